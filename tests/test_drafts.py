import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leapasr.decoding.ctc import greedy_ctc, read_ctc
from leapasr.decoding.drafts import CTCDrafter, MTPDrafter, Reading, build_drafter
from leapasr.decoding.options import DecodingOptions
from leapasr.decoding.rejoin import LEFT_OUT, Rejoining
from leapasr.decoding.rewriting import Verdict
from leapasr.decoding.trace import DraftToken
from leapasr.model.ctc_head import CTCScores
from leapasr.model.processing import spelling
from leapasr.transcriber import load

END = 99
TOKENS = st.lists(st.integers(1, 4), max_size=12)
MISREAD = 100  # a token so much further on is spelt like it but for the last character


def spelt(token: int) -> list[int]:
    """Four characters that no other token has; those of a misread token are its own but for one."""
    if token > MISREAD:
        return [*spelt(token - MISREAD)[:-1], -token]
    return [10 * token + n for n in range(4)]


def costs_of_all(written: list[int], reading: list[int]) -> list[float]:
    """Least costs of what only `written` or only a beginning of `reading` has: the whole table, cell by cell."""
    table = [[LEFT_OUT * j for j in range(len(reading) + 1)]]
    for i, character in enumerate(written):
        row = [i + 1.0]
        for j, other in enumerate(reading):
            both = [table[i][j]] if character == other else []
            row.append(min([*both, table[i][j + 1] + 1, row[j] + LEFT_OUT]))
        table.append(row)
    return table[-1]


def rejoined(written, reading, spell=lambda token: (token,)) -> Rejoining:
    rejoining = Rejoining(reading, spell)
    rejoining.follow(written)
    return rejoining


def drafted(drafter, emitted, guesses=()) -> list[int]:
    return [token.token for token in drafter.propose(emitted, guesses)]


def reading_of(tokens) -> Reading:
    return Reading(tokens, [0.9] * len(tokens))


def drafter_of(tokens, *, led: bool = False) -> CTCDrafter:
    return CTCDrafter(reading_of(tokens), end_token=END, led=led, spell=spelt)


@given(TOKENS, TOKENS)
def test_costs_are_of_the_best_alignment(written, reading):
    rejoining = rejoined(written, reading)
    assert rejoining.costs == pytest.approx(costs_of_all(written, reading))
    assert rejoining.costs[rejoining.place] == pytest.approx(min(rejoining.costs))


@given(TOKENS, TOKENS)
def test_tokens_are_aligned_by_their_characters(written, reading):
    letters = {1: (1, 2), 2: (2,), 3: (1, 2, 3), 4: ()}
    rejoining = rejoined(written, reading, letters.get)
    texts = [[letter for token in text for letter in letters[token]] for text in (written, reading)]
    assert rejoining.costs == pytest.approx(costs_of_all(*texts))


@given(TOKENS, TOKENS)
def test_a_copy_goes_its_own_way(written, reading):
    rejoining = rejoined(written, reading)
    other = rejoining.copy()
    other.advance(7)
    assert rejoining.costs == pytest.approx(costs_of_all(written, reading))
    assert other.costs == pytest.approx(costs_of_all([*written, 7], reading))
    assert other.place == rejoined([*written, 7], reading).place


@given(st.lists(st.integers(1, 90), min_size=3, max_size=30, unique=True), st.data())
def test_one_mistake_is_stepped_over(reading, data):
    """A token of the reading that is misread, left out, or preceded by another: behind it, all is as before."""
    at = data.draw(st.integers(0, len(reading) - 2))
    misread = [*reading[:at], reading[at] + MISREAD, *reading[at + 1 :]]
    assert rejoined(reading[: at + 1], misread, spelt).place == at + 1
    left_out = [*reading[:at], reading[at + 1]]
    assert rejoined(left_out, reading, spelt).place == at + 2
    preceded = [*reading[:at], 91]
    assert rejoined(preceded, reading, spelt).place == at
    for count in range(len(reading) + 1):
        assert rejoined(reading[:count], reading, spelt).place == count


