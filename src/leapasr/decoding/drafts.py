"""Draft sources: who proposes the tokens that the next decoder call verifies.

A row owns one drafter, from its prefill to its end. What a source reads besides the row's own tokens and the heads'
guesses (a CTC output, say) goes into its drafter when the row is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from leapasr.decoding.trace import DraftToken


class Drafter(Protocol):
    """The role: propose how a row goes on. Any proposal is safe, only good ones are fast."""

    def propose(self, emitted: Sequence[int], guesses: Sequence[DraftToken]) -> Sequence[DraftToken]:
        """Draft the tokens behind `emitted`.

        The loop cuts what lies behind an end-of-text or beyond the row's token bound.

        Args:
            emitted: the row's tokens so far; none before the prefill.
            guesses: what heads 2..K say comes next, one token each; none before the prefill.
        """


class MTPDrafter:
    """The greedy tokens of heads 2..K (``head2``, ...)."""

    def propose(self, emitted: Sequence[int], guesses: Sequence[DraftToken]) -> Sequence[DraftToken]:
        return guesses
