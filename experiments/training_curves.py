"""Draw the curves of training runs from their metrics.jsonl files, in the order given, one panel a stage of a run.

python experiments/training_curves.py training/metrics.jsonl --output docs/training.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOSSES = {"ctc": "CTC", "ce_1": "head 1 cross-entropy", "ce_2": "head 2", "ce_4": "head 4", "ce_8": "head 8"}
DEV = {"dev_ctc_wer": "CTC greedy WER (dev)", "dev_accuracy_1": "head 1 accuracy (dev)"}


def smoothed(values: list[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average."""
    result: list[float] = []
    for value in values:
        result.append(value if not result else weight * result[-1] + (1 - weight) * value)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, nargs="+", help="metrics.jsonl of a run")
    parser.add_argument("--output", type=Path, default=Path("docs/training.png"))
    arguments = parser.parse_args()
    stages: dict[str, list[dict]] = {}
    for path in arguments.metrics:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            name = row["stage"] if len(arguments.metrics) == 1 else f"{path.parent.name}: {row['stage']}"
            stages.setdefault(name, []).append(row)
    figure, axes = plt.subplots(2, len(stages), figsize=(5 * len(stages), 7), squeeze=False)
    for column, (stage, rows) in enumerate(stages.items()):
        rows = list({row["update"]: row for row in rows}.values())  # a resumed run writes some updates again
        rows.sort(key=lambda row: row["update"])
        for axis, names in ((axes[0, column], LOSSES), (axes[1, column], DEV)):
            for name, label in names.items():
                points = [(row["update"], row[name]) for row in rows if name in row]
                if points:
                    updates, values = zip(*points, strict=True)
                    marker = "o" if names is DEV else None
                    axis.plot(
                        updates, list(values) if names is DEV else smoothed(list(values)), marker=marker, label=label
                    )
            axis.set_xlabel("update")
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=8)
        axes[0, column].set_title(stage)
        axes[0, column].set_ylabel("training loss (smoothed)")
        axes[1, column].set_ylim(0, 1)
    figure.tight_layout()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=90)


if __name__ == "__main__":
    main()
