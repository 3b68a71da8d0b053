r"""All that only a GPU can show, in one run: gpu.json and gpu.md.

    python experiments/gpu.py --manifest librispeech/manifest.jsonl --output docs

The shipped model side by side with transformers' `generate`, on the first test utterances; then replays of the same
utterances' drafts on decoders of larger sizes, random weights, with their floor: reading weights and cache once. Steps
are captured as CUDA graphs where that is found to be faster; replays run without as well. Files are written after each
part, so that a run that is cut short leaves what it has. On a CPU (`--device cpu --sizes 125m`) it shows that the
command works, and no more.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from leapasr.evaluation.bench import BenchRow, bench, read_utterances, sizes_of
from leapasr.evaluation.bench_report import as_markdown, bench_table
from leapasr.evaluation.replay import SIZES, ReplayRow, record, replay, replay_table
from leapasr.evaluation.systems import build_systems
from leapasr.transcriber import load


def page(machine: str, captured: bool, measured: Sequence[BenchRow], replays: Sequence[Sequence[ReplayRow]]) -> str:
    """Markdown of all tables."""
    parts = [
        "# On a GPU",
        f"`experiments/gpu.py`, {machine}. The shipped model, {measured[0].num_utterances} utterances "
        f"({measured[0].audio_seconds:.0f} s), {measured[0].dtype}, steps {'' if captured else 'not '}captured; "
        "medians, and ranges of rounds that take turns:",
        as_markdown(bench_table(measured)),
        "Replays: decoders of random weights whose calls verify and emit what was recorded; no figure of them is one "
        "of a model. The floor is the time to read weights and cache once at the bandwidth that was measured.",
        *(as_markdown(replay_table(rows)) for rows in replays),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--batch-sizes", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    batch_sizes = sizes_of(arguments.batch_sizes)
    transcriber = load(device=arguments.device, dtype=arguments.dtype)
    device = transcriber.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    machine = f"{name}, torch {torch.__version__}"
    utterances = read_utterances([arguments.manifest], use="test", limit=arguments.limit)
    measured = bench(
        transcriber, build_systems(transcriber), utterances, batch_sizes=batch_sizes, rounds=arguments.rounds
    )
    replays: list[list[ReplayRow]] = []
    arguments.output.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        found = {
            "machine": machine,
            "ways": asdict(transcriber.decoder.ways),
            "bench": [asdict(row) for row in measured],
            "replays": [asdict(row) for rows in replays for row in rows],
        }
        (arguments.output / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (arguments.output / "gpu.md").write_text(page(machine, transcriber.decoder.ways.captured, measured, replays))

    write()
    texts = record(transcriber, utterances)
    for size in arguments.sizes:
        rows = replay(
            texts,
            size=size,
            batch_sizes=batch_sizes,
            rounds=arguments.rounds,
            device=arguments.device,
            dtype=arguments.dtype,
        )
        replays.append(rows)
        write()
        print(f"{size}: done", flush=True)


if __name__ == "__main__":
    main()
