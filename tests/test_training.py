"""The trainer: every stage on a toy, exact resuming, what stays frozen, and what is said when it cannot go on."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import tiny_config
from transformers import WhisperFeatureExtractor

from leapasr import config
from leapasr.audio import SAMPLE_RATE
from leapasr.config import MWER, Stage, TrainingConfig, small_llama
from leapasr.data.augmentation import NO_AUGMENTATION, Augmentation
from leapasr.data.batches import Source
from leapasr.data.manifests import read_manifest
from leapasr.model.building import build_model, build_processor
from leapasr.model.configuration import SpeechLlamaConfig
from leapasr.model.processing import SpeechLlamaProcessor
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration
from leapasr.training import trainer as trainer_module
from leapasr.training.mwer import hypothesize, read_lists
from leapasr.training.run import usable
from leapasr.training.tokenizer import train_tokenizer
from leapasr.training.trainer import Trainer, TrainingError, save_atomically

TEXTS = ["the cat sat", "A dog ran.", "where is it?", "no, it is not", "the dog sat", "the cat ran."]
NUM_TOKENS = 80
STAGES = tuple(
    Stage(
        task, task, updates=3, batch=60 if task == "text" else 3, learning_rate=1e-2, warmup=2, averaging=0.5, slips=0.1
    )
    for task in ("text", "ctc", "joint", "heads", "mwer")
)  # with augmentation and slips: random choices must be the same in a resumed run


@pytest.fixture(autouse=True)
def on_the_cpu_and_not_waiting_for_the_disk(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(os, "fsync", lambda file: None)  # what a killed process has written stays without it


@pytest.fixture(scope="session")
def processor() -> SpeechLlamaProcessor:
    tokenizer = train_tokenizer(TEXTS, vocab_size=NUM_TOKENS)
    return SpeechLlamaProcessor(WhisperFeatureExtractor(feature_size=8), tokenizer)


@pytest.fixture(scope="session")
def manifest(babble, tmp_path_factory) -> Path:
    """A second of sound for each of `TEXTS`."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = []
    for n, text in enumerate(TEXTS):
        soundfile.write(folder / f"{n}.wav", babble(1.0, seed=n), SAMPLE_RATE)
        lines.append({"id": f"toy-{n}", "audio": f"{n}.wav", "duration": 1.0, "text": text, "use": "train"})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def new_model(*, num_heads=4, tied=True, seed=1) -> SpeechLlamaForConditionalGeneration:
    shape = tiny_config(num_heads=num_heads)
    shape.decoder_config.tie_word_embeddings = tied
    shape.decoder_config.vocab_size = NUM_TOKENS
    shape.encoder_config.max_source_positions = 100  # two seconds
    torch.manual_seed(seed)
    return SpeechLlamaForConditionalGeneration(shape)


def make_trainer(output, manifest, processor, *, stages=STAGES, model=None, texts=TEXTS, cuts=None, **options):
    options = {"precision": "fp32", "compile": False, "num_workers": 0, "checkpoint_minutes": 60} | options
    cuts = read_manifest(manifest, use="train").cuts if cuts is None else cuts
    run = TrainingConfig(None, stages, manifests={manifest: 1.0}, dev=(), text=(), output=output, **options)
    return Trainer(run, model or new_model(), processor, sources=[Source(cuts)], texts=texts, dev=cuts[:2])


def stage_of(task, **fields):
    stage = next(stage for stage in STAGES if stage.task == ("text" if task == "language" else task))
    return replace(stage, task=task, augmentation=NO_AUGMENTATION, **fields)


