"""What is made of a draft that failed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leapasr.decoding.rewriting import REACH, Verdict, rewritten, until_end
from leapasr.decoding.trace import DraftToken

END = 0
TRUTH = list(range(1, 13))


def drafted(tokens):
    return [DraftToken(token, 0.5, "head3") for token in tokens]


def following(token: int) -> int:
    """The text counts: behind n comes n + 1, and end-of-text behind the last."""
    return token + 1 if token in TRUTH[:-1] else END


def rewrite(draft: list[int], *, emitted: int = 0, checked: int | None = None, hears: bool = True) -> list[int]:
    """What a speaker who knows the text makes of a draft behind `emitted`, checked up to `checked` tokens.

    Behind a token that is not of the text, it says what it said before that token.
    """
    verdicts, said, last = [], [], emitted
    checked = len(draft) if checked is None else checked
    for token in [*draft[:checked], None]:
        said.append(following(last) if last else TRUTH[0])
        last = token if token in TRUTH else last
    for token, says in zip(draft[:checked], said, strict=False):
        guess = DraftToken(following(says), 0.9 if hears else 0.05, "head2")
        verdicts.append(Verdict(says, 0.9, 0.9 if says == token else 0.0, guess))
    num_accepted = next((n for n, (token, says) in enumerate(zip(draft, said, strict=False)) if token != says), checked)
    further = [DraftToken(said[-1], 0.9, "jacobi")]
    while further[-1].token != END and len(further) < 4:
        further.append(DraftToken(following(further[-1].token), 0.5, "head"))
    text = rewritten(drafted(draft), verdicts, further, num_accepted, end_token=END)
    assert [(t.token, t.source) for t in text] == [(t.token, t.source) for t in until_end(text, {END})]
    return [said[num_accepted], *(token.token for token in text)]


@pytest.mark.parametrize(
    "draft",
    [
        [1, 2, 3, 4, 5, 6],  # right
        [1, 90, 3, 4, 5, 6],  # another in its place
        [1, 3, 4, 5, 6],  # missing
        [1, 90, 2, 3, 4, 5, 6],  # one too many
        [1, 90, 91, 2, 3, 4, 5, 6],  # two too many
        [1, 1, 2, 3, 4, 5, 6],  # doubled
        [1, 90, 3, 5, 6, 91, 92, 8],  # all of it
    ],
)
def test_what_is_wrong_in_a_draft_is_mended(draft):
    text = rewrite(draft)
    first = text[0]
    assert text == list(range(first, first + len(text)))
    assert text[-1] >= 6


@given(st.lists(st.sampled_from(["right", "other", "missing", "too many", "doubled"]), min_size=4, max_size=11))
def test_mistakes_apart_from_each_other_are_all_mended(kinds):
    draft: list[int] = []
    for place, kind in enumerate(kinds):
        token = TRUTH[place]
        kind = kind if place % 3 == 1 else "right"
        draft += {
            "right": [token], "other": [100 + token], "missing": [], "too many": [100 + token, token],
            "doubled": [token, token],
        }[kind]  # fmt: skip
    text = rewrite(draft)
    expected = list(range(text[0], len(TRUTH) + 1))
    assert text == [*expected, END][: len(text)]
    assert len(text) >= len(kinds) - text[0]


@given(st.lists(st.integers(0, 20), max_size=15), st.integers(0, 15), st.booleans(), st.integers(0, 11))
def test_any_draft_can_be_rewritten(draft, checked, hears, emitted):
    draft = draft[: draft.index(END) + 1] if END in draft else draft
    text = rewrite(draft, emitted=emitted, checked=min(checked, len(draft)), hears=hears)
    assert len(text) <= 2 * len(draft) + 5
    assert END not in text[:-1]


def test_what_was_not_checked_stays():
    assert rewrite([1, 90, 3, 4, 80, 81], checked=3) == [2, 3, 4, 80, 81]
    assert rewrite([1, 90, 3, 4, 80, 81], checked=6)[:3] == [2, 3, 4]


def test_head_2_is_heard_only_if_it_is_sure():
    """Without it, an impossible token with which the draft goes on comes later, a possible one is replaced."""
    sure = [Verdict(token, 0.9, 0.9) for token in (4, 5)]
    further = [DraftToken(6, 0.9, "jacobi")]
    for chance, guess, expected in (
        (0.0, None, [3, 4, 5, 6]),
        (0.2, None, [4, 5, 6]),
        (0.0, DraftToken(4, 0.05, "head2"), [3, 4, 5, 6]),
        (0.0, DraftToken(4, 0.5, "head2"), [4, 5, 6]),
        (0.2, DraftToken(3, 0.5, "head2"), [3, 4, 5, 6]),
    ):
        text = rewritten(drafted([3, 4, 5]), [Verdict(2, 0.9, chance, guess), *sure], further, 0, end_token=END)
        assert [token.token for token in text] == expected[:-1] + expected[-1:] * (text[-1].token == 6)


def test_the_draft_is_met_again_within_reach_only():
    """Tokens too many: up to so many are skipped; behind more, the text is sought in their places."""
    near = [90 + n for n in range(REACH + 1)]
    assert rewrite([*near[:-1], 2, 3, 4])[:4] == [1, 2, 3, 4]
    assert rewrite([*near, 2, 3, 4])[:4] != [1, 2, 3, 4]


def test_the_draft_is_met_again_where_head_1_says_the_next_token():
    """Nobody drafted 2, but three places on it is what head 1 would write."""
    verdicts = [
        Verdict(1, 0.9, 0.1, DraftToken(2, 0.8, "head2")),
        Verdict(7, 0.3, 0.1),
        Verdict(8, 0.3, 0.1),
        Verdict(2, 0.9, 0.1, DraftToken(3, 0.8, "head2")),
        Verdict(3, 0.9, 0.9),
    ]
    text = rewritten(drafted([90, 91, 92, 93, 3]), verdicts, drafted([4]), 0, end_token=END)
    assert [token.token for token in text] == [2, 3, 4]


def test_corrections_tell_their_source_and_how_sure_head_1_is():
    verdicts = [Verdict(7, 0.8, 0.1), Verdict(3, 0.7, 0.7), Verdict(8, 0.6, 0.2)]
    further = [DraftToken(9, 0.4, "jacobi"), DraftToken(10, 0.3, "head2")]
    text = rewritten(drafted([2, 3, 4]), verdicts, further, 0, end_token=END)
    assert text == [DraftToken(3, 0.7, "head3"), DraftToken(8, 0.6, "jacobi"), *further]
