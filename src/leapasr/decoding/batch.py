"""Decoding a batch: the loop that the options ask for, run to its end."""

from __future__ import annotations

from collections.abc import Sequence

from leapasr.decoding.beam import BeamLoop
from leapasr.decoding.costs import FREE, CallCosts
from leapasr.decoding.drafts import Drafter
from leapasr.decoding.interface import Decoder, Prompts
from leapasr.decoding.loop import DecodingLoop
from leapasr.decoding.options import DecodingOptions, DecodingResult
from leapasr.decoding.rejoin import Spelling, as_one
from leapasr.decoding.rules import Rules


def build_loop(
    decoder: Decoder,
    options: DecodingOptions,
    *,
    costs: CallCosts = FREE,
    rules: Rules | None = None,
    spell: Spelling = as_one,
) -> DecodingLoop:
    """The loop for `options`; arguments and errors as of `DecodingLoop` and `BeamLoop`.

    Raises:
        ValueError: rules are given for a beam search, which keeps none.
    """
    if options.strategy == "beam":
        if rules is not None:
            raise ValueError("strategy 'beam' keeps no rules such as Whisper's: choose another strategy")
        return BeamLoop(decoder, options, costs=costs, spell=spell)
    return DecodingLoop(decoder, options, costs=costs, rules=rules)


def decode(
    decoder: Decoder,
    prompts: Prompts,
    options: DecodingOptions,
    *,
    max_tokens: Sequence[int] | None = None,
    drafters: Sequence[Drafter] | None = None,
    costs: CallCosts = FREE,
    rules: Rules | None = None,
    spell: Spelling = as_one,
) -> list[DecodingResult]:
    """Decode a batch of prompts: a result for each, in their order. Arguments as of `build_loop`.

    Raises:
        ValueError: the options do not fit the decoder, or the arguments do not fit each other.
    """
    loop = build_loop(decoder, options, costs=costs, rules=rules, spell=spell)
    keys = loop.add(prompts, max_tokens=max_tokens, drafters=drafters)
    results: dict[int, DecodingResult] = {}
    while loop:
        results |= loop.step()
    return [results[key] for key in keys]
