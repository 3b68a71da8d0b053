"""What a wider call costs, and how much of a draft is worth it."""

import json
from collections import Counter
from itertools import accumulate, pairwise
from operator import mul

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_decoding import MAX_TOKENS, VERIFY, make_prompts, outcomes, scripted

from leapasr.decoding import DecodingOptions, SpeechLlamaDecoder, decode
from leapasr.decoding import costs as costs_module
from leapasr.decoding.costs import (
    CARRIED,
    FREE,
    CallCosts,
    fastest_ways,
    find_costs,
    find_ways,
    measure_costs,
    num_worth_drafting,
)
from leapasr.decoding.interface import Ways
from leapasr.decoding.reference import beam_reference, decode_reference

COSTS = CallCosts((1, 4), (1, 2, 10), ((1.0, 2.0, 4.0), (3.0, 6.0, 12.0)))
STEEP = CallCosts((1, 2), (1, 2), ((1.0, 100.0), (1.0, 100.0)))
PROBABILITIES = st.lists(st.lists(st.floats(0, 1), max_size=8), min_size=1, max_size=4)


@pytest.fixture
def decoder(build_tiny_model):
    return SpeechLlamaDecoder(build_tiny_model())


@pytest.mark.parametrize(
    ("num_rows", "width", "seconds"),
    [(1, 1, 1), (1, 2, 2), (1, 6, 3), (4, 10, 12), (2, 1, 1 + 2 / 3), (1, 18, 6), (7, 2, 10)],
)
def test_costs_lie_on_lines_between_what_was_measured(num_rows, width, seconds):
    assert COSTS(num_rows, width) == pytest.approx(seconds)


@given(PROBABILITIES, st.integers(1, 12), st.floats(0, 3))
@example([[1.0] * 8], 1, 0.6)  # the first token is not worth it, eight are
def test_the_best_length_of_all(probabilities, width, seconds_per_token):
    def gain(length):
        worths = [accumulate([p + (1 - p) * CARRIED for p in row], mul) for row in probabilities]
        expected = sum(sum(list(row)[:length]) for row in worths)
        return seconds_per_token * expected - COSTS(len(probabilities), width + length)

    lengths = range(max(map(len, probabilities)) + 1)
    found = num_worth_drafting(probabilities, COSTS, width=width, seconds_per_token=seconds_per_token)
    assert gain(found) == pytest.approx(max(map(gain, lengths)))


