"""Calibration: which setting is chosen, where it is kept, and what is said when there is none."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from leapasr.audio import SAMPLE_RATE
from leapasr.cli import app
from leapasr.decoding import DecodingOptions
from leapasr.evaluation import calibration as module
from leapasr.evaluation.calibration import Calibration, budget_of, calibrate, calibrated_options, save_calibration
from leapasr.evaluation.evaluate import evaluate
from leapasr.transcriber import load


@pytest.fixture
def folder(tiny_model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


@pytest.fixture
def manifest(tmp_path, babble) -> Path:
    lines = []
    for use in ("dev", "test"):
        for n in range(3):
            soundfile.write(tmp_path / f"{use}{n}.wav", babble(1.0, seed=n), SAMPLE_RATE)
            audio = {"id": f"{use}{n}", "audio": f"{use}{n}.wav", "duration": 1.0}
            lines.append(audio | {"text": "the cat sat", "use": use})
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def report(folder, manifest):
    """A report to change: its words and calls are made up."""
    from leapasr.data.manifests import read_manifest

    cuts = read_manifest(manifest, use="dev").cuts
    return evaluate(load(str(folder)), cuts, [DecodingOptions(drafts="mtp")])[0]


def with_figures(report, *, calls: int, wer: float = 0.2, change: float = 0.0, high: float = 0.0):
    return replace(report, decoder_calls=calls, wer=wer, wer_change=change, wer_change_high=high)


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ([{"calls": 50, "high": 0.002}, {"calls": 40, "high": 0.002}], 1),  # both are inside: the faster
        ([{"calls": 50, "high": 0.002}, {"calls": 40, "high": 0.0021}], 0),  # the faster one is a hair outside
        ([{"calls": 50, "high": 0.0, "wer": 0.3, "change": 0.1}, {"calls": 60}], 0),  # the share is of the baseline's
        ([{"calls": 50, "high": 0.0021, "wer": 0.3, "change": 0.1}, {"calls": 60}], 1),
        ([{"calls": 100}, {"calls": 120}], None),  # verification is as fast
        ([{"calls": 10, "high": 0.1}], None),
    ],
)
def test_the_fewest_calls_inside_the_budget(report, monkeypatch, settings, chosen):
    reports = [with_figures(report, calls=100), *(with_figures(report, **figures) for figures in settings)]
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: reports)
    found = calibrate(None, [], budget=0.01, candidates=[DecodingOptions()] * len(settings))
    assert found.chosen == chosen
    assert found.exact.decoder_calls == 100


def test_every_candidate_is_tried(folder, manifest):
    from leapasr.data.manifests import read_manifest

    cuts, transcriber = list(read_manifest(manifest, use="dev").cuts), load(str(folder))
    found = calibrate(transcriber, cuts, budget=1.0)
    assert [report.strategy for report in found.reports] == [options.strategy for options in module.CANDIDATES]
    assert {report.threshold for report in found.reports} >= {0.95, 0.3}
    assert found.exact.identical_to_autoregressive == 1


def test_what_is_chosen_is_kept_with_the_model(folder, report):
    candidates = [DecodingOptions(strategy="threshold", threshold=0.5), DecodingOptions(strategy="relaxed", ratio=0.3)]
    path = save_calibration(Calibration(0.01, report, candidates, [report, report], 1), folder)
    assert path.parent == folder
    assert calibrated_options(str(folder)) == candidates[1]
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"calibration\.json is damaged .* run 'leapasr calibrate' again"):
        calibrated_options(str(folder))
    path.unlink()
    with pytest.raises(ValueError, match="has not been calibrated: run 'leapasr calibrate'"):
        calibrated_options(str(folder))


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.5%", 0.005), ("0.02", 0.02), ("0", 0.0), ("100%", 1.0)])
def test_budgets(text, share):
    assert budget_of(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "much", "-1%", "101%", "nan"])
def test_bad_budgets(text):
    with pytest.raises(ValueError, match="the budget is a share of the WER such as"):
        budget_of(text)


def test_command_line(folder, manifest, monkeypatch):
    monkeypatch.setattr(module, "qualifies", lambda report, budget: True)
    monkeypatch.setattr(module, "CANDIDATES", module.CANDIDATES)
    base = ["calibrate", "--model", str(folder), "--dev", str(manifest)]
    result = CliRunner().invoke(app, [*base, "--test", str(manifest)])
    assert result.exit_code == 0, result.output
    assert "chosen" in result.stdout
    options = calibrated_options(str(folder))
    assert options.strategy in ("threshold", "relaxed")
    audio = str(manifest.parent / "test0.wav")
    said = CliRunner().invoke(app, ["transcribe", audio, "--model", str(folder), "--strategy", "calibrated"])
    assert said.exit_code == 0, said.output
    samples, _ = soundfile.read(audio, dtype=np.float32)
    assert said.stdout.strip() == load(str(folder)).transcribe(samples, options).text
    given = ["--strategy", "calibrated", "--threshold", "0.5"]
    refused = CliRunner().invoke(app, ["transcribe", audio, "--model", str(folder), *given])
    assert refused.exit_code == 2
    assert "leave out --threshold" in refused.stderr


def test_no_setting_is_good_enough(folder, manifest, monkeypatch):
    monkeypatch.setattr(module, "qualifies", lambda report, budget: False)
    result = CliRunner().invoke(app, ["calibrate", "--model", str(folder), "--dev", str(manifest)])
    assert result.exit_code == 1
    assert "no setting has fewer calls than verification and a WER increase of at most 1.00%" in result.stderr
    assert not (folder / "calibration.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-wer-increase", "much"], "the budget is a share of the WER"),
        (["--model", "nowhere"], "model folder not found: nowhere"),
        (["--dev", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_arguments(folder, manifest, arguments, message):
    base = ["calibrate", "--model", str(folder), "--dev", str(manifest)]
    result = CliRunner().invoke(app, [*base, *arguments])
    assert result.exit_code != 0
    assert message in result.stderr
