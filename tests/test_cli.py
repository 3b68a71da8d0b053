"""The command line on a tiny random model: what it writes, where, and the exit code and message of every bad input."""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

import leapasr
from leapasr.audio import SAMPLE_RATE, read_audio
from leapasr.cli import app
from leapasr.decoding import DecodingOptions
from leapasr.decoding.costs import FREE
from leapasr.model.processing import SpeechLlamaProcessor
from leapasr.transcriber import load

SPREAD_IDS = ["u0", "u2", "u4"]


@pytest.fixture(scope="module")
def transcriber(tiny_model_folder):
    return load(tiny_model_folder, device="cpu")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory, babble) -> Path:
    """``a.flac``, 2.5 s, and ``deep/b.wav``, 1 s."""
    folder = tmp_path_factory.mktemp("recordings")
    (folder / "deep").mkdir()
    soundfile.write(folder / "a.flac", babble(2.5, seed=1), SAMPLE_RATE)
    soundfile.write(folder / "deep" / "b.wav", babble(1, seed=5), SAMPLE_RATE)
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory, babble) -> Path:
    """Six utterances of 0.5 to 1 s, the last for training."""
    folder = tmp_path_factory.mktemp("test-set")
    lines = []
    for index in range(6):
        seconds = 0.5 + index / 10
        soundfile.write(folder / f"{index}.wav", babble(seconds, seed=index), SAMPLE_RATE)
        use = "train" if index == 5 else "test"
        lines.append({"id": f"u{index}", "audio": f"{index}.wav", "duration": seconds, "text": "Oh no.", "use": use})
    return write_lines(folder / "manifest.jsonl", [json.dumps(line) for line in lines])


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def run(tiny_model_folder):
    """Runs a command with the tiny model on the CPU: `run("transcribe", file, "--format", "srt")`."""

    def invoke(command: str, *arguments: object):
        model = ["--model", str(tiny_model_folder), "--device", "cpu"]
        return CliRunner().invoke(app, [command, *map(str, arguments), *model])

    return invoke


def complaints(result) -> list[str]:
    """What the lines that begin with the program's name say; no traceback may be there."""
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return [line.removeprefix("leapasr: ") for line in result.stderr.splitlines() if line.startswith("leapasr: ")]


def test_text_and_summary(run, transcriber, recordings):
    expected = transcriber.transcribe(recordings / "deep" / "b.wav", DecodingOptions(drafts="mtp"))
    result = run("transcribe", recordings / "deep" / "b.wav", "--drafts", "mtp")
    assert result.exit_code == 0
    assert result.stdout == f"{expected.text}\n" != "\n"
    assert "1 file, 1.0 s of audio" in result.stderr
    fewer = f"{expected.decoder_calls} decoder calls, autoregressive {expected.num_tokens} ("
    assert fewer in result.stderr
    assert expected.decoder_calls < expected.num_tokens
    plain = run("transcribe", recordings / "deep" / "b.wav", "--strategy", "autoregressive")
    assert plain.stdout == result.stdout
    assert f"{expected.num_tokens} decoder calls, autoregressive {expected.num_tokens} (" in plain.stderr