def test_a_draft_is_worth_something_behind_a_mistake():
    row = [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert num_worth_drafting([row], COSTS, width=1, seconds_per_token=1.0) == 6  # 0.5 each, for a quarter of a call
    assert num_worth_drafting([row], COSTS, width=1, seconds_per_token=0.6) == 0


def test_what_costs_nothing_is_all_drafted():
    assert num_worth_drafting([[0.1] * 5, [0.0] * 9], FREE, width=1, seconds_per_token=0.0) == 9
    assert num_worth_drafting([[], []], FREE, width=1, seconds_per_token=1.0) == 0


@pytest.mark.parametrize("costs", [FREE, COSTS, STEEP])
def test_costs_change_calls_and_no_token(decoder, costs):
    prompts, bounds = make_prompts(5), [MAX_TOKENS] * 5
    references = decode_reference(decoder, prompts, VERIFY, max_tokens=bounds)
    drafters = scripted(references, "mixed", 9)
    results = decode(decoder, prompts, VERIFY, max_tokens=bounds, drafters=drafters, costs=costs)
    assert outcomes(results) == outcomes(references)
    calls, most = (sum(result.num_calls for result in each) for each in (results, references))
    assert calls == most if costs is STEEP else calls < most


@pytest.mark.parametrize("costs", [COSTS, STEEP])
@pytest.mark.parametrize("num_rows", [3, 5])
def test_costs_change_a_beams_calls_and_no_hypothesis(decoder, costs, num_rows):
    prompts, bounds = make_prompts(num_rows), [MAX_TOKENS] * num_rows
    options = DecodingOptions(strategy="beam", beam_size=3, nbest=3, drafts="mtp", max_repeats=4)
    greedy = decode_reference(decoder, prompts, VERIFY, max_tokens=bounds)
    expected = beam_reference(decoder, prompts, options, max_tokens=bounds)
    calls = {}
    for each in (FREE, costs):
        drafters = scripted(greedy, "right", 9)
        results = decode(decoder, prompts, options, max_tokens=bounds, drafters=drafters, costs=each)
        calls[each] = sum(result.num_calls for result in results)
        for result, hypotheses in zip(results, expected, strict=True):
            assert [hypothesis.tokens for hypothesis in result.hypotheses] == [each.tokens for each in hypotheses]
    if costs is STEEP:
        assert calls[FREE] < calls[costs]


def test_relaxed_verification_checks_all_that_is_drafted(decoder):
    """What it emits depends on what is drafted, so it must not depend on the machine or on the other rows."""
    prompts, bounds = make_prompts(5), [MAX_TOKENS] * 5
    references = decode_reference(decoder, prompts, VERIFY, max_tokens=bounds)
    options = DecodingOptions(strategy="relaxed", ratio=0.0, top=48, max_repeats=4)
    free, steep = (
        decode(decoder, prompts, options, max_tokens=bounds, drafters=scripted(references, "random", 9), costs=costs)
        for costs in (FREE, STEEP)
    )
    assert outcomes(steep) == outcomes(free) != outcomes(references)


def test_measured_costs_rise(decoder):
    costs = measure_costs(decoder)
    for row in costs.seconds:
        assert all(0 < narrow <= wide for narrow, wide in pairwise(row))
    for few, many in pairwise(costs.seconds):
        assert all(a <= b for a, b in zip(few, many, strict=True))


def test_calls_too_wide_to_wait_for_lie_on_the_line_before_them(decoder, monkeypatch):
    timed = []

    def seconds(decoder, graphs, cache, width):
        timed.append((len(cache.lengths), width))
        return 1.0 + len(cache.lengths) * width

    monkeypatch.setattr(costs_module, "_seconds", seconds)
    measured = measure_costs(decoder)
    assert max(rows * width for rows, width in timed) == costs_module.MAX_TOKENS
    assert Counter(timed)[32, 8] == 2  # once to warm up, and not again: that took longer than patience lasts
    expected = [[1.0 + rows * width for width in costs_module.WIDTHS] for rows in costs_module.NUM_ROWS]
    assert [list(row) for row in measured.seconds] == expected


@pytest.mark.parametrize("fastest", [Ways(), Ways("mkl"), Ways("onednn"), Ways("mkl", rough=True), Ways(rough=True)])
def test_the_fastest_ways_are_found(decoder, monkeypatch, fastest):
    taken = []

    def seconds(decoder, graphs, cache, width):
        return 1.0 + (taken[-1].packing != fastest.packing) + (taken[-1].rough != fastest.rough)

    monkeypatch.setattr(decoder, "prepare", taken.append)
    monkeypatch.setattr(costs_module, "_seconds", seconds)
    assert fastest_ways(decoder) == fastest


@pytest.mark.parametrize(("may_round", "is_steady", "is_faster"), [(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_products_are_rounded_only_if_that_is_allowed_steady_and_faster(
    decoder, monkeypatch, may_round, is_steady, is_faster
):
    taken = []
    monkeypatch.setattr(decoder, "prepare", taken.append)
    monkeypatch.setattr(decoder, "may_round", bool(may_round))
    monkeypatch.setattr(costs_module, "_seconds", lambda *_: 0.9 if taken[-1].rounded and is_faster else 1.0)
    monkeypatch.setattr(costs_module, "steady", lambda decoder: bool(is_steady))
    assert fastest_ways(decoder).rounded == bool(may_round and is_steady and is_faster)


def test_ways_are_found_once(decoder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found, taken = Ways("mkl", rough=True), []
    monkeypatch.setattr(costs_module, "fastest_ways", lambda decoder: found)
    monkeypatch.setattr(decoder, "prepare", taken.append)
    assert find_ways(decoder, "a") == found
    monkeypatch.setattr(costs_module, "fastest_ways", lambda decoder: Ways())
    assert find_ways(decoder, "a") == found
    assert find_ways(decoder, "another model") == Ways()
    assert taken == [found, found, Ways()]
    decoder.may_round = True
    assert find_ways(decoder, "a") == Ways()
    decoder.may_round = False
    paths = list(tmp_path.rglob("*.json"))
    assert len(paths) == 3
    for damaged in ("", "[]", '{"packed": true}'):
        for path in paths:
            path.write_text(damaged)
        assert find_ways(decoder, "a") == Ways()


def test_costs_are_measured_once(decoder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = find_costs(decoder, "a", Ways())
    (path,) = tmp_path.rglob("*.json")
    assert find_costs(decoder, "a", Ways()) == first
    written = json.loads(path.read_text())
    written["seconds"][0][0] = 0.0
    path.write_text(json.dumps(written))
    assert find_costs(decoder, "a", Ways()).seconds[0][0] == 0.0
    find_costs(decoder, "another model", Ways())
    find_costs(decoder, "a", Ways(rough=True))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    find_costs(decoder, "a", Ways())
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert len(list(tmp_path.rglob("*.json"))) == 4
    for damaged in ("", "[]", '{"num_rows": 3}'):
        path.write_text(damaged)
        assert find_costs(decoder, "a", Ways()).seconds[0][0] > 0
        assert json.loads(path.read_text())["num_rows"] == list(first.num_rows)


def test_costs_that_cannot_be_kept_are_measured_all_the_same(decoder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert find_costs(decoder, "a", Ways()).seconds[0][0] > 0