@given(TOKENS, TOKENS, st.data())
def test_from_a_place_on_only_what_lies_behind_it_counts(written, reading, data):
    place = data.draw(st.integers(0, len(reading)))
    other = rejoined([1, 2, 3], reading).from_place(place)
    for token in written:
        other.advance(token)
    assert other.costs[place:] == pytest.approx(costs_of_all(written, reading[place:]))
    assert other.place >= place


def test_a_token_that_ends_inside_one_that_was_read_goes_on_at_its_nearer_end():
    def spell(token):
        return [ord(letter) for letter in ("abcde" if token == 5 else "abcde"[: token - 10])]

    assert [rejoined([10 + count], [5], spell).place for count in range(6)] == [0, 0, 0, 1, 1, 1]


def test_what_is_spelt_half_alike_was_misread():
    """Of alignments that cost the same, the one that goes on by about as much as was written."""
    letters = {1: b"abcd", 2: b"xxxxab", 3: b"efgh"}
    assert rejoined([1], [2, 3], letters.get).place == 1


def test_tokens_are_spelt_as_the_tokenizer_has_them(tiny_model_folder):
    tokenizer = load(tiny_model_folder).processor.tokenizer
    spell = spelling(tokenizer)
    ids = tokenizer.encode("don't say naïve", add_special_tokens=False)
    assert ["".join(map(chr, spell(token))) for token in ids] == tokenizer.convert_ids_to_tokens(ids)
    assert spell(10**6) == ()


def test_ctc_drafts_all_that_is_left_and_end_of_text():
    drafter = drafter_of([5, 6, 7, 8])
    assert drafted(drafter, []) == [5, 6, 7, 8, END]
    assert drafted(drafter, [5, 6]) == [7, 8, END]
    assert drafted(drafter, [5, 6, 1]) == [7, 8, END]
    assert drafted(drafter, [5, 6, 1, 8]) == [END]
    assert {token.source for token in drafter.propose([5, 6, 1, 8], ())} == {"ctc"}
    assert drafted(drafter_of([]), []) == [END]
    twice = drafter_of([5, 5, 6])
    assert drafted(twice, [5]) == [5, 6, END]
    assert twice.reading == drafter_of([5, 5, 6]).reading


def test_surer_guesses_go_before_ctc():
    def draft(*probabilities, guessed=(3, 4, 7)):
        guesses = [DraftToken(token, p, f"head{token}") for token, p in zip(guessed, probabilities, strict=False)]
        return drafted(drafter_of([1, 2, 7, 8], led=True), [1], guesses)

    assert draft(0.9, 1.0, 1.0) == [2, 7, 8, END]  # CTC is as sure
    assert draft(0.95, 0.9, 1.0) == [3, 2, 7, 8, END]
    assert draft(0.95, 0.95, 0.9) == [3, 4, 2, 7, 8, END]
    assert draft(0.95, 0.95, 0.95) == [3, 4, 7, 8, END]
    assert draft(0.95, 0.95, guessed=(2, 4)) == [2, 7, 8, END]
    assert draft(0.95, 0.95, guessed=(7, END)) == [7, END]
    assert drafted(drafter_of([1, 2], led=True), [1, 2], [DraftToken(3, 0.1, "head2")]) == [3, END]
    assert drafted(drafter_of([1, 2], led=False), [1], [DraftToken(3, 1.0, "head2")]) == [2, END]


def test_a_rejected_guess_leaves_no_trace():
    drafter = drafter_of([1, 2, 7, 8], led=True)
    assert drafted(drafter, [1], [DraftToken(7, 0.95, "head2"), DraftToken(4, 0.95, "head3")]) == [7, 4, 8, END]
    assert drafted(drafter, [1, 2]) == [7, 8, END]


