import json
from dataclasses import replace

import jiwer
import numpy as np
import pytest
import soundfile

from leapasr.audio import SAMPLE_RATE
from leapasr.data.manifests import read_manifest
from leapasr.decoding import DecodingOptions
from leapasr.evaluation.evaluate import compare, evaluate, write_hypotheses, write_reports
from leapasr.evaluation.scoring import count_errors, word_error_rate, word_error_rate_difference
from leapasr.text import Normalizer
from leapasr.transcriber import load

PLAIN, WHISPER = Normalizer("plain"), Normalizer("whisper_english")
REFERENCES = ["The cat sat on the mat.", "a b c", "one", "x y z w", "", "hello there world"]
HYPOTHESES = ["the cat sat on mat", "a x c d", "two", "", "noise here", "Hello, there world!"]


def test_errors_counted_by_hand():
    errors = count_errors(REFERENCES, HYPOTHESES, PLAIN)
    assert errors.num_words_N.tolist() == [6, 3, 1, 4, 0, 3]
    assert errors.substitutions_N.tolist() == [0, 1, 1, 0, 0, 0]
    assert errors.deletions_N.tolist() == [1, 0, 0, 4, 0, 0]
    assert errors.insertions_N.tolist() == [0, 1, 0, 0, 2, 0]
    assert errors.rate == 10 / 17


def test_errors_are_those_of_jiwer():
    rng = np.random.default_rng(0)
    words = list("abcde")
    references = [" ".join(rng.choice(words, rng.integers(1, 15))) for _ in range(60)]
    hypotheses = [" ".join(rng.choice(words, rng.integers(0, 15))) for _ in range(60)]
    assert count_errors(references, hypotheses, PLAIN).rate == pytest.approx(jiwer.wer(references, hypotheses))


def test_normalisers_differ_where_they_should():
    assert count_errors(["it's 20 pounds"], ["it is twenty pounds"], WHISPER).rate == 0
    assert count_errors(["it's 20 pounds"], ["it is twenty pounds"], PLAIN).rate == 1


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [(["a"], [], "0 hypotheses for 1 references"), (["", "?"], ["a", "b"], "2 utterances hold no word")],
)
def test_what_cannot_be_scored(references, hypotheses, message):
    with pytest.raises(ValueError, match=message):
        count_errors(references, hypotheses, PLAIN)


def random_errors(rates, num_utterances=300, seed=1):
    """A system with a word error rate of about `rates` on utterances of 10 words, one substitution a word at most."""
    rng = np.random.default_rng(seed)
    references = [" ".join(["a"] * 10)] * num_utterances
    drawn = rng.random((num_utterances, 10))
    return [
        count_errors(references, [" ".join("b" if x < rate else "a" for x in row) for row in drawn], PLAIN)
        for rate in rates
    ]


def test_interval_is_that_of_the_binomial():
    (errors,) = random_errors([0.2])
    value, low, high = word_error_rate(errors)
    half_width = 1.96 * (value * (1 - value) / 3000) ** 0.5
    assert value == errors.rate
    assert low == pytest.approx(value - half_width, abs=0.003)
    assert high == pytest.approx(value + half_width, abs=0.003)
    assert word_error_rate(errors) == (value, low, high)
    assert word_error_rate(errors, seed=1) != (value, low, high)
    narrow = word_error_rate(errors, confidence=0.5)
    assert low < narrow.low < value < narrow.high < high


def test_paired_interval_is_narrower_than_unpaired():
    first, second = random_errors([0.20, 0.22])
    value, low, high = word_error_rate_difference(first, second)
    assert value == pytest.approx(second.rate - first.rate)
    assert 0 < low < value < high
    assert high - low < 0.6 * (word_error_rate(first).high - word_error_rate(first).low)
    assert word_error_rate_difference(first, first) == (0, 0, 0)