def test_what_a_machine_is_measured_for_once_is_told_apart(run, recordings, monkeypatch):
    clock, ahead = time.perf_counter, 0

    def measured(decoder, description, ways, spend):
        nonlocal ahead
        ahead += 1000
        spend(1000.0)
        return FREE

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + ahead)
    monkeypatch.setattr("leapasr.transcriber.find_costs", measured)
    summary = run("transcribe", recordings / "deep" / "b.wav").stderr
    told = re.search(r"in (\d+\.\d+) s .*; (\d+\.\d+) s more, this once, to find out what is fastest", summary)
    assert told, summary
    seconds, measuring = map(float, told.groups())
    assert measuring >= 1000 > seconds
    monkeypatch.setattr("leapasr.transcriber.find_costs", lambda *_: FREE)
    assert "this once" not in run("transcribe", recordings / "deep" / "b.wav").stderr


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--strategy", "threshold", "--threshold", "0"], DecodingOptions(strategy="threshold", threshold=0.0)),
        (
            ["--strategy", "threshold", "--threshold", "0", "--heads", "2"],
            DecodingOptions(strategy="threshold", threshold=0.0, num_heads=2),
        ),
        (["--heads", "2"], DecodingOptions(num_heads=2)),
        (["--drafts", "ctc"], DecodingOptions(drafts="ctc")),
        (["--drafts", "both"], DecodingOptions(drafts="both")),
        (["--draft-length", "full"], DecodingOptions(draft_length="full")),
        (["--strategy", "relaxed", "--ratio", "0.3"], DecodingOptions(strategy="relaxed", ratio=0.3)),
        (["--strategy", "beam", "--beam-size", "2"], DecodingOptions(strategy="beam", beam_size=2)),
        (["--strategy", "beam", "--threshold", "0.5"], DecodingOptions(strategy="beam", threshold=0.5)),
    ],
)
def test_strategies(run, transcriber, recordings, arguments, options):
    result = run("transcribe", recordings / "a.flac", "--format", "json", "--batch-size", 2, *arguments)
    assert result.exit_code == 0
    said, expected = json.loads(result.stdout), transcriber.transcribe(recordings / "a.flac", options)
    assert (said["text"], said["decoder_calls"]) == (expected.text, expected.decoder_calls)
    assert [segment["tokens"] for segment in said["segments"]] == [segment.tokens for segment in expected.segments]


def test_the_best_texts_of_a_beam(run, transcriber, recordings):
    command = ["--strategy", "beam", "--beam-size", 3, "--nbest", 2, "--format", "json"]
    said = json.loads(run("transcribe", recordings / "a.flac", *command).stdout)
    for segment in said["segments"]:
        best, second = segment["nbest"]
        assert best["text"] == segment["text"]
        assert best["score"] >= second["score"]
    greedy = json.loads(run("transcribe", recordings / "a.flac", "--format", "json").stdout)
    assert all(segment["nbest"] == [] for segment in greedy["segments"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "beam", "--nbest", "2"], "2 texts of the same audio do not fit format 'txt': choose 'json'"),
        (
            ["--strategy", "beam", "--nbest", "5", "--format", "json"],
            "nbest must be from 1 to the beam's size 4, got 5",
        ),
        (["--nbest", "2", "--format", "json"], "nbest 2 have no meaning for strategy 'verify'"),
    ],
)
def test_best_texts_that_cannot_be_had(run, recordings, arguments, message):
    result = run("transcribe", recordings / "a.flac", *arguments)
    assert result.exit_code == 2
    assert message in complaints(result)[0]


def test_explanations(run, recordings):
    result = run("transcribe", recordings / "a.flac", "--explain")
    assert result.exit_code == 0
    assert "tokens by source: " in result.stdout
    assert "│" in result.stdout
    refused = run("transcribe", recordings / "a.flac", "--explain", "--format", "json")
    assert refused.exit_code == 2
    assert "not for format 'json'" in complaints(refused)[0]


def test_word_times_in_json_and_subtitles(run, recordings):
    segments = json.loads(run("transcribe", recordings / "a.flac", "--format", "json").stdout)["segments"]
    words = [word for segment in segments for word in segment["words"]]
    assert words
    assert all(0 <= word["start"] < word["end"] <= 2.5 for word in words)
    first = segments[0]["words"][0] if segments[0]["words"] else segments[0]
    srt = run("transcribe", recordings / "a.flac", "--format", "srt").stdout
    number, times, text, *_ = srt.splitlines()
    assert number == "1"
    assert first["text"].startswith(text)
    assert re.fullmatch(r"00:00:0\d,\d{3} --> 00:00:0\d,\d{3}", times)
    assert times.startswith(f"00:00:{first['start']:06.3f}".replace(".", ","))
    vtt = run("transcribe", recordings / "a.flac", "--format", "vtt").stdout
    assert vtt.startswith("WEBVTT\n\n" + times.replace(",", ".") + "\n")


