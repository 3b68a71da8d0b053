import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leapasr.decoding.ctc import greedy_ctc, read_ctc
from leapasr.decoding.drafts import LEAD, CTCDrafter, MTPDrafter, Reading, build_drafter
from leapasr.decoding.options import DecodingOptions
from leapasr.decoding.rejoin import MAX_EDITS, Rejoining
from leapasr.decoding.rewriting import Verdict
from leapasr.decoding.trace import DraftToken

END = 99
TOKENS = st.lists(st.integers(1, 4), max_size=12)


def edit_distances(emitted: list[int], reading: list[int]) -> list[int]:
    """Edit distance between `emitted` and every beginning of `reading`: the whole table, cell by cell."""
    table = [list(range(len(reading) + 1))]
    for i, token in enumerate(emitted):
        row = [i + 1]
        for j, other in enumerate(reading):
            row.append(min(table[i][j] + (token != other), table[i][j + 1] + 1, row[j] + 1))
        table.append(row)
    return table[-1]


def rejoined(emitted, reading) -> Rejoining:
    rejoining = Rejoining(reading)
    rejoining.follow(emitted)
    return rejoining


def drafted(drafter, emitted, guesses=()) -> list[int]:
    return [token.token for token in drafter.propose(emitted, guesses)]


def reading_of(tokens) -> Reading:
    return Reading(tokens, [0.9] * len(tokens))


@given(TOKENS, TOKENS)
def test_costs_are_edit_distances(emitted, reading):
    rejoining = rejoined(emitted, reading)
    assert rejoining.costs.tolist() == edit_distances(emitted, reading)
    assert rejoining.costs[rejoining.place] == rejoining.costs.min()


@given(TOKENS, TOKENS)
def test_a_copy_goes_its_own_way(emitted, reading):
    rejoining = rejoined(emitted, reading)
    other = rejoining.copy()
    other.advance(7)
    assert rejoining.costs.tolist() == edit_distances(emitted, reading)
    assert other.costs.tolist() == edit_distances([*emitted, 7], reading)
    assert other.place == rejoined([*emitted, 7], reading).place


@given(st.lists(st.integers(1, 1000), min_size=3, max_size=30, unique=True), st.data())
def test_one_mistake_is_stepped_over(reading, data):
    """A token of the reading that is replaced, left out, or preceded by another: behind it, all is as before."""
    at = data.draw(st.integers(0, len(reading) - 2))
    replaced = [*reading[:at], 0]
    assert rejoined(replaced, reading).place == at + 1
    skipped = [*reading[:at], reading[at + 1]]
    assert rejoined(skipped, reading).place == at + 2
    inserted = [*reading[:at], 0, reading[at]]
    assert rejoined(inserted, reading).place == at + 1
    for count in range(len(reading) + 1):
        assert rejoined(reading[:count], reading).place == count


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20, unique=True), st.data())
def test_what_is_still_to_come_of_a_reading_is_edited(reading, data):
    num_emitted = data.draw(st.integers(0, len(reading)))
    rejoining = rejoined(reading[:num_emitted], reading)
    edited = list(reading)
    for _ in range(3):
        index = data.draw(st.integers(num_emitted, len(edited)))
        instead = data.draw(st.lists(st.integers(2000, 3000), max_size=3))
        edited[index : index + 1] = instead
        rejoining.edit(index, instead)
    assert rejoining.reading.tolist() == edited
    assert rejoining.costs.tolist() == edit_distances(reading[:num_emitted], edited)


def test_what_has_nothing_to_do_with_the_reading_is_lost():
    rejoining = rejoined(list(range(1, 21)), list(range(1, 41)))
    assert not rejoining.is_lost
    for _ in range(MAX_EDITS - 1):
        rejoining.advance(0)
        assert not rejoining.is_lost
    rejoining.advance(0)
    assert rejoining.is_lost
    for token in range(29, 40):
        rejoining.advance(token)
    assert not rejoining.is_lost


def test_ctc_drafts_all_that_is_left_and_end_of_text():
    drafter = CTCDrafter(reading_of([5, 6, 7, 8]), end_token=END)
    assert drafted(drafter, []) == [5, 6, 7, 8, END]
    assert drafted(drafter, [5, 6]) == [7, 8, END]
    assert drafted(drafter, [5, 6, 1]) == [8, END]
    assert drafted(drafter, [5, 6, 1, 8]) == [END]
    assert {token.source for token in drafter.propose([5, 6, 1, 8], ())} == {"ctc"}
    assert drafted(CTCDrafter(reading_of([]), end_token=END), []) == [END]


