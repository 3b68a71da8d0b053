"""What each ingredient brings: one training run without it, at a small budget, against one with all of them.

    python experiments/ablations.py --encoder WHISPER --text-model work/run/text --manifest librispeech.jsonl … \\
        --synthetic synthetic.jsonl --dev dev.jsonl

Every run takes the same number of updates of the same size from the same seed. Copying emerges only after hundreds
of text updates, so the runs do not repeat the text stages: they begin with the decoder and heads of `--text-model`,
the folder that a run's last text stage left. Writes docs/ablations.md and .json; a run whose figures are in the work
folder is not repeated.
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
from leapasr.training.run import load_initial, prepare
from leapasr.training.trainer import TRAINED_PREFIXES
from leapasr.transcriber import load


@dataclass(frozen=True)
class Variant:
    """A run of the whole recipe, changed in one point."""

    name: str
    model: ModelPreset
    stages: tuple[Stage, ...]
    manifests: dict[Path, float]
    pretrained_decoder: bool = True


def recipe(*, ctc: int, joint: int, batch: float) -> tuple[Stage, Stage]:
    """The first and the last audio stage of the shipped model, with few updates each."""
    stages = {stage.name: stage for stage in tiny()[1]}
    return (
        replace(stages["ctc"], updates=ctc, batch=batch, warmup=ctc // 8),
        replace(stages["joint"], updates=joint, batch=batch, warmup=joint // 8),
    )


def variants(arguments: argparse.Namespace) -> list[Variant]:
    """The recipe with everything, and without one ingredient each."""
    model, _ = tiny(arguments.encoder)
    ctc, joint = recipe(ctc=arguments.ctc_updates, joint=arguments.joint_updates, batch=arguments.batch)
    real = dict.fromkeys(arguments.manifest, 1.0)
    manifests = real | {arguments.synthetic: arguments.synthetic_weight}
    everything = Variant("everything", model, (ctc, joint), manifests)
    no_ctc = replace(model, fields=model.fields | {"ctc_in_prompt": False, "ctc_lookahead": 0, "ctc_positions": False})
    scratch = replace(model, encoder=load_encoder_config(arguments.encoder))
    no_pooling = replace(model, fields=model.fields | {"encoder_pooling_layer": None, "encoder_stacking": 2})
    found = [
        everything,
        replace(everything, name="encoder from random weights", model=scratch,
                stages=(replace(ctc, frozen_encoder_layers=0), replace(joint, frozen_encoder_layers=0))),
        replace(everything, name="encoder frozen", stages=(ctc, replace(joint, frozen_encoder_layers=None))),
        replace(everything, name="no pooling (encoder at 50 frames a second)", model=no_pooling),
        replace(everything, name="no LM pretraining", pretrained_decoder=False),
        replace(everything, name="no CTC (neither loss nor prompt)", model=no_ctc,
                stages=(replace(joint, ctc_weight=0.0, updates=ctc.updates + joint.updates),)),
        replace(everything, name="no augmentation",
                stages=tuple(replace(stage, augmentation=NO_AUGMENTATION) for stage in (ctc, joint))),
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
    text_model, processor = load_initial(arguments.text_model)
    processor.tokenizer.save_pretrained(folder / "tokenizer")
    start = time.perf_counter()
    trainer = prepare(
        variant.model, variant.stages, manifests=variant.manifests, dev=(), text=(), output=folder,
        seed=arguments.seed, report=lambda message: None, compile=False,
    )  # fmt: skip
    if variant.pretrained_decoder:
        wanted = trainer.model.state_dict()
        learnt = {
            name: value for name, value in text_model.state_dict().items() if name.startswith(TRAINED_PREFIXES["text"])
        }
        trainer.model.load_state_dict({name: learnt[name] for name in wanted.keys() & learnt.keys()}, strict=False)
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
        f"Small equal budgets ({arguments.ctc_updates} CTC and {arguments.joint_updates} joint updates of "
        f"{arguments.batch:g} s, Whisper encoder `{Path(arguments.encoder).name}`, decoder and heads as the text "
        f"stages left them), seed {arguments.seed}, WER on {num_dev} dev utterances. The figures show what helps "
        "early, not where training ends.",
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
    parser.add_argument("--text-model", type=Path, required=True, help="model folder of a run's last text stage")
    parser.add_argument("--manifest", type=Path, action="append", required=True, help="training manifest")
    parser.add_argument("--synthetic", type=Path, required=True, help="training manifest of synthetic speech")
    parser.add_argument("--synthetic-weight", type=float, default=0.2)
    parser.add_argument("--dev", type=Path, required=True, help="dev manifest")
    parser.add_argument("--dev-utterances", type=int, default=100)
    parser.add_argument("--ctc-updates", type=int, default=300)
    parser.add_argument("--joint-updates", type=int, default=150)
    parser.add_argument("--batch", type=float, default=60, help="seconds of audio an update")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("work/ablations"))
    parser.add_argument("--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()

    arguments.work.mkdir(parents=True, exist_ok=True)
    dev = list(read_manifest(arguments.dev, use="dev", limit=arguments.dev_utterances).cuts)
    rows = []
    for variant in variants(arguments):
        rows.append(run(variant, arguments, dev))
        print(rows[-1], flush=True)
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "ablations.json").write_text(json.dumps(rows, indent=1) + "\n")
        (arguments.output / "ablations.md").write_text(page(rows, arguments, len(dev)))


if __name__ == "__main__":
    main()
