"""What each ingredient brings: one training run without it, at a small budget, against one with all of them.

    python experiments/ablations.py --whisper tiny.en --manifest librispeech.jsonl … \\
        --synthetic synthetic.jsonl --text prose.txt --dev dev.jsonl

Every run takes the same number of updates of the same size from the same seed: the recipe that ships, shortened.
Writes docs/ablations.md and .json; what is trained or scored already, by the work folder, is not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lhotse.cut import Cut

from leapasr.config import ModelPreset, Stage, tiny
from leapasr.data.augmentation import NO_AUGMENTATION
from leapasr.data.manifests import read_manifest
from leapasr.decoding import DecodingOptions
from leapasr.evaluation.evaluate import evaluate
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration
from leapasr.training.run import prepare
from leapasr.transcriber import load


@dataclass(frozen=True)
class Variant:
    """A run of the whole recipe, changed in one point; `random` names parts that begin with random weights."""

    name: str
    model: ModelPreset
    stages: tuple[Stage, ...]
    manifests: dict[Path, float]
    random: tuple[str, ...] = ()


def recipe(*, ctc: int, settle: int, heads: int, batch: float) -> tuple[Stage, ...]:
    """The stages of the shipped model, with few updates each."""
    updates = {"ctc": ctc, "settle": settle, "reading": ctc, "heads": heads}
    return tuple(
        replace(stage, updates=updates[stage.name], batch=batch, warmup=updates[stage.name] // 8, averaging=0.98)
        for stage in tiny()[1]
    )


def variants(arguments: argparse.Namespace) -> list[Variant]:
    """The recipe with everything, and without one ingredient each."""
    model, _ = tiny(arguments.whisper)
    ctc, settle, reading, heads = stages = recipe(
        ctc=arguments.ctc_updates, settle=arguments.settle_updates, heads=arguments.head_updates, batch=arguments.batch
    )
    real = dict.fromkeys(arguments.manifest, 1.0)
    everything = Variant("everything", model, stages, real | {arguments.synthetic: arguments.synthetic_weight})

    def changed(**fields: Any) -> ModelPreset:
        return replace(model, fields=model.fields | fields)

    return [
        everything,
        replace(everything, name="encoder from random weights", random=("encoder.",),
                stages=(replace(ctc, frozen_encoder_layers=0), settle, reading, heads)),
        replace(everything, name="encoder frozen",
                stages=(ctc, replace(settle, frozen_encoder_layers=None), reading, heads)),
        replace(everything, name="decoder from random weights", random=("decoder.", "text_positions.", "soft_prompt.")),
        replace(everything, name="no CTC (neither loss nor what it reads)",
                model=changed(ctc_in_prompt=False, ctc_lookahead=0), stages=(replace(settle, ctc_weight=0.0), heads)),
        replace(everything, name="no augmentation", stages=tuple(
            replace(stage, augmentation=NO_AUGMENTATION) for stage in stages)),
        replace(everything, name="no synthetic speech", manifests=real),
        replace(everything, name="head 1 alone (K = 1)", model=changed(num_heads=1, draft_layers=0),
                stages=(ctc, settle, reading)),
    ]  # fmt: skip


def train(variant: Variant, folder: Path, arguments: argparse.Namespace) -> None:
    """Train `variant` in `folder`, if that was not done before; of the training, its model and its log stay."""
    if (folder / "trained").exists():
        return
    trainer = prepare(
        variant.model, variant.stages, manifests=variant.manifests, dev=(), text=arguments.text, output=folder,
        seed=arguments.seed, report=lambda message: None,
    )  # fmt: skip
    if variant.random:
        torch.manual_seed(arguments.seed)
        fresh = SpeechLlamaForConditionalGeneration(trainer.model.config).state_dict()
        state = {name: value for name, value in fresh.items() if name.startswith(variant.random)}
        trainer.model.load_state_dict(state, strict=False)
    trainer.run()
    (folder / "trained").touch()
    for stage in variant.stages:
        shutil.rmtree(folder / stage.name)
    (folder / "checkpoint.pt").unlink()


def score(variant: Variant, folder: Path, dev: Sequence[Cut]) -> dict[str, Any]:
    """A row of the table: the model in `folder` on dev."""
    done = folder / "figures.json"
    if done.exists():
        return json.loads(done.read_text())
    chosen = [DecodingOptions(strategy="autoregressive")]
    if variant.model.fields["num_heads"] > 1:
        chosen += [DecodingOptions(strategy="verify", drafts="mtp"),
                   DecodingOptions(strategy="verify", draft_length="full")]  # fmt: skip
    reports = evaluate(load(str(folder / "model")), dev, chosen, batch_size=8)
    figures = {
        "name": variant.name,
        "ctc_wer": reports[0].ctc_wer,
        "wer": reports[0].wer,
        "wer_low": reports[0].wer_low,
        "wer_high": reports[0].wer_high,
        "call_reduction_mtp": reports[1].call_reduction if len(reports) > 1 else None,
        "call_reduction_both": reports[-1].call_reduction,
    }
    done.write_text(json.dumps(figures))
    return figures


def page(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace, num_dev: int) -> str:
    """The table, as Markdown."""
    lines = [
        "# What each ingredient brings",
        "",
        f"Small equal budgets: updates of {arguments.batch:g} s, {arguments.ctc_updates} in each of the stages ctc and "
        f"reading, {arguments.settle_updates} in settle, {arguments.head_updates} in heads. Whisper "
        f"`{Path(arguments.whisper).name}`, seed {arguments.seed}, WER on {num_dev} dev utterances. The figures show "
        "what helps early, not where training ends. Call reduction by verification, with drafts of the heads alone, "
        "and of heads and CTC.",
        "",
        "| run | CTC greedy WER % | decoder WER % (95% interval) | calls, heads | calls, heads and CTC |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        wer = f"{100 * row['wer']:.1f} ({100 * row['wer_low']:.1f} to {100 * row['wer_high']:.1f})"
        calls = " | ".join("–" if row[f"call_reduction_{source}"] is None else f"{row[f'call_reduction_{source}']:.2f}x"
                           for source in ("mtp", "both"))  # fmt: skip
        lines.append(f"| {row['name']} | {100 * row['ctc_wer']:.1f} | {wer} | {calls} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whisper", required=True, help="a Whisper: hub name or folder")
    parser.add_argument("--manifest", type=Path, action="append", required=True, help="training manifest")
    parser.add_argument("--synthetic", type=Path, required=True, help="training manifest of synthetic speech")
    parser.add_argument("--synthetic-weight", type=float, default=0.15)
    parser.add_argument(
        "--text", type=Path, action="append", required=True, help="prose, which tells what tokens to keep"
    )
    parser.add_argument("--dev", type=Path, required=True, help="dev manifest")
    parser.add_argument("--dev-utterances", type=int, default=100)
    parser.add_argument("--ctc-updates", type=int, default=150, help="of each of the stages ctc and reading")
    parser.add_argument("--settle-updates", type=int, default=100)
    parser.add_argument("--head-updates", type=int, default=100)
    parser.add_argument("--batch", type=float, default=60, help="seconds of audio an update")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("work/ablations"))
    parser.add_argument("--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()

    dev = list(read_manifest(arguments.dev, use="dev", limit=arguments.dev_utterances).cuts)
    rows = []
    runs = [(each, arguments.work / each.name.split(" (")[0].replace(" ", "-")) for each in variants(arguments)]
    for variant, folder in runs:
        print(f"training: {variant.name}", flush=True)
        train(variant, folder, arguments)
    for variant, folder in runs:
        rows.append(score(variant, folder, dev))
        print(rows[-1], flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "ablations.json").write_text(json.dumps(rows, indent=1) + "\n")
    (arguments.output / "ablations.md").write_text(page(rows, arguments, len(dev)))


if __name__ == "__main__":
    main()