def test_sure_guesses_go_before_ctc():
    def guesses(*probabilities):
        return [DraftToken(token, p, f"head{token}") for token, p in zip((2, 3, 4), probabilities, strict=False)]

    def draft(*probabilities):
        drafter = CTCDrafter(reading_of([1, 2, 7, 8]), end_token=END, lead=0.5)
        return drafted(drafter, [1], guesses(*probabilities))

    assert draft(0.4, 0.9, 0.9) == [2, 7, 8, END]
    assert draft(0.5, 0.4, 0.9) == [2, 7, 8, END]
    assert draft(0.5, 0.9, 0.1) == [2, 3, 8, END]
    assert draft(0.5, 0.9, 0.9) == [2, 3, 4, END]
    ending = CTCDrafter(reading_of([1, 2, 7, 8]), end_token=END, lead=0.5)
    assert drafted(ending, [1], [DraftToken(2, 0.9, "head2"), DraftToken(END, 0.9, "head3")]) == [2, END]


def test_a_rejected_guess_leaves_no_trace():
    drafter = CTCDrafter(reading_of([1, 2, 7, 8]), end_token=END, lead=0.5)
    assert drafted(drafter, [1], [DraftToken(3, 0.9, "head2"), DraftToken(4, 0.9, "head3")]) == [3, 4, 8, END]
    assert drafted(drafter, [1, 2]) == [7, 8, END]


def test_heads_draft_alone_where_ctc_is_lost():
    drafter = CTCDrafter(reading_of(list(range(1, 30))), end_token=END, lead=0.5)
    guesses = [DraftToken(50, 0.1, "head2"), DraftToken(51, 0.9, "head3")]
    assert drafted(drafter, [60] * 20, guesses) == [50, 51]
    alone = CTCDrafter(reading_of(list(range(1, 30))), end_token=END)
    assert drafted(alone, [60] * 20, guesses) == []


@pytest.mark.parametrize(("drafts", "lead"), [("ctc", None), ("both", LEAD), (None, LEAD)])
def test_options_name_the_drafter(drafts, lead):
    drafter = build_drafter(DecodingOptions(drafts=drafts), reading_of([5]), end_token=END)
    assert isinstance(drafter, CTCDrafter)
    assert drafter.lead == lead
    assert isinstance(build_drafter(DecodingOptions(drafts="mtp"), reading_of([5]), end_token=END), MTPDrafter)


class Speaker:
    """Knows what was said: behind any of its words it goes on from there, whatever stood before; else it babbles."""

    def __init__(self, truth: list[int]):
        self.next = dict(zip([None, *truth], [*truth, END], strict=True))

    def verdicts(self, emitted: list[int], draft: list[int]) -> list[Verdict]:
        said = [self.next.get(before, 0) for before in [*([None, *emitted][-1:]), *draft]]
        known = set(self.next.values())
        return [
            Verdict(token, 0.9, 0.9 if token == other else 0.0 if other in known else 0.1)
            for token, other in zip(said, [*draft, None], strict=True)
        ]


def spoken(truth: list[int], drafter: CTCDrafter, *, review: bool = True) -> tuple[list[int], int]:
    """What verification emits, and in how many calls."""
    speaker, emitted, num_calls = Speaker(truth), [], 0
    while END not in emitted:
        draft = drafted(drafter, emitted)
        verdicts = speaker.verdicts(emitted, draft)
        num_accepted = sum(1 for _ in itertools.takewhile(lambda v: v.chance == 0.9, verdicts[:-1]))
        if review:
            drafter.review(verdicts[:-1], num_accepted, ())
        emitted += [verdict.token for verdict in verdicts[: num_accepted + 1]]
        num_calls += 1
    return emitted[: emitted.index(END)], num_calls


@pytest.mark.parametrize(
    ("read", "corrected"),
    [
        ([50, 2, 3, 60, 5, 6, 7, 8], [50, 2, 3, 4, 5, 6, 7, 8]),  # another in its place
        ([50, 2, 3, 5, 6, 7, 8], [50, 2, 3, 4, 5, 6, 7, 8]),  # missing
        ([50, 2, 3, 60, 4, 5, 6, 7, 8], [50, 2, 3, 4, 5, 6, 7, 8]),  # too many
        ([50, 2, 3, 4, 5, 6, 7], [50, 2, 3, 4, 5, 6, 7, 8]),  # the last one missing
        ([50, 2, 3, 4, 60, 70, 7, 8], [50, 2, 3, 4, 5, 70, 7, 8]),  # two in a row: behind the first, nothing is certain
    ],
)
def test_one_call_corrects_the_reading_behind_its_first_mistake(read, corrected):
    drafter = CTCDrafter(reading_of(read), end_token=END)
    draft = drafted(drafter, [])
    verdicts = Speaker([1, 2, 3, 4, 5, 6, 7, 8]).verdicts([], draft)
    drafter.review(verdicts[: len(draft)], next(i for i, v in enumerate(verdicts) if v.chance != 0.9), ())
    assert [token.token for token in drafter.reading] == drafter.rejoining.reading.tolist() == corrected
    sources = {token.token: token.source for token in drafter.reading}
    assert all((source == "ctc") == (token in read) for token, source in sources.items())