def weights_of(folder) -> dict[str, bytes]:
    """The weights of every model in a run's folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def stop_before_update(monkeypatch, total):
    """Have training interrupted before its `total`-th update, counted over all stages from now on."""
    rate, calls = trainer_module.learning_rate, []

    def interrupted_rate(stage, update):
        calls.append(update)
        if len(calls) == total:
            raise KeyboardInterrupt
        return rate(stage, update)

    monkeypatch.setattr(trainer_module, "learning_rate", interrupted_rate)


# Learning


@pytest.mark.parametrize("task", ["joint", "mwer"])
def test_without_its_loss_the_ctc_head_stays_as_it_is(tmp_path, manifest, processor, task):
    model = new_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stage = stage_of(task, updates=3, ctc_weight=0.0)
    make_trainer(tmp_path, manifest, processor, stages=(stage,), model=model).run()
    stayed = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert stayed - {"encoder.encoder.embed_positions.weight"} == {name for name in before if "ctc_head" in name}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("task", ["language", "text", "ctc", "joint", "heads", "mwer"])
def test_every_stage_lowers_its_loss(tmp_path, manifest, processor, task, precision):
    stage = stage_of(task, updates=40, averaging=0.0, mwer=MWER(nbest=2, ce_weight=0.5))
    trainer = make_trainer(tmp_path, manifest, processor, stages=(stage,), precision=precision, seed=3)
    trainer.dev = trainer.sources[0].cuts  # a toy is learnt by heart
    before = trainer.evaluate(stage)
    assert trainer.run() == tmp_path / "model"
    after = trainer.evaluate(stage)
    losses = {
        "language": ["ce_1"],
        "text": ["ce_1", "ce_2", "ce_3", "ce_4"],
        "ctc": ["ctc"],
        "joint": ["ctc", "ce_1", "ce_2", "ce_3", "ce_4"],
        "heads": ["ce_2", "ce_3", "ce_4"],
        "mwer": ["errors_expected", "ctc", "ce_1", "ce_2", "ce_3", "ce_4"],
    }[task]
    for name in losses:  # a head on a random, frozen decoder learns little, and one that writes little errs little
        share = 0.95 if task == "heads" or name == "errors_expected" else 0.8
        assert after[name] < share * before[name], (name, before[name], after[name])
    if task == "heads":
        assert after["ce_1"] == before["ce_1"]
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in logged] == [25, 40]
    assert {"loss", "grad_norm", "audio_per_second", *losses} <= logged[0].keys()
    assert {f"dev_{name}" for name in losses} <= logged[1].keys()
    assert task != "language" or "ce_2" not in logged[0]
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_loss_of_mwer_is_of_all_its_parts(tmp_path, manifest, processor):
    model = new_model()
    settings = MWER(nbest=2, reference=True, ce_weight=0.3, calls_weight=0.2)
    stage = stage_of("mwer", ctc_weight=0.7, mwer=settings)
    stage = replace(stage, slips=0.0)
    batch = make_trainer(tmp_path, manifest, processor, model=model)._dataset(stage, 0)[0]
    task = trainer_module.StageTask(model, processor, stage)
    encoding, end = task.encode(batch), {"end_token_id": model.config.eos_token_id}
    found = hypothesize(model, processor, encoding, batch, nbest=2, with_reference=True)
    logits, risk, _ = read_lists(model, encoding, found, batch.text_ids, batch.text_lengths, calls_weight=0.2)
    ctc = trainer_module.ctc_loss(
        encoding.ctc.logits_BTV, encoding.ctc_lengths_B, batch.text_ids, batch.text_lengths,
        blank=model.config.blank_token_id,
    )  # fmt: skip
    ce, *_ = trainer_module.mtp_loss(logits, batch.text_ids, batch.text_lengths, weights=stage.weights(4), **end)
    losses = task(batch)
    assert losses.total.item() == pytest.approx((risk + 0.7 * ctc + 0.3 * ce).item(), rel=1e-5)
    assert losses.figures["errors_oracle"] == 0
    with torch.no_grad():  # in evaluation the reference is not in the lists
        assert task(batch).figures["errors_oracle"] > 0


def test_a_language_model_reads_nothing_but_its_texts(tmp_path, manifest, processor):
    trainer = make_trainer(tmp_path, manifest, processor)
    for task, reads in (("language", False), ("text", True)):
        dataset = trainer._dataset(stage_of(task), epoch=0)
        assert all((dataset[index].read_ids.shape[1] > 0) == reads for index in range(len(dataset)))


def test_the_decoder_reads_slips_in_training_alone(processor):
    task = trainer_module.StageTask(new_model(), processor, stage_of("text", slips=0.5))
    batch = trainer_module.MisreadBatches(TEXTS, processor, batch_tokens=300, seed=1, epoch=0)[0]
    assert not torch.equal(task.read(batch), batch.text_ids)
    with torch.no_grad():
        assert torch.equal(task.read(batch), batch.text_ids)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("task", "trained"),
    [
        ("language", ("decoder.",)),
        ("text", ("decoder.", "mtp_heads.", "speech_projection.previous.", "speech_projection.following")),
        ("ctc", ("encoder.", "adapter.", "ctc_head.")),
        ("joint", ("encoder.", "adapter.", "ctc_head.", "speech_projection.", "decoder.", "mtp_heads.")),
        ("heads", ("mtp_heads.",)),
        ("mwer", ("encoder.", "adapter.", "ctc_head.", "speech_projection.", "decoder.", "mtp_heads.")),
    ],
)
def test_a_stage_leaves_other_weights_bit_identical(tmp_path, manifest, processor, task, trained, precision):
    """Contract 5 for `heads`: head 1 of the retrofitted model is that of the base model."""
    model = new_model()
    for parameter in model.parameters():
        parameter.data += 1e-3 * torch.randn(parameter.shape)  # of no bfloat16 value, and no norm at exactly 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stage = stage_of(task, averaging=0.0)
    trainer = make_trainer(tmp_path, manifest, processor, stages=(stage,), model=model, precision=precision)
    folder = trainer.run()
    for after in (model.state_dict(), SpeechLlamaForConditionalGeneration.from_pretrained(folder).state_dict()):
        assert after.keys() == before.keys()
        for name, value in after.items():
            changes = name.startswith(trained) and not name.endswith("embed_positions.weight")
            assert torch.equal(value, before[name]) != changes, name


# Resuming


def test_no_two_stages_hear_the_same_batches(tmp_path, manifest, processor):
    noisy = stage_of("ctc")
    stages = tuple(replace(noisy, name=name, augmentation=Augmentation(noise=1.0)) for name in ("first", "second"))
    trainer = make_trainer(tmp_path, manifest, processor, stages=stages)
    heard = []
    for trainer.stage_index, stage in enumerate(stages):
        heard.append(trainer._dataset(stage, 0)[0].input_features)
        assert torch.equal(trainer._dataset(stage, 0)[0].input_features, heard[-1])
    assert heard[0].shape != heard[1].shape or not torch.equal(*heard)


@pytest.mark.parametrize(("precision", "tied"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_interrupted_at_every_update_and_resumed(tmp_path, manifest, processor, monkeypatch, precision, tied):
    options = {"precision": precision, "eval_every": 2}
    make_trainer(tmp_path / "whole", manifest, processor, model=new_model(tied=tied), **options).run()
    options["checkpoint_minutes"] = 0
    num_runs = 0
    while not (tmp_path / "parts" / "mwer").exists():
        with monkeypatch.context() as patch:
            stop_before_update(patch, 2)  # one update a run
            # the weights must come from the checkpoint: but for the first run, the model that is given is another
            model = new_model(tied=tied, seed=1 if num_runs == 0 else 100 + num_runs)
            trainer = make_trainer(tmp_path / "parts", manifest, processor, model=model, **options)
            if num_runs < 14:
                with pytest.raises(KeyboardInterrupt):
                    trainer.run()
            else:
                trainer.run()
        num_runs += 1
    assert num_runs == 15
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert whole.keys() == {f"{name}/model.safetensors" for name in ("text", "ctc", "joint", "heads", "mwer", "model")}
    for name, data in whole.items():
        assert parts[name] == data, name


KILLED_RUN = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import torch
    import test_training as t
    from leapasr.training import trainer as module

    torch.set_num_threads(1)
    num_saves, save = 0, torch.save

    def killed_while_writing(state, file):
        global num_saves
        num_saves += 1
        if num_saves == {at_save}:
            file.write(b"half of a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    module.torch.save = killed_while_writing
    processor = t.SpeechLlamaProcessor.from_pretrained({processor!r})
    t.make_trainer(Path({output!r}), Path({manifest!r}), processor, checkpoint_minutes=0).run()
"""


