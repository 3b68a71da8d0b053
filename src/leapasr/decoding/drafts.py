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
from leapasr.decoding.rewriting import POSSIBLE, Verdict, rewritten, until_end
from leapasr.decoding.trace import DraftToken

ROUNDS = 2  # of guesses of all heads: as many tokens are in their draft at most
LEAD = 0.95  # least probability at which a head's guess goes before CTC's tokens


class Drafter(Protocol):
    """The role: propose how a row goes on. Any proposal is safe, only good ones are fast."""

    def propose(self, emitted: Sequence[int], guesses: Sequence[DraftToken]) -> Sequence[DraftToken]:
        """Draft the tokens behind `emitted`.

        The loop cuts what lies behind an end-of-text or beyond the row's token bound.

        Args:
            emitted: the row's tokens so far; none before the prefill.
            guesses: what heads 2..K say comes next, one token each; none before the prefill.
        """

    def review(self, verdicts: Sequence[Verdict], num_accepted: int, further: Sequence[DraftToken]) -> None:
        """Hear what a call says of the last proposal, for the next one.

        Args:
            verdicts: on each proposed token; fewer, where the loop cut the proposal.
            num_accepted: so many proposed tokens stand. What is said behind the next one is given a wrong prefix.
            further: what heads 1..K say comes behind the last of these; empty unless the drafter is `MTPDrafter`.
        """

    def copy(self) -> Drafter:
        """One that goes on from here by itself."""


@dataclass(frozen=True)
class Reading:
    """What a source says of a whole utterance before the decoder is asked: token ids and how sure it is of each."""

    tokens: Sequence[int]
    probabilities: Sequence[float]


class MTPDrafter:
    """What the heads say comes next (``head2``, ...), carried on from call to call.

    A call checks what was drafted, and says at its end what comes further on: the draft grows, and what it holds is
    rewritten by each call (`rewritten`) before its turn comes.
    """

    def __init__(self, *, end_token: int):
        self.end_token = end_token
        self._next: Sequence[DraftToken] = ()
        self._proposed: Sequence[DraftToken] = ()

    def propose(self, emitted: Sequence[int], guesses: Sequence[DraftToken]) -> Sequence[DraftToken]:
        text = [*self._next, *guesses[len(self._next) :]]
        self._proposed = until_end(text, (self.end_token,))[: ROUNDS * len(guesses)]
        return self._proposed

    def review(self, verdicts: Sequence[Verdict], num_accepted: int, further: Sequence[DraftToken]) -> None:
        if further:
            self._next = rewritten(self._proposed, verdicts, further, num_accepted, end_token=self.end_token)

    def copy(self) -> MTPDrafter:
        return copy(self)


class CTCDrafter:
    """All that CTC read behind what was emitted, end-of-text included, re-joined after each of its mistakes.

    The call that finds the first mistake of a draft also says what head 1 would write at every place behind it: given
    a prefix that is not quite the text's, but the same speech. So the reading is corrected wherever else head 1
    disagrees with it (source ``jacobi``: as in Jacobi decoding, Santilli et al., arXiv 2305.10427), and the mistakes
    of a whole utterance cost a few calls, not one each.

    Args:
        reading: CTC's greedy tokens.
        end_token: end-of-text.
        lead: with it, what heads 2..K say comes first, as far as their probabilities reach it, and CTC's tokens
            behind that; None leaves the heads out.
    """

    def __init__(self, reading: Reading, *, end_token: int, lead: float | None = None):
        self.end_token, self.lead = end_token, lead
        self.reading = [DraftToken(*read, "ctc") for read in zip(reading.tokens, reading.probabilities, strict=True)]
        self.rejoining = Rejoining(reading.tokens)
        self._proposed: list[DraftToken] = []
        self._num_first = self._place = 0  # in the last proposal: tokens of the heads, and where the reading went on

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
        self._num_first, self._place = len(first), rejoining.place
        if rejoining.is_lost or (first and first[-1].token == self.end_token):
            self._proposed = first
        else:
            self._proposed = [*first, *self.reading[rejoining.place :], DraftToken(self.end_token, 1.0, "ctc")]
        return self._proposed

    def review(self, verdicts: Sequence[Verdict], num_accepted: int, further: Sequence[DraftToken]) -> None:
        said = list(zip(self._proposed, verdicts, strict=False))
        agrees = [drafted.token == verdict.token for drafted, verdict in said]
        for place in reversed(range(max(num_accepted, self._num_first), len(said))):
            drafted, verdict = said[place]
            index, behind = self._place + place - self._num_first, place + 1
            is_first = place == num_accepted
            if verdict.token == self.end_token or not (is_first or agrees[place - 1]):
                continue  # right behind a wrong token, what is said goes on from that
            correction, following = verdict.instead(drafted), verdict.believed
            if agrees[place]:
                self._correct(index, [correction])
            elif following and following.token == drafted.token:
                self._correct(index, [correction, drafted])  # one is missing
            elif following and behind < len(said) and following.token == said[behind][1].token:
                self._correct(index + 1, [following])
                self._correct(index, [correction])
            elif is_first:
                continue  # left to re-joining, which knows what stands there instead
            elif behind < len(self._proposed) and verdict.token == self._proposed[behind].token:
                self._correct(index, [])  # one too many
            elif verdict.chance < POSSIBLE and behind < len(said) and agrees[behind]:
                self._correct(index, [correction, drafted])
            else:
                self._correct(index, [correction])

    def _correct(self, index: int, instead: list[DraftToken]) -> None:
        """Put these tokens in the place of one of the reading; end-of-text is not of the reading, and stays."""
        kept = [token for token in instead if token.token != self.end_token]
        self.reading[index : index + 1] = kept
        self.rejoining.edit(index, [token.token for token in kept])

    def copy(self) -> CTCDrafter:
        other = copy(self)
        other.reading, other.rejoining = self.reading.copy(), self.rejoining.copy()
        return other


def build_drafter(options: DecodingOptions, reading: Reading, *, end_token: int) -> Drafter:
    """The draft source that `options` name, for a row of which CTC read `reading`."""
    match options.drafts_used:
        case "ctc":
            return CTCDrafter(reading, end_token=end_token)
        case "both":
            return CTCDrafter(reading, end_token=end_token, lead=LEAD)
        case _:
            return MTPDrafter(end_token=end_token)
