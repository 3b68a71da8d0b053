"""Timing side by side: the rows are of what ran, and every system writes what it should."""

import json

import numpy as np
import pytest
import soundfile
from test_decoding import EOS, make_prompts
from typer.testing import CliRunner

from leapasr.audio import SAMPLE_RATE
from leapasr.cli import app
from leapasr.decoding import DecodingOptions, SpeechLlamaDecoder, decode
from leapasr.evaluation import bench as timing
from leapasr.evaluation.bench_report import as_markdown, bench_table, draw, write_rows
from leapasr.evaluation.peer_process import FasterWhisperModel
from leapasr.evaluation.peers import FasterWhisper, generate
from leapasr.evaluation.systems import GENERATE, Generate, Leapasr, System, build_systems
from leapasr.transcriber import load

BATCH_SIZES = [1, 3]


@pytest.fixture(scope="module")
def transcriber(tiny_model_folder):
    return load(tiny_model_folder, device="cpu")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory, babble):
    """Five utterances, one of them longer than the tiny model hears at once, and one file that is no audio."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "bad.wav").write_bytes(b"no audio")
    lines = [{"id": "bad", "audio": "bad.wav", "duration": 1.0, "text": "Gone."}]
    for index, seconds in enumerate([0.6, 2.9, 0.9, 1.1, 0.7]):
        soundfile.write(folder / f"{index}.wav", babble(seconds, seed=index), SAMPLE_RATE)
        lines.append({"id": f"u{index}", "audio": f"{index}.wav", "duration": seconds, "text": "The cat sat."})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    return path


@pytest.fixture(scope="module")
def utterances(manifest):
    return timing.read_utterances([manifest])


@pytest.fixture(scope="module")
def rows(transcriber, utterances):
    return timing.bench(transcriber, build_systems(transcriber), utterances, batch_sizes=BATCH_SIZES, rounds=2)


@pytest.mark.parametrize("num_rows", [1, 5])
def test_generate_takes_batches_of_uneven_prompts(build_tiny_model, num_rows):
    model = build_tiny_model()
    prompts = make_prompts(num_rows, seed=5)
    options = DecodingOptions(strategy="autoregressive", max_tokens=25, max_repeats=None)
    expected = decode(SpeechLlamaDecoder(model), prompts, options)
    written = generate(model, prompts, max_tokens=25)
    for row, result in zip(written, expected, strict=True):
        assert row == result.tokens + [EOS] * (result.truncated is None)


def test_all_that_emits_head_1s_tokens_writes_the_same(rows):
    assert {row.batch_size for row in rows} == set(BATCH_SIZES)
    for row in rows:
        same = row.same_tokens_as_generate
        if row.system in (GENERATE, "hf/prompt lookup", "leapasr/autoregressive", "leapasr/verify"):
            assert same == 1, row.label
        elif row.system == "leapasr/ctc":
            assert same < 1, row.label
    assert len({row.wer for row in rows if row.same_tokens_as_generate == 1}) == 1


def test_rows_hold_together(rows, utterances):
    labels = [row.label for row in rows if row.batch_size == 3]
    assert labels == ["leapasr/ctc", "leapasr/autoregressive", "leapasr/verify mtp", "leapasr/verify both",
                      "leapasr/threshold 0.9", GENERATE]  # fmt: skip
    assert [row.label for row in rows if row.batch_size == 1] == [*labels, "hf/prompt lookup"]
    assert rows[0].audio_seconds == pytest.approx(sum(map(len, utterances.samples)) / SAMPLE_RATE)
    for row in rows:
        assert row.num_utterances == 5
        assert 0 < row.seconds_low <= row.seconds <= row.seconds_high
        assert row.rtfx == pytest.approx(row.audio_seconds / row.seconds)
        assert row.encoder_seconds + row.decoder_seconds < row.seconds_high * 1.01
        assert row.peak_memory_mb is None or row.peak_memory_mb > 50
        is_ours = row.system.startswith("leapasr/") and row.system != "leapasr/ctc"
        assert (row.overhead is not None) == is_ours
        if is_ours:
            assert 0 < row.overhead < 1
            assert row.tokens_per_call >= 1
            assert (row.tokens_per_call > 1) >= (row.system == "leapasr/verify")
        same_size = [other for other in rows if other.batch_size == row.batch_size]
        generated = next(other for other in same_size if other.system == GENERATE)
        if row.system != "leapasr/ctc":
            assert row.speedup_vs_generate == pytest.approx(generated.decoder_seconds / row.decoder_seconds)
        assert row.total_speedup_vs_generate == pytest.approx(generated.seconds / row.seconds)


def test_the_decoder_is_left_as_it_was(transcriber, rows):
    assert not {"call", "logits", "draft_logits"} & set(vars(transcriber.decoder))


def test_costs_are_measured_before_the_first_turn(tiny_model_folder, utterances, monkeypatch):
    """Those of a worker's cores, too: a turn within which they are measured would be longer for it."""
    transcriber = load(tiny_model_folder, device="cpu")
    known, run = [], Leapasr.run

    def watched(system, *args):
        known.append(set(transcriber._costs))
        return run(system, *args)

    monkeypatch.setattr(Leapasr, "run", watched)
    systems = [Leapasr(transcriber, DecodingOptions(strategy="autoregressive")), Generate(transcriber)]
    timing.bench(transcriber, systems, utterances, batch_sizes=[1, 4], rounds=1)
    assert len(known) == 4
    assert all(each == set(transcriber._costs) for each in known)


