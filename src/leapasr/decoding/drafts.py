"""Draft sources: who proposes the tokens that the next decoder call verifies.

A row owns one drafter, from its prefill to its end. What a source reads besides the row's own tokens and the heads'
guesses (a CTC output, say) goes into its drafter when the row is added.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from leapasr.decoding.options import DecodingOptions
from leapasr.decoding.rejoin import Rejoining, Spelling, as_one
from leapasr.decoding.rewriting import Verdict, rewritten, until_end
from leapasr.decoding.trace import DraftToken

ROUNDS = 2  # of guesses of all heads: as many tokens are in their draft at most


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


class _Stretch(NamedTuple):
    """A token of a corrected reading, in the place of what was read from its token number `first` to the next one's."""

    token: DraftToken
    first: int


class CTCDrafter:
    """All that CTC read behind what was emitted, end-of-text included, re-joined after each of its mistakes.

    The call that finds the first mistake of a draft also says what head 1 would write at every place behind it: given
    a prefix that is not quite the text's, but the same speech. So the reading is corrected wherever else head 1
    disagrees with it (source ``jacobi``: as in Jacobi decoding, Santilli et al., arXiv 2305.10427), and the mistakes
    of a whole utterance cost a few calls, not one each. What was read is kept beside: a correction may be wrong, too.

    Args:
        reading: CTC's greedy tokens.
        end_token: end-of-text.
        led: whether what heads 2..K say comes first, as far as they are surer than the reading; its tokens follow.
        spell: the characters of a token.
    """

    def __init__(self, reading: Reading, *, end_token: int, led: bool = False, spell: Spelling = as_one):
        self.end_token, self.led = end_token, led
        self._read = [DraftToken(*read, "ctc") for read in zip(reading.tokens, reading.probabilities, strict=True)]
        self._corrected = [_Stretch(token, place) for place, token in enumerate(self._read)]
        self._rejoining = Rejoining(reading.tokens, spell)
        self._proposed: list[DraftToken] = []
        self._num_first = self._begin = 0  # in the last proposal: tokens of the heads, and where the others begin

    @property
    def reading(self) -> list[DraftToken]:
        """What CTC read, as corrected so far."""
        return [stretch.token for stretch in self._corrected]

    def propose(self, emitted: Sequence[int], guesses: Sequence[DraftToken]) -> Sequence[DraftToken]:
        self._rejoining.follow(emitted)
        rejoining, last = self._rejoining, emitted[-1] if emitted else None
        begin = self._continuation(rejoining.place, last)
        first: list[DraftToken] = []
        for guess in guesses if self.led else ():
            heard = self._corrected[begin].token if begin < len(self._corrected) else None
            if heard is not None and (heard.token == guess.token or heard.probability >= guess.probability):
                break
            first.append(guess)
            rejoining = rejoining.copy()
            rejoining.advance(guess.token)
            begin = self._continuation(rejoining.place, guess.token)
        self._num_first, self._begin = len(first), begin
        ends = bool(first) and first[-1].token == self.end_token
        behind = [] if ends else [*self.reading[begin:], DraftToken(self.end_token, 1.0, "ctc")]
        self._proposed = [*first, *behind]
        return self._proposed

    def _continuation(self, place: int, last: int | None) -> int:
        """The place in the corrected reading that goes on with ``reading[place:]`` behind the token `last`.

        What corrections have put there has been written if it is that token. What they have taken away from there
        comes back: the text stands before it.
        """
        index = bisect_left(self._corrected, place, key=lambda stretch: stretch.first)
        for behind, stretch in enumerate(self._corrected[index:], index + 1):
            if stretch.first > place:
                break
            if stretch.token.token == last and stretch.token.source != "ctc":
                index = behind
        stop = self._corrected[index].first if index < len(self._corrected) else len(self._read)
        self._corrected[index:index] = [_Stretch(self._read[n], n) for n in range(place, stop)]
        return index

    def review(self, verdicts: Sequence[Verdict], num_accepted: int, further: Sequence[DraftToken]) -> None:
        said = list(zip(self._proposed, verdicts, strict=False))
        agrees = [drafted.token == verdict.token for drafted, verdict in said]
        before, behind = self._corrected[: self._begin], self._corrected[self._begin :]
        corrected: list[_Stretch] = []
        place = 0
        while place < min(len(said) - self._num_first, len(behind)):
            index, stretch = self._num_first + place, behind[place]
            drafted, verdict = said[index]
            believed = index <= num_accepted or agrees[index - 1]  # behind a wrong token, what is said goes on from it
            if agrees[index]:
                stretch = stretch._replace(token=verdict.instead(drafted))
            elif believed and verdict.token != self.end_token:
                rejoining = self._rejoining.from_place(stretch.first)
                rejoining.advance(verdict.token)
                corrected.append(_Stretch(verdict.instead(drafted), stretch.first))
                if rejoining.place > stretch.first:
                    while place < len(behind) and behind[place].first < rejoining.place:
                        place += 1
                    continue
            corrected.append(stretch)
            place += 1
        self._corrected = [*before, *corrected, *behind[place:]]

    def copy(self) -> CTCDrafter:
        other = copy(self)
        other._corrected, other._rejoining = self._corrected.copy(), self._rejoining.copy()
        return other


def build_drafter(options: DecodingOptions, reading: Reading, *, end_token: int, spell: Spelling = as_one) -> Drafter:
    """The draft source that `options` name, for a row of which CTC read `reading` in tokens that `spell` spells."""
    if options.drafts_used in ("ctc", "both"):
        return CTCDrafter(reading, end_token=end_token, led=options.drafts_used == "both", spell=spell)
    return MTPDrafter(end_token=end_token)
