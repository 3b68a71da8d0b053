"""Beam search against the textbook's, on random weights: tokens, scores, and how few calls they take."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoding import EOS, MAX_TOKENS, V, corruption, make_prompts, outcomes, scripted, take

from leapasr.decoding import DecodingOptions, SpeechLlamaDecoder, build_loop, decode
from leapasr.decoding.drafts import Reading, build_drafter
from leapasr.decoding.reference import beam_reference, decode_reference

NUM_ROWS = 7
BEAM = DecodingOptions(strategy="beam", beam_size=3, nbest=3, max_repeats=4)
GREEDY = DecodingOptions(strategy="autoregressive", max_repeats=4)
BOUNDS = [MAX_TOKENS] * NUM_ROWS


@pytest.fixture(scope="module")
def decoder(build_tiny_model):
    return SpeechLlamaDecoder(build_tiny_model())


@pytest.fixture(scope="module")
def prompts():
    return make_prompts(NUM_ROWS)


@pytest.fixture(scope="module")
def greedy(decoder, prompts):
    return decode_reference(decoder, prompts, GREEDY, max_tokens=BOUNDS)


@pytest.fixture(scope="module")
def textbook(decoder, prompts):
    return beam_reference(decoder, prompts, BEAM, max_tokens=BOUNDS)


def same(results, expected) -> None:
    """The same hypotheses in the same order, with the same scores."""
    for result, hypotheses in zip(results, expected, strict=True):
        found = [(hypothesis.tokens, hypothesis.truncated) for hypothesis in result.hypotheses]
        assert found == [(hypothesis.tokens, hypothesis.truncated) for hypothesis in hypotheses]
        scores = [hypothesis.score for hypothesis in hypotheses]
        assert [hypothesis.score for hypothesis in result.hypotheses] == pytest.approx(scores, abs=1e-6)
        assert (result.tokens, result.truncated) == found[0]


def test_the_random_model_is_worth_searching(textbook, greedy):
    """Ended and cut hypotheses, and a best one that greedy decoding does not find."""
    assert {hypothesis.truncated for hypotheses in textbook for hypothesis in hypotheses} >= {None, "length"}
    assert sum(best.tokens != row.tokens for (best, *_), row in zip(textbook, greedy, strict=True)) > NUM_ROWS / 2
    assert len({len(hypothesis.tokens) for hypotheses in textbook for hypothesis in hypotheses}) > 5


@pytest.mark.parametrize("num_drafts", [0, 1, 5, 40])
@pytest.mark.parametrize("kind", ["right", "wrong", "random", "mixed", "end inside"])
def test_the_textbook_search_whatever_the_drafts(decoder, prompts, greedy, textbook, kind, num_drafts):
    drafters = scripted(greedy, kind, num_drafts)
    same(decode(decoder, prompts, BEAM, max_tokens=BOUNDS, drafters=drafters), textbook)


@pytest.mark.parametrize("drafts", ["mtp", "ctc", "both"])
@pytest.mark.parametrize("kind", ["right", "mixed"])
def test_the_textbook_search_from_every_source(decoder, prompts, greedy, textbook, kind, drafts):
    options, drafters = replace(BEAM, drafts=drafts), []
    for row, result in enumerate(greedy):
        corrupt = corruption(kind, row)
        tokens = [corrupt(token, j) for j, token in enumerate(result.tokens)]
        drafters.append(build_drafter(options, Reading(tokens, [0.9] * len(tokens)), end_token=EOS))
    same(decode(decoder, prompts, options, max_tokens=BOUNDS, drafters=drafters), textbook)


@pytest.mark.parametrize("head_type", ["projection", "latent", "residual", "sequential"])
def test_the_textbook_search_with_every_head_type(build_tiny_model, head_type):
    decoder = SpeechLlamaDecoder(build_tiny_model(head_type=head_type, num_heads=4))
    prompts = make_prompts(3, seed=1)
    expected = beam_reference(decoder, prompts, BEAM, max_tokens=[12] * 3)
    same(decode(decoder, prompts, BEAM, max_tokens=[12] * 3), expected)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    num_rows=st.integers(1, 4),
    beam_size=st.integers(1, 6),
    max_tokens=st.integers(1, 9),
    max_repeats=st.sampled_from([2, 3, None]),
    data=st.data(),
)
def test_any_beam_under_any_guards(decoder, seed, num_rows, beam_size, max_tokens, max_repeats, data):
    prompts, bounds = make_prompts(num_rows, seed), [max_tokens + row for row in range(num_rows)]
    nbest = data.draw(st.integers(1, beam_size))
    options = DecodingOptions(strategy="beam", beam_size=beam_size, nbest=nbest, max_repeats=max_repeats)
    expected = beam_reference(decoder, prompts, options, max_tokens=bounds)
    greedy = decode_reference(decoder, prompts, options, max_tokens=bounds)
    results = decode(decoder, prompts, options, max_tokens=bounds, drafters=scripted(greedy, "mixed"))
    same(results, expected)
    for result in results:  # no text twice, unless one was cut to the other
        whole = [tuple(each.tokens) for each in result.hypotheses if each.truncated is None]
        assert len(set(whole)) == len(whole)
        scores = [hypothesis.score for hypothesis in result.hypotheses]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_a_beam_of_one_is_greedy(decoder, prompts, greedy, threshold):
    options = replace(BEAM, beam_size=1, nbest=1, threshold=threshold)
    results = decode(decoder, prompts, options, max_tokens=BOUNDS)
    assert outcomes(results) == outcomes(greedy)
    for result, reference in zip(results, greedy, strict=True):
        assert result.log_probabilities == pytest.approx(reference.log_probabilities, abs=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.1])
def test_a_beam_of_one_with_a_threshold_is_threshold_decoding(decoder, prompts, threshold):
    options = replace(BEAM, beam_size=1, nbest=1, threshold=threshold)
    greedy = DecodingOptions(strategy="threshold", threshold=threshold, max_repeats=4)
    results, expected = (decode(decoder, prompts, each, max_tokens=BOUNDS) for each in (options, greedy))
    assert outcomes(results) == outcomes(expected)
    assert [result.num_calls for result in results] == [result.num_calls for result in expected]
    assert len({len(result.trace) / result.num_calls for result in results}) > 1


def test_no_head_is_trusted_above_a_threshold_that_none_reaches(decoder, prompts, textbook):
    same(decode(decoder, prompts, replace(BEAM, threshold=1.0), max_tokens=BOUNDS), textbook)


def test_scores_of_a_beam_that_trusts_heads_are_theirs(decoder, prompts):
    """Each token's log-probability under the head that was asked: the trace adds up to the score."""
    results = decode(decoder, prompts, replace(BEAM, threshold=0.05), max_tokens=BOUNDS)
    sources = set()
    for result in results:
        values = [
            record.log_probability
            if record.log_probability is not None
            else torch.tensor(record.draft_probability, dtype=torch.float64).log().item()
            for record in result.trace
        ]
        assert sum(values) == pytest.approx(result.hypotheses[0].score, abs=1e-6)
        sources |= {record.source for record in result.trace}
    assert {"head1", "head2", "head3"} <= sources