def test_several_files_and_folders(run, transcriber, recordings, tmp_path):
    texts = {name: transcriber.transcribe(recordings / name).text for name in ("a.flac", "deep/b.wav")}
    printed = run("transcribe", recordings)
    assert printed.stdout == "".join(f"{recordings / name}: {text}\n" for name, text in texts.items())
    written = run("transcribe", recordings, "--output-dir", tmp_path / "out")
    assert (written.exit_code, written.stdout) == (0, "")
    assert (tmp_path / "out" / "a.txt").read_text() == f"{texts['a.flac']}\n"
    assert (tmp_path / "out" / "deep" / "b.txt").read_text() == f"{texts['deep/b.wav']}\n"


def test_all_formats_and_whispers_spelling_of_options(run, recordings, tmp_path):
    assert run("transcribe", recordings, "-f", "all", "-o", tmp_path / "out").exit_code == 0
    written = sorted(
        str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()
    )
    suffixes = ("json", "srt", "tsv", "txt", "vtt")
    assert written == [f"{name}.{suffix}" for name in ("a", "deep/b") for suffix in suffixes]
    for suffix in suffixes:
        single = run("transcribe", recordings / "a.flac", "--output_format", suffix).stdout
        together = (tmp_path / "out" / f"a.{suffix}").read_text()
        if suffix == "json":  # probabilities differ a little by what else is in the batch
            single, together = json.loads(single)["text"], json.loads(together)["text"]
        assert single == together != ""
    assert run("transcribe", recordings / "a.flac", "--format", "tsv").stdout.startswith("start\tend\ttext\n")


def test_a_folder_goes_on_where_it_stopped(run, recordings, tmp_path):
    folder, out = tmp_path / "talks", tmp_path / "out"
    shutil.copytree(recordings, folder)
    shutil.move(folder / "a.flac", tmp_path)
    assert run("transcribe", folder, "-o", out, "-f", "all").exit_code == 0
    (out / "deep" / "b.txt").write_text("Kept.\n")
    shutil.move(tmp_path / "a.flac", folder)  # a file that came later does not move the others' transcripts
    result = run("transcribe", folder, "-o", out, "-f", "all")
    assert (result.exit_code, complaints(result)) == (
        0,
        [f"1 of 2 files skipped, transcribed before: {folder / 'deep' / 'b.wav'}"],
    )
    assert re.search(r"1 file, 2\.5 s of audio in .*; 1 skipped", result.stderr)
    assert (out / "deep" / "b.txt").read_text() == "Kept.\n"
    (out / "a.vtt").unlink()
    assert "1 file, 2.5 s" in run("transcribe", folder, "-o", out, "-f", "all").stderr  # one of its outputs is missing
    assert "0 files, 0.0 s" in run("transcribe", folder, "-o", out, "-f", "all").stderr
    later = (out / "deep" / "b.txt").stat().st_mtime + 5
    os.utime(folder / "deep" / "b.wav", (later, later))  # another recording under the same name
    assert "1 file, 1.0 s" in run("transcribe", folder, "-o", out, "-f", "all").stderr
    assert (out / "deep" / "b.txt").read_text() != "Kept.\n"
    again = run("transcribe", folder, "-o", out, "--overwrite")
    assert ("2 files, 3.5 s" in again.stderr, complaints(again)) == (True, [])


def test_half_written_transcripts_do_not_count(run, recordings, tmp_path, full_disk):
    with full_disk(10):
        result = run("transcribe", recordings / "a.flac", "-f", "json", "-o", tmp_path)
    assert result.exit_code == 1
    assert "File too large" in complaints(result)[-1]
    assert list(tmp_path.iterdir()) == []


def test_globs(run, transcriber, recordings):
    text = transcriber.transcribe(recordings / "deep" / "b.wav").text
    assert run("transcribe", recordings / "*" / "*.wav").stdout == f"{text}\n"
    assert run("transcribe", recordings / "**" / "b.*").stdout == f"{text}\n"
    nothing = run("transcribe", recordings / "*.mp3")
    assert (nothing.exit_code, complaints(nothing)) == (2, [f"no file matches {recordings / '*.mp3'}"])


def test_a_file_named_like_a_glob_is_that_file(run, recordings, tmp_path):
    shutil.copy(recordings / "deep" / "b.wav", tmp_path / "b[1].wav")
    shutil.copy(recordings / "a.flac", tmp_path / "b1.wav")
    assert "1 file, 1.0 s" in run("transcribe", tmp_path / "b[1].wav").stderr


