"""Every decoding strategy and draft source at several numbers of heads, on four test sets: docs/strategies*

    python experiments/strategies.py --speech SPEECH --synthetic MANIFEST

SPEECH and MANIFEST as for experiments/results.py, which tells how the synthetic set is made. Beside the tables and
plots: how many calls utterances took, and what limits them (how often each head is right, and what CTC's drafts
would need if each of their mistakes cost one call).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

import kaldialign
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from results import accuracy_table, test_sets

from leapasr.chunks import by_length
from leapasr.data.manifests import read_manifest
from leapasr.decoding import DecodingOptions
from leapasr.decoding.batch import build_loop
from leapasr.decoding.trace import DraftToken
from leapasr.evaluation.bench import BenchRow, bench, read_utterances
from leapasr.evaluation.evaluate import Report, Strategy, evaluate
from leapasr.evaluation.systems import Generate, Leapasr
from leapasr.text import NORMALIZER
from leapasr.transcriber import Transcriber, load

MTP = DecodingOptions(strategy="verify", drafts="mtp")
TIMED = ("autoregressive", "verify mtp", "verify ctc full", "verify both full", "verify both",
         "relaxed both 0.3", "threshold 0.9", "threshold 0.7", "threshold 0.5",
         "beam 4 mtp", "beam 4 both full", "beam 4 both", "beam 4 threshold 0.9")  # fmt: skip
CURVES = {"threshold": "threshold τ", "relaxed both": "relaxed, heads and CTC", "relaxed mtp": "relaxed, heads alone",
          "verify mtp": "verify, heads alone, by K", "verify both full": "verify, heads and CTC, by K"}  # fmt: skip
MOST_CALLS, MOST_TOKENS = 6, 24  # of an utterance in the table, of a step in the plot


def strategies(num_heads: int) -> dict[str, Strategy]:
    """What is compared, for a model of so many heads."""
    fewer = [k for k in (2, 3, 4, 6) if k < num_heads]
    named: dict[str, Strategy] = {"ctc": "ctc", "autoregressive": DecodingOptions(strategy="autoregressive")}
    for k in fewer:
        named[f"verify mtp, K = {k}"] = DecodingOptions(strategy="verify", drafts="mtp", num_heads=k)
    named["verify mtp"] = MTP
    named["verify ctc full"] = DecodingOptions(strategy="verify", drafts="ctc", draft_length="full")
    for k in fewer[::2]:
        named[f"verify both full, K = {k}"] = DecodingOptions(strategy="verify", draft_length="full", num_heads=k)
    named["verify both full"] = DecodingOptions(strategy="verify", draft_length="full")
    named["verify both"] = DecodingOptions(strategy="verify")
    for ratio in (0.5, 0.3, 0.1):
        named[f"relaxed mtp {ratio}"] = DecodingOptions(strategy="relaxed", ratio=ratio, drafts="mtp")
    for ratio in (0.5, 0.3, 0.1, 0.03):
        named[f"relaxed both {ratio}"] = DecodingOptions(strategy="relaxed", ratio=ratio)
    for threshold in (0.95, 0.9, 0.8, 0.7, 0.5):
        named[f"threshold {threshold}"] = DecodingOptions(strategy="threshold", threshold=threshold)
    named["beam 4 mtp"] = DecodingOptions(strategy="beam", drafts="mtp")
    named["beam 4 both full"] = DecodingOptions(strategy="beam", draft_length="full")
    named["beam 4 both"] = DecodingOptions(strategy="beam")
    named["beam 4 threshold 0.9"] = DecodingOptions(strategy="beam", threshold=0.9)
    return named


class Listener:
    """A `Drafter` that drafts nothing and keeps what heads 2..K guess behind each token."""

    def __init__(self) -> None:
        self.guesses: list[list[int]] = []

    def propose(self, emitted: Sequence[int], guesses: Sequence[DraftToken]) -> Sequence[DraftToken]:
        if emitted:
            self.guesses.append([guess.token for guess in guesses])
        return ()

    def review(self, verdicts: object, num_accepted: int, further: object) -> None:
        pass

    def copy(self) -> Listener:
        raise NotImplementedError("no beam search listens")


@dataclass
class Limits:
    """What limits the drafts, summed over utterances.

    Attributes:
        tokens: emitted ones, end-of-text included.
        right: by head k, how often its guess was what came, and of how many.
        fresh_calls: calls if the heads drafted anew behind each call.
        ctc_calls: calls if each token that CTC's reading lacks, has wrong or has too many cost one.
        num_utterances: the least possible number of calls.
    """

    tokens: int
    right: dict[int, tuple[int, int]]
    fresh_calls: int
    ctc_calls: int
    num_utterances: int


def measure_limits(transcriber: Transcriber, cuts: Sequence, batch_size: int) -> Limits:
    """Let the heads guess behind every token of what autoregressive decoding writes."""
    tokens = fresh = ctc = num = 0
    right: Counter[int] = Counter()
    asked: Counter[int] = Counter()
    end_token = min(transcriber.decoder.end_tokens)
    chunks = transcriber.cut((n, cut.load_audio()[0]) for n, cut in enumerate(cuts))
    for each in by_length(chunks, batch_size):
        batch = transcriber.encode(each)
        listeners = [Listener() for _ in each]
        loop = build_loop(transcriber.decoder, MTP)
        keys = loop.add(batch.prompts, max_tokens=batch.max_tokens, drafters=listeners)
        texts: dict[int, list[int]] = {}
        while loop:
            texts |= {key: [*result.tokens, end_token] for key, result in loop.step().items()}
        readings = transcriber.decode_ctc(batch).results
        for key, listener, reading in zip(keys, listeners, readings, strict=True):
            text = texts[key]
            accepted = []
            for place, guesses in enumerate(listener.guesses, 1):
                hits = [guess == token for guess, token in zip(guesses, text[place:], strict=False)]
                right.update(k for k, hit in enumerate(hits, 2) if hit)
                asked.update(range(2, len(hits) + 2))
                accepted.append(([*hits, False]).index(False))
            place = fresh_here = 1
            while place < len(text):
                place += 1 + accepted[place - 1]
                fresh_here += 1
            edits = kaldialign.edit_distance(text, [*reading.tokens, end_token])
            ctc += 1 + edits["ins"] + edits["del"] + edits["sub"]
            tokens, fresh, num = tokens + len(text), fresh + fresh_here, num + 1
    return Limits(tokens, {k: (right[k], asked[k]) for k in sorted(asked)}, fresh, ctc, num)


def limits_section(limits: Limits, reports: Mapping[str, Report]) -> list[str]:
    """Markdown of what stands between the drafts and one call an utterance."""

    def row(name: str, calls: int) -> str:
        return f"| {name} | {calls} | {limits.tokens / calls:.2f} |"

    shares = " ".join(f"{k}: {100 * hits / asked:.1f}%." for k, (hits, asked) in limits.right.items())
    return [
        "",
        "What stands in the way, in calls on the same utterances:",
        "",
        "| | calls | tokens per call |",
        "| --- | --- | --- |",
        row("one call a token", limits.tokens),
        row("heads that draft anew behind each call", limits.fresh_calls),
        row("verify mtp", reports["verify mtp"].decoder_calls),
        row("CTC's reading, each of its mistakes one call (re-joined without fail, nothing corrected)",
            limits.ctc_calls),
        row("verify ctc full", reports["verify ctc full"].decoder_calls),
        row("verify both full", reports["verify both full"].decoder_calls),
        row("one call an utterance", limits.num_utterances),
        "",
        f"Guesses that are what head 1 writes, given all before, by head {shares}",
    ]  # fmt: skip


def calls_section(reports: Mapping[str, Report]) -> list[str]:
    """Markdown of the shares of utterances by the calls that they took."""
    lines = [
        "",
        f"Utterances by their decoder calls, of {next(iter(reports.values())).num_utterances}:",
        "",
        "| | " + " | ".join(map(str, range(1, MOST_CALLS))) + f" | {MOST_CALLS} and more |",
        "| --- |" + " --- |" * MOST_CALLS,
    ]
    for name in ("verify mtp", "verify ctc full", "verify both full", "verify both"):
        calls = Counter(min(utterance.calls, MOST_CALLS) for utterance in reports[name].utterances)
        lines.append(f"| {name} | " + " | ".join(str(calls[num]) for num in range(1, MOST_CALLS + 1)) + " |")
    return lines


def draw(reports: Mapping[str, Report], path: Path) -> None:
    """WER against call reduction, a curve a strategy; and how many tokens a step emits."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    for start, label in CURVES.items():
        points = sorted(
            (report.call_reduction or 0.0, 100 * report.wer)
            for name, report in reports.items()
            if name == start or name.startswith((f"{start} ", f"{start},"))
        )
        left.plot(*zip(*points, strict=True), marker="o", label=label)
    for name, report in reports.items():
        if name.startswith("beam"):
            left.plot(report.call_reduction, 100 * report.wer, marker="x", linestyle="", label=name)
    left.set_xlabel("decoder calls, times fewer than autoregressive")
    left.set_ylabel("WER %")
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    for name in ("verify mtp", "verify ctc full", "verify both full"):
        lengths: Counter[int] = Counter()
        for length, num in reports[name].accept_lengths.items():
            lengths[min(length, MOST_TOKENS)] += num
        shares = [lengths[length] / lengths.total() for length in range(1, MOST_TOKENS + 1)]
        right.step(range(1, MOST_TOKENS + 1), shares, where="mid", label=name)
    right.set_xlabel(f"tokens that a step emitted ({MOST_TOKENS}: or more)")
    right.set_ylabel("share of steps")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def time_table(rows: Sequence[BenchRow], names: Sequence[str]) -> list[str]:
    """Markdown of times; `rows` go through `names` again for each batch size."""
    lines = [
        "| | batch | RTFx, all of it (range) | decoder s | against autoregressive |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in zip(cycle(names), rows, strict=False):
        low, high = row.audio_seconds / row.seconds_high, row.audio_seconds / row.seconds_low
        lines.append(
            f"| {name} | {row.batch_size} | {row.rtfx:.1f} ({low:.1f} to {high:.1f}) | {row.decoder_seconds:.2f} "
            f"| {row.speedup_vs_autoregressive:.2f}x |"
        )
    return lines


def compare_words(
    transcriber: Transcriber, sets: Mapping[str, tuple[Path, str | None]], *, limit: int, batch_size: int, output: Path
) -> None:
    """Write strategies.md, .json and .png: words and calls of every strategy on every set."""
    chosen, dtype = strategies(transcriber.decoder.num_heads), transcriber.dtype
    figures: list[dict] = []
    page = [
        "# Strategies and draft sources",
        "",
        f"`experiments/strategies.py`: up to {limit} utterances a set, spread evenly, {dtype}, batch "
        f"{batch_size}, {torch.get_num_threads()} CPU threads. Words are compared after the {NORMALIZER.name} "
        f"normaliser of Whisper. K heads, head 1 included: {transcriber.decoder.num_heads} where nothing is said. "
        "Calls of drafts that are not *full* depend on the machine: they are cut where a wider call is not worth it. "
        "Times: [strategies-time.md](strategies-time.md).",
    ]
    for name, (manifest, use) in sets.items():
        cuts = list(read_manifest(manifest, use=use, limit=limit).cuts)
        print(name, len(cuts), flush=True)
        written = evaluate(transcriber, cuts, list(chosen.values()), batch_size=batch_size, test_set=name)
        reports = dict(zip(chosen, written, strict=True))
        page += ["", f"## {name}: {len(cuts)} utterances", "", *accuracy_table(reports), *calls_section(reports)]
        limits = measure_limits(transcriber, cuts, batch_size)
        page += limits_section(limits, reports)
        if not figures:
            draw(reports, output / "strategies.png")
            page += ["", "![WER against call reduction, and tokens a step](strategies.png)"]
        figures += [{"name": each, **report.figures()} for each, report in reports.items()]
        figures.append({"test_set": name, "limits": vars(limits)})
        (output / "strategies.md").write_text("\n".join(page) + "\n")
        (output / "strategies.json").write_text(json.dumps(figures, indent=1) + "\n")


def compare_times(
    transcriber: Transcriber, manifest: Path, use: str | None, *, limit: int, rounds: int, output: Path
) -> None:
    """Write strategies-time.md and .json: seconds of the main strategies, one at a time and eight at once."""
    chosen, dtype = strategies(transcriber.decoder.num_heads), transcriber.dtype
    utterances = read_utterances([manifest], use=use, limit=limit)
    systems = [Generate(transcriber), *(Leapasr(transcriber, chosen[name]) for name in TIMED)]
    rows = bench(transcriber, systems, utterances, batch_sizes=(1, 8), rounds=rounds)
    page = [
        "# Strategies and their time",
        "",
        f"`experiments/strategies.py --part times`: {len(utterances.samples)} utterances of LibriSpeech test-clean, "
        f"{dtype}, {torch.get_num_threads()} CPU threads. Features, encoder and decoding; {rounds} "
        "rounds, all taking turns in one process; medians. Decoder times include all that is around it; *against "
        "autoregressive* is theirs divided by this one's. Words and calls: [strategies.md](strategies.md).",
        "",
        *time_table(rows, ["transformers' generate", *TIMED]),
    ]
    (output / "strategies-time.md").write_text("\n".join(page) + "\n")
    (output / "strategies-time.json").write_text(json.dumps([*map(asdict, rows)], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name; the shipped model without it")
    parser.add_argument("--dtype", help="of the model; float32 without it")
    parser.add_argument("--speech", type=Path, required=True, help="folder with librispeech, commonvoice_en and an4")
    parser.add_argument("--synthetic", type=Path, help="manifest of synthetic speech that was not trained on")
    parser.add_argument("--part", choices=("words", "times"), help="both without it")
    parser.add_argument("--limit", type=int, default=200, help="so many utterances a set")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--timed", type=int, default=12, help="utterances of the first set that times are taken on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()

    transcriber = load(arguments.model, dtype=arguments.dtype)
    arguments.output.mkdir(parents=True, exist_ok=True)
    sets = test_sets(arguments.speech, arguments.synthetic)
    if arguments.part != "times":
        limit, batch_size = arguments.limit, arguments.batch_size
        compare_words(transcriber, sets, limit=limit, batch_size=batch_size, output=arguments.output)
    if arguments.part != "words":
        first = next(iter(sets.values()))
        limit, rounds = arguments.timed, arguments.rounds
        compare_times(transcriber, *first, limit=limit, rounds=rounds, output=arguments.output)


if __name__ == "__main__":
    main()