def test_killed_while_it_writes_a_checkpoint_and_resumed(tmp_path, manifest, processor):
    make_trainer(tmp_path / "whole", manifest, processor).run()
    processor.save_pretrained(tmp_path / "processor")
    output = tmp_path / "killed"
    script = textwrap.dedent(KILLED_RUN).format(
        tests=str(Path(__file__).parent), at_save=9, processor=str(tmp_path / "processor"), output=str(output),
        manifest=str(manifest),
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (output / "checkpoint.pending").read_bytes() == b"half of a checkpoint"
    saved = torch.load(output / "checkpoint.pt", weights_only=True)
    assert (saved["stage"], saved["update"]) == (2, 0)  # the first joint update is lost, and made again
    make_trainer(output, manifest, processor, model=new_model(seed=9)).run()
    assert weights_of(output) == weights_of(tmp_path / "whole")


def test_a_finished_run_is_not_trained_again(tmp_path, manifest, processor, monkeypatch):
    make_trainer(tmp_path, manifest, processor).run()
    before = weights_of(tmp_path)
    stop_before_update(monkeypatch, 1)
    assert make_trainer(tmp_path, manifest, processor, model=new_model(seed=5)).run() == tmp_path / "model"
    assert weights_of(tmp_path) == before


# What cannot be


def test_a_loss_that_is_not_finite_names_the_batch_and_keeps_the_checkpoint(tmp_path, manifest, processor, monkeypatch):
    stages = (stage_of("ctc", updates=4), stage_of("joint"))
    make_trainer(tmp_path / "whole", manifest, processor, stages=stages).run()
    ctc_loss, losses = trainer_module.ctc_loss, []

    def ctc_loss_that_breaks(*args, **options):
        losses.append(ctc_loss(*args, **options))
        return losses[-1] * (float("nan") if len(losses) == 3 else 1)

    output = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "ctc_loss", ctc_loss_that_breaks)
        with pytest.raises(TrainingError) as error:
            make_trainer(output, manifest, processor, stages=stages, checkpoint_minutes=0).run()
    message = str(error.value)
    assert "stage 'ctc', update 2: loss nan" in message
    assert "Lower the learning rate (0.01)" in message
    assert str(output / "checkpoint.pt") in message
    assert "toy-" in message.partition("Batch: ")[2]
    saved = torch.load(output / "checkpoint.pt", weights_only=True)
    assert (saved["stage"], saved["update"]) == (0, 2)
    make_trainer(output, manifest, processor, stages=stages).run()
    assert weights_of(output) == weights_of(tmp_path / "whole")