def test_pairing_needs_the_same_references():
    first = count_errors(["a b", "c"], ["a b", "c"], PLAIN)
    second = count_errors(["a", "b c"], ["a", "b c"], PLAIN)
    with pytest.raises(ValueError, match="different references"):
        word_error_rate_difference(first, second)


@pytest.fixture(scope="module")
def transcriber(tiny_model_folder):
    return load(tiny_model_folder, device="cpu")


@pytest.fixture(scope="module")
def cuts(tmp_path_factory, babble):
    """Sound of 0.4 to 3.3 seconds (up to three chunks), one silence, one file that is no audio."""
    folder = tmp_path_factory.mktemp("test-set")
    seconds = [0.4, 3.3, 1.0, 0.7, 2.0, 1.2]
    lines = []
    for index, duration in enumerate(seconds):
        samples = babble(duration, seed=index) * (index != 3)
        soundfile.write(folder / f"{index}.wav", samples, SAMPLE_RATE)
        lines.append({"id": f"u{index}", "audio": f"{index}.wav", "duration": duration, "text": "The cat sat."})
    (folder / "bad.wav").write_bytes(b"no audio")
    lines.append({"id": "bad", "audio": "bad.wav", "duration": 1.0, "text": "dog"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_manifest(folder / "manifest.jsonl").cuts


STRATEGIES = [
    DecodingOptions(strategy="verify", draft_length="full"),
    DecodingOptions(strategy="autoregressive"),
    DecodingOptions(strategy="threshold", threshold=0.0, num_heads=3),
    "ctc",
]


@pytest.fixture(scope="module")
def reports(transcriber, cuts):
    done = []
    reports = evaluate(transcriber, cuts, STRATEGIES, batch_size=2, problems=["line 9"], progress=done.append)
    assert sum(done) == pytest.approx(8.6)
    return reports


def test_reports_agree_with_transcribe(transcriber, cuts, reports):
    for options, report in zip(STRATEGIES[:3], reports[:3], strict=True):
        assert [utterance.id for utterance in report.utterances] == [f"u{index}" for index in range(6)]
        for utterance in report.utterances:
            alone = transcriber.transcribe(cuts[utterance.id].load_audio()[0], options)
            assert utterance.tokens == alone.tokens
            assert utterance.hypothesis == alone.text
            assert utterance.calls == alone.decoder_calls
            assert utterance.reference == "The cat sat."


def test_figures_of_a_report(reports):
    verify, autoregressive, threshold, ctc = reports
    for report in reports:
        assert report.num_utterances == 6
        assert report.num_words == 18
        assert report.audio_seconds == pytest.approx(8.6)
        assert report.problems[0] == "line 9"
        assert report.problems[1].startswith("bad: its audio cannot be read")
        assert report.wer_low <= report.wer <= report.wer_high
        texts = [utterance.hypothesis for utterance in report.utterances]
        references = ["the cat sat"] * 6
        assert report.wer == pytest.approx(jiwer.wer(references, [WHISPER(text) for text in texts]))
        assert report.wer_plain == pytest.approx(jiwer.wer(references, [PLAIN(text) for text in texts]))
        assert report.decoder_calls == sum(utterance.calls for utterance in report.utterances)
        assert report.decoder_calls == sum(report.accept_lengths.values())
        assert report.tokens == sum(length * count for length, count in report.accept_lengths.items())
        assert report.seconds == pytest.approx(report.encoder_seconds + report.decoder_seconds)
        assert report.rtfx == pytest.approx(report.audio_seconds / report.seconds)
        assert report.ctc_wer == verify.ctc_wer
        assert (report.batch_size, report.dtype, report.device) == (2, "float32", "cpu")
    for report in (verify, autoregressive, threshold):
        assert report.tokens_per_call == pytest.approx(report.tokens / report.decoder_calls)
        assert report.call_reduction == pytest.approx(autoregressive.decoder_calls / report.decoder_calls)
    assert autoregressive.decoder_calls == autoregressive.tokens
    assert [report.num_heads for report in reports] == [4, 1, 3, 0]
    assert autoregressive.identical_to_autoregressive == verify.identical_to_autoregressive == 1
    assert verify.call_reduction > 1
    pairs = zip(threshold.utterances, autoregressive.utterances, strict=True)
    num_identical = sum(mine.tokens == theirs.tokens for mine, theirs in pairs)
    assert 1 <= num_identical < 6  # unverified random heads are wrong; the silent utterance stays as it is
    assert threshold.identical_to_autoregressive == num_identical / 6
    assert threshold.threshold == 0.0


def test_silence_takes_no_call(reports):
    assert (reports[0].utterances[3].hypothesis, reports[0].utterances[3].calls) == ("", 0)


def test_greedy_ctc(transcriber, cuts, reports):
    texts = [transcriber.ctc_text(cuts[f"u{index}"].load_audio()[0]) for index in range(6)]
    assert any(texts)
    ctc = reports[3]
    assert [utterance.hypothesis for utterance in ctc.utterances] == texts
    assert (ctc.strategy, ctc.decoder_calls, ctc.tokens_per_call, ctc.call_reduction) == ("ctc", 0, None, None)
    assert ctc.wer == reports[0].ctc_wer == pytest.approx(count_errors(["the cat sat"] * 6, texts, WHISPER).rate)


def test_changes_are_paired(reports):
    verify, autoregressive, _, ctc = reports
    assert (verify.wer_change, verify.wer_change_low, verify.wer_change_high) == (0, 0, 0)
    value, low, high = compare(autoregressive, ctc)
    assert (ctc.wer_change, ctc.wer_change_low, ctc.wer_change_high) == (value, low, high)
    assert value == pytest.approx(ctc.wer - autoregressive.wer)
    assert low < value < high
    with pytest.raises(ValueError, match=r"different utterances .* 1 are in one alone \['u5'\]"):
        compare(verify, replace(verify, utterances=verify.utterances[:5]))


def test_written_reports(reports, tmp_path):
    write_reports(reports, tmp_path / "new" / "four.json")
    write_reports(reports[:1], tmp_path / "one.json")
    one = json.loads((tmp_path / "one.json").read_text())
    assert json.loads((tmp_path / "new" / "four.json").read_text())[0] == one
    expected = (
        "wer wer_low wer_high wer_plain num_utterances num_words audio_seconds decoder_calls tokens tokens_per_call"
    )
    expected += " call_reduction identical_to_autoregressive encoder_seconds decoder_seconds seconds rtfx strategy"
    expected += " threshold num_heads batch_size dtype ctc_wer accept_lengths problems"
    assert set(expected.split()) <= set(one)
    write_hypotheses(reports[:1], tmp_path / "hypotheses.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "hypotheses.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"u{index}" for index in range(6)]
    assert set(lines[0]) == {"id", "reference", "hypothesis", "tokens", "calls"}


def test_the_comparison_has_the_same_limits(transcriber, cuts):
    (report,) = evaluate(transcriber, cuts, [DecodingOptions(max_tokens=3)])
    assert report.identical_to_autoregressive == 1
    assert report.num_truncated["length"] > 0


def test_what_cannot_be_evaluated(transcriber, cuts):
    with pytest.raises(ValueError, match="no strategy"):
        evaluate(transcriber, cuts, [])
    with pytest.raises(ValueError, match="unknown strategy 'beam'"):
        evaluate(transcriber, cuts, ["beam"])
    with pytest.raises(ValueError, match="num_heads 9 asked for, but the model has 4"):
        evaluate(transcriber, cuts, [DecodingOptions(num_heads=9)])
    with pytest.raises(ValueError, match=r"no utterance has audio that can be read: bad: "):
        evaluate(transcriber, cuts.filter(lambda cut: cut.id == "bad"), STRATEGIES)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(transcriber, cuts, STRATEGIES, batch_size=0)


def test_reports_are_data(reports):
    assert replace(reports[0], wer=0.5).figures()["wer"] == 0.5