@pytest.mark.parametrize(("drafts", "led"), [("ctc", False), ("both", True), (None, True)])
def test_options_name_the_drafter(drafts, led):
    drafter = build_drafter(DecodingOptions(drafts=drafts), reading_of([5]), end_token=END)
    assert isinstance(drafter, CTCDrafter)
    assert drafter.led == led
    assert isinstance(build_drafter(DecodingOptions(drafts="mtp"), reading_of([5]), end_token=END), MTPDrafter)


class Speaker:
    """Knows what was said: behind any of its words it goes on from there, whatever stood before; else it babbles."""

    def __init__(self, truth: list[int]):
        self.next = dict(zip([None, *truth], [*truth, END], strict=True))

    def verdicts(self, emitted: list[int], draft: list[int]) -> list[Verdict]:
        said = [self.next.get(before, 0) for before in [*([None, *emitted][-1:]), *draft]]
        return [
            Verdict(token, 0.9, 0.9 if token == other else 0.1)
            for token, other in zip(said, [*draft, None], strict=True)
        ]


def spoken(truth: list[int], drafter: CTCDrafter) -> tuple[list[int], int]:
    """What verification emits, and in how many calls."""
    speaker, emitted, num_calls = Speaker(truth), [], 0
    while END not in emitted:
        draft = drafted(drafter, emitted)
        verdicts = speaker.verdicts(emitted, draft)
        num_accepted = sum(1 for _ in itertools.takewhile(lambda v: v.chance == 0.9, verdicts[:-1]))
        drafter.review(verdicts[:-1], num_accepted, ())
        emitted += [verdict.token for verdict in verdicts[: num_accepted + 1]]
        num_calls += 1
    return emitted[: emitted.index(END)], num_calls


@pytest.mark.parametrize(
    ("read", "corrected"),
    [
        ([101, 2, 3, 104, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]),  # another in its place
        ([101, 2, 3, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]),  # missing
        ([101, 2, 3, 60, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]),  # too many
        ([101, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]),  # the last one missing: end-of-text is not of the reading
        ([101, 2, 3, 60, 70, 5, 6], [1, 2, 3, 4, 60, 70, 5, 6]),  # unlike what was said: it may come behind it
        ([101, 2, 3, 104, 105, 6, 7, 8], [1, 2, 3, 4, 105, 6, 7, 8]),  # two in a row: behind the first, all is open
        ([101, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9]),  # nor is it put there
    ],
)
def test_one_call_corrects_the_reading_behind_its_first_mistake(read, corrected):
    drafter = drafter_of(read)
    draft = drafted(drafter, [])
    verdicts = Speaker([1, 2, 3, 4, 5, 6, 7, 8]).verdicts([], draft)
    drafter.review(verdicts[: len(draft)], [v.chance == 0.9 for v in verdicts].index(False), ())
    assert [token.token for token in drafter.reading] == corrected
    assert all(token.source == "jacobi" for token in drafter.reading if token.token not in read)


def test_a_missing_token_is_put_in_once():
    drafter = drafter_of([101, 2, 3, 5, 6])
    draft = drafted(drafter, [])
    drafter.review(Speaker([1, 2, 3, 4, 5, 6]).verdicts([], draft)[: len(draft)], 0, ())
    assert drafted(drafter.copy(), [1, 2, 3]) == [4, 5, 6, END]
    assert drafted(drafter.copy(), [1, 2, 3, 4]) == [5, 6, END]


def test_what_head_1_confirms_is_as_sure_as_head_1_is():
    drafter = drafter_of([101, 2, 3, 108])
    drafter.propose([], ())
    drafter.review([Verdict(1, 0.8, 0.2), Verdict(2, 0.7, 0.7), Verdict(3, 0.99, 0.99), Verdict(8, 0.6, 0.2)], 0, ())
    assert drafter.reading == [
        DraftToken(1, 0.8, "jacobi"),
        DraftToken(2, 0.7, "ctc"),
        DraftToken(3, 0.99, "ctc"),
        DraftToken(8, 0.6, "jacobi"),
    ]


