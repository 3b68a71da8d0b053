"""Guards, options and results: what needs no decoder."""

from types import SimpleNamespace

import pytest

from leapasr.decoding import DecodingOptions, DecodingResult
from leapasr.decoding.guards import MAX_CYCLE, Guards, guard_rows
from leapasr.decoding.trace import TokenRecord, accept_length_histogram, accept_lengths


@pytest.mark.parametrize(
    ("tokens", "cut"),
    [
        ([5, 6, 6], None),
        ([5, 6, 6, 6], (2, "repetition")),
        ([7, 5, 6, 5, 6, 5, 6], (3, "repetition")),
        ([5, 6, 5, 6, 5], None),
        ([6, 6, 6, 5], None),
        ([1, 2, 3, 4, 5, 6, 7, 8], (8, "length")),
        ([1, 2, 3, 4, 5, 6, 6, 6], (6, "repetition")),
    ],
)
def test_cut(tokens, cut):
    assert Guards(max_tokens=8, max_repeats=3).cut(tokens) == cut


def test_longest_cycle_that_counts():
    guards = Guards(max_tokens=1000, max_repeats=2)
    assert guards.cut([*range(MAX_CYCLE)] * 2) == (MAX_CYCLE, "repetition")
    assert guards.cut([*range(MAX_CYCLE + 1)] * 2) is None


def test_repetition_guard_turned_off():
    assert Guards(max_tokens=100, max_repeats=None).cut([5] * 99) is None


def test_token_bound_is_the_least_of_three():
    decoder = SimpleNamespace(max_positions=20, max_text=20)

    def bounds(max_tokens, options):
        return [guards.max_tokens for guards in guard_rows(options, decoder, [3, 15, 4], max_tokens)]

    assert bounds(None, DecodingOptions()) == [17, 5, 16]
    assert bounds([9, 9, 30], DecodingOptions()) == [9, 5, 16]
    assert bounds([9, 9, 30], DecodingOptions(max_tokens=6)) == [6, 5, 6]


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "message"),
    [
        ([3, 20], None, "prompt of row 1 fills 20 of the decoder's 20 positions.*cut the audio"),
        ([3, 4], [5], "1 token bounds for 2 prompts"),
        ([3, 4], [5, 0], "token bound of row 1 must be at least 1, got 0"),
    ],
)
def test_rows_that_cannot_be_guarded(lengths, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        guard_rows(DecodingOptions(), SimpleNamespace(max_positions=20, max_text=20), lengths, max_tokens)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "wave"}, "unknown strategy 'wave': choose one of autoregressive, threshold, verify, relaxed"),
        ({"strategy": "threshold"}, "needs a threshold"),
        ({"strategy": "threshold", "threshold": 1.5}, "from 0 to 1, got 1.5"),
        ({"strategy": "threshold", "threshold": float("nan")}, "from 0 to 1, got nan"),
        ({"strategy": "verify", "threshold": 0.5}, "threshold 0.5 has no meaning for strategy 'verify'"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"strategy": "autoregressive", "num_heads": 2}, "uses head 1 only, got num_heads 2"),
        ({"drafts": "oracle"}, "unknown drafts 'oracle': choose one of mtp"),
        (
            {"strategy": "autoregressive", "drafts": "mtp"},
            "'mtp' are for strategies verify, relaxed, beam, not 'autoregressive'",
        ),
        ({"drafts": "ctc", "num_heads": 4}, "drafts 'ctc' use head 1 only, got num_heads 4"),
        ({"strategy": "relaxed"}, "needs a ratio"),
        ({"strategy": "relaxed", "ratio": 1.5}, "from 0 to 1, got 1.5"),
        ({"strategy": "relaxed", "ratio": 0.5, "top": 0}, "top must be at least 1, got 0"),
        ({"ratio": 0.5}, "ratio 0.5 and top None have no meaning for strategy 'verify'"),
        ({"strategy": "threshold", "threshold": 0.5, "top": 2}, "no meaning for strategy 'threshold'"),
        ({"draft_length": "long"}, "unknown draft_length 'long': choose one of worthwhile, full"),
        ({"strategy": "relaxed", "ratio": 0.3, "draft_length": "full"}, "not 'relaxed' with drafts 'both'"),
        ({"drafts": "mtp", "draft_length": "full"}, "with drafts from CTC, not 'verify' with drafts 'mtp'"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_repeats": 1}, "max_repeats must be at least 2, got 1"),
    ],
)
def test_options_that_contradict(fields, message):
    with pytest.raises(ValueError, match=message):
        DecodingOptions(**fields)


def test_more_heads_than_the_model_has():
    DecodingOptions(num_heads=4).check(4)
    with pytest.raises(ValueError, match="num_heads 6 asked for, but the model has 4"):
        DecodingOptions(num_heads=6).check(4)


def test_accept_lengths_count_emitted_tokens_per_step():
    def trace(*steps):
        return [TokenRecord(7, step, "head1", None, -0.5) for step in steps]

    assert accept_lengths(trace(0, 1, 1, 1, 2, 2)) == [1, 3, 2]
    assert accept_length_histogram([trace(0, 1, 1), trace(0, 0), trace()]) == {1: 1, 2: 2}


def test_log_probabilities_are_those_of_the_tokens_kept():
    trace = [TokenRecord(token, step, "head1", None, -float(step)) for step, token in enumerate([7, 8, 2])]
    assert DecodingResult([7, 8], 3, trace, None).log_probabilities == [0.0, -1.0]