@pytest.fixture
def interrupted(tmp_path, manifest, processor, monkeypatch):
    """The folder of a run that was interrupted in its second stage."""
    with monkeypatch.context() as patch:
        stop_before_update(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path, manifest, processor, checkpoint_minutes=0).run()
    return tmp_path


ONE_OF_TWO = """
    import hashlib, os, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import test_training as t

    def say(*words):
        os.write(1, (" ".join(map(str, words)) + chr(10)).encode())  # the lines of two processes, each whole

    t.torch.set_num_threads(1)
    to_device = t.trainer_module._to_device

    def heard(batch, device):
        if t.torch.is_grad_enabled():
            say("heard", trainer.stage_index, trainer.update, *batch.ids)
        return to_device(batch, device)

    t.trainer_module._to_device = heard
    processor = t.SpeechLlamaProcessor.from_pretrained({processor!r})
    trainer = t.make_trainer(Path({output!r}), Path({manifest!r}), processor, model=t.new_model(seed=7))
    trainer.run()
    digest = hashlib.sha256()
    for value in trainer.model.state_dict().values():
        digest.update(value.numpy().tobytes())
    say("weights", trainer.accelerator.num_processes, digest.hexdigest())
"""


def test_two_processes_go_on_with_what_one_began(interrupted, tmp_path_factory, manifest, processor):
    folder = tmp_path_factory.mktemp("two")
    processor.save_pretrained(folder / "processor")
    script = textwrap.dedent(ONE_OF_TWO).format(
        tests=str(Path(__file__).parent), processor=str(folder / "processor"), output=str(interrupted),
        manifest=str(manifest),
    )  # fmt: skip
    (folder / "train.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(folder / "train.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    weights = [line[1:] for line in lines if line and line[0] == "weights"]
    assert [num_processes for num_processes, _ in weights] == ["2", "2"]
    assert len({digest for _, digest in weights}) == 1
    heard = {}
    for _, stage, update, *ids in (line for line in lines if line and line[0] == "heard"):
        heard.setdefault((int(stage), int(update)), []).append({name.partition("#")[0] for name in ids})
    assert sorted(heard) == [(1, 2), *((stage, update) for stage in (2, 3, 4) for update in range(3))]
    for of_both in heard.values():  # an epoch of two batches: each process has one of them
        assert [len(ids) for ids in of_both] == [3, 3]
        assert set.union(*of_both) == {f"toy-{n}" for n in range(6)}


def test_a_checkpoint_of_another_run(interrupted, manifest, processor):
    before = (interrupted / "checkpoint.pt").read_bytes()
    with pytest.raises(TrainingError, match=r"another architecture: size mismatch for mtp_heads.* another --output"):
        make_trainer(interrupted, manifest, processor, model=new_model(num_heads=2)).run()
    with pytest.raises(TrainingError, match=r"of a run of the stages text, .*, mwer, not ctc; train into"):
        make_trainer(interrupted, manifest, processor, stages=STAGES[1:2]).run()
    frozen = (STAGES[0], replace(STAGES[1], frozen_encoder_layers=None), *STAGES[2:])
    with pytest.raises(TrainingError, match="written while stage 'ctc' trained other weights"):
        make_trainer(interrupted, manifest, processor, stages=frozen).run()
    assert (interrupted / "checkpoint.pt").read_bytes() == before


def test_a_damaged_checkpoint(interrupted, manifest, processor):
    path = interrupted / "checkpoint.pt"
    data = path.read_bytes()
    for damaged in (b"", b"{}", b"no checkpoint at all", data[:100], data[: len(data) // 2], data[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(
            TrainingError, match=r"checkpoint\.pt is damaged or cut short; delete it to train from the start"
        ):
            make_trainer(interrupted, manifest, processor).run()
        assert path.read_bytes() == damaged


def test_a_full_disk_leaves_the_old_checkpoint(interrupted, manifest, processor, full_disk):
    path = interrupted / "checkpoint.pt"
    before = path.read_bytes()
    trainer = make_trainer(interrupted, manifest, processor, checkpoint_minutes=0)
    with full_disk(len(before) // 2), pytest.raises(OSError, match=r"File too large: '.*checkpoint\.pending'"):
        trainer.run()
    assert path.read_bytes() == before
    assert not path.with_suffix(".pending").exists()
    make_trainer(interrupted, manifest, processor).run()


def test_a_checkpoint_replaces_another_whole(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_atomically({"update": 1}, path)
    old = tmp_path / "old.pt"
    os.link(path, old)
    save_atomically({"update": 2}, path)
    assert torch.load(old) == {"update": 1}  # replaced, never written into
    with pytest.raises((AttributeError, TypeError)):
        save_atomically({"update": lambda: 3}, path)
    assert torch.load(path) == {"update": 2}
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint.pt", "old.pt"}


def test_no_data(tmp_path, manifest, processor):
    with pytest.raises(TrainingError, match="stage 'text' needs text: give --text FILE"):
        make_trainer(tmp_path, manifest, processor, texts=[]).run()
    with pytest.raises(ValueError, match="no training data: every source is empty or has weight 0"):
        make_trainer(tmp_path, manifest, processor, stages=STAGES[1:], cuts=[]).run()
    assert not (tmp_path / "checkpoint.pt").exists()


def test_cuts_that_cannot_be_used_are_reported(manifest, processor):
    cuts = read_manifest(manifest, use="train").cuts
    texts = ["the cat sat", "the ¥ sat", "", "the cat sat on the mat where the dog ran, and ran, and ran."]
    for cut, text in zip(cuts, texts, strict=False):
        cut.supervisions[0].text = text
    cuts[4].duration = 0.2
    problems = []
    kept = usable(cuts, processor, ctc_frame_rate=25, report=problems.append)
    assert [cut.id for cut in kept] == ["toy-0", "toy-5"]
    assert [problem.partition(":")[0] for problem in problems] == ["toy-1", "toy-2", "toy-3", "toy-4"]
    for problem, reason in zip(
        problems,
        ["characters outside the vocabulary: '¥'", "empty text", "more than CTC can align", "outside 0.3 to 24.0 s"],
        strict=True,
    ):
        assert reason in problem


# The preset of the paper's scale


def test_base_is_of_the_papers_scale():
    preset, _ = config.base()
    with torch.device("meta"):
        shape = preset.fields | {"encoder_config": preset.encoder, "decoder_config": preset.decoder}
        model = SpeechLlamaForConditionalGeneration(SpeechLlamaConfig(**shape))

    def millions(module):
        return sum(p.numel() for p in module.parameters()) / 1e6

    assert model.num_heads == 4
    assert 115 < millions(model.decoder) < 135
    assert 90 < millions(model.encoder) < 110


def test_base_steps_and_resumes_on_one_batch(tmp_path, manifest, processor, monkeypatch):
    """Every stage of the preset, on the same classes and a narrower model."""
    preset, stages = config.base()
    encoder = preset.encoder.to_dict() | {
        "num_mel_bins": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 32, "subsampling_conv_channels": 8,
    }  # fmt: skip
    preset = replace(
        preset,
        encoder=type(preset.encoder)(**encoder),
        decoder=small_llama(NUM_TOKENS, size=32, layers=2, ffn=64, heads=2),
        vocab_size=NUM_TOKENS,
        fields=preset.fields | {"adapter_size": 16, "adapter_attention_heads": 2, "adapter_ffn_size": 32},
    )
    stages = tuple(replace(stage, updates=2) for stage in stages)

    def run(folder, seed, **options):
        model = build_model(preset, processor.tokenizer, seed=seed)
        own = build_processor(preset, processor.tokenizer)
        trainer = make_trainer(folder, manifest, own, stages=stages, model=model, precision="bf16", **options)
        assert len(trainer._dataset(stages[1], 0)) == 1
        return trainer.run()

    run(tmp_path / "whole", 1)
    with monkeypatch.context() as patch:
        stop_before_update(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", 1, checkpoint_minutes=0)
    run(tmp_path / "parts", 2)
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    loaded = SpeechLlamaForConditionalGeneration.from_pretrained(tmp_path / "parts" / "model")
    assert all(np.isfinite(value.numpy()).all() for value in loaded.state_dict().values())