def test_files_outside_the_working_folder_are_written_inside_the_output_folder(run, recordings, tmp_path, monkeypatch):
    monkeypatch.chdir(recordings / "deep")
    assert run("transcribe", "b.wav", Path("..") / "a.flac", "-o", tmp_path / "out").exit_code == 0
    assert sorted(file.name for file in (tmp_path / "out").rglob("*.txt")) == ["a.txt", "b.txt"]


def test_standard_input(tiny_model_folder, transcriber, recordings, tmp_path):
    def piped(content: bytes, *arguments: object):
        model = ["--model", str(tiny_model_folder), "--device", "cpu"]
        return CliRunner().invoke(app, ["transcribe", "-", *map(str, arguments), *model], input=content)

    content, other = (recordings / "a.flac").read_bytes(), (recordings / "deep" / "b.wav").read_bytes()
    text, other_text = (transcriber.transcribe(each).text for each in (content, other))
    assert piped(content).stdout == f"{text}\n"
    assert piped(content, recordings / "deep" / "b.wav").stdout.startswith(f"-: {text}\n{recordings}")
    for each, expected in ((content, text), (other, other_text)):  # what was piped before is not known: never skipped
        assert piped(each, "-o", tmp_path).exit_code == 0
        assert (tmp_path / "stdin.txt").read_text() == f"{expected}\n"
    bad = piped(b"")
    assert bad.exit_code == 1
    assert "standard input: the audio file object cannot be read as audio" in complaints(bad)[0]


def test_clips(run, transcriber, recordings):
    def said(clips: str):
        return json.loads(run("transcribe", recordings / "a.flac", "-f", "json", "--clip-timestamps", clips).stdout)

    samples = read_audio(recordings / "a.flac")
    parts = [(0.25, 1.0), (1.5, 2.5)]
    alone = [transcriber.transcribe(samples[int(a * SAMPLE_RATE) : int(b * SAMPLE_RATE)]) for a, b in parts]
    for clips in ("0.25,1,1.5", "0.25,1,1.5,99"):
        found = said(clips)
        assert [segment["tokens"] for segment in found["segments"]] == [each.tokens for each in alone]
        assert [(segment["start"], segment["end"]) for segment in found["segments"]] == parts
        assert found["audio_seconds"] == 1.75
    late = run("transcribe", recordings / "a.flac", "--clip-timestamps", "0,1,9")
    message = f"{recordings / 'a.flac'} is 2.50 s long: no clip can begin at 9 s"
    assert (late.exit_code, complaints(late)) == (1, [message])