def test_log_probabilities_add_up_to_the_score(decoder, prompts, greedy):
    for result in decode(decoder, prompts, BEAM, max_tokens=BOUNDS, drafters=scripted(greedy, "mixed")):
        total = sum(record.log_probability for record in result.trace)
        assert total == pytest.approx(result.hypotheses[0].score, abs=1e-6)
        assert len(result.trace) == len(result.tokens) + (result.truncated is None) or result.truncated == "repetition"
        steps = [record.step for record in result.trace]
        assert set(steps) <= set(range(result.num_calls))


@pytest.mark.parametrize("num_rows", range(1, NUM_ROWS + 1))
def test_a_batch_gives_each_row_what_it_gets_alone(decoder, prompts, textbook, num_rows):
    same(decode(decoder, take(prompts, range(num_rows)), BEAM, max_tokens=BOUNDS[:num_rows]), textbook[:num_rows])


def test_rows_that_join_late(decoder, prompts, textbook):
    loop, results, order = build_loop(decoder, BEAM), {}, []
    for group in ([0, 1, 2], [3], [4, 5, 6]):
        order += loop.add(take(prompts, group), max_tokens=[MAX_TOKENS] * len(group))
        for _ in range(3):
            results |= loop.step()
    while loop:
        results |= loop.step()
    same([results[key] for key in order], textbook)


