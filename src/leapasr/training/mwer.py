"""Minimum word error rate training: N-best lists on the fly, by the beam search that decodes.

Shapes: B rows, N hypotheses a row, P = B · N, M text tokens, U = M + 1 text positions, D width, K heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leapasr.data.batches import Batch, pad_tokens
from leapasr.decoding import DecodingOptions, DecodingResult, Prompts, SpeechLlamaDecoder, decode
from leapasr.decoding.guards import token_bound
from leapasr.decoding.interface import Ways
from leapasr.decoding.rejoin import Spelling, as_one
from leapasr.evaluation.scoring import count_word_errors
from leapasr.model.processing import SpeechLlamaProcessor, spelling
from leapasr.model.speech_llama import SpeechEncoding, SpeechLlamaForConditionalGeneration
from leapasr.model.text_trees import TextTrees
from leapasr.running import timed
from leapasr.text import NORMALIZER
from leapasr.training.encoder_cache import FrameBatch
from leapasr.training.losses import (
    drafting_probabilities,
    expected_calls,
    list_probabilities,
    mwer_loss,
    text_log_probabilities,
)


@dataclass(frozen=True, eq=False)
class Hypotheses:
    """N-best lists of a batch.

    A hypothesis that a guard cut short counts as the text that is left of it, ended by end-of-text.

    Attributes:
        text_BNM, lengths_BN: token ids and their valid lengths, the likeliest hypothesis first.
        errors_BN: word errors against the row's reference, float32, as `evaluate` counts them.
        listed_BN: which places hold a hypothesis; a short list is filled up.
        calls_B: decoder calls that it took to find them.
        seconds: that the search took.
    """

    text_BNM: Tensor
    lengths_BN: Tensor
    errors_BN: Tensor
    listed_BN: Tensor
    calls_B: Tensor
    seconds: float


@torch.no_grad()
def search(
    model: SpeechLlamaForConditionalGeneration,
    encoding: SpeechEncoding,
    options: DecodingOptions,
    *,
    spell: Spelling = as_one,
) -> list[DecodingResult]:
    """Decode what the speech side gave, with the model as it is; its training mode is left as it was.

    Args:
        options: with no drafts from CTC. spell: the characters of a token.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    max_tokens = [token_bound(length / model.ctc_frame_rate) for length in encoding.ctc_lengths_B.tolist()]
    try:
        with torch.compiler.set_stance("force_eager"):  # layers are compiled for training's shapes, not for a cache's
            decoder = SpeechLlamaDecoder(model)
            decoder.prepare(Ways(packing="onednn"))
            prompts = Prompts(*model.prompt(encoding))
            return decode(decoder, prompts, options, max_tokens=max_tokens, spell=spell)
    finally:
        for module, was_training in training.items():
            module.training = was_training


def hypothesize(
    model: SpeechLlamaForConditionalGeneration,
    processor: SpeechLlamaProcessor,
    encoding: SpeechEncoding,
    batch: Batch | FrameBatch,
    *,
    nbest: int,
    with_reference: bool = False,
) -> Hypotheses:
    """The N-best lists of `batch`; `with_reference` has it join each list that lacks it."""
    # CTC's drafts save a few calls more than the heads', and cost more time (docs/nbest.md)
    options = DecodingOptions(strategy="beam", beam_size=nbest, nbest=nbest, drafts="mtp")
    device = batch.text_ids.device
    with timed(device) as timer:  # what is left to do of the encoder's work is not the search's
        results = search(model, encoding, options, spell=spelling(processor.tokenizer))
    lists, errors = [], []
    for result, text, length in zip(results, batch.text_ids.tolist(), batch.text_lengths.tolist(), strict=True):
        texts = dict.fromkeys(tuple(each.tokens) for each in result.hypotheses)  # what is left after cuts may be equal
        if with_reference:
            texts[tuple(text[:length])] = None
        reference = processor.decode_text(text[:length])
        lists.append([list(tokens) for tokens in texts])
        counts = [count_word_errors(reference, processor.decode_text(each), NORMALIZER) for each in texts]
        errors.append([sum(of_each[1:]) for of_each in counts])
    num_listed_B1 = torch.tensor([[len(texts)] for texts in lists], device=device)
    size = nbest + with_reference
    filled = [each for texts in lists for each in [*texts, *[[]] * (size - len(texts))]]
    text_PM, lengths_P = pad_tokens(filled, processor.tokenizer.pad_token_id)
    return Hypotheses(
        text_BNM=text_PM.unflatten(0, (-1, size)).to(device),
        lengths_BN=lengths_P.unflatten(0, (-1, size)).to(device),
        errors_BN=torch.tensor([[*each, *[0] * (size - len(each))] for each in errors], device=device).float(),
        listed_BN=torch.arange(size, device=device) < num_listed_B1,
        calls_B=torch.tensor([result.num_calls for result in results], device=device).float(),
        seconds=timer.seconds,
    )


