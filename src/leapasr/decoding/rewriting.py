"""How a text goes on behind a draft's first mistake, by all that one decoder call said along the draft.

The call that finds the mistake has read the rest of the draft, too, and says at every place of it what it would write
there: given a prefix that is not the text's, but the same speech. From these sayings the next draft is put together.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from leapasr.decoding.trace import DraftToken

POSSIBLE = 0.005  # least probability with which head 1 finds a drafted token possible at its place
HEARD = 0.1  # least probability at which head 2 is believed on what follows
REACH = 3  # places ahead at which the draft may come back to the text


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a call says at the place of a drafted token, given the draft before it.

    Attributes:
        token: what head 1 would write there, and with what `probability`.
        chance: head 1's probability of the drafted token.
        following: what head 2 says comes behind `token`, whatever was drafted; None where it was not asked.
    """

    token: int
    probability: float
    chance: float
    following: DraftToken | None = None

    @property
    def believed(self) -> DraftToken | None:
        """`following`, if head 2 is sure enough of it."""
        return self.following if self.following and self.following.probability >= HEARD else None

    def instead(self, drafted: DraftToken) -> DraftToken:
        """Head 1's token for the drafted one: the same, as sure as head 1 is, or a correction (source ``jacobi``)."""
        source = drafted.source if self.token == drafted.token else "jacobi"
        return DraftToken(self.token, self.probability, source)


def rewritten(
    draft: Sequence[DraftToken],
    verdicts: Sequence[Verdict],
    further: Sequence[DraftToken],
    num_accepted: int,
    *,
    end_token: int,
) -> list[DraftToken]:
    """What comes behind head 1's token at the first place where it leaves `draft`, or behind all of it.

    The text that is put together follows the draft as long as it is what head 1 says. Where it is not, head 2 tells
    what comes behind head 1's token, and that tells where in the draft to go on: at the drafted token itself (the
    text has a token more), behind it (another in its place), further on (tokens too many).

    Args:
        draft: what was proposed. verdicts: on each token of it; on fewer, if only these were checked.
        further: what heads 1..K say comes behind the last token that was checked.
        num_accepted: so many drafted tokens stand.
        end_token: end-of-text.

    Returns:
        tokens up to end-of-text, if it comes to that; those that head 1 corrected are of source ``jacobi``.
    """
    num_checked = len(verdicts)
    said = [verdict.instead(drafted) for drafted, verdict in zip(draft, verdicts, strict=False)]
    said.append(further[0])
    text: list[DraftToken] = []
    place, last = num_accepted, said[num_accepted].token
    while place < num_checked and last != end_token:
        drafted, verdict = draft[place], verdicts[place]
        following = verdict.believed if verdict.token == last else None
        if drafted.token == last:
            place += 1
            text.append(said[place])
        elif following:
            place = _next_place(following.token, draft, verdicts, place)
            text.append(following)
        elif said[place + 1].token == last:
            place += 1  # it insists: the drafted token means nothing to it
            continue
        elif verdict.chance < POSSIBLE and _goes_on(draft, verdicts, place + 1):
            text.append(drafted)
        else:
            place += 1
            text.append(said[place])
        last = text[-1].token
    if last == end_token:
        return text
    behind = [further[0], *draft[num_checked + 1 :]] if num_checked < len(draft) else further
    met = next((n + 1 for n, token in enumerate(behind) if token.token == last), 0)
    return until_end([*text, *behind[met:]], (end_token,))


def _next_place(token: int, draft: Sequence[DraftToken], verdicts: Sequence[Verdict], place: int) -> int:
    """Where `token` stands in the draft or is said to stand, from `place` on and not far; else the next place."""
    if draft[place].token == token:
        return place
    for near in range(place + 1, min(place + 1 + REACH, len(verdicts))):
        if token in (draft[near].token, verdicts[near].token):
            return near
    return place + 1


def _goes_on(draft: Sequence[DraftToken], verdicts: Sequence[Verdict], place: int) -> bool:
    """Whether head 1 agrees with the draft at `place`."""
    return place < len(verdicts) and verdicts[place].token == draft[place].token


def until_end(draft: Sequence[DraftToken], end_tokens: Collection[int]) -> list[DraftToken]:
    """`draft` up to its first end-of-text, that included."""
    end = next((place for place, drafted in enumerate(draft) if drafted.token in end_tokens), len(draft))
    return list(draft[: end + 1])
