"""From a command line's arguments to a training run: tokenizer, model, data, trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from lhotse.cut import Cut
from lhotse.utils import fastcopy
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from leapasr.config import PRESETS, ModelPreset, Stage, TrainingConfig
from leapasr.data.augmentation import NO_AUGMENTATION
from leapasr.data.batches import Source
from leapasr.data.manifests import read_manifest, spread, use_of
from leapasr.data.synthesis import passages, read_paragraphs
from leapasr.model.building import build_model, build_processor
from leapasr.model.checkpoints import whisper_tokenizer
from leapasr.model.precision import advice_against
from leapasr.model.processing import SpeechLlamaProcessor
from leapasr.model.retrofitting import head_fields, set_heads
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration
from leapasr.model.storage import replace_files
from leapasr.model.whisper_decoder import WhisperDecoder
from leapasr.text import tidy
from leapasr.training.tokenizer import NUM_SPECIAL, frequent_tokens, train_tokenizer
from leapasr.training.trainer import Trainer

TOKENIZER_TEXTS = 100_000
MIN_SECONDS, MAX_SECONDS = 0.3, 24.0


def with_tidied_text(cut: Cut) -> Cut:
    """The cut with its transcript in the style that models write."""
    supervision = cut.supervisions[0]
    return fastcopy(cut, supervisions=[fastcopy(supervision, text=tidy(supervision.text))])


def usable(
    cuts: Iterable[Cut], processor: SpeechLlamaProcessor, *, ctc_frame_rate: float, report: Callable[[str], None]
) -> list[Cut]:
    """The cuts that training can use; each other one is reported with its reason.

    A cut needs a text inside the vocabulary, 0.3 to 24 seconds of audio, and at least 1.2 CTC frames a token (at the
    fastest speed of augmentation, CTC cannot align more).
    """
    kept = []
    for cut in map(with_tidied_text, cuts):
        try:
            num_tokens = len(processor.encode_text(cut.supervisions[0].text))
        except ValueError as error:
            report(f"{cut.id}: {error}")
            continue
        if not MIN_SECONDS <= cut.duration <= MAX_SECONDS:
            report(f"{cut.id}: {cut.duration:.2f} s is outside {MIN_SECONDS} to {MAX_SECONDS} s")
        elif not num_tokens:
            report(f"{cut.id}: empty text")
        elif num_tokens * 1.2 > cut.duration * ctc_frame_rate:
            report(f"{cut.id}: {num_tokens} tokens in {cut.duration:.2f} s are more than CTC can align")
        else:
            kept.append(cut)
    return kept


def prepare(
    preset: ModelPreset | None,
    stages: tuple[Stage, ...],
    *,
    manifests: dict[Path, float],
    dev: Sequence[Path],
    text: Sequence[Path],
    output: Path,
    initial_model: Path | None = None,
    num_heads: int | None = None,
    head_type: str | None = None,
    draft_layers: int | None = None,
    seed: int = 1,
    report: Callable[[str], None] = print,
    **options: Any,
) -> Trainer:
    """Build the model, its processor and data, ready to `run()`.

    Args:
        preset: what to build the model from; not used where there is an `initial_model`.
        manifests: training manifests and weights. dev, text: dev manifests, prose.
        initial_model: folder of a leapasr model to start from; heads that it lacks are new.
        num_heads, head_type, draft_layers: instead of those of the preset or the initial model.
        report: is told of every utterance that is left out, by one of several processes.
        options: further fields of `TrainingConfig`.

    Raises:
        ValueError: there is no data for a stage, nothing to train, or a vocabulary that is not the tokenizer's.
    """
    if not PartialState().is_main_process:
        report = _unheard
    config = TrainingConfig(
        model=preset, stages=stages, manifests=manifests, dev=tuple(dev), text=tuple(text), output=output,
        seed=seed, **options,
    )  # fmt: skip
    check_data(config)
    texts = passages((p for path in text for p in read_paragraphs(path)), seed=seed)
    if text and not texts:
        raise ValueError(f"no usable passage in {', '.join(map(str, text))}: prose is needed, a paragraph a line")
    if initial_model is not None:
        model, processor = load_initial(initial_model)
        set_heads(model, num_heads=num_heads, head_type=head_type, draft_layers=draft_layers, seed=seed)
    elif preset is not None:
        heads = head_fields(num_heads=num_heads, head_type=head_type, draft_layers=draft_layers)
        preset = replace(preset, fields=preset.fields | heads)
        with PartialState().main_process_first():
            tokenizer = load_tokenizer(preset, texts, output / "tokenizer")
        model, processor = build_model(preset, tokenizer, seed=seed), build_processor(preset, tokenizer)
    else:
        raise ValueError("this preset trains on a model that is there already: give --init MODEL")
    if model.mtp_heads is None and any(stage.task == "heads" for stage in stages):
        raise ValueError("the model has head 1 alone (K = 1), and a stage trains further heads: give --heads K")
    if model.mtp_heads is None and any(stage.task == "mwer" and stage.mwer.calls_weight for stage in stages):
        raise ValueError("the model has head 1 alone (K = 1), which saves no call: leave out --calls-weight")
    sources, dev_cuts = [], []
    if not all(stage.reads_text for stage in stages):
        read = partial(read_usable, processor=processor, ctc_frame_rate=model.ctc_frame_rate, report=report)
        sources = [Source(read(path, "train"), weight) for path, weight in manifests.items()]
        if not any(source.draw(np.random.default_rng(seed)) for source in sources):
            given = ", ".join(f"{len(source.cuts)} with weight {source.weight:g}" for source in sources)
            raise ValueError(f"no utterance to train on: the manifests have {given}")
        dev_cuts = [cut for path in dev for cut in spread(read(path, "dev"), config.eval_utterances)]
    return Trainer(config, model, processor, sources=sources, texts=texts, dev=dev_cuts)


def _unheard(message: str) -> None:
    pass


def check_data(config: TrainingConfig) -> None:
    """Find out before anything is computed what data are missing.

    Raises:
        ValueError: a stage has no data, or a file does not exist.
    """
    of_text = [stage.name for stage in config.stages if stage.reads_text]
    if of_text and not config.text:
        raise ValueError(f"the stage {of_text[0]!r} has no text: give --text FILE, or choose other --stages")
    if len(of_text) < len(config.stages) and not config.manifests:
        raise ValueError("no training manifest: give --manifest FILE, or --stages text alone")
    for path in (*config.text, *config.manifests, *config.dev):
        if not path.exists():
            raise ValueError(f"{path} does not exist")


def load_initial(folder: Path) -> tuple[SpeechLlamaForConditionalGeneration, SpeechLlamaProcessor]:
    """A leapasr model, float32, and its processor, to go on training from.

    Raises:
        ValueError: it is no such model, is damaged, or its tokenizer is of another vocabulary. OSError: there is none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: a leapasr model is wanted")
    model = SpeechLlamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = SpeechLlamaProcessor.from_pretrained(folder)
    if len(processor.tokenizer) != model.config.vocab_size:
        raise ValueError(
            f"{folder} has a tokenizer of {len(processor.tokenizer)} tokens and a model of "
            f"{model.config.vocab_size}: they do not belong together"
        )
    return model, processor