def read_lists(
    model: SpeechLlamaForConditionalGeneration,
    encoding: SpeechEncoding,
    found: Hypotheses,
    reference_BM: Tensor,
    reference_lengths_B: Tensor,
    *,
    calls_weight: float = 0.0,
) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """Read N-best lists, and the references beside them, in one pass.

    Args:
        reference_BM, reference_lengths_B: ids of each row's reference, as the decoder is to read them.

    Returns:
        the logits of heads 1..K on the references, K × (B, U, V); the risk of the lists, `mwer_loss` and, weighted,
        `expected_calls` of further heads; and figures, means over rows.
    """
    M = max(found.text_BNM.shape[-1], reference_BM.shape[-1])
    texts_BNM = torch.cat([_widened(found.text_BNM, M), _widened(reference_BM[:, None], M)], 1)
    lengths_BN = torch.cat([found.lengths_BN, reference_lengths_B[:, None]], 1)
    end_token_id = model.config.eos_token_id
    trees = TextTrees.of(texts_BNM, lengths_BN, begin_token_id=model.config.bos_token_id)
    hidden_BWH = model.read_texts(*encoding.prefix, trees)
    hidden_B1UH = trees.along(hidden_BWH, texts=slice(-1, None))
    reference_logits = model.head_logits(hidden_B1UH[:, 0, : reference_BM.shape[-1] + 1], reference_BM)
    (node_logits_BWV,) = model.head_logits(hidden_BWH, trees.tokens_BW, num_heads=1)
    log_probs_BN = text_log_probabilities(
        node_logits_BWV, trees.nodes_BNU, texts_BNM, lengths_BN, end_token_id=end_token_id
    )
    probabilities_BN = list_probabilities(log_probs_BN[:, :-1], found.listed_BN)
    risk = mwer_loss(probabilities_BN, found.errors_BN, found.listed_BN)
    figures = {
        "errors_expected": (probabilities_BN.detach() * found.errors_BN).sum(-1).mean(),
        "errors_first": found.errors_BN[:, 0].mean(),
        "errors_oracle": found.errors_BN.masked_fill(~found.listed_BN, torch.inf).amin(-1).mean(),
        "search_calls": found.calls_B.mean(),
        "search_seconds": torch.tensor(found.seconds),
    }
    if calls_weight:
        text_PM, lengths_P = texts_BNM[:, :-1].flatten(0, 1), found.lengths_BN.flatten()
        hidden_BNUH = trees.along(hidden_BWH, texts=slice(0, -1))
        further_logits = model.head_logits(hidden_BNUH.flatten(0, 1), text_PM)[1:]
        drafting_GPU = drafting_probabilities(further_logits, text_PM, lengths_P, end_token_id=end_token_id)
        calls_BN = expected_calls(drafting_GPU, lengths_P).view_as(probabilities_BN)
        # not by the list's probabilities: they would teach head 1 to write less
        calls = (probabilities_BN.detach() * calls_BN).sum(-1).mean()
        risk, figures["calls_expected"] = risk + calls_weight * calls, calls.detach()
    return reference_logits, risk, figures


def _widened(text: Tensor, size: int) -> Tensor:
    """Token ids (..., M) as (..., size), filled up with any id."""
    return torch.nn.functional.pad(text, (0, size - text.shape[-1]))