def test_language(run, tiny_model_folder, recordings, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    (folder / "README.md").write_text("---\nlanguage: en\n---\n")

    def asked(language: str, model: Path = folder):
        arguments = ["transcribe", str(recordings / "a.flac"), "-f", "json", "--language", language]
        return CliRunner().invoke(app, [*arguments, "--model", str(model), "--device", "cpu"])

    for language in ("en", "English"):
        assert json.loads(asked(language).stdout)["language"] == "en"
    refused = asked("German")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert complaints(refused) == ["language 'German' asked for, but the model writes 'en' alone"]
    assert "does not let one choose" in complaints(asked("en", tiny_model_folder))[0]
    assert json.loads(run("transcribe", recordings / "a.flac", "-f", "json").stdout)["language"] is None


def test_word_times_can_be_left_out(run, recordings):
    arguments = ["transcribe", recordings / "a.flac", "-f", "json"]
    segments = json.loads(run(*arguments, "--no-word-timestamps").stdout)["segments"]
    assert [segment["words"] for segment in segments] == [[]] * len(segments)
    assert run(*arguments, "--word-timestamps").stdout == run(*arguments).stdout


def test_lines_of_subtitles():
    sample = str(importlib.resources.files("leapasr") / "samples" / "austen-0870.flac")

    def subtitles(*arguments: str) -> list[str]:
        result = CliRunner().invoke(app, ["transcribe", sample, "-f", "srt", "--draft-length", "full", *arguments])
        return [block.split("\n", 2)[2].strip() for block in result.stdout.split("\n\n")]

    wide, narrow = subtitles(), subtitles("--max-line-width", "20", "--max-line-count", "1")
    assert " ".join(wide).split() == " ".join(narrow).split()
    assert max(len(line) for text in wide for line in text.splitlines()) in range(21, 43)
    assert max(map(len, narrow)) <= 20
    assert not any("\n" in text for text in narrow)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--initial-prompt", "Hello"], "initial prompt 'Hello' given, but the model takes none"),
        (["--clip-timestamps", "1,x"], "clips are START,END,START,END,... in seconds, got '1,x'"),
        (["--clip-timestamps", "3,2"], "one behind the other, got 3 to 2 s"),
        (["--clip-timestamps", "0,2,1,3"], "one behind the other, got 1 to 3 s behind 2 s"),
        (["--clip-timestamps", "nan"], "one behind the other, got nan to inf s"),
        (["--clip-timestamps", "-1,3"], "one behind the other, got -1 to 3 s"),
        (["--word-timestamps"], "format 'txt' has no place for the times of words"),
        (["--max-line-width", "20"], "max_line_width are for subtitles, not for format 'txt'"),
        (["-f", "srt", "--max-line-count", "0"], "max_line_count must be at least 1, got 0"),
        (["-f", "srt", "--max-line-count", "1", "--no-word-timestamps"], "max_line_count need the times of words"),
        (["-f", "all"], "5 formats do not fit one stream: give an output folder"),
        (["-f", "all", "--explain", "-o", "out"], "not for format 'all'"),
    ],
)
def test_requests_that_cannot_be_met(run, recordings, arguments, message):
    result = run("transcribe", recordings / "a.flac", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    (complaint,) = complaints(result)
    assert message in complaint


def test_files_of_one_name_do_not_overwrite_each_other(run, recordings, tmp_path):
    shutil.copy(recordings / "a.flac", tmp_path / "a.flac")
    shutil.copy(recordings / "deep" / "b.wav", tmp_path / "a.wav")
    assert run("transcribe", tmp_path, "--format", "vtt", "--output-dir", tmp_path / "out").exit_code == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.flac.vtt", "a.wav.vtt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.wav", None, "audio file not found"),
        ("empty.wav", b"", r"is empty \(0 bytes\)"),
        ("corrupt.flac", b"fLaC" + bytes(3000), "cannot be read as audio"),
        ("notes.txt", b"Not audio at all.\n" * 100, "no audio stream"),
        ("zero.wav", np.zeros(0), "zero.wav"),
    ],
)
def test_a_bad_file_among_good_ones(run, recordings, tmp_path, name, content, message):
    bad = tmp_path / name
    if isinstance(content, bytes):
        bad.write_bytes(content)
    elif content is not None:
        soundfile.write(bad, content, SAMPLE_RATE)
    result = run("transcribe", bad, recordings / "deep" / "b.wav")
    assert result.exit_code == 1
    (complaint,) = complaints(result)
    assert re.search(message, complaint)
    assert str(bad) in complaint
    assert result.stdout.startswith(f"{recordings / 'deep' / 'b.wav'}: ")
    assert "1 not transcribed" in result.stderr