@pytest.mark.parametrize(("chance", "corrected"), [(0.4, [50, 2, 3, 5, 6]), (0.0, [50, 2, 3, 4, 5, 6])])
def test_a_token_that_could_stand_there_was_misheard_and_one_that_could_not_comes_later(chance, corrected):
    drafter = CTCDrafter(reading_of([50, 2, 4, 5, 6]), end_token=END)
    drafter.propose([], ())
    sure = [Verdict(token, 0.9, 0.9) for token in (2, 5, 6)]
    drafter.review([Verdict(1, 0.9, 0.1), sure[0], Verdict(3, 0.6, chance), *sure[1:]], 0, ())
    assert [token.token for token in drafter.reading] == corrected


def test_what_head_1_confirms_is_as_sure_as_head_1_is():
    drafter = CTCDrafter(reading_of([1, 2, 3, 4]), end_token=END)
    drafter.propose([], ())
    drafter.review([Verdict(7, 0.8, 0.2), Verdict(2, 0.7, 0.7), Verdict(3, 0.99, 0.99), Verdict(8, 0.6, 0.2)], 0, ())
    assert drafter.reading == [
        DraftToken(1, 0.9, "ctc"), DraftToken(2, 0.9, "ctc"), DraftToken(3, 0.99, "ctc"), DraftToken(8, 0.6, "jacobi"),
    ]  # fmt: skip


@given(st.lists(st.integers(1, 90), min_size=12, max_size=60, unique=True), st.data())
def test_single_mistakes_cost_two_more_calls_however_many_there_are(truth, data):
    read: list[int] = []
    for place, token in enumerate(truth):
        kind = data.draw(st.sampled_from(["none", "other", "missing", "too many"])) if place % 4 == 2 else "none"
        read += {"none": [token], "other": [100 + place], "missing": [], "too many": [100 + place, token]}[kind]
    emitted, num_calls = spoken(truth, CTCDrafter(reading_of(read), end_token=END))
    assert emitted == truth
    assert num_calls <= 3


@given(st.lists(st.integers(1, 90), max_size=40, unique=True), st.lists(st.integers(1, 120), max_size=40))
def test_reviews_never_change_what_is_emitted(truth, read):
    """A reading that has nothing to do with the text, in the worst case."""
    drafter = CTCDrafter(reading_of(read), end_token=END)
    emitted, num_calls = spoken(truth, drafter)
    assert emitted == truth
    assert num_calls <= len(truth) + 1
    assert [token.token for token in drafter.reading] == drafter.rejoining.reading.tolist()
    assert len(drafter.rejoining.costs) == len(drafter.reading) + 1


def test_a_correction_stays_with_the_copy_that_heard_it():
    drafter = CTCDrafter(reading_of([50, 2, 3, 60]), end_token=END)
    drafter.propose([], ())
    other = drafter.copy()
    other.review(Speaker([1, 2, 3, 4]).verdicts([], [50, 2, 3, 60, END])[:5], 0, ())
    assert (drafted(other, [1]), drafted(drafter, [1])) == ([2, 3, 4, END], [2, 3, 60, END])


def test_heads_that_led_are_not_of_the_reading():
    drafter = CTCDrafter(reading_of([1, 2, 3, 50, 5]), end_token=END, lead=0.5)
    guesses = [DraftToken(90, 0.9, "head2"), DraftToken(2, 0.9, "head3")]
    assert drafted(drafter, [], guesses) == [90, 2, 3, 50, 5, END]
    drafter.review(Speaker([1, 2, 3, 4, 5]).verdicts([], [90, 2, 3, 50, 5, END])[:6], 0, ())
    assert drafted(drafter, [1]) == [2, 3, 4, 5, END]


