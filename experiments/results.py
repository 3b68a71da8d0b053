r"""Evaluate a model on test sets, beside faster-whisper on the same audio, and write docs/results.md and .json.

    python experiments/results.py --speech SPEECH --synthetic MANIFEST --peer tiny.en=FOLDER --peer base=FOLDER

The synthetic set is speech of text that no training read: the transcripts of test-clean, whose books are kept out
of the prose, a sentence a line:

    jq -r 'select(.use == "test") | .text | ascii_downcase | (.[:1] | ascii_upcase) + .[1:] + "."' \
        SPEECH/librispeech/manifest.jsonl > text
    leapasr synthesize text --output FOLDER --hours 0.6 --seed 7
    head -400 FOLDER/manifest.jsonl > FOLDER/test.jsonl

How long it all takes is `leapasr bench`'s to tell.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from leapasr.data.manifests import read_manifest, spread
from leapasr.decoding import DecodingOptions
from leapasr.evaluation.evaluate import Report, Strategy, evaluate
from leapasr.evaluation.peers import FasterWhisper
from leapasr.evaluation.scoring import count_errors, word_error_rate, word_error_rate_difference
from leapasr.text import NORMALIZER, PLAIN
from leapasr.transcriber import load

STRATEGIES: dict[str, Strategy] = {
    "ctc": "ctc",
    "autoregressive": DecodingOptions(strategy="autoregressive"),
    "verify mtp": DecodingOptions(strategy="verify", drafts="mtp"),
    "verify both full": DecodingOptions(strategy="verify", drafts="both", draft_length="full"),
    "verify both": DecodingOptions(strategy="verify", drafts="both"),
    **{f"threshold {at}": DecodingOptions(strategy="threshold", threshold=at) for at in (0.9, 0.7, 0.5)},
}
TEST_SETS = {
    "librispeech/test (official test-clean)": "librispeech",
    "commonvoice_en/test": "commonvoice_en",
    "an4/test": "an4",
}


def test_sets(speech: Path, synthetic: Path | None) -> dict[str, tuple[Path, str | None]]:
    """Manifests by the names of their sets, and which lines of them count."""
    sets: dict[str, tuple[Path, str | None]] = {
        name: (speech / folder / "manifest.jsonl", "test") for name, folder in TEST_SETS.items()
    }
    return sets | ({"synthetic": (synthetic, None)} if synthetic else {})


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def accuracy_table(reports: Mapping[str, Report]) -> list[str]:
    """Markdown of one test set, a row a strategy."""
    lines = [
        "| system | WER % (95% interval) | plain WER % | calls | tokens per call | call reduction | same tokens % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, report in reports.items():
        lines.append(
            f"| {name} | {percent(report.wer)} ({percent(report.wer_low)} to {percent(report.wer_high)}) "
            f"| {percent(report.wer_plain)} | {report.decoder_calls} | {report.tokens_per_call or 0:.2f} "
            f"| {report.call_reduction or 0:.2f} | {percent(report.identical_to_autoregressive)} |"
        )
    return lines


def peer_table(ours: Report, peers: dict[str, list[str]], compared: Sequence[int]) -> tuple[list[str], list[dict]]:
    """Markdown and figures of what peers wrote for the utterances `compared`, set against the report `ours`."""
    chosen = [ours.utterances[index] for index in compared]
    truth = [utterance.reference for utterance in chosen]
    our_errors = count_errors(truth, [utterance.hypothesis for utterance in chosen], NORMALIZER)
    rate = word_error_rate(our_errors)
    lines = [
        "",
        f"On {len(chosen)} of these utterances, spread evenly:",
        "",
        "| system | WER % (95% interval) | plain WER % | autoregressive leapasr minus it |",
        "| --- | --- | --- | --- |",
        f"| leapasr, autoregressive | {percent(rate.value)} ({percent(rate.low)} to {percent(rate.high)}) | | |",
    ]
    figures = []
    for name, hypotheses in peers.items():
        errors = count_errors(truth, hypotheses, NORMALIZER)
        rate, plain = word_error_rate(errors), count_errors(truth, hypotheses, PLAIN).rate
        more = word_error_rate_difference(errors, our_errors)
        lines.append(
            f"| {name}, int8, greedy | {percent(rate.value)} ({percent(rate.low)} to {percent(rate.high)}) "
            f"| {percent(plain)} | {percent(more.value)} ({percent(more.low)} to {percent(more.high)}) |"
        )
        figures.append({"test_set": ours.test_set, "system": name, "num_utterances": len(chosen), **rate._asdict()})
    return lines, figures


def write(page: Sequence[str], figures: Sequence[dict], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text("\n".join(page) + "\n")
    (folder / "results.json").write_text(json.dumps(figures, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name; the shipped model without it")
    parser.add_argument("--speech", type=Path, required=True, help="folder with librispeech, commonvoice_en and an4")
    parser.add_argument("--synthetic", type=Path, help="manifest of synthetic speech that was not trained on")
    parser.add_argument("--peer", action="append", default=[], help="NAME=FOLDER of a faster-whisper model")
    parser.add_argument("--limit", type=int, help="so many utterances a set")
    parser.add_argument("--batch-size", type=int, default=16, help="for the words; calls do not depend on it, except "
                        "where drafts are cut by what calls cost")  # fmt: skip
    parser.add_argument("--peer-limit", type=int, default=300, help="so many utterances a set for the peers")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()

    transcriber = load(arguments.model) if arguments.model else load()
    peers = [FasterWhisper(*peer.split("=", 1)) for peer in arguments.peer]
    sets = test_sets(arguments.speech, arguments.synthetic)
    figures, page = [], [
        "# Results",
        "",
        f"Words are compared after the {NORMALIZER.name} normaliser of Whisper; *plain* is lower case, letters and "
        "apostrophes. What the figures mean: `leapasr.evaluation.evaluate`. All rows of a set are of one run, "
        f"float32, batch {arguments.batch_size}, {torch.get_num_threads()} CPU threads. *full* drafts are all that CTC "
        "read; without the word they are cut where a wider call is not worth it, so that their calls depend on the "
        "machine. The synthetic set is sentences of test-clean's transcripts in synthetic voices. Times: "
        "[performance.md](performance.md).",
    ]  # fmt: skip
    for name, (manifest, use) in sets.items():
        cuts = list(read_manifest(manifest, use=use, limit=arguments.limit).cuts)
        print(name, len(cuts), flush=True)
        reports = evaluate(transcriber, cuts, list(STRATEGIES.values()), batch_size=arguments.batch_size, test_set=name)
        compared = spread(list(range(len(cuts))), arguments.peer_limit)
        samples = [cuts[index].load_audio()[0] for index in compared]
        written = {f"faster-whisper {peer.name}": peer.transcribe(samples) for peer in peers}
        hours = reports[0].audio_seconds / 3600
        page += ["", f"## {name}: {len(cuts)} utterances, {hours:.2f} h", ""]
        page += accuracy_table(dict(zip(STRATEGIES, reports, strict=True)))
        figures += [report.figures() for report in reports]
        if peers:
            autoregressive = next(report for report in reports if report.strategy == "autoregressive")
            lines, rates = peer_table(autoregressive, written, compared)
            page += lines
            figures += rates
        write(page, figures, arguments.output)
    print("\n".join(page))


if __name__ == "__main__":
    main()
