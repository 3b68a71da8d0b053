"""The slow, obvious references: greedy decoding and beam search of one row at a time, without a cache.

They are the oracles of the tests: whatever `decode` does to be fast, exact strategies give these tokens.

Shapes: B rows, L positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leapasr.decoding.guards import Guards, guard_rows
from leapasr.decoding.interface import Decoder, Prompts
from leapasr.decoding.options import DecodingOptions, DecodingResult, Hypothesis
from leapasr.decoding.trace import TokenRecord
from leapasr.model.speech_llama import causal_mask


def full_forward(decoder: Decoder, embeddings_LD: Tensor, first_positions: Tensor | None = None) -> Tensor:
    """Hidden states (L, D) of one row's whole input (L, D), without a cache; `first_positions` are of its prompt."""
    L = len(embeddings_LD)
    positions_L = torch.arange(L, device=decoder.device)
    if first_positions is not None:
        positions_L[: len(first_positions)] = first_positions
    mask_11LL = causal_mask(L, decoder.dtype, decoder.device)
    return decoder.call(embeddings_LD[None], positions_L[None], mask_11LL, None)[0]


@torch.inference_mode()
def decode_reference(
    decoder: Decoder, prompts: Prompts, options: DecodingOptions, *, max_tokens: Sequence[int] | None = None
) -> list[DecodingResult]:
    """What `decode` gives with strategy ``autoregressive``; of the options only the guards are read."""
    lengths = prompts.lengths_B.tolist()
    guards = guard_rows(options, decoder, lengths, max_tokens)
    positions = [None] * len(lengths) if prompts.positions_BL is None else prompts.positions_BL
    return [
        _decode_row(decoder, prompt_LD[:length], None if places is None else places[:length], row_guards)
        for prompt_LD, places, length, row_guards in zip(
            prompts.embeddings_BLD, positions, lengths, guards, strict=True
        )
    ]


def _decode_row(decoder: Decoder, prompt_LD: Tensor, positions_L: Tensor | None, guards: Guards) -> DecodingResult:
    tokens: list[int] = []
    trace: list[TokenRecord] = []
    while True:
        text = torch.tensor(tokens, dtype=torch.long, device=decoder.device)
        embeddings = torch.cat([prompt_LD, decoder.embed(text[None])[0]])
        log_probs_V = decoder.logits(full_forward(decoder, embeddings, positions_L)[-1]).log_softmax(-1)
        token = int(log_probs_V.argmax())
        trace.append(TokenRecord(token, len(trace), "head1", None, float(log_probs_V[token])))
        if token in decoder.end_tokens:
            return DecodingResult(tokens, len(trace), trace, None)
        tokens.append(token)
        cut = guards.cut(tokens)
        if cut is not None:
            num_kept, truncated = cut
            return DecodingResult(tokens[:num_kept], len(trace), trace, truncated)


@torch.inference_mode()
def beam_reference(
    decoder: Decoder, prompts: Prompts, options: DecodingOptions, *, max_tokens: Sequence[int] | None = None
) -> list[list[Hypothesis]]:
    """A textbook beam search: the hypotheses that `decode` gives with strategy ``beam`` and no threshold."""
    lengths = prompts.lengths_B.tolist()
    guards = guard_rows(options, decoder, lengths, max_tokens)
    positions = [None] * len(lengths) if prompts.positions_BL is None else prompts.positions_BL
    assert options.beam_size_used is not None
    return [
        _search_row(
            decoder,
            prompt_LD[:length],
            None if places is None else places[:length],
            row_guards,
            beam_size=options.beam_size_used,
            nbest=options.nbest or 1,
        )
        for prompt_LD, places, length, row_guards in zip(
            prompts.embeddings_BLD, positions, lengths, guards, strict=True
        )
    ]


def _search_row(
    decoder: Decoder, prompt_LD: Tensor, positions_L: Tensor | None, guards: Guards, *, beam_size: int, nbest: int
) -> list[Hypothesis]:
    beam: list[tuple[list[int], float, Hypothesis | None]] = [([], 0.0, None)]  # the last once it has ended
    while any(ended is None for _, _, ended in beam[:nbest]):
        candidates: list[tuple[list[int], float, Hypothesis | None]] = []
        for tokens, score, ended in beam:
            if ended is not None:
                candidates.append((tokens, score, ended))
                continue
            text = torch.tensor(tokens, dtype=torch.long, device=decoder.device)
            embeddings = torch.cat([prompt_LD, decoder.embed(text[None])[0]])
            log_probs_V = decoder.logits(full_forward(decoder, embeddings, positions_L)[-1]).log_softmax(-1)
            for token, log_probability in enumerate(log_probs_V.tolist()):
                total = score + log_probability
                cut = None if token in decoder.end_tokens else guards.cut([*tokens, token])
                if token in decoder.end_tokens:
                    candidates.append((tokens, total, Hypothesis(tokens, total, None)))
                elif cut is not None:
                    candidates.append((tokens, total, Hypothesis([*tokens, token][: cut[0]], total, cut[1])))
                else:
                    candidates.append(([*tokens, token], total, None))
        beam = sorted(candidates, key=lambda candidate: -candidate[1])[:beam_size]
    return [ended for _, _, ended in beam[:nbest] if ended is not None]