def test_what_a_correction_did_away_with_comes_back_if_the_text_goes_there():
    """Head 1 says 7, which is spelt as 2 and 3 are together; in the end it writes 2 after all."""
    drafter = CTCDrafter(
        reading_of([101, 60, 2, 3, 4]),
        end_token=END,
        spell=lambda token: [*spelt(2), *spelt(3)] if token == 7 else spelt(token),
    )
    drafter.propose([], ())
    verdicts = [Verdict(token, 0.9, 0.5) for token in (1, 60, 7, 4, 4, END)]
    drafter.review(verdicts, 0, ())
    assert [token.token for token in drafter.reading] == [1, 60, 7, 4]
    assert drafted(drafter.copy(), [1, 60]) == [7, 4, END]
    assert drafted(drafter.copy(), [1, 60, 7]) == [4, END]
    assert drafted(drafter, [1, 60, 2]) == [3, 4, END]


@given(st.lists(st.integers(1, 90), min_size=12, max_size=60, unique=True), st.data())
def test_single_mistakes_cost_two_more_calls_however_many_there_are(truth, data):
    read: list[int] = []
    for place, token in enumerate(truth):
        kind = data.draw(st.sampled_from(["none", "other", "missing", "too many"])) if place % 4 == 2 else "none"
        read += {"none": [token], "other": [MISREAD + token], "missing": [], "too many": [91, token]}[kind]
    emitted, num_calls = spoken(truth, drafter_of(read))
    assert emitted == truth
    assert num_calls <= 3


@given(st.lists(st.integers(1, 90), max_size=40, unique=True), st.lists(st.integers(1, 98), max_size=40))
def test_reviews_never_change_what_is_emitted(truth, read):
    """A reading that has nothing to do with the text, in the worst case."""
    emitted, num_calls = spoken(truth, drafter_of(read))
    assert emitted == truth
    assert num_calls <= len(truth) + 1


def test_a_correction_stays_with_the_copy_that_heard_it():
    drafter = drafter_of([101, 2, 3, 104])
    drafter.propose([], ())
    other = drafter.copy()
    other.review(Speaker([1, 2, 3, 4]).verdicts([], [101, 2, 3, 104, END])[:5], 0, ())
    assert (drafted(other, [1]), drafted(drafter, [1])) == ([2, 3, 4, END], [2, 3, 104, END])


def test_heads_that_led_are_not_of_the_reading():
    drafter = drafter_of([1, 2, 3, 104, 5], led=True)
    assert drafted(drafter, [], [DraftToken(90, 0.95, "head2")]) == [90, 1, 2, 3, 104, 5, END]
    drafter.review(Speaker([1, 2, 3, 4, 5]).verdicts([], [90, 1, 2, 3, 104, 5, END])[:7], 0, ())
    assert [token.token for token in drafter.reading] == [1, 2, 3, 4, 5]
    assert drafted(drafter, [1]) == [2, 3, 4, 5, END]


def test_what_a_rejected_guess_leapt_over_stays_corrected():
    drafter, speaker = drafter_of([101, 2, 3, 104, 5], led=True), Speaker([1, 2, 3, 4, 5])
    for emitted, guesses in (([], []), ([1, 2, 3], [DraftToken(5, 0.95, "head2")])):
        draft = drafted(drafter, emitted, guesses)
        drafter.review(speaker.verdicts(emitted, draft)[: len(draft)], 0, ())
    assert draft == [5, END]
    assert drafted(drafter, [1, 2, 3]) == [4, 5, END]


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
    ctc = CTCScores.of(logits)
    readings = read_ctc(ctc, lengths, blank=0)
    assert [reading.tokens for reading in readings] == greedy_ctc(ctc, lengths, blank=0)
    probabilities = logits.softmax(-1)
    for row, (reading, length) in enumerate(zip(readings, lengths.tolist(), strict=True)):
        best = logits[row, :length].argmax(-1).tolist()
        frames = itertools.groupby(range(length), key=best.__getitem__)
        peaks = [max(float(probabilities[row, t, token]) for t in run) for token, run in frames if token]
        assert reading.probabilities == pytest.approx(peaks)
