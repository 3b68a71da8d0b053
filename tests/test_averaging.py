"""The mean of models' weights."""

import pytest
import torch
from conftest import tiny_config
from typer.testing import CliRunner

from leapasr.cli import app
from leapasr.model.averaging import average_models
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration
from leapasr.transcriber import load


def saved(folder, seed, **fields):
    torch.manual_seed(seed)
    SpeechLlamaForConditionalGeneration(tiny_config(**fields)).save_pretrained(folder)
    return folder


def test_weights_are_the_mean(tmp_path):
    folders = [saved(tmp_path / str(seed), seed) for seed in range(3)]
    states = [SpeechLlamaForConditionalGeneration.from_pretrained(folder).state_dict() for folder in folders]
    for name, value in average_models(folders).state_dict().items():
        expected = torch.stack([state[name].double() for state in states]).mean(0)
        assert torch.allclose(value.double(), expected, atol=1e-7), name
        assert value.dtype == states[0][name].dtype


def test_models_that_cannot_be_averaged(tmp_path):
    one = saved(tmp_path / "one", 1)
    with pytest.raises(ValueError, match="two models at least, got 1"):
        average_models([one])
    for fields in ({"num_heads": 2}, {"vocab_size": 64}):
        with pytest.raises(ValueError, match=r"another is of another architecture than .*one \(\d+ weights differ"):
            average_models([one, saved(tmp_path / "another", 2, **fields)])


def test_command_line(tiny_model_folder, tmp_path):
    output = tmp_path / "mean"
    result = CliRunner().invoke(
        app, ["average", str(tiny_model_folder), str(tiny_model_folder), "--output", str(output)]
    )
    assert result.exit_code == 0, result.output
    same = load(str(tiny_model_folder)).model.state_dict()
    assert all(torch.allclose(value, same[name]) for name, value in load(str(output)).model.state_dict().items())
    assert load(str(output)).processor.decode_text([5]) == load(str(tiny_model_folder)).processor.decode_text([5])
    refused = CliRunner().invoke(app, ["average", str(tiny_model_folder), "--output", str(output)])
    assert refused.exit_code == 2
    assert "two models at least" in refused.stderr
    missing = CliRunner().invoke(app, ["average", str(tiny_model_folder), "nowhere", "--output", str(output)])
    assert missing.exit_code == 2
    assert "nowhere is no folder" in missing.stderr