def test_systems_take_turns_after_one_that_does_not_count(transcriber, utterances):
    turns = []

    class Recorded(System):
        def __init__(self, name, *, batched=True):
            self.name, self.batched = name, batched
            self.inner = Generate(transcriber)

        def run(self, samples, batch_size):
            turns.append((self.name, batch_size))
            return self.inner.run(samples, batch_size)

    systems = [Recorded(GENERATE), Recorded("b", batched=False)]
    done = []
    found = timing.bench(
        transcriber, systems, utterances, batch_sizes=[1, 2], rounds=2, progress=lambda amount: done.append(amount)
    )
    assert turns == [(GENERATE, 1), ("b", 1), (GENERATE, 2)] * 3
    assert [(row.system, row.batch_size) for row in found] == turns[:3]
    assert sum(done) == timing.num_turns(systems, [1, 2], 2) == len(turns)


def test_a_report_to_keep(rows, tmp_path):
    write_rows(rows, tmp_path / "deep" / "rows.json")
    written = json.loads((tmp_path / "deep" / "rows.json").read_text())
    assert [row["system"] for row in written] == [row.system for row in rows]
    assert bench_table(rows).row_count == len(rows)
    pytest.importorskip("matplotlib")
    for path in draw(rows, tmp_path / "plots"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_table_as_markdown(rows):
    header, line, *body = as_markdown(bench_table(rows)).splitlines()
    assert set(line) == {"|", "-"}
    assert header.split("|")[1].strip() == "system"
    assert [cells.split("|")[1].strip() for cells in body] == [row.label for row in rows]
    assert {cells.count("|") for cells in (header, line, *body)} == {13}


def test_from_the_command_line(tiny_model_folder, manifest, tmp_path):
    arguments = ["bench", str(manifest), "--model", str(tiny_model_folder), "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--repeat", "1", "--batch-size", "2", "--json", f"{tmp_path}/r.json"])
    assert result.exit_code == 1  # a file is no audio
    assert "bad: its audio cannot be read" in result.stderr
    rows = json.loads((tmp_path / "r.json").read_text())
    assert {row["batch_size"] for row in rows} == {2}
    assert {row["num_utterances"] for row in rows} == {5}
    assert {row["system"] for row in rows} >= {GENERATE, "leapasr/ctc", "leapasr/verify"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "1,x"], "batch sizes are whole numbers from 1 on"),
        (["--batch-size", "0"], "batch sizes are whole numbers from 1 on"),
        (["--peer", "tiny.en"], "a peer is NAME=FOLDER"),
        (["--peer", "tiny.en="], "a peer is NAME=FOLDER"),
        (["--model", "nowhere/at-all"], "nowhere/at-all"),
    ],
)
def test_bad_arguments(manifest, arguments, message):
    result = CliRunner().invoke(app, ["bench", str(manifest), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_folder_that_is_no_whisper(tmp_path):
    pytest.importorskip("faster_whisper")
    with pytest.raises(ValueError, match="holds no model that faster-whisper can read"):
        FasterWhisper("tiny", tmp_path)


def test_batches_of_faster_whisper_keep_utterances_apart(monkeypatch):
    """Its pipeline is given one recording with a clip an utterance; a stand-in tells what it was given back."""

    class Segment:
        def __init__(self, text, seek):
            self.text, self.seek = text, seek

    class Pipeline:
        def transcribe(self, recording, *, batch_size, clip_timestamps, **options):
            assert batch_size == 2
            heard = [recording[round(clip["start"] * SAMPLE_RATE) : round(clip["end"] * SAMPLE_RATE)]
                     for clip in clip_timestamps]  # fmt: skip
            segments = [
                Segment(f" {half} {piece[0]:.0f} {len(piece)} ", int(clip["start"] * 100))
                for clip, piece in zip(clip_timestamps, heard, strict=True)
                for half in "ab"
            ]
            return segments, None

    whisper = FasterWhisperModel.__new__(FasterWhisperModel)
    whisper.language = "en"
    whisper.pipeline = Pipeline()
    whisper.model = type("Model", (), {"frames_per_second": 100})()
    samples = [np.full(length, value, np.float32) for value, length in enumerate([8000, 16000, 40001])]
    texts = whisper.transcribe(samples, batch_size=2)
    assert texts == ["a 0 8000 b 0 8000", "a 1 16000 b 1 16000", "a 2 40001 b 2 40001"]
