"""`leapasr train`, from files to a model: stages, resuming, retrofitted heads, cached encoder frames, errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import WhisperConfig, WhisperModel
from typer.testing import CliRunner

from leapasr import config
from leapasr.cli import app
from leapasr.config import Stage, small_llama
from leapasr.data.augmentation import NO_AUGMENTATION
from leapasr.data.batches import Source, SpeechBatches, plan_epoch
from leapasr.data.manifests import read_manifest
from leapasr.model.processing import SpeechLlamaProcessor
from leapasr.model.retrofitting import set_heads
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration
from leapasr.training import trainer as trainer_module
from leapasr.training.encoder_cache import EncoderCache, FrameBatches, fingerprint
from leapasr.training.run import load_initial, train, weighted
from leapasr.training.trainer import StageTask, TrainingError

SAMPLES = Path(trainer_module.__file__).parents[1] / "samples"
PROSE = "It was a truth. The good opinion of the family, which had been gained so early, was lost by half past ten."
VOCAB_SIZE = 96
QUICK = {"precision": "fp32", "compile": False, "num_workers": 0}


def small_scratch(encoder: str | None = None):
    """The preset `scratch`, its stages and all, in a size that trains in a moment."""
    model, stages = config.scratch(encoder)
    fields = {"adapter_size": 16, "adapter_layers": 1, "adapter_attention_heads": 2, "adapter_ffn_size": 32}
    decoder = small_llama(VOCAB_SIZE, size=32, layers=1, ffn=64, heads=2)
    model = replace(model, decoder=decoder, vocab_size=VOCAB_SIZE, fields=model.fields | fields | {"num_heads": 3})
    stages = tuple(
        replace(s, updates=3, warmup=1, batch=200 if s.reads_text else 10, frozen_encoder_layers=frozen)
        for s, frozen in zip(stages, (0, 0, None, 1, 1), strict=True)
    )
    return model, stages


@pytest.fixture
def data(tmp_path, monkeypatch) -> dict:
    """Arguments of `train`: the sample recordings three times over, prose, and a pretrained Whisper of two layers."""
    monkeypatch.setitem(config.PRESETS, "scratch", small_scratch)
    torch.manual_seed(0)
    fields = {"d_model": 16, "encoder_ffn_dim": 32, "encoder_layers": 2, "encoder_attention_heads": 2}
    fields |= {"decoder_ffn_dim": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "vocab_size": 64}
    fields |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    WhisperModel(WhisperConfig(num_mel_bins=80, **fields)).save_pretrained(tmp_path / "whisper")
    (tmp_path / "prose.txt").write_text(f"{PROSE}\n" * 20)
    lines = [
        {"id": f"{path.stem}-{n}", "audio": str(path), "duration": seconds, "text": text, "use": use}
        for path, seconds, text in zip(
            sorted(SAMPLES.glob("*.flac")), (7.1, 5.3, 3.29), ("a good opinion", "of the family", "lost"), strict=True
        )
        for n, use in enumerate(("train", "train", "dev"))
    ]
    write_manifest(tmp_path / "manifest.jsonl", lines)
    return {
        "output": tmp_path / "training",
        "manifests": [str(tmp_path / "manifest.jsonl")],
        "dev": [tmp_path / "manifest.jsonl"],
        "text": [tmp_path / "prose.txt"],
        "encoder": str(tmp_path / "whisper"),
        **QUICK,
    }


def write_manifest(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def saved_state(folder: Path) -> dict[str, torch.Tensor]:
    return SpeechLlamaForConditionalGeneration.from_pretrained(folder).state_dict()


def from_model(data: dict, initial: Path, output: str) -> dict:
    return data | {"initial_model": initial, "encoder": None, "text": [], "output": data["output"].parent / output}


@pytest.fixture
def trained(data) -> Path:
    return train("scratch", **data, stages="ctc")


def test_one_command_trains_every_stage(data):
    folder = train("scratch", **data)
    output = data["output"]
    assert folder == output / "model"
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    order = ("language", "text", "ctc", "encoder", "joint")
    assert [(line["stage"], line["update"]) for line in logged] == [(stage, 3) for stage in order]
    assert {"dev_ce_1"} <= logged[0].keys()
    assert {"dev_ce_1", "dev_ce_3"} <= logged[1].keys()
    assert {"dev_ctc", "dev_ctc_wer"} <= logged[2].keys()
    assert {"dev_ctc_wer", "dev_accuracy_1", "dev_accuracy_3"} <= logged[4].keys()

    pretrained = WhisperModel.from_pretrained(data["encoder"]).encoder.state_dict()
    stages = {stage: saved_state(output / stage) for stage in order}
    for name, weight in pretrained.items():
        name = f"encoder.encoder.{name}"
        assert torch.equal(stages["text"][name], weight)
        assert torch.equal(stages["ctc"][name], weight)
    for stage, before, name, changes in (
        ("text", "language", "decoder.lm_head.weight", True),
        ("ctc", "text", "ctc_head.weight", True),
        ("ctc", "text", "decoder.lm_head.weight", False),
        ("encoder", "ctc", "encoder.encoder.layers.0.fc1.weight", False),
        ("encoder", "ctc", "encoder.encoder.layers.1.fc1.weight", True),
        ("encoder", "ctc", "mtp_heads.expansion.weight", False),
        ("joint", "encoder", "encoder.encoder.layers.1.fc1.weight", True),
        ("joint", "encoder", "mtp_heads.expansion.weight", True),
    ):
        assert torch.equal(stages[stage][name], stages[before][name]) != changes, (stage, name)
    model, processor = load_initial(folder)
    assert processor.decode_text(processor.encode_text("A good opinion.")) == "A good opinion."
    assert model.num_heads == 3


def test_the_same_command_goes_on_where_it_was_interrupted(data, monkeypatch):
    whole = saved_state(train("scratch", **data))
    rate, num_calls = trainer_module.learning_rate, 0

    def interrupted_rate(stage, update):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 8:  # in the middle of the third stage
            raise KeyboardInterrupt
        return rate(stage, update)

    again = data | {"output": data["output"].parent / "interrupted", "checkpoint_minutes": 0.0}
    monkeypatch.setattr(trainer_module, "learning_rate", interrupted_rate)
    with pytest.raises(KeyboardInterrupt):
        train("scratch", **again)
    resumed = saved_state(train("scratch", **again))
    assert num_calls == 16
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("draft_layers", [0, 1])
@pytest.mark.parametrize("head_type", ["projection", "latent", "residual", "sequential"])
def test_heads_are_fitted_to_a_frozen_model(data, trained, head_type, draft_layers):
    before = saved_state(trained)
    heads = {"num_heads": 5, "head_type": head_type, "draft_layers": draft_layers}
    folder = train("heads", **from_model(data, trained, "heads"), updates=2, **heads)
    model = SpeechLlamaForConditionalGeneration.from_pretrained(folder)
    assert (model.num_heads, model.config.head_type, model.config.draft_layers) == (5, head_type, draft_layers)
    after, of_heads = model.state_dict(), ("mtp_heads.", "draft_layers.")
    frozen = {name for name in before if not name.startswith(of_heads)}
    assert frozen == {name for name in after if not name.startswith(of_heads)}
    for name in frozen:
        assert torch.equal(before[name], after[name]), name
    fresh, _ = load_initial(trained)
    set_heads(fresh, **heads, seed=1)
    for part in ("mtp_heads.", "draft_layers.")[: 1 + draft_layers]:
        own = {name: weight for name, weight in fresh.state_dict().items() if name.startswith(part)}
        assert any(not torch.equal(weight, after[name]) for name, weight in own.items())


@pytest.mark.parametrize("num_heads", [1, 3])
def test_all_of_a_model_is_trained_for_fewer_word_errors(data, trained, num_heads):
    settings = {"nbest": 2, "reference": True, "calls_weight": 0.1 if num_heads > 1 else None}
    arguments = from_model(data, trained, "mwer") | {"num_heads": num_heads, "updates": 2}
    folder = train("mwer", **arguments, **settings)
    before, after = saved_state(trained), saved_state(folder)
    for part in ("encoder.", "adapter.", "ctc_head.", "decoder."):
        assert any(not torch.equal(before[name], after[name]) for name in after if name.startswith(part)), part
    assert any(name.startswith("mtp_heads.") for name in after) == (num_heads > 1)
    (logged,) = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
    figures = {"errors_expected", "errors_first", "errors_oracle", "search_calls", "search_seconds", "ce_1", "ctc"}
    assert figures <= logged.keys()
    assert ("calls_expected" in logged) == (num_heads > 1)
    assert logged["errors_oracle"] <= min(logged["errors_expected"], logged["errors_first"])
    assert logged["errors_oracle"] == 0  # the reference is in the list


def training_logits(model, num_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    size = model.config.decoder_config.hidden_size
    hidden, tokens = torch.randn(2, 1, 6, size, generator=generator, dtype=model.dtype)
    return model.mtp_heads.training_logits(hidden, tokens, model.get_output_embeddings())[: num_heads - 1]


@pytest.mark.parametrize("head_type", ["projection", "latent", "residual", "sequential"])
@pytest.mark.parametrize("num_heads", [3, 6])
def test_heads_that_are_there_stay(build_tiny_model, tmp_path, head_type, num_heads):
    model = build_tiny_model(head_type=head_type, num_heads=4, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    other = SpeechLlamaForConditionalGeneration.from_pretrained(tmp_path)
    set_heads(other, num_heads=num_heads, head_type=None, seed=1)
    kept = min(num_heads, 4)
    for before, after in zip(training_logits(model, kept), training_logits(other, kept), strict=True):
        torch.testing.assert_close(after, before)
    assert len(training_logits(other, num_heads)) == num_heads - 1
    other.save_pretrained(tmp_path / "other")
    assert SpeechLlamaForConditionalGeneration.from_pretrained(tmp_path / "other").num_heads == num_heads


def test_new_heads_begin_as_head_1(build_tiny_model, tmp_path):
    build_tiny_model(num_heads=1, dtype=torch.float32).save_pretrained(tmp_path)
    for head_type in ("projection", "latent", "residual", "sequential"):
        model = SpeechLlamaForConditionalGeneration.from_pretrained(tmp_path)
        set_heads(model, num_heads=3, head_type=head_type, seed=1)
        hidden = torch.randn(1, 6, 32)
        first = model.get_output_embeddings()(hidden)
        for logits in model.mtp_heads.training_logits(hidden, torch.randn(1, 6, 32), model.get_output_embeddings()):
            torch.testing.assert_close(logits, first)
        set_heads(model, num_heads=1, head_type=None, seed=1)
        assert model.mtp_heads is None


def test_training_goes_on_from_a_model(data, trained):
    folder = train("scratch", **from_model(data, trained, "more"), stages="joint")
    model, processor = load_initial(folder)
    assert model.num_heads == 3
    assert processor.tokenizer.get_vocab() == load_initial(trained)[1].tokenizer.get_vocab()
    before, after = saved_state(trained), model.state_dict()
    name = "encoder.encoder.layers.0.fc1.weight"  # frozen: the initial model's, and so the pretrained one's
    assert torch.equal(before[name], after[name])
    assert not torch.equal(before["ctc_head.weight"], after["ctc_head.weight"])


def test_cached_frames_give_the_same_loss(trained, data, tmp_path):
    model, processor = load_initial(trained)
    cuts = list(read_manifest(data["manifests"][0]).cuts)
    cache = EncoderCache(tmp_path / "frames", model.encoder, processor)
    cache.compute(cuts, batch_seconds=20, num_workers=0, advance=lambda count: None)
    plan = plan_epoch([Source(cuts)], batch_seconds=25, seed=1, epoch=0)
    heard = SpeechBatches(plan, processor, NO_AUGMENTATION, seed=1, epoch=0)
    cached = FrameBatches(plan, processor, EncoderCache(tmp_path / "frames", model.encoder, processor))
    assert len(heard) == len(cached) > 1
    for task in ("ctc", "joint", "heads", "mwer"):
        losses = StageTask(model, processor, Stage("any", task, updates=1, batch=25, learning_rate=1e-3))
        for index in range(2):
            expected, got = losses(heard[index]), losses(cached[index])
            assert expected.total > 0.1
            torch.testing.assert_close(got.total, expected.total, rtol=1e-5, atol=1e-6)
            assert got.figures.keys() == expected.figures.keys()
            assert cached[index].audio_seconds == heard[index].audio_seconds
            assert cached[index].ids == heard[index].ids


def test_training_from_cached_frames_gives_the_same_model(data, trained, tmp_path, monkeypatch):
    arguments = from_model(data, trained, "one") | {"augment": False}
    expected = saved_state(train("scratch", **arguments, stages="ctc"))
    arguments |= {"output": tmp_path / "two", "encoder_cache": tmp_path / "frames", "dev": []}
    got = saved_state(train("scratch", **arguments, stages="ctc"))
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.equal(got["ctc_head.weight"], saved_state(trained)["ctc_head.weight"])

    def encode(self, *_):
        raise AssertionError("the frames are there already")

    monkeypatch.setattr("leapasr.model.encoders.WhisperSpeechEncoder.forward", encode)
    train("scratch", **arguments | {"output": tmp_path / "three"}, stages="ctc")


def test_frames_are_of_these_weights_and_this_audio(data, trained, tmp_path):
    model, processor = load_initial(trained)
    cuts = list(read_manifest(data["manifests"][0]).cuts)
    cache = EncoderCache(tmp_path, model.encoder, processor)
    assert len(cache.missing([*cuts, cuts[0].with_id("other")])) == len(cuts)
    cache.compute(cuts[:1], batch_seconds=20, num_workers=0, advance=lambda count: None)
    assert cache.missing([cuts[0], cuts[-1].with_id(cuts[0].id)]) == [cuts[-1].with_id(cuts[0].id)]
    assert cache.missing([cuts[0].truncate(duration=2.0)]) != []
    assert len(cache.frames(cuts[0])) == 178  # 7.1 s, pooled

    again = EncoderCache(tmp_path, model.encoder, processor)
    assert again.missing(cuts[:1]) == []
    processor.save_pretrained(tmp_path / "processor")
    reloaded = SpeechLlamaProcessor.from_pretrained(tmp_path / "processor")
    assert fingerprint(model.encoder, reloaded) == fingerprint(model.encoder, processor)
    model.encoder.pooling_layer = 1
    assert EncoderCache(tmp_path, model.encoder, processor).missing(cuts[:1]) == cuts[:1]
    folders = set()
    for model.encoder.pooling_layer in (None, 0, 1, 2):
        folders.add(EncoderCache(tmp_path, model.encoder, processor).folder)
    assert len(folders) == 4
    assert EncoderCache(tmp_path, model.encoder, processor).missing(cuts[:1]) == []
    with torch.no_grad():
        model.encoder.encoder.layers[1].fc2.bias[3] += 1e-3
    assert EncoderCache(tmp_path, model.encoder, processor).missing(cuts[:1]) == cuts[:1]
    shard = next(again.folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    again.shards = {}
    with pytest.raises(ValueError, match=r"safetensors is damaged .* delete it"):
        again.refresh()


def test_an_interrupted_cache_keeps_whole_shards(data, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("leapasr.training.encoder_cache.SHARD_SECONDS", 1.0)
    model, processor = load_initial(trained)
    cuts = list(read_manifest(data["manifests"][0]).cuts)
    cache = EncoderCache(tmp_path / "frames", model.encoder, processor)

    counts = []

    def interrupt(count):
        counts.append(count)
        if len(counts) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.compute(cache.missing(cuts), batch_seconds=8, num_workers=0, advance=interrupt)
    cache = EncoderCache(tmp_path / "frames", model.encoder, processor)
    assert len(cache.missing(cuts)) == len(cuts) - sum(counts)
    cache.compute(cache.missing(cuts), batch_seconds=8, num_workers=0, advance=counts.append)
    assert sum(counts) == len(cuts)
    assert cache.missing(cuts) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "huge"}, "unknown preset 'huge': choose one of tiny, scratch, base, heads, mwer"),
        ({"stages": "ctc,mwer"}, "unknown stages mwer: this preset has language, text, ctc, encoder, joint"),
        ({"updates": 0}, "updates must be at least 1, got 0"),
        ({"text": []}, "the stage 'language' has no text"),
        ({"text": [], "stages": "ctc"}, "a tokenizer must be made from text first"),
        ({"manifests": []}, "no training manifest"),
        ({"manifests": ["nowhere.jsonl"]}, r"nowhere\.jsonl does not exist"),
        ({"manifests": ["{manifest}=much"]}, "positive number, got 'much'"),
        ({"manifests": ["{manifest}=0.05"]}, r"no utterance to train on: the manifests have 6 with weight 0\.05"),
        ({"manifests": ["{manifest}", "{manifest}=2"]}, "is given twice"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
        ({"head_type": "medusa"}, "unknown head_type 'medusa'"),
        ({"preset": "heads", "encoder": None}, "give --init MODEL"),
        ({"preset": "mwer", "encoder": None}, "give --init MODEL"),
        ({"nbest": 4, "reference": True}, "nbest, reference: for MWER training alone; choose --preset mwer"),
        ({"preset": "heads", "encoder": None, "initial_model": Path("nowhere")}, "nowhere is no folder"),
        ({"initial_model": Path("nowhere")}, "has an encoder already"),
        ({"encoder_cache": Path("frames")}, "stage 'ctc' augments its audio"),
        ({"encoder_cache": Path("frames"), "stages": "text,joint"}, "none of text, joint is"),
    ],
)
def test_errors_come_early(data, monkeypatch, changes, message):
    monkeypatch.setattr("leapasr.training.trainer.Trainer.run", lambda self: pytest.fail("this trains"))
    arguments = {"preset": "scratch"} | data | changes
    arguments["manifests"] = [m.format(manifest=data["manifests"][0]) for m in arguments["manifests"]]
    with pytest.raises(ValueError, match=message):
        train(**arguments)


def test_a_vocabulary_of_another_size_is_an_error(data, trained, tmp_path):
    (tmp_path / "prose.txt").write_text("The end of it.\n")
    with pytest.raises(ValueError, match=r"the text gives a vocabulary of .* tokens only, and 96 are wanted"):
        train("scratch", **data | {"output": tmp_path / "new"})
    _, processor = load_initial(trained)
    processor.tokenizer.add_tokens(["<more>"])
    processor.save_pretrained(trained)
    with pytest.raises(ValueError, match="a tokenizer of 97 tokens and a model of 96"):
        train("heads", **from_model(data, trained, "heads"), num_heads=2)


def test_heads_need_more_than_one(data, trained):
    one = train("scratch", **from_model(data, trained, "one"), stages="ctc", num_heads=1)
    with pytest.raises(ValueError, match=r"head 1 alone \(K = 1\).*give --heads K"):
        train("heads", **from_model(data, one, "heads"))


def test_settings_of_mwer_that_cannot_be(data, trained):
    arguments = from_model(data, trained, "mwer")
    with pytest.raises(ValueError, match=r"head 1 alone \(K = 1\), which saves no call: leave out"):
        train("mwer", **arguments, num_heads=1, calls_weight=0.1)
    with pytest.raises(ValueError, match="of a list of 1 there is nothing to choose"):
        train("mwer", **arguments, nbest=1)


def test_a_loss_that_is_not_finite_ends_training(data, trained):
    model, _ = load_initial(trained)
    with torch.no_grad():
        model.ctc_head.weight[0, 0] = torch.nan
    model.save_pretrained(trained)
    with pytest.raises(TrainingError, match=r"stage 'joint', update 0: loss nan.*Lower the learning rate"):
        train("scratch", **from_model(data, trained, "nan"), stages="joint")
    assert not (data["output"].parent / "nan" / "model").exists()


def test_what_cannot_be_used_is_reported(data, tmp_path):
    audio = str(SAMPLES / "austen-0870.flac")
    good = {"id": "good", "audio": audio, "duration": 7.1, "text": "it was lost"}
    lines = [good, good | {"id": "dense", "text": "opinion " * 100}, good | {"id": "empty", "text": " "}]
    lines += [good | {"id": "gone", "audio": "gone.flac"}]
    manifest = write_manifest(tmp_path / "whole.jsonl", lines)  # no line names a use: all are for training
    reported: list[str] = []
    arguments = data | {"manifests": [str(manifest)], "dev": [], "report": reported.append}
    train("scratch", **arguments, stages="ctc", updates=1)
    assert len(reported) == 3
    for message in ("whole.jsonl:4: audio file not found", "more than CTC can align", "empty: empty text"):
        assert any(message in line for line in reported), reported


def test_weights_of_manifests(tmp_path):
    (tmp_path / "a=2").touch()
    got = weighted(["plain.jsonl", "half.jsonl=0.5", str(tmp_path / "a=2"), f"{tmp_path}/a=2=3"[:-2] + "x=3"])
    assert list(got.values()) == [1, 0.5, 1, 3]
    assert list(got)[2:] == [tmp_path / "a=2", tmp_path / "a=2x"]


def test_command_line(data):
    output = data["output"]
    command = ["train", "--preset", "scratch", "--encoder", data["encoder"], "--output", str(output)]
    command += ["--text", str(data["text"][0]), "--manifest", f"{data['manifests'][0]}=2", "--dev", str(data["dev"][0])]
    command += ["--updates", "1", "--no-compile", "--precision", "fp32"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert str(output / "model") in result.output
    heads = ["train", "--preset", "heads", "--init", str(output / "model"), "--heads", "4", "--head-type", "residual"]
    heads += ["--manifest", data["manifests"][0], "--output", str(output / "heads"), "--no-compile", "--updates", "1"]
    result = CliRunner().invoke(app, [*heads, "--encoder-cache", str(output / "frames")])
    assert result.exit_code == 0, result.output
    model = SpeechLlamaForConditionalGeneration.from_pretrained(output / "heads" / "model")
    assert (model.num_heads, model.config.head_type) == (4, "residual")
    assert list((output / "frames").glob("*/*.safetensors"))
    result = CliRunner().invoke(app, [*heads, "--init", "nowhere"])
    assert result.exit_code != 0
    assert "nowhere is no folder" in result.output
    mwer = ["train", "--preset", "mwer", "--init", str(output / "heads" / "model"), "--manifest", data["manifests"][0]]
    mwer += ["--output", str(output / "mwer"), "--no-compile", "--precision", "fp32", "--updates", "1"]
    mwer += ["--nbest", "2", "--reference", "--calls-weight", "0.1", "--ce-weight", "0.5"]
    result = CliRunner().invoke(app, mwer)
    assert result.exit_code == 0, result.output
    (logged,) = [json.loads(line) for line in (output / "mwer" / "metrics.jsonl").read_text().splitlines()]
    assert logged["errors_oracle"] == 0 < logged["calls_expected"]
    result = CliRunner().invoke(app, [*mwer, "--nbest", "1", "--no-reference"])
    assert result.exit_code == 2
    assert "of a list of 1 there is nothing to choose" in result.output
