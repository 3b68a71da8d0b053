"""Calibration: the fastest inexact setting whose word error rate stays inside a budget, kept with the model.

A setting qualifies if the 95% interval of its WER minus autoregressive decoding's (paired bootstrap over utterances)
ends inside the budget. Of those that do, the one with the fewest decoder calls is taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lhotse.cut import Cut
from rich.table import Table

from leapasr.decoding import DecodingOptions
from leapasr.evaluation.evaluate import Report, evaluate
from leapasr.transcriber import Transcriber

FILE = "calibration.json"
EXACT = DecodingOptions(strategy="verify", draft_length="full")  # what a setting must be faster than
CANDIDATES = (
    *(DecodingOptions(strategy="relaxed", ratio=ratio, top=3) for ratio in (0.7, 0.5, 0.3, 0.2, 0.1, 0.05)),
    *(DecodingOptions(strategy="threshold", threshold=t) for t in (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)),
)


@dataclass(frozen=True)
class Calibration:
    """What calibration found.

    Attributes:
        budget: most WER increase, as a share of autoregressive decoding's WER.
        exact: the report of verification, which changes nothing.
        candidates: settings that were tried. reports: of each of them.
        chosen: index of the candidate that qualifies with the fewest calls; None if none does that has fewer calls
            than `exact`.
    """

    budget: float
    exact: Report
    candidates: Sequence[DecodingOptions]
    reports: list[Report]
    chosen: int | None


def budget_of(text: str) -> float:
    """A share from ``1%`` or ``0.01``.

    Raises:
        ValueError: it is neither, or not from 0 to 100%.
    """
    number, percent = text.removesuffix("%"), text.endswith("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ValueError(f"the budget is a share of the WER such as '1%' or '0.01', from 0 to 100%, got {text!r}")
    return value


def qualifies(report: Report, budget: float) -> bool:
    """Whether the WER increase of `report` is inside `budget`, a share of the WER that it is set against."""
    return report.wer_change_high <= budget * (report.wer - report.wer_change)


def calibrate(
    transcriber: Transcriber,
    cuts: Sequence[Cut],
    *,
    budget: float,
    candidates: Sequence[DecodingOptions] = CANDIDATES,
    batch_size: int = 8,
    test_set: str = "",
    progress: Callable[[float], None] | None = None,
) -> Calibration:
    """Try `candidates` on `cuts`; other arguments as of `evaluate`.

    Raises:
        ValueError: there is nothing to score, or a candidate does not fit the model.
    """
    exact, *reports = evaluate(
        transcriber, cuts, [EXACT, *candidates], batch_size=batch_size, test_set=test_set, progress=progress
    )
    calls = {
        index: report.decoder_calls
        for index, report in enumerate(reports)
        if qualifies(report, budget) and report.decoder_calls < exact.decoder_calls
    }
    return Calibration(
        budget, exact, candidates, reports, min(calls, key=lambda index: calls[index]) if calls else None
    )


def save_calibration(calibration: Calibration, folder: Path) -> Path:
    """Write what was chosen, and its figures on dev, into the model's folder; returns the file.

    Raises:
        OSError: the folder cannot be written.
    """
    path = folder / FILE
    assert calibration.chosen is not None
    fields = {
        "options": asdict(calibration.candidates[calibration.chosen]),
        "max_wer_increase": calibration.budget,
        "dev": calibration.reports[calibration.chosen].figures(),
    }
    pending = path.with_suffix(".pending")
    pending.write_text(json.dumps(fields, indent=1) + "\n")
    os.replace(pending, path)
    return path


def calibrated_options(place: str) -> DecodingOptions:
    """The options that calibration left in a model's folder.

    Raises:
        ValueError: there are none, or the file is damaged.
    """
    path = Path(place) / FILE
    if not path.is_file():
        raise ValueError(f"{place} has not been calibrated: run 'leapasr calibrate', or choose another strategy")
    try:
        return DecodingOptions(**json.loads(path.read_text())["options"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): run 'leapasr calibrate' again") from error


def calibration_table(calibration: Calibration) -> Table:
    """A row a setting, verification first: what it costs in words and brings in calls."""
    table = Table("setting", "WER", "minus autoregressive (95% interval)", "fewer calls", "inside the budget")
    for index, report in enumerate((calibration.exact, *calibration.reports), -1):
        inside = qualifies(report, calibration.budget)
        table.add_row(
            report.label,
            f"{report.wer:.2%}",
            f"{report.wer_change:+.2%} ({report.wer_change_low:+.2%} to {report.wer_change_high:+.2%})",
            f"{report.call_reduction or 1:.2f} times",
            "chosen" if index == calibration.chosen else "yes" if inside else "no",
        )
    return table
