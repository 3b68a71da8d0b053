import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leapasr.decoding.ctc import greedy_ctc, read_ctc
from leapasr.decoding.drafts import CTCDrafter, MTPDrafter, Reading, build_drafter
from leapasr.decoding.options import DecodingOptions
from leapasr.decoding.rejoin import MAX_EDITS, Rejoining
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


@pytest.mark.parametrize(("drafts", "lead"), [("ctc", None), ("both", 0.7), (None, 0.7)])
def test_options_name_the_drafter(drafts, lead):
    drafter = build_drafter(DecodingOptions(drafts=drafts), reading_of([5]), end_token=END)
    assert isinstance(drafter, CTCDrafter)
    assert drafter.lead == lead
    assert isinstance(build_drafter(DecodingOptions(drafts="mtp"), reading_of([5]), end_token=END), MTPDrafter)


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
