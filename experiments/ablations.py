"""What each ingredient brings: one training run without it, at a small budget, against one with all of them.

    python experiments/ablations.py --encoder WHISPER --text en.txt.xz --manifest librispeech.jsonl … \\
        --synthetic synthetic.jsonl --dev dev.jsonl

Every run takes the same number of updates of the same size from the same seed. Writes docs/ablations.md and .json;
a run whose figures are in the work folder is not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leapasr.config import ModelPreset, Stage, tiny
from leapasr.data.augmentation import NO_AUGMENTATION
from leapasr.data.manifests import read_manifest
from leapasr.decoding import DecodingOptions
from leapasr.evaluation.evaluate import evaluate
from leapasr.model.checkpoints import load_encoder_config
from leapasr.training.run import load_tokenizer, prepare
from leapasr.transcriber import load


@dataclass(frozen=True)
class Variant:
    """A run of the whole recipe, changed in one point."""

    name: str
    model: ModelPreset
    stages: tuple[Stage, ...]
    manifests: dict[Path, float]


def recipe(*, text: int, ctc: int, joint: int, batch: float) -> tuple[Stage, ...]:
    """The stages of the shipped model, with few updates each."""
    _, (text_stage, ctc_stage, *joint_stages) = tiny()
    return (
        replace(text_stage, updates=text, batch=1500, warmup=text // 10),
        replace(ctc_stage, updates=ctc, batch=batch, warmup=ctc // 8),
        replace(joint_stages[-1], updates=joint, batch=batch, warmup=joint // 8, frozen_encoder_layers=0),
    )


def variants(arguments: argparse.Namespace) -> list[Variant]:
    """The recipe with everything, and without one ingredient each."""
    model, _ = tiny(arguments.encoder)
    stages = recipe(text=arguments.text_updates, ctc=arguments.ctc_updates, joint=arguments.joint_updates,
                    batch=arguments.batch)  # fmt: skip
    text, ctc, joint = stages
    real = dict.fromkeys(arguments.manifest, 1.0)
    manifests = real | {arguments.synthetic: arguments.synthetic_weight}
    everything = Variant("everything", model, stages, manifests)
    no_ctc = replace(model, fields=model.fields | {"ctc_in_prompt": False, "ctc_lookahead": 0, "ctc_positions": False})
    scratch = replace(model, encoder=load_encoder_config(arguments.encoder))
    no_pooling = replace(model, fields=model.fields | {"encoder_pooling_layer": None, "encoder_stacking": 2})
    found = [
        everything,
        replace(everything, name="encoder from random weights", model=scratch,
                stages=(text, replace(ctc, frozen_encoder_layers=0), joint)),
        replace(everything, name="encoder frozen", stages=(text, ctc, replace(joint, frozen_encoder_layers=None))),
        replace(everything, name="no pooling (encoder at 50 frames a second)", model=no_pooling),
        replace(everything, name="no LM pretraining", stages=(ctc, joint)),
        replace(everything, name="no CTC (neither loss nor prompt)", model=no_ctc,
                stages=(text, replace(joint, ctc_weight=0.0, updates=ctc.updates + joint.updates))),
        replace(everything, name="no augmentation",
                stages=(text, *(replace(stage, augmentation=NO_AUGMENTATION) for stage in (ctc, joint)))),
        replace(everything, name="no synthetic speech", manifests=real),
        replace(everything, name="head 1 alone (K = 1)", model=replace(model, fields=model.fields | {"num_heads": 1})),
    ]  # fmt: skip
    if arguments.other_encoder:
        found.append(replace(everything, name=f"encoder {arguments.other_encoder.name}",
                             model=tiny(str(arguments.other_encoder))[0]))  # fmt: skip
    return found


def run(variant: Variant, arguments: argparse.Namespace, dev: Sequence) -> dict[str, Any]:
    """Train `variant` and evaluate it on dev."""
    folder = arguments.work / variant.name.split(" (")[0].replace(" ", "-")
    done = folder / "figures.json"
    if done.exists():
        return json.loads(done.read_text())
    tokenizer = arguments.work / "tokenizer"
    if tokenizer.exists() and not (folder / "tokenizer").exists():
        shutil.copytree(tokenizer, folder / "tokenizer")
    start = time.perf_counter()
    trainer = prepare(
        variant.model, variant.stages, manifests=variant.manifests, dev=(), text=[arguments.text], output=folder,
        seed=arguments.seed, report=lambda message: None, compile=False,
    )  # fmt: skip
    model = trainer.run()
    seconds = time.perf_counter() - start
    chosen = [DecodingOptions(strategy="autoregressive")]
    if variant.model.fields["num_heads"] > 1:
        chosen.append(DecodingOptions(strategy="verify"))
    reports = evaluate(load(str(model)), dev, chosen, batch_size=8)
    figures = {
        "name": variant.name,
        "ctc_wer": reports[0].ctc_wer,
        "wer": reports[0].wer,
        "wer_low": reports[0].wer_low,
        "wer_high": reports[0].wer_high,
        "call_reduction": reports[-1].call_reduction,
        "training_seconds": seconds,
    }
    done.write_text(json.dumps(figures))
    shutil.rmtree(model)
    return figures


def page(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace, num_dev: int) -> str:
    """The table, as Markdown."""
    lines = [
        "# What each ingredient brings",
        "",
        f"Small equal budgets ({arguments.text_updates} text, {arguments.ctc_updates} CTC and "
        f"{arguments.joint_updates} joint updates of {arguments.batch:g} s, Whisper encoder "
        f"`{Path(arguments.encoder).name}`), seed {arguments.seed}, WER on {num_dev} dev utterances. The figures show "
        "what helps early, not where training ends.",
        "",
        "| run | CTC greedy WER % | decoder WER % (95% interval) | call reduction by verification |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        wer = f"{100 * row['wer']:.1f} ({100 * row['wer_low']:.1f} to {100 * row['wer_high']:.1f})"
        lines.append(f"| {row['name']} | {100 * row['ctc_wer']:.1f} | {wer} | {row['call_reduction']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="a Whisper encoder: hub name or folder")
    parser.add_argument("--other-encoder", type=Path, help="another one to compare it with")
    parser.add_argument("--text", type=Path, required=True, help="prose, a paragraph a line")
    parser.add_argument("--manifest", type=Path, action="append", required=True, help="training manifest")
    parser.add_argument("--synthetic", type=Path, required=True, help="training manifest of synthetic speech")
    parser.add_argument("--synthetic-weight", type=float, default=0.2)
    parser.add_argument("--dev", type=Path, required=True, help="dev manifest")
    parser.add_argument("--dev-utterances", type=int, default=100)
    parser.add_argument("--text-updates", type=int, default=100)
    parser.add_argument("--ctc-updates", type=int, default=300)
    parser.add_argument("--joint-updates", type=int, default=150)
    parser.add_argument("--batch", type=float, default=60, help="seconds of audio an update")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("work/ablations"))
    parser.add_argument("--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()

    arguments.work.mkdir(parents=True, exist_ok=True)
    dev = list(read_manifest(arguments.dev, use="dev", limit=arguments.dev_utterances).cuts)
    planned = variants(arguments)
    if not (arguments.work / "tokenizer").exists():
        from leapasr.data.synthesis import passages, read_paragraphs

        texts = passages(read_paragraphs(arguments.text), seed=arguments.seed)
        load_tokenizer(planned[0].model, texts, arguments.work / "tokenizer")
    rows = []
    for variant in planned:
        rows.append(run(variant, arguments, dev))
        print(rows[-1], flush=True)
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "ablations.json").write_text(json.dumps(rows, indent=1) + "\n")
        (arguments.output / "ablations.md").write_text(page(rows, arguments, len(dev)))


if __name__ == "__main__":
    main()
