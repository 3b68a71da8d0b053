"""Where a text that is being written stands within another reading of the same speech.

A draft source that reads the whole utterance at once (CTC, say) says the same as the decoder for long stretches, and
now and then something else. Behind such a place its reading is as good as before, if only one knows where to go on.
What is misread mostly sounds alike and is spelt alike, in other tokens: so texts are aligned by their characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy

import numpy as np

LEFT_OUT = 0.5  # what a character of the reading costs that the text has not; one that only the text has costs 1

Spelling = Callable[[int], Sequence[int]]  # the characters of a token, as numbers


def as_one(token: int) -> Sequence[int]:
    """A token as a character of its own."""
    return (token,)


class Rejoining:
    """Aligns a text, token by token, with a reading, at the least cost of the characters that only one of them has.

    `costs[j]` is that of all that was written and the first j characters of the reading; a new character takes one row
    of that table. Leaving out what was read is the cheaper: where both go on alike further on, there the text goes on.
    """

    def __init__(self, reading: Sequence[int], spell: Spelling = as_one):
        self._spell = spell
        spelt = [spell(token) for token in reading]
        self._ends = np.cumsum([0, *map(len, spelt)])
        self._characters = np.fromiter((character for each in spelt for character in each), dtype=np.int64)
        self._ramp = LEFT_OUT * np.arange(len(self._characters) + 1)
        self._moves: dict[int, np.ndarray] = {}
        self._tilted = np.zeros(len(self._ramp))  # costs less the ramp: what is left out then costs nothing
        self.num_written = self._at = 0

    def copy(self) -> Rejoining:
        """One that goes its own way from here."""
        return copy(self)  # what is changed in place does not depend on the way

    @property
    def costs(self) -> np.ndarray:
        return self._tilted + self._ramp

    def from_place(self, place: int) -> Rejoining:
        """One whose text stands before a token of the reading, which it will not go back behind."""
        other = self.copy()
        other._at = int(self._ends[place])
        other._tilted = np.full(len(self._ramp), -self._ramp[other._at])
        other._tilted[: other._at] = np.inf
        return other

    def follow(self, written: Sequence[int]) -> None:
        """Take in what was written since the last time; `written` is all of it."""
        for token in written[self.num_written :]:
            self.advance(token)

    def advance(self, token: int) -> None:
        """Take in one token that was written."""
        characters = self._spell(token)
        self._at += len(characters)
        self._take(characters)
        self.num_written += 1
        costs = self.costs
        cheapest = np.flatnonzero(costs <= costs.min() + 1e-9)
        self._at = int(cheapest[np.abs(cheapest - self._at).argmin()])

    def _take(self, characters: Iterable[int]) -> None:
        for character in characters:
            moves = self._moves.get(character)
            if moves is None:
                moves = np.where(self._characters == character, -LEFT_OUT, np.inf)
                self._moves[character] = moves
            tilted = self._tilted + 1
            np.minimum(tilted[1:], self._tilted[:-1] + moves, out=tilted[1:])
            self._tilted = np.minimum.accumulate(tilted, out=tilted)

    @property
    def place(self) -> int:
        """From which token on the reading is likely to continue the text: where the cheapest alignment ends.

        Of several the one nearest to a step on from the last; of a token that it ends in, the nearer end.
        """
        behind = int(np.searchsorted(self._ends, self._at))
        if behind and self._ends[behind] - self._at > self._at - self._ends[behind - 1]:
            return behind - 1
        return behind
