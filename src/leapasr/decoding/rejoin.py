"""Where a text that is being written stands within another reading of the same speech.

A draft source that reads the whole utterance at once (CTC, say) says the same as the decoder for long stretches, and
now and then something else. Behind such a place its reading is as good as before, if only one knows where to go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from copy import copy

import numpy as np

WINDOW, MAX_EDITS = 12, 8  # lost: so many edits in the last so many tokens


class Rejoining:
    """Aligns emitted tokens with a reading, token by token, at the least edit distance.

    `costs[j]` is the edit distance (insertions, deletions and substitutions cost 1) between all that was emitted and
    the first j tokens of the reading; a new token takes one row of that table.
    """

    def __init__(self, reading: Sequence[int]):
        self.reading = np.asarray(reading, dtype=np.int64)
        self.costs = np.arange(len(reading) + 1)
        self.num_emitted = self.place = 0
        self._recent: deque[int] = deque([0], maxlen=WINDOW)

    def copy(self) -> Rejoining:
        """One that goes its own way from here."""
        other = copy(self)  # of its parts, only `_recent` is changed in place
        other._recent = self._recent.copy()
        return other

    def follow(self, emitted: Sequence[int]) -> None:
        """Take in what was emitted since the last time; `emitted` is all of it."""
        for token in emitted[self.num_emitted :]:
            self.advance(token)

    def advance(self, token: int) -> None:
        """Take in one emitted token.

        `place`, from which on the reading is likely to continue it, becomes the end of the cheapest alignment. Of
        several, one that ends in this very token; then the one nearest to a step on from the last place.
        """
        matches = self.reading == token
        steps = np.minimum(self.costs[:-1] + ~matches, self.costs[1:] + 1)
        index = np.arange(len(self.costs))
        costs = np.concatenate([self.costs[:1] + 1, steps])
        self.costs = np.minimum.accumulate(costs - index) + index
        self.num_emitted += 1

        cheapest = np.flatnonzero(self.costs == self.costs.min())
        ending = cheapest[(cheapest > 0) & matches[cheapest - 1]] if len(matches) else cheapest[:0]
        found = ending if len(ending) else cheapest
        self.place = int(found[np.abs(found - (self.place + 1)).argmin()])
        self._recent.append(int(self.costs.min()))

    def edit(self, index: int, tokens: Sequence[int]) -> None:
        """Put other tokens in the place of one that the text has not come to yet, or behind the last."""
        self.reading = np.concatenate([self.reading[:index], tokens, self.reading[index + 1 :]]).astype(np.int64)
        before, behind = self.costs[: index + 1], self.costs[index + 2 :]
        unmet = before[-1] + 1 + np.arange(len(tokens))
        self.costs = np.concatenate([before, unmet, behind + (len(tokens) - 1)])

    @property
    def is_lost(self) -> bool:
        """Whether the last tokens had so little to do with the reading that its continuation is worth nothing."""
        return self._recent[-1] - self._recent[0] >= MAX_EDITS
