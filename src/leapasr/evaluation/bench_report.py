"""What `bench` found, as a table, as JSON, and as plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from leapasr.evaluation.bench import BenchRow
from leapasr.evaluation.replay import ReplayRow

MARKDOWN_WIDTH = 1000  # no cell is broken into lines


def bench_table(rows: Sequence[BenchRow]) -> Table:
    """A row a system and batch size, for people to read."""
    table = Table(
        "system", "batch", "RTFx (range)", "encoder s", "decoder s", "decoder vs generate", "all vs generate",
        "overhead", "tokens per call", "WER", "same tokens", "MB",
    )  # fmt: skip
    for row in rows:
        low, high = row.audio_seconds / row.seconds_high, row.audio_seconds / row.seconds_low
        table.add_row(
            row.label,
            str(row.batch_size),
            f"{row.rtfx:.1f} ({low:.1f} to {high:.1f})",
            _shown(row.encoder_seconds, "{:.3f}"),
            _shown(row.decoder_seconds, "{:.3f}"),
            _shown(row.speedup_vs_generate, "{:.2f}x"),
            _shown(row.total_speedup_vs_generate, "{:.2f}x"),
            _shown(row.overhead, "{:.0%}"),
            _shown(row.tokens_per_call, "{:.2f}"),
            f"{row.wer:.2%}",
            _shown(row.same_tokens_as_generate, "{:.0%}"),
            _shown(row.peak_memory_mb, "{:.0f}"),
        )
    return table


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def as_markdown(table: Table) -> str:
    """A table of this module or of `replay`, for a page."""
    written = StringIO()
    table.box = box.MARKDOWN
    Console(file=written, width=MARKDOWN_WIDTH).print(table)
    return "\n".join(line.strip() for line in written.getvalue().splitlines()).strip()


def write_rows(rows: Sequence[BenchRow | ReplayRow], path: Path) -> None:
    """Write the rows as a JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def draw(rows: Sequence[BenchRow], folder: Path) -> list[Path]:
    """Plots into `folder`: ``speedup.png`` (against batch size) and ``time.png`` (where time goes); their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'leapasr[plots]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    labels = list(dict.fromkeys(row.label for row in rows))
    speedup = Figure(figsize=(7, 4.5), layout="tight")
    axes = speedup.subplots()
    for label in labels:
        points = [(row.batch_size, row.speedup_vs_generate) for row in rows if row.label == label]
        if points[0][1] is not None:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="batch size", ylabel="decoder time, times less than generate", xscale="log")
    sizes = sorted({row.batch_size for row in rows})
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    split = Figure(figsize=(7, 0.28 * len(rows) + 1.2), layout="tight")
    axes = split.subplots()
    names = [f"{row.label}, batch {row.batch_size}" for row in rows]
    encoder = [row.encoder_seconds or 0.0 for row in rows]
    overhead = [(row.overhead or 0.0) * (row.decoder_seconds or 0.0) for row in rows]
    forward = [(row.decoder_seconds or 0.0) - out for row, out in zip(rows, overhead, strict=True)]
    rest = [row.seconds - sum(known) for row, *known in zip(rows, encoder, forward, overhead, strict=True)]
    left = np.zeros(len(rows))
    for part, values in (("encoder", encoder), ("decoder", forward), ("around the decoder", overhead), ("other", rest)):
        axes.barh(names, values, left=left, label=part)
        left += np.array(values)
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds for {rows[0].audio_seconds:.0f} s of audio")
    axes.legend(fontsize=8)
    paths = [folder / "speedup.png", folder / "time.png"]
    speedup.savefig(paths[0], dpi=90)
    split.savefig(paths[1], dpi=90)
    return paths