def test_a_file_cut_short_is_transcribed_with_a_warning(run, recordings, tmp_path):
    content = (recordings / "a.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(content[: len(content) // 2])
    result = run("transcribe", tmp_path / "cut.flac")
    assert result.exit_code == 0
    (complaint,) = complaints(result)
    assert re.match(r"warning: .*cut\.flac is damaged: .* s were decoded", complaint)


def test_silence_is_no_error(run, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(3 * SAMPLE_RATE), SAMPLE_RATE)
    result = run("transcribe", tmp_path / "silence.wav")
    assert (result.exit_code, result.stdout, complaints(result)) == (0, "\n", [])
    assert "1 silent" in result.stderr
    assert run("transcribe", tmp_path / "silence.wav", "--format", "srt").stdout == ""


@pytest.mark.parametrize(("rate", "num_channels"), [(8000, 1), (48_000, 6), (44_100, 2)])
def test_any_rate_and_number_of_channels(run, transcriber, tmp_path, rate, num_channels, babble):
    samples = np.repeat(babble(1, seed=5)[: rate // 2], 1)  # other speed and pitch: what counts is that it is the same
    soundfile.write(tmp_path / "a.wav", np.stack([samples] * num_channels, axis=1), rate)
    result = run("transcribe", tmp_path / "a.wav")
    assert result.exit_code == 0
    assert result.stdout == transcriber.transcribe(read_audio(tmp_path / "a.wav")).text + "\n"
    assert f"{len(samples) / rate:.1f} s of audio" in result.stderr


def test_long_recordings(run, babble, tmp_path):
    """An hour of near-silence at 8 kHz with three sounds, the last at its end: all are heard, where they are."""
    samples = np.tile(np.random.default_rng(0).normal(0, 1e-4, 8000).astype(np.float32), 3600)
    for second in (10, 1805, 3599):
        samples[second * 8000 : (second + 1) * 8000] = babble(1, seed=second)[::2]
    soundfile.write(tmp_path / "hour.flac", samples, 8000)
    result = run("transcribe", tmp_path / "hour.flac", "--format", "json")
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    assert said["audio_seconds"] == pytest.approx(3600)
    for second in (10, 1805, 3599):
        around = [each for each in said["segments"] if each["start"] < second + 1 and each["end"] > second]
        assert around
        assert min(each["start"] for each in around) <= second
        assert max(each["end"] for each in around) >= min(second + 1, 3600)
    assert len(said["segments"]) <= 9


def test_reading_takes_the_memory_of_the_result(tmp_path):
    soundfile.write(tmp_path / "long.wav", np.zeros(120 * 44_100, dtype=np.int16), 44_100)
    tracemalloc.start()
    samples = read_audio(tmp_path / "long.wav")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert samples.nbytes == 120 * SAMPLE_RATE * 4
    assert peak < 1.5 * samples.nbytes


@pytest.mark.parametrize("command", ["transcribe", "evaluate"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "5"], "num_heads 5 asked for, but the model has 4"),
        (["--heads", "0"], "num_heads must be at least 1, got 0"),
        (["--strategy", "threshold"], "strategy 'threshold' needs a threshold"),
        (["--strategy", "threshold", "--threshold", "1.5"], "threshold is a probability from 0 to 1, got 1.5"),
        (["--strategy", "threshold", "--threshold", "-0.1"], "threshold is a probability from 0 to 1, got -0.1"),
        (["--strategy", "threshold", "--threshold", "nan"], "threshold is a probability from 0 to 1, got nan"),
        (["--threshold", "0.9"], "threshold 0.9 has no meaning for strategy 'verify'"),
        (["--strategy", "autoregressive", "--drafts", "ctc"], "drafts 'ctc' are for strategies verify, relaxed"),
        (["--beam-size", "2"], "beam_size 2 and nbest None have no meaning for strategy 'verify'"),
        (["--strategy", "autoregressive", "--heads", "3"], "strategy 'autoregressive' uses head 1 only"),
        (["--device", "warp"], "device 'warp' cannot be used"),
    ],
)
def test_wrong_options(tiny_model_folder, recordings, manifest, command, arguments, message):
    source = recordings / "a.flac" if command == "transcribe" else manifest
    result = CliRunner().invoke(app, [command, str(source), "--model", str(tiny_model_folder), *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    (complaint,) = complaints(result)
    assert message in complaint


@pytest.mark.parametrize(
    "arguments",
    [
        ["transcribe"],
        ["transcribe", "a.wav", "--strategy", "wave"],
        ["transcribe", "a.wav", "--output-format", "doc"],
        ["transcribe", "a.wav", "--batch-size", "0"],
        ["transcribe", "a.wav", "--dtype", "int4"],
        ["evaluate", "a.jsonl", "--limit", "0"],
        ["evaluate", "a.jsonl", "--use", "tset"],
        ["nothing"],
    ],
)
def test_usage_errors(arguments):
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_places_that_cannot_take_transcripts(run, recordings, tmp_path):
    result = run("transcribe", recordings, "--format", "srt")
    assert (result.exit_code, complaints(result)) == (
        2,
        ["2 files do not fit one stream of srt: give an output folder"],
    )
    (tmp_path / "file").touch()
    result = run("transcribe", recordings, "--output-dir", tmp_path / "file")
    assert result.exit_code == 2
    assert "is a file: transcripts need a folder" in complaints(result)[0]
    (tmp_path / "nothing").mkdir()
    result = run("transcribe", tmp_path / "nothing")
    assert result.exit_code == 2
    assert "holds no audio file" in complaints(result)[0]
    result = run("transcribe", recordings, "--output-dir", tmp_path / "file" / "below")
    assert result.exit_code == 1
    assert "Not a directory" in complaints(result)[0]


@pytest.mark.parametrize("command", ["transcribe", "info"])
def test_models_that_cannot_be_used(tiny_model_folder, recordings, tmp_path, command):
    def message(model: Path) -> str:
        arguments = [str(model)] if command == "info" else [str(recordings / "a.flac"), "--model", str(model)]
        result = CliRunner().invoke(app, [command, *arguments])
        assert (result.exit_code, result.stdout) == (2, "")
        (complaint,) = complaints(result)
        return complaint

    assert "model folder not found" in message(tmp_path / "nowhere")
    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"adapter_size": 32}))
    assert "of another architecture than its config.json" in message(other)
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "model of type 'llama'" in message(other)
    (other / "config.json").write_text(json.dumps(config))
    (other / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes()[:5000])
    assert "damaged or cut short" in message(other)


