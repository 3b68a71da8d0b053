"""From a command line's arguments to a training run: tokenizer, model, data, trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lhotse.cut import Cut
from lhotse.utils import fastcopy
from transformers import AutoTokenizer

from leapasr.config import PRESETS, ModelPreset, Stage, TrainingConfig
from leapasr.data.batches import Source
from leapasr.data.manifests import read_manifest, spread
from leapasr.data.synthesis import passages, read_paragraphs
from leapasr.model.building import build_model, build_processor
from leapasr.model.processing import SpeechLlamaProcessor
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration
from leapasr.text import tidy
from leapasr.training.tokenizer import train_tokenizer
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
    seed: int = 1,
    report: Callable[[str], None] = print,
    **options,
) -> Trainer:
    """Build the model, its processor and data, ready to `run()`.

    Args:
        preset: what to build the model from; None with `initial_model`.
        manifests: training manifests and weights. dev, text: dev manifests, prose.
        initial_model: folder of a leapasr model to start from.
        report: is told of every utterance that is left out.
        options: further fields of `TrainingConfig`.

    Raises:
        ValueError: there is no data for a stage, or neither `preset` nor `initial_model`.
    """
    texts = passages((p for path in text for p in read_paragraphs(path)), seed=seed) if text else []
    if initial_model is not None:
        model = SpeechLlamaForConditionalGeneration.from_pretrained(initial_model)
        processor = SpeechLlamaProcessor.from_pretrained(initial_model)
    elif preset is not None:
        saved = output / "tokenizer"
        if isinstance(preset.decoder, str):
            tokenizer = AutoTokenizer.from_pretrained(preset.decoder)
        elif saved.exists():
            tokenizer = AutoTokenizer.from_pretrained(saved)
        elif texts:
            tokenizer = train_tokenizer(texts[:TOKENIZER_TEXTS], vocab_size=preset.vocab_size)
            tokenizer.save_pretrained(saved)
        else:
            raise ValueError("a tokenizer must be trained first, and there is no text: give --text FILE")
        model = build_model(preset, tokenizer, seed=seed)
        processor = build_processor(model.config.encoder_config, tokenizer)
    else:
        raise ValueError("nothing to train: give a preset or a model to start from")
    needs_audio = any(stage.task != "text" for stage in stages)
    if needs_audio and not manifests:
        raise ValueError("no training manifest: give --manifest FILE, or only the stage 'text'")

    def read(path: Path, use: str) -> list[Cut]:
        result = read_manifest(path, use=use)
        for problem in result.problems:
            report(problem)
        return usable(result.cuts, processor, ctc_frame_rate=model.ctc_frame_rate, report=report)

    sources = [Source(read(path, "train"), weight) for path, weight in manifests.items()] if needs_audio else []
    config = TrainingConfig(
        model=preset, stages=stages, manifests=manifests, dev=tuple(dev), text=tuple(text), output=output,
        seed=seed, **options,
    )  # fmt: skip
    dev_cuts = [cut for path in dev for cut in spread(read(path, "dev"), config.eval_utterances)]
    return Trainer(config, model, processor, sources=sources, texts=texts, dev=dev_cuts)


def choose_stages(stages: tuple[Stage, ...], names: str | None, updates: int | None) -> tuple[Stage, ...]:
    """The stages named in `names` (comma-separated; None: all), each with `updates` updates if that is given.

    Raises:
        ValueError: a name is not a stage.
    """
    if names is not None:
        by_name = {stage.name: stage for stage in stages}
        unknown = [name for name in names.split(",") if name not in by_name]
        if unknown:
            raise ValueError(f"unknown stages {', '.join(unknown)}: this preset has {', '.join(by_name)}")
        stages = tuple(by_name[name] for name in names.split(","))
    return stages if updates is None else tuple(replace(stage, updates=updates) for stage in stages)


def weighted(manifest: str) -> tuple[Path, float]:
    """``PATH`` or ``PATH:WEIGHT``.

    Raises:
        ValueError: the weight is not a positive number.
    """
    path, colon, weight = manifest.rpartition(":")
    if not colon or Path(manifest).exists():
        return Path(manifest), 1.0
    try:
        number = float(weight)
    except ValueError:
        return Path(manifest), 1.0
    if number <= 0:
        raise ValueError(f"weight of {path} must be positive, got {weight}")
    return Path(path), number


def train(
    preset: str,
    *,
    output: Path,
    manifests: Sequence[str],
    dev: Sequence[Path] = (),
    text: Sequence[Path] = (),
    encoder: str | None = None,
    initial_model: Path | None = None,
    stages: str | None = None,
    updates: int | None = None,
    seed: int = 1,
    report: Callable[[str], None] = print,
) -> Path:
    """What ``leapasr train`` does; returns the folder of the trained model.

    Args:
        preset: name of a preset. manifests: ``PATH`` or ``PATH:WEIGHT``. The rest as in `prepare`, `choose_stages`.

    Raises:
        ValueError: an argument is off. TrainingError: training cannot go on.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    model_preset, all_stages = PRESETS[preset](encoder)
    trainer = prepare(
        model_preset,
        choose_stages(all_stages, stages, updates),
        manifests=dict(map(weighted, manifests)),
        dev=dev,
        text=text,
        output=output,
        initial_model=initial_model,
        seed=seed,
        report=report,
    )
    return trainer.run()
