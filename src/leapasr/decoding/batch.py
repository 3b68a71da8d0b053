"""Decoding a batch: the loop that the options ask for, run to its end."""

from __future__ import annotations

from collections.abc import Sequence

from leapasr.decoding.beam import BeamLoop
from leapasr.decoding.drafts import Drafter
from leapasr.decoding.interface import Decoder, Prompts
from leapasr.decoding.loop import DecodingLoop
from leapasr.decoding.options import DecodingOptions, DecodingResult


def build_loop(decoder: Decoder, options: DecodingOptions) -> DecodingLoop:
    """The loop for `options`; errors as of `DecodingLoop`."""
    return BeamLoop(decoder, options) if options.strategy == "beam" else DecodingLoop(decoder, options)


def decode(
    decoder: Decoder,
    prompts: Prompts,
    options: DecodingOptions,
    *,
    max_tokens: Sequence[int] | None = None,
    drafters: Sequence[Drafter] | None = None,
) -> list[DecodingResult]:
    """Decode a batch of prompts: a result for each, in their order. Arguments as in `DecodingLoop`.

    Raises:
        ValueError: the options do not fit the decoder, or the arguments do not fit each other.
    """
    loop = build_loop(decoder, options)
    keys = loop.add(prompts, max_tokens=max_tokens, drafters=drafters)
    results: dict[int, DecodingResult] = {}
    while loop:
        results |= loop.step()
    return [results[key] for key in keys]