def test_hypotheses_are_aligned_by_the_characters_of_their_tokens(decoder, prompts, textbook):
    asked = set()

    def spell(token):
        asked.add(token)
        return [token // 8, token % 8]

    results = decode(decoder, prompts, BEAM, max_tokens=BOUNDS, spell=spell)
    same(results, textbook)
    assert asked >= {token for result in results for token in result.tokens[1:-1]}


@pytest.mark.parametrize("num_steps", range(4))
def test_rows_that_are_dropped_leave_the_others_what_they_get_alone(decoder, prompts, textbook, num_steps):
    """Their several lines in the cache go with them."""
    loop, results = build_loop(decoder, BEAM), {}
    keys = loop.add(prompts, max_tokens=BOUNDS)
    for _ in range(num_steps):
        results |= loop.step()
    kept = [row for row, key in enumerate(keys) if row not in (1, 2, 5) or key in results]
    loop.drop([keys[row] for row in (1, 2, 5)])
    while loop:
        results |= loop.step()
    assert sorted(results) == [keys[row] for row in kept]
    same([results[keys[row]] for row in kept], [textbook[row] for row in kept])


def test_a_beam_of_one_with_right_drafts_takes_one_call(decoder, prompts, greedy):
    options = replace(BEAM, beam_size=1, nbest=1)
    results = decode(decoder, prompts, options, max_tokens=BOUNDS, drafters=scripted(greedy, "right", 40))
    assert {result.num_calls for result in results} == {1}


@pytest.mark.parametrize("kind", ["right", "end inside"])
def test_nothing_is_fed_that_could_not_be_emitted(build_tiny_model, prompts, greedy, kind):
    """End-of-text ends a hypothesis, and what lies behind the token bound is of no use."""
    decoder, fed = SpeechLlamaDecoder(build_tiny_model()), []
    embed = decoder.embed
    decoder.embed = lambda tokens_BW, places_BW: fed.append(tokens_BW) or embed(tokens_BW, places_BW)
    bounds = [6] * NUM_ROWS
    decode(decoder, prompts, BEAM, max_tokens=bounds, drafters=scripted(greedy, kind, 40))
    assert max(tokens_BW.shape[1] for tokens_BW in fed) <= 5
    assert not any((tokens_BW == EOS).any() for tokens_BW in fed)


def test_in_float32(build_tiny_model):
    decoder = SpeechLlamaDecoder(build_tiny_model(dtype=torch.float32))
    prompts = make_prompts(4, seed=2, dtype=torch.float32)
    expected = beam_reference(decoder, prompts, BEAM, max_tokens=[12] * 4)
    results = decode(decoder, prompts, BEAM, max_tokens=[12] * 4)
    assert [[h.tokens for h in result.hypotheses] for result in results] == [
        [h.tokens for h in hypotheses] for hypotheses in expected
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beam_size": 0}, "beam_size must be at least 1, got 0"),
        ({"beam_size": 2, "nbest": 3}, "nbest must be from 1 to the beam's size 2, got 3"),
        ({"nbest": 0}, "nbest must be from 1 to the beam's size 4, got 0"),
        ({"threshold": 1.5}, "threshold is a probability from 0 to 1, got 1.5"),
        ({"threshold": 0.5, "drafts": "ctc"}, "have no meaning for a beam with threshold 0.5"),
        ({"strategy": "verify", "beam_size": 4}, "beam_size 4 and nbest None have no meaning for strategy 'verify'"),
    ],
)
def test_options_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        DecodingOptions(**{"strategy": "beam"} | fields)


def test_a_beam_wider_than_the_vocabulary(decoder, prompts):
    options = replace(BEAM, beam_size=V + 10, nbest=2)
    few, bounds = take(prompts, [0, 1]), [3, 3]
    same(decode(decoder, few, options, max_tokens=bounds), beam_reference(decoder, few, options, max_tokens=bounds))
