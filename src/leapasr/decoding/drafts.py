"""Draft sources: who proposes the tokens that the next decoder call verifies.

A row owns one drafter, from its prefill to its end. What a source reads besides the row's own tokens and the heads'
guesses (a CTC output, say) goes into its drafter when the row is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

from leapasr.decoding.options import DecodingOptions
from leapasr.decoding.rejoin import Rejoining
from leapasr.decoding.trace import DraftToken

LEAD = 0.7  # least probability at which a head's guess goes before CTC's tokens


class Drafter(Protocol):
    """The role: propose how a row goes on. Any proposal is safe, only good ones are fast."""

    def propose(self, emitted: Sequence[int], guesses: Sequence[DraftToken]) -> Sequence[DraftToken]:
        """Draft the tokens behind `emitted`.

        The loop cuts what lies behind an end-of-text or beyond the row's token bound.

        Args:
            emitted: the row's tokens so far; none before the prefill.
            guesses: what heads 2..K say comes next, one token each; none before the prefill.
        """

    def copy(self) -> Drafter:
        """One that goes on from here by itself."""


@dataclass(frozen=True)
class Reading:
    """What a source says of a whole utterance before the decoder is asked: token ids and how sure it is of each."""

    tokens: Sequence[int]
    probabilities: Sequence[float]


class MTPDrafter:
    """The greedy tokens of heads 2..K (``head2``, ...)."""

    def propose(self, emitted: Sequence[int], guesses: Sequence[DraftToken]) -> Sequence[DraftToken]:
        return guesses

    def copy(self) -> MTPDrafter:
        return self


class CTCDrafter:
    """All that CTC read behind what was emitted, end-of-text included, re-joined after each of its mistakes.

    Args:
        reading: CTC's greedy tokens.
        end_token: end-of-text.
        lead: with it, what heads 2..K say comes first, as far as their probabilities reach it, and CTC's tokens
            behind that; None leaves the heads out.
    """

    def __init__(self, reading: Reading, *, end_token: int, lead: float | None = None):
        self.reading, self.end_token, self.lead = reading, end_token, lead
        self.rejoining = Rejoining(reading.tokens)

    def propose(self, emitted: Sequence[int], guesses: Sequence[DraftToken]) -> Sequence[DraftToken]:
        self.rejoining.follow(emitted)
        first: list[DraftToken] = []
        rejoining = self.rejoining
        if self.lead is not None and guesses:
            lead = self.lead
            first = list(guesses if rejoining.is_lost else takewhile(lambda guess: guess.probability >= lead, guesses))
            if first:
                rejoining = rejoining.copy()
                for guess in first:
                    rejoining.advance(guess.token)
        if rejoining.is_lost or (first and first[-1].token == self.end_token):
            return first
        place = rejoining.place
        rest = zip(self.reading.tokens[place:], self.reading.probabilities[place:], strict=True)
        return [
            *first,
            *(DraftToken(token, probability, "ctc") for token, probability in rest),
            DraftToken(self.end_token, 1.0, "ctc"),
        ]

    def copy(self) -> CTCDrafter:
        other = copy(self)
        other.rejoining = self.rejoining.copy()
        return other


def build_drafter(options: DecodingOptions, reading: Reading, *, end_token: int) -> Drafter:
    """The draft source that `options` name, for a row of which CTC read `reading`."""
    match options.drafts_used:
        case "ctc":
            return CTCDrafter(reading, end_token=end_token)
        case "both":
            return CTCDrafter(reading, end_token=end_token, lead=LEAD)
        case _:
            return MTPDrafter()