def test_without_a_model_in_the_package(monkeypatch, recordings, tmp_path):
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    result = CliRunner().invoke(app, ["transcribe", str(recordings / "a.flac")])
    assert result.exit_code == 2
    (complaint,) = complaints(result)
    assert re.search(r"holds no model \(.*pretrained/tiny is missing\): name a model folder", complaint)


def test_evaluation(run, manifest, tmp_path):
    files = tmp_path / "figures" / "wer.json", tmp_path / "hypotheses.jsonl"
    result = run("evaluate", manifest, "--use", "test", "--json", files[0], "--hypotheses", files[1])
    assert (result.exit_code, complaints(result)) == (0, [])
    figures = json.loads(files[0].read_text())
    assert (figures["strategy"], figures["threshold"], figures["num_heads"]) == ("verify", None, 4)
    assert figures["drafts"] == "both"
    assert (figures["num_utterances"], figures["num_words"]) == (5, 10)
    assert figures["audio_seconds"] == pytest.approx(0.5 + 0.6 + 0.7 + 0.8 + 0.9)
    assert figures["identical_to_autoregressive"] == 1
    assert figures["tokens_per_call"] == figures["call_reduction"] >= 1
    assert figures["wer_low"] <= figures["wer"] <= figures["wer_high"]
    assert figures["rtfx"] == pytest.approx(figures["audio_seconds"] / figures["seconds"])
    assert figures["seconds"] == figures["encoder_seconds"] + figures["decoder_seconds"]
    assert (figures["batch_size"], figures["dtype"]) == (8, "float32")
    lines = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"u{index}" for index in range(5)]
    assert {line["reference"] for line in lines} == {"Oh no."}
    assert sum(line["calls"] for line in lines) == figures["decoder_calls"]
    assert f"{figures['wer']:.2%}" in result.stdout
    assert "whisper_english" in result.stdout


def test_evaluation_of_some_utterances_with_other_options(run, manifest, tmp_path):
    arguments = ["--limit", 3, "--hypotheses", tmp_path / "h.jsonl", "--json", tmp_path / "wer.json"]
    arguments += ["--strategy", "threshold", "--threshold", 0.5, "--heads", 2, "--batch-size", 1, "--dtype", "bfloat16"]
    assert run("evaluate", manifest, *arguments).exit_code == 0
    figures = json.loads((tmp_path / "wer.json").read_text())
    expected = {
        "strategy": "threshold",
        "threshold": 0.5,
        "drafts": None,
        "num_heads": 2,
        "batch_size": 1,
        "dtype": "bfloat16",
    }
    assert expected.items() <= figures.items()
    ids = [json.loads(line)["id"] for line in (tmp_path / "h.jsonl").read_text().splitlines()]
    assert ids == SPREAD_IDS


