"""Evaluation reports as a table for people to read."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from leapasr.evaluation.evaluate import Report


def report_table(reports: Sequence[Report]) -> Table:
    """A column a report, a row a figure."""
    table = Table("", *(report.test_set for report in reports))
    rows = [_figures(report) for report in reports]
    for name in rows[0]:
        table.add_row(name, *(row[name] for row in rows))
    return table


def _figures(report: Report) -> dict[str, str]:
    lengths = ", ".join(f"{length}: {count}" for length, count in report.accept_lengths.items())
    return {
        "strategy": f"{report.label}, K = {report.num_heads}",
        "utterances, words": f"{report.num_utterances}, {report.num_words}",
        "audio": f"{report.audio_seconds:.1f} s",
        f"WER ({report.normalizer})": f"{report.wer:.2%} ({report.wer_low:.2%} to {report.wer_high:.2%})",
        "WER minus autoregressive": f"{report.wer_change:+.2%} ({report.wer_change_low:+.2%} to "
        f"{report.wer_change_high:+.2%})",
        "WER (plain)": f"{report.wer_plain:.2%}",
        f"WER of greedy CTC ({report.normalizer})": f"{report.ctc_wer:.2%}",
        "decoder calls, tokens": f"{report.decoder_calls}, {report.tokens}",
        "tokens per call": _number(report.tokens_per_call),
        "fewer calls than autoregressive": _number(report.call_reduction, " times"),
        "same tokens as autoregressive": f"{report.identical_to_autoregressive:.2%} of utterances",
        "steps by tokens emitted": lengths or "none",
        "cut short": ", ".join(f"{count} by {guard}" for guard, count in report.num_truncated.items()) or "none",
        "encoder, decoder": f"{report.encoder_seconds:.2f} s, {report.decoder_seconds:.2f} s",
        "RTFx": _number(report.rtfx),
        "computed": f"batch {report.batch_size}, {report.dtype}, {report.device}",
        "left out": str(len(report.problems)),
    }


def _number(value: float | None, unit: str = "") -> str:
    return "none" if value is None else f"{value:.2f}{unit}"
