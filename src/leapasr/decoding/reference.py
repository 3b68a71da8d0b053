"""The slow, obvious reference: greedy decoding of one row at a time, without a cache.

It is the oracle of the tests: whatever `decode` does to be fast, exact strategies give these tokens.

Shapes: B rows, L positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leapasr.decoding.guards import Guards, guard_rows
from leapasr.decoding.interface import Decoder, Prompts
from leapasr.decoding.options import DecodingOptions, DecodingResult
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