def load_tokenizer(preset: ModelPreset, texts: Sequence[str], folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a pretrained decoder; else the one in `folder`, made from `texts` if it is not there yet.

    Raises:
        ValueError: there is no text to train it on, or too little for `preset.vocab_size` tokens, or the one in
            `folder` is of another size.
    """
    if isinstance(preset.decoder, str):
        return AutoTokenizer.from_pretrained(preset.decoder)
    if folder.exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if len(tokenizer) != preset.vocab_size:
            raise ValueError(
                f"{folder} has {len(tokenizer)} tokens, and the preset wants {preset.vocab_size}: "
                "train into another --output folder"
            )
        return tokenizer
    if not texts:
        raise ValueError("a tokenizer must be made from text first, and there is none: give --text FILE")
    if isinstance(preset.decoder, WhisperDecoder) and isinstance(preset.encoder, str):
        tokenizer = frequent_tokens(
            whisper_tokenizer(preset.encoder), texts[:TOKENIZER_TEXTS], preset.vocab_size - NUM_SPECIAL
        )
    else:
        tokenizer = train_tokenizer(texts[:TOKENIZER_TEXTS], vocab_size=preset.vocab_size)
    if len(tokenizer) != preset.vocab_size:
        raise ValueError(
            f"the text gives a vocabulary of {len(tokenizer)} tokens only, and {preset.vocab_size} are wanted: "
            "give more --text"
        )

    def write(pending: Path) -> None:
        tokenizer.save_pretrained(pending)

    replace_files(folder, write)
    return tokenizer


def read_usable(
    path: Path, use: str, *, processor: SpeechLlamaProcessor, ctc_frame_rate: float, report: Callable[[str], None]
) -> list[Cut]:
    """The `usable` cuts of a manifest with this ``use``; of one that names no ``use`` at all, every cut.

    Raises:
        ValueError: the manifest cannot be read, or has no line with this ``use``.
    """
    result = read_manifest(path)
    if any(use_of(cut) is not None for cut in result.cuts):
        result = read_manifest(path, use=use)
    for problem in result.problems:
        report(problem)
    return usable(result.cuts, processor, ctc_frame_rate=ctc_frame_rate, report=report)


def choose_stages(stages: tuple[Stage, ...], names: str | None, updates: int | None) -> tuple[Stage, ...]:
    """The stages named in `names` (comma-separated; None: all), each with `updates` updates if that is given.

    Raises:
        ValueError: a name is not a stage, or `updates` is less than 1.
    """
    if updates is not None and updates < 1:
        raise ValueError(f"updates must be at least 1, got {updates}")
    if names is not None:
        by_name = {stage.name: stage for stage in stages}
        unknown = [name for name in names.split(",") if name not in by_name]
        if unknown:
            raise ValueError(f"unknown stages {', '.join(unknown)}: this preset has {', '.join(by_name)}")
        stages = tuple(by_name[name] for name in names.split(","))
    return stages if updates is None else tuple(replace(stage, updates=updates) for stage in stages)


def set_mwer(stages: tuple[Stage, ...], **fields: Any) -> tuple[Stage, ...]:
    """The stages, with these fields of `MWER` in those of that task; None leaves a field as it is.

    Raises:
        ValueError: there is no such stage, or a value is out of range.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if given and all(stage.task != "mwer" for stage in stages):
        raise ValueError(f"{', '.join(given)}: for MWER training alone; choose --preset mwer, or leave them out")
    return tuple(
        replace(stage, mwer=replace(stage.mwer, **given)) if stage.task == "mwer" else stage for stage in stages
    )


def weighted(manifests: Sequence[str]) -> dict[Path, float]:
    """Manifests, each ``PATH`` or ``PATH=WEIGHT``, as paths and weights (1 without one).

    Raises:
        ValueError: a weight is not a positive number, or a path is there twice.
    """
    weights: dict[Path, float] = {}
    for manifest in manifests:
        path, equals, weight = manifest.rpartition("=")
        if not equals or Path(manifest).exists():
            path, weight = manifest, "1"
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise ValueError(f"{manifest}: the weight behind = must be a positive number, got {weight!r}")
        if Path(path) in weights:
            raise ValueError(f"{path} is given twice: give it once, with a weight ({path}=2)")
        weights[Path(path)] = number
    return weights


def train(
    preset: str,
    *,
    output: Path,
    manifests: Sequence[str] = (),
    dev: Sequence[Path] = (),
    text: Sequence[Path] = (),
    encoder: str | None = None,
    initial_model: Path | None = None,
    num_heads: int | None = None,
    head_type: str | None = None,
    draft_layers: int | None = None,
    stages: str | None = None,
    updates: int | None = None,
    augment: bool = True,
    nbest: int | None = None,
    reference: bool | None = None,
    ce_weight: float | None = None,
    calls_weight: float | None = None,
    seed: int = 1,
    report: Callable[[str], None] = print,
    **options: Any,
) -> Path:
    """What ``leapasr train`` does: every stage of a preset, tokenizer included, going on where it was interrupted.

    Args:
        preset: name of a preset.
        manifests: training manifests, each ``PATH`` or ``PATH=WEIGHT``.
        encoder: hub name or folder of the pretrained encoder, instead of the preset's.
        augment: False trains on the audio as it is.
        nbest, reference, ce_weight, calls_weight: of stages of the task ``mwer`` (`MWER`), instead of the preset's.
        options: further fields of `TrainingConfig`. The rest as in `prepare` and `choose_stages`.

    Returns:
        the folder of the trained model.

    Raises:
        ValueError: an argument is off. TrainingError: training cannot go on.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    if encoder is not None and initial_model is not None:
        raise ValueError(f"{initial_model} has an encoder already: leave out --encoder, or --init")
    model_preset, all_stages = PRESETS[preset](encoder) if encoder else PRESETS[preset]()
    chosen = choose_stages(all_stages, stages, updates)
    if not augment:
        chosen = tuple(replace(stage, augmentation=NO_AUGMENTATION) for stage in chosen)
    chosen = set_mwer(chosen, nbest=nbest, reference=reference, ce_weight=ce_weight, calls_weight=calls_weight)
    trainer = prepare(
        model_preset,
        chosen,
        manifests=weighted(manifests),
        dev=dev,
        text=text,
        output=output,
        initial_model=initial_model,
        num_heads=num_heads,
        head_type=head_type,
        draft_layers=draft_layers,
        seed=seed,
        report=report,
        **options,
    )
    if advice := advice_against(trainer.config.precision, trainer.accelerator.device):
        report(advice)
    return trainer.run()