@pytest.mark.parametrize(
    ("following", "corrected"),
    [(None, [2, 3, 4]), (DraftToken(2, 0.9, "head2"), [1, 2, 3, 4]), (DraftToken(3, 0.9, "head2"), [1, 3, 4])],
)
def test_head_2_tells_a_missing_token_from_a_misheard_one(following, corrected):
    """Head 1 says 1 where 2 was drafted, and behind that 3: the text is 1 2 3 or 1 3; re-joining alone guesses."""
    drafter = CTCDrafter(reading_of([2, 3, 4]), end_token=END, lead=0.95)
    drafter.propose([], ())
    drafter.review([Verdict(1, 0.9, 0.0, following), Verdict(3, 0.9, 0.9), Verdict(4, 0.9, 0.9)], 0, ())
    assert [token.token for token in drafter.reading] == drafter.rejoining.reading.tolist() == corrected


def test_head_2_corrects_two_tokens_in_a_row():
    drafter = CTCDrafter(reading_of([50, 51, 3, 4]), end_token=END, lead=0.95)
    drafter.propose([], ())
    verdicts = [Verdict(1, 0.9, 0.0, DraftToken(2, 0.9, "head2")), Verdict(2, 0.8, 0.0), Verdict(3, 0.9, 0.9)]
    drafter.review(verdicts, 0, ())
    assert [(token.token, token.source) for token in drafter.reading] == [
        (1, "jacobi"),
        (2, "head2"),
        (3, "ctc"),
        (4, "ctc"),
    ]
    unsure = CTCDrafter(reading_of([50, 51, 3, 4]), end_token=END, lead=0.95)
    unsure.propose([], ())
    unsure.review([replace(verdicts[0], following=DraftToken(2, 0.05, "head2")), *verdicts[1:]], 0, ())
    assert [token.token for token in unsure.reading] == [50, 51, 3, 4]


def test_heads_draft_goes_on_behind_its_end():
    drafter = MTPDrafter(end_token=END)
    guesses = [DraftToken(token, 0.5, f"head{token}") for token in (2, 3, 4)]
    assert drafted(drafter, [], guesses) == [2, 3, 4]
    further = [DraftToken(token, 0.5, "head") for token in (5, 6, 7, 8)]
    sure = [Verdict(token, 0.9, 0.9) for token in (2, 3, 4)]
    other = drafter.copy()
    other.review(sure, 3, further)
    assert drafted(other, [1, 2, 3, 4, 5], guesses) == [6, 7, 8]
    drafter.review([sure[0], Verdict(30, 0.9, 0.1), sure[2]], 1, further)
    assert drafted(drafter, [1, 2, 30], guesses) == [4, 5, 6, 7, 8][: 2 * 3]
    drafter.review([Verdict(token, 0.9, 0.9) for token in (4, 5, 6, 7, 8)], 5, [DraftToken(9, 0.9, "jacobi"), *further])
    assert drafted(drafter, [1, 2, 30, 4, 5, 6, 7, 8, 9], [*guesses, guesses[0]]) == [5, 6, 7, 8]


def test_heads_draft_is_two_rounds_of_guesses_at_most_and_ends_with_the_text():
    drafter = MTPDrafter(end_token=END)
    guesses = [DraftToken(token, 0.5, "head") for token in (2, 3)]
    drafter.propose([], guesses)
    drafter.review([Verdict(9, 0.9, 0.1), Verdict(3, 0.9, 0.9)], 0, [DraftToken(t, 0.5, "head") for t in range(4, 12)])
    assert drafted(drafter, [9], guesses) == [3, 4, 5, 6]
    ending = MTPDrafter(end_token=END)
    assert drafted(ending, [], [DraftToken(token, 0.5, "head") for token in (2, END, 3)]) == [2, END]
    ending.review([Verdict(2, 0.9, 0.9), Verdict(7, 0.9, 0.1)], 1, [DraftToken(END, 0.9, "jacobi"), *guesses])
    assert drafted(ending, [2, 7], guesses) == [END]


def test_readings_are_greedy_ctc_with_its_peaks():
    torch.manual_seed(0)
    logits, lengths = 2 * torch.randn(4, 40, 5), torch.tensor([40, 17, 1, 0])
    readings = read_ctc(logits, lengths, blank=0)
    assert [reading.tokens for reading in readings] == greedy_ctc(logits, lengths, blank=0)
    probabilities = logits.softmax(-1)
    for row, (reading, length) in enumerate(zip(readings, lengths.tolist(), strict=True)):
        best = logits[row, :length].argmax(-1).tolist()
        frames = itertools.groupby(range(length), key=best.__getitem__)
        peaks = [max(float(probabilities[row, t, token]) for t in run) for token, run in frames if token]
        assert reading.probabilities == pytest.approx(peaks)
