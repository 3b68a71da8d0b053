"""Fitting heads to a tiny random Whisper, from audio to what `transcribe` does with them."""

import json
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
import soundfile
import torch
from test_whisper import build, speech
from typer.testing import CliRunner

from leapasr.audio import AudioError
from leapasr.chunks import Chunk
from leapasr.cli import app
from leapasr.decoding import DecodingOptions
from leapasr.model.fitted_heads import SHIPPED, FittedHeads
from leapasr.model.whisper import fingerprint
from leapasr.training.distillation import OF_ONE, PAUSE_SECONDS, WITH, Distillation, find_recordings, joined, learn
from leapasr.training.fit import FitConfig, blotted, fit
from leapasr.training.losses import shifted_labels
from leapasr.transcriber import load
from leapasr.whisper_transcriber import WhisperOptions, load_whisper

CONFIG = FitConfig(
    num_heads=3, adapter_size=16, adapter_layers=1, draft_vocabulary=100, updates=6, batch_seconds=3.0, warmup=2,
    eval_every=3, checkpoint_minutes=0.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def bfloat16_is_fast(monkeypatch):
    """Whatever the CPU of these tests is: no fit gives advice about it."""
    monkeypatch.setattr("leapasr.model.precision.bfloat16_speedup", lambda device: 5.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """Ten recordings, one of them longer than what the model hears at once."""
    folder = tmp_path_factory.mktemp("audio")
    for n in range(10):
        soundfile.write(folder / f"{n}.wav", speech(2.3 if n == 4 else 0.4 + 0.05 * n, 50 + n), 16_000)
    return folder


@pytest.fixture(scope="module")
def manifest(audio):
    """The same with languages; two are not for training."""
    path = audio / "manifest.jsonl"
    uses = ["train"] * 8 + ["dev", "test"]
    rows = []
    for n, use in enumerate(uses):
        seconds, language = soundfile.info(audio / f"{n}.wav").duration, ("de", "fr")[n % 2]
        row = {"id": str(n), "audio": f"{n}.wav", "duration": seconds, "text": "no matter"}
        rows.append({**row, "language": language, "use": use})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(folder, audio, output, config=CONFIG, *, stop_at: int | None = None, **options):
    """Fit, or be interrupted at an update."""

    @contextmanager
    def progress(description, total):
        done = 0

        def advance(amount):
            nonlocal done
            done += amount
            if description == "fitting" and stop_at is not None and done >= stop_at:
                raise KeyboardInterrupt

        yield advance

    complaints: list[str] = []
    with pytest.raises(KeyboardInterrupt) if stop_at is not None else nullcontext():
        fit(str(folder), audio, output, config, progress=progress, complain=complaints.append, **options)
    return complaints


def test_lessons_hold_what_the_model_writes_and_the_states_it_writes_it_from(folder, manifest, tmp_path):
    model = load_whisper(str(folder), device=torch.device("cpu"), dtype=torch.float32, bare=True)
    recordings, problems = find_recordings([manifest])
    assert (len(recordings), problems) == (8, [])
    lessons = Distillation(tmp_path)
    lessons.compute(model, recordings, advance=lambda _: None, complain=pytest.fail)
    names = lessons.lessons(recordings)
    assert len(names) > 8  # a long recording gives several
    for name in names:
        lesson = lessons.lesson(name)
        assert lesson.states.shape == (len(lesson.tokens) + 1, 32)
        told = (lesson.states @ model.model.proj_out.weight.T).argmax(-1)
        kept = [place for place, token in enumerate(lesson.tokens) if token == told[place]]
        assert len(kept) >= 0.9 * len(lesson.tokens)  # others are in float16, or what rules forbid
    by_key = {recording.key: recording for recording in recordings}
    alone = [name for name in names if WITH not in name and by_key[name.split(OF_ONE)[0]].name != "4"]
    for name in alone:
        recording = by_key[name.split(OF_ONE)[0]]
        expected = model.transcribe(
            recording.read(), DecodingOptions(strategy="autoregressive"), language=recording.language
        )
        assert lessons.lesson(name).tokens.tolist() == expected.tokens
    assert alone
    assert Distillation(tmp_path).lessons(recordings) == names
    assert not Distillation(tmp_path).missing(recordings)


def test_recordings_that_give_no_lesson_cost_no_other_its_own(folder, manifest, tmp_path, monkeypatch):
    model = load_whisper(str(folder), device=torch.device("cpu"), dtype=torch.float32, bare=True)
    recordings, _ = find_recordings([manifest])
    lost, unread = recordings[0], recordings[4]

    def no_audio():
        raise AudioError("gone")

    def learn_of_others(transcriber, batch):
        return {name: part for name, part in learn(transcriber, batch).items() if lost.key not in name}

    monkeypatch.setattr("leapasr.training.distillation.GROUP", 2)
    monkeypatch.setattr("leapasr.training.distillation.joined", lambda chunks, seconds: chunks)
    monkeypatch.setattr("leapasr.training.distillation.learn", learn_of_others)
    complaints: list[str] = []
    parts = [replace(each, read=no_audio) if each is unread else each for each in recordings]
    for several in (parts[:4], parts[:1] + parts[4:], recordings):  # resumed, each time with other audio
        lessons = Distillation(tmp_path)
        lessons.compute(model, lessons.missing(several), advance=lambda _: None, complain=complaints.append)
        assert Distillation(tmp_path).missing(several) == ([parts[4]] if parts[4] in several else [])
    assert complaints == ["gone"]
    kept = {name.split(OF_ONE)[0] for name in Distillation(tmp_path).lessons(recordings)}
    assert kept == {each.key for each in recordings if each is not lost}


def chunk(name: str, seconds: float, language: str | None = "de") -> Chunk[str]:
    return Chunk(name, 0.0, np.full(int(16_000 * seconds), len(name), np.float32), language)


def test_neighbours_of_one_language_are_joined_to_all_lengths_and_none_is_lost():
    chunks = [chunk(f"r{n}-0", 0.5 + n % 7, "de" if n < 150 else "fr") for n in range(200)]
    stretches = list(joined(chunks, 30.0))
    assert WITH.join(each.recording for each in stretches).split(WITH) == [each.recording for each in chunks]
    assert all(len({int(part[1:-2]) < 150 for part in each.recording.split(WITH)}) == 1 for each in stretches)
    assert max(each.seconds for each in stretches) <= 30
    counts = [each.recording.count(WITH) + 1 for each in stretches]
    assert min(counts) == 1
    assert max(counts) > 4
    for each in stretches:
        parts = [part for part in chunks if part.recording in each.recording.split(WITH)]
        pauses = PAUSE_SECONDS * (len(parts) - 1)
        assert each.seconds == pytest.approx(sum(part.seconds for part in parts) + pauses, abs=1e-3)
    assert [each.recording for each in stretches] == [each.recording for each in joined(chunks, 30.0)]


def test_what_is_of_no_known_language_stays_alone():
    names = [each.recording for each in joined([chunk(f"r{n}-0", 1.0, None) for n in range(40)], 30.0)]
    assert names == [f"r{n}-0" for n in range(40)]


def test_fitted_heads_are_for_their_model_and_change_nothing_that_is_written(folder, manifest, tmp_path):
    assert run(folder, [manifest], tmp_path / "heads") == []
    whisper = WhisperOptions(language="de")
    plain, fitted = load(folder, whisper=whisper), load(folder, adapter=tmp_path / "heads", whisper=whisper)
    assert fitted.decoder.num_heads == 3
    config = fitted.heads.config
    assert (config.base_weights, config.updates) == (fingerprint(plain.model), 6)
    assert config.fitted_on == (f"{manifest.parent.name}/manifest.jsonl",)
    assert len(fitted.heads.tokens) == 101  # end-of-text is one more
    samples = [speech(0.7, n) for n in range(4)]
    for drafts in ("mtp", "ctc", "both"):
        results = fitted.transcribe(samples, DecodingOptions(drafts=drafts))
        assert [each.tokens for each in results] == [each.tokens for each in plain.transcribe(samples)]
    log = [json.loads(line) for line in (tmp_path / "heads" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["update"] for entry in log] == [3, 6]
    assert {"ctc", "ce_2", "accuracy_3", "dev_ce_2"} <= log[0].keys()
    assert not (tmp_path / "heads" / "checkpoint.pt").exists()


def test_heads_guess_what_the_model_writes_most_often(folder, manifest, tmp_path):
    run(folder, [manifest], tmp_path / "few", replace(CONFIG, draft_vocabulary=9), cache=tmp_path / "lessons")
    (shards,) = (tmp_path / "lessons").iterdir()
    lessons = Distillation(shards)
    names = lessons.lessons(find_recordings([manifest])[0])
    counts = Counter(token for name in names for token in lessons.tokens(name).tolist())
    guessed = set(FittedHeads.load(tmp_path / "few").tokens.tolist())
    assert len(guessed) == 10
    assert min(counts[token] for token in guessed if counts[token]) >= max(
        counts[token] for token in counts.keys() - guessed
    )
    run(folder, [manifest], tmp_path / "many", replace(CONFIG, draft_vocabulary=250), cache=tmp_path / "lessons")
    assert set(FittedHeads.load(tmp_path / "many").tokens.tolist()) >= {*counts, *range(8, 90)}


def test_an_interrupted_fit_gives_the_heads_of_an_uninterrupted_one(folder, audio, tmp_path):
    cache = tmp_path / "lessons"
    run(folder, [audio], tmp_path / "whole", cache=cache, language="de")
    run(folder, [audio], tmp_path / "parts", cache=cache, language="de", stop_at=4)
    assert not (tmp_path / "parts" / "heads.safetensors").exists()
    with pytest.raises(ValueError, match="other settings or audio"):
        run(folder, [audio], tmp_path / "parts", replace(CONFIG, seed=2), cache=cache, language="de")
    run(folder, [audio], tmp_path / "parts", cache=cache, language="de")
    first, second = ((tmp_path / name / "heads.safetensors").read_bytes() for name in ("whole", "parts"))
    assert first == second


def test_heads_that_are_there_are_gone_on_from(folder, audio, manifest, tmp_path):
    run(folder, [manifest], tmp_path / "first", replace(CONFIG, draft_vocabulary=30))
    still = replace(CONFIG, updates=1, learning_rate=0.0, precision="fp32")
    run(folder, [audio], tmp_path / "still", still, init=tmp_path / "first")
    first, then = FittedHeads.load(tmp_path / "first"), FittedHeads.load(tmp_path / "still")
    assert then.tokens.tolist() == first.tokens.tolist()
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(then.state_dict()[name], weight, atol=0.01 * float(weight.abs().max()), rtol=0)
    assert then.config.fitted_on == (*first.config.fitted_on, f"{audio.parent.name}/{audio.name}")
    assert (then.config.updates, then.config.base_model) == (CONFIG.updates + 1, first.config.base_model)


def test_heads_to_go_on_from_must_be_of_the_model_and_the_shape(folder, audio, manifest, tmp_path):
    run(folder, [manifest], tmp_path / "first")
    for name, value, there in (("num_heads", 4, 3), ("head_type", "latent", "sequential"), ("adapter_size", 32, 16)):
        with pytest.raises(ValueError, match=f"{name} is {value}, and {there} in the heads"):
            run(folder, [audio], tmp_path / "other", replace(CONFIG, **{name: value}), init=tmp_path / "first")
    with pytest.raises(ValueError, match="num_pieces 280 makes 280 pieces"):
        run(folder, [audio], tmp_path / "other", replace(CONFIG, num_pieces=280), init=tmp_path / "first")
    with pytest.raises(ValueError, match="holds no fitted heads"):
        run(folder, [audio], tmp_path / "other", init=tmp_path / "nowhere")
    heads = FittedHeads.load(tmp_path / "first")
    heads.config = replace(heads.config, base_weights="0" * 64)
    heads.save(tmp_path / "strange")
    with pytest.raises(ValueError, match="has other weights"):
        run(folder, [audio], tmp_path / "other", init=tmp_path / "strange")


def test_heads_learn(folder, manifest, tmp_path):
    config = replace(CONFIG, updates=60, eval_every=30, dropout=0.0, learning_rate=1e-2, batch_seconds=20.0)
    run(folder, [manifest], tmp_path, config)
    half, end = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert end["ce_2"] < half["ce_2"] < 3
    assert end["ctc"] < half["ctc"]


def test_a_stretch_in_each_two_seconds_is_blotted_out():
    torch.manual_seed(0)
    frames_BTD = torch.rand(50, 500, 3) + 1
    found_BTD = blotted(frames_BTD, 0.4)
    out_BT = (found_BTD == 0).all(-1)
    assert torch.equal(found_BTD[~out_BT], frames_BTD[~out_BT])
    ends_BT = out_BT & ~torch.nn.functional.pad(out_BT, (0, 1))[:, 1:]
    assert 5 >= ends_BT.sum(1).max() > 3  # 10 s; some overlap
    assert out_BT.float().mean() == pytest.approx(0.1, abs=0.01)
    assert not torch.equal(out_BT[0], out_BT[1])
    assert torch.equal(blotted(frames_BTD, 0), frames_BTD)


def test_labels_of_head_2_are_what_follows_the_next_token():
    labels = shifted_labels(torch.tensor([[4, 5, 6]]), torch.tensor([3]), head=2, end_token_id=9)
    assert labels.tolist() == [[5, 6, 9, -100]]


def test_advice_where_bfloat16_is_slow(folder, audio, tmp_path, monkeypatch):
    monkeypatch.setattr("leapasr.model.precision.bfloat16_speedup", lambda device: 0.25)
    (advice,) = run(folder, [audio], tmp_path / "out")
    assert "4.0 times as long as in fp32" in advice


def test_what_cannot_be_learnt_from_is_refused(folder, audio, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no audio file"):
        run(folder, [empty], tmp_path / "out")
    soundfile.write(empty / "one.wav", speech(0.5), 16_000)
    with pytest.raises(ValueError, match="stretches of speech to learn from"):
        run(folder, [empty], tmp_path / "out")
    (empty / "broken.wav").write_bytes(b"no audio")
    assert any("broken.wav" in each for each in _complaints(folder, [empty, audio], tmp_path / "out"))
    with pytest.raises(ValueError, match="updates must be at least 1"):
        FitConfig(updates=0)


def _complaints(folder, audio, output):
    return run(folder, audio, output)


def test_the_command_line_fits_tells_and_transcribes(folder, audio, tmp_path):
    runner, heads = CliRunner(), str(tmp_path / "heads")
    fitted = runner.invoke(app, [
        "fit", str(folder), "--audio", str(audio), "--output", heads, "--updates", "2", "--heads", "3",
        "--adapter-size", "16", "--adapter-layers", "1", "--language", "de", "--device", "cpu",
    ])  # fmt: skip
    assert fitted.exit_code == 0, fitted.output
    told = runner.invoke(app, ["info", str(folder), "--adapter", heads])
    assert "sequential, fitted to" in told.output
    written = {}
    for name, further in (("fitted", ["--adapter", heads]), ("plain", [])):
        result = runner.invoke(
            app, ["transcribe", str(audio / "3.wav"), "--model", str(folder), "--language", "de", *further]
        )
        assert result.exit_code == 0, result.output
        written[name] = result.stdout
    assert written["fitted"] == written["plain"]
    for wrong in (["--language", "xx"], ["--strategy", "beam"], ["--condition-on-previous-text"]):
        result = runner.invoke(app, ["transcribe", str(audio / "3.wav"), "--model", str(folder), *wrong])
        assert result.exit_code == 2, (wrong, result.output)
    other = runner.invoke(app, ["info", "--adapter", heads])
    assert other.exit_code == 2


def test_heads_inside_the_package_are_found_by_the_weights(folder, manifest, tmp_path, monkeypatch):
    run(folder, [manifest], tmp_path / "pretrained" / "heads" / "tiny")
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    assert load(folder).decoder.num_heads == 3
    other = tmp_path / "other"
    other.mkdir()
    model = build(other)
    model.model.encoder.conv1.bias.data[0] += 0.1
    model.save_pretrained(other)
    assert load(other).decoder.num_heads == 1
    assert FittedHeads.load(tmp_path / "pretrained" / "heads" / "tiny").config.num_heads == 3


def test_heads_inside_the_package_are_whole_small_and_say_whose_they_are():
    homes = list(resources.files("leapasr").joinpath(*SHIPPED).glob("*/"))
    assert {FittedHeads.load(home).config.base_model: home.name for home in homes} == {
        "openai/whisper-tiny.en": "whisper-tiny.en",
        "openai/whisper-base": "whisper-base",
    }
    assert sum(path.stat().st_size for home in homes for path in home.iterdir()) <= 8_000_000


def test_a_model_that_writes_no_word_has_no_word_errors(folder, manifest, tmp_path, monkeypatch):
    monkeypatch.setattr("leapasr.training.fit.NORMALIZER", lambda text: "")
    run(folder, [manifest], tmp_path)
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all("dev_ce_2" in entry and "dev_ctc_wer" not in entry for entry in log)