def test_several_manifests_one_of_them_bad(run, manifest, tmp_path):
    missing = tmp_path / "missing.jsonl"
    (tmp_path / "empty.jsonl").touch()
    arguments = [missing, manifest, tmp_path / "empty.jsonl", manifest, "--json", tmp_path / "wer.json"]
    result = run("evaluate", *arguments)
    assert result.exit_code == 1
    assert complaints(result) == [
        f"manifest not found: {missing}",
        f"{tmp_path / 'empty.jsonl'} is empty: a manifest needs a line an utterance",
    ]
    first, second = json.loads((tmp_path / "wer.json").read_text())
    assert first["test_set"] == second["test_set"] == str(manifest)
    assert first["num_utterances"] == 6


def test_bad_lines_of_a_manifest(run, manifest, tmp_path):
    good = json.loads(manifest.read_text().splitlines()[0]) | {"audio": str(manifest.parent / "0.wav")}
    (tmp_path / "text.wav").write_text("no audio")
    lines = [
        json.dumps(good),
        "{not JSON",
        json.dumps({name: value for name, value in good.items() if name != "text"} | {"id": "textless"}),
        json.dumps(good | {"id": "gone", "audio": "gone.wav"}),
        json.dumps(good | {"id": "text", "audio": "text.wav"}),
        json.dumps(good | {"id": "漢字", "text": "Ünïcödé 漢字 \N{SNOWMAN}"}),
    ]
    bad = write_lines(tmp_path / "bad.jsonl", lines)
    result = run("evaluate", bad, "--json", tmp_path / "wer.json")
    assert result.exit_code == 1
    not_json, textless, gone, no_audio = complaints(result)
    assert f"{bad}: bad.jsonl:2: not JSON" in not_json
    assert "bad.jsonl:3: no text" in textless
    assert f"bad.jsonl:4: audio file not found: {tmp_path / 'gone.wav'}" in gone
    assert "text: its audio cannot be read" in no_audio
    figures = json.loads((tmp_path / "wer.json").read_text())
    assert figures["num_utterances"] == 2  # characters outside the model's vocabulary are scored like any
    assert len(figures["problems"]) == 4
    nothing = write_lines(tmp_path / "nothing.jsonl", lines[1:4])
    result = run("evaluate", nothing)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "has no usable utterance (3 bad lines: nothing.jsonl:1: not JSON" in complaints(result)[0]


def test_training_on_text_outside_the_vocabulary(build_tiny_model, tiny_model_folder, manifest, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)
    vocab_size = len(SpeechLlamaProcessor.from_pretrained(model).tokenizer)
    build_tiny_model(dtype=torch.float32, vocab_size=vocab_size).save_pretrained(model)
    line = json.loads(manifest.read_text().splitlines()[0]) | {"audio": str(manifest.parent / "0.wav"), "use": "train"}
    strange = write_lines(tmp_path / "strange.jsonl", [json.dumps(line | {"text": "Oh 漢字."})])
    arguments = ["train", "--init", str(model), "--manifest", str(strange), "--output", str(tmp_path / "t")]
    result = CliRunner().invoke(app, [*arguments, "--preset", "heads", "--no-compile"])
    assert result.exit_code == 2
    assert any("u0: characters outside the vocabulary: '字 漢'" in complaint for complaint in complaints(result))


def test_info(tiny_model_folder, transcriber):
    result = CliRunner().invoke(app, ["info", str(tiny_model_folder)])
    assert result.exit_code == 0
    shown = dict(re.findall(r"│ +(.+?) +│ +(.+?) +│", result.stdout))
    num_parameters = sum(parameter.numel() for parameter in transcriber.model.parameters())
    assert shown["parameters"] == f"{num_parameters:,}"
    parts = ("encoder", "adapter", "ctc_head", "speech_projection", "decoder", "mtp_heads")
    rows = re.findall(r"│ +(\w+) +│ +([\d,]+) +│", result.stdout)
    assert [name for name, _ in rows] == ["parameters", *parts]
    assert sum(int(count.replace(",", "")) for _, count in rows[1:]) == num_parameters
    assert (shown["tokens per call (K)"], shown["heads 2..K"]) == ("4", "latent")
    assert shown["stored as"].startswith("float32, ")


def test_help_and_version():
    assert CliRunner().invoke(app, ["--version"]).stdout == f"{leapasr.__version__}\n"
    for command in ("transcribe", "evaluate", "bench", "train", "info", "synthesize", "restore"):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
