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


def full_forward(decoder: Decoder, prompt: Prompts, text_LD: Tensor) -> Tensor:
    """Hidden states (L', D) of one row's prompt and text (L, D) behind it; nothing is kept from call to call."""
    embeddings_LD = torch.cat([prompt.embeddings_BLD[0], text_LD])
    L = len(embeddings_LD)
    if prompt.memory_BMD is not None:
        cache = decoder.new_cache(prompt)
        return decoder.call(embeddings_LD[None], *cache.plan(L, decoder.dtype), cache)[0]
    positions_L = torch.arange(L, device=decoder.device)
    if prompt.positions_BL is not None:
        positions_L[: prompt.positions_BL.shape[1]] = prompt.positions_BL[0]
    hidden = torch.finfo(decoder.dtype).min
    mask_LL = torch.full((L, L), hidden, dtype=decoder.dtype, device=decoder.device).triu(1)
    return decoder.call(embeddings_LD[None], positions_L[None], mask_LL[None, None], None)[0]


def _next_log_probabilities(decoder: Decoder, prompt: Prompts, tokens: Sequence[int]) -> Tensor:
    """Head 1's log-probabilities (V,) of the token behind a row's prompt and `tokens`."""
    text_1M = torch.tensor([tokens], dtype=torch.long, device=decoder.device)
    places_1M = 1 + torch.arange(len(tokens), device=decoder.device)[None]
    hidden_LD = full_forward(decoder, prompt, decoder.embed(text_1M, places_1M)[0])
    return decoder.logits(hidden_LD[-1]).log_softmax(-1)


@torch.inference_mode()
def decode_reference(
    decoder: Decoder, prompts: Prompts, options: DecodingOptions, *, max_tokens: Sequence[int] | None = None
) -> list[DecodingResult]:
    """What `decode` gives with strategy ``autoregressive``; of the options only the guards are read."""
    guards = guard_rows(options, decoder, prompts.num_slots, max_tokens)
    return [_decode_row(decoder, prompts.row(index), row_guards) for index, row_guards in enumerate(guards)]


def _decode_row(decoder: Decoder, prompt: Prompts, guards: Guards) -> DecodingResult:
    tokens: list[int] = []
    trace: list[TokenRecord] = []
    while True:
        log_probs_V = _next_log_probabilities(decoder, prompt, tokens)
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
    guards = guard_rows(options, decoder, prompts.num_slots, max_tokens)
    size, nbest = options.beam_size_used, options.nbest or 1
    assert size is not None
    return [
        _search_row(decoder, prompts.row(index), row_guards, beam_size=size, nbest=nbest)
        for index, row_guards in enumerate(guards)
    ]


def _search_row(decoder: Decoder, prompt: Prompts, guards: Guards, *, beam_size: int, nbest: int) -> list[Hypothesis]:
    beam: list[tuple[list[int], float, Hypothesis | None]] = [([], 0.0, None)]  # the last once it has ended
    while any(ended is None for _, _, ended in beam[:nbest]):
        candidates: list[tuple[list[int], float, Hypothesis | None]] = []
        for tokens, score, ended in beam:
            if ended is not None:
                candidates.append((tokens, score, ended))
                continue
            log_probs_V = _next_log_probabilities(decoder, prompt, tokens)
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
