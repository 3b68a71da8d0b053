r"""Whispers with heads fitted to them beside their own `generate`, and beside faster-whisper: docs/existing-models*

    python experiments/existing_models.py --speech SPEECH --model tiny.en=FOLDER --model base=FOLDER \
        [--adapter base=FOLDER] [--peer tiny.en=CT2FOLDER --peer base=CT2FOLDER]
    python experiments/existing_models.py --speech SPEECH --model tiny.en=FOLDER --fits FITS \
        [--updates 600] [--precision fp32]

SPEECH holds librispeech, commonvoice_en, commonvoice_ml and kerstin_de, with a manifest.jsonl each. Every utterance of
a test set is decoded for the words and the calls; `--timed` of them, spread evenly, are timed. A row is written when it
is done, and is not measured again: delete it from the JSON file, or the file, to have it anew. The tables go behind the
mark in docs/existing-models.md.

With `--fits` heads of several kinds are fitted to the first model, in the folder FITS, on 2.2 hours and less of
LibriSpeech's part for training, and compared on utterances of its part for development.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lhotse.cut import Cut

from leapasr.data.manifests import read_manifest, spread
from leapasr.decoding import DecodingOptions
from leapasr.evaluation.bench import BenchRow, Utterances, bench
from leapasr.evaluation.evaluate import Report, evaluate, reference_of, samples_of
from leapasr.evaluation.peers import FasterWhisper
from leapasr.evaluation.systems import GenerateWhisper, Leapasr, System, Whisper
from leapasr.model.precision import PRECISIONS
from leapasr.training.distillation import GROUP
from leapasr.training.fit import FitConfig, fit
from leapasr.transcriber import load
from leapasr.whisper_transcriber import WhisperOptions, WhisperTranscriber

MARK = "<!-- figures: written by experiments/existing_models.py -->"
AUTOREGRESSIVE = DecodingOptions(strategy="autoregressive")
STRATEGIES = {
    "mtp": DecodingOptions(drafts="mtp"),
    "ctc": DecodingOptions(drafts="ctc", draft_length="full"),
    "both": DecodingOptions(drafts="both", draft_length="full"),
}
TIMED = DecodingOptions()  # drafts as long as is fastest
BATCH_SIZES, TARGETS = (1, 8), {"librispeech": 4.0}
TARGET = 2.5  # call reduction elsewhere


@dataclass(frozen=True)
class TestSet:
    """A row: which utterances of which corpus, and their language."""

    corpus: str
    language: str

    @property
    def name(self) -> str:
        return f"{self.corpus}/test" + (f" {self.language}" if self.corpus == "commonvoice_ml" else "")

    def cuts(self, speech: Path, limit: int | None) -> list[Cut]:
        cuts = list(read_manifest(speech / self.corpus / "manifest.jsonl", use="test").cuts)
        return spread([cut for cut in cuts if cut.supervisions[0].language == self.language], limit)


ENGLISH = [TestSet("librispeech", "en"), TestSet("commonvoice_en", "en")]
OTHERS = [
    *(TestSet("commonvoice_ml", language) for language in ("de", "es", "fr", "it", "nl", "pl", "pt")),
    TestSet("kerstin_de", "de"),
]


def evaluated(transcriber: WhisperTranscriber, cuts: Sequence[Cut], batch_size: int) -> dict[str, Report]:
    """By the name of each strategy, autoregressive decoding first."""
    strategies = {"autoregressive": AUTOREGRESSIVE, **STRATEGIES}
    reports = evaluate(transcriber, cuts, list(strategies.values()), batch_size=batch_size)
    return dict(zip(strategies, reports, strict=True))


def words(transcriber: WhisperTranscriber, cuts: Sequence[Cut], batch_size: int) -> Iterator[tuple[str, object]]:
    """What was written, in how many calls, and whether it is what `generate` writes: names and values of a row."""
    reports = evaluated(transcriber, cuts, batch_size)
    generated = GenerateWhisper(transcriber).run([samples_of(cut) for cut in cuts], batch_size).tokens
    assert generated is not None
    for name, report in reports.items():
        same = sum(ours.tokens == theirs for ours, theirs in zip(report.utterances, generated, strict=True))
        yield f"same_as_generate_{name}", same / len(generated)
        yield f"call_reduction_{name}", report.call_reduction
    for name in ("wer", "wer_low", "wer_high", "ctc_wer", "audio_seconds"):
        yield name, getattr(reports["autoregressive"], name)


def times(
    transcriber: WhisperTranscriber, peers: Sequence[FasterWhisper], cuts: Sequence[Cut], rounds: int
) -> list[BenchRow]:
    systems: list[System] = [
        Leapasr(transcriber, AUTOREGRESSIVE), Leapasr(transcriber, TIMED), GenerateWhisper(transcriber),
        *map(Whisper, peers),
    ]  # fmt: skip
    utterances = Utterances([samples_of(cut) for cut in cuts], [reference_of(cut) for cut in cuts], [])
    return bench(transcriber, systems, utterances, batch_sizes=BATCH_SIZES, rounds=rounds)


def measured(
    model: str, test_set: TestSet, cuts: Sequence[Cut], folders: Mapping[str, Mapping[str, str]], *, arguments
) -> dict[str, object]:
    """A row's figures."""
    multilingual = not model.endswith(".en")
    transcriber = load(
        folders["model"][model],
        adapter=folders["adapter"].get(model),
        whisper=WhisperOptions(language=test_set.language if multilingual else None),
    )
    assert isinstance(transcriber, WhisperTranscriber)
    if transcriber.heads is None:
        raise ValueError(f"no heads were fitted to {folders['model'][model]}: name their folder with --adapter")
    row: dict[str, object] = {"model": model, "test_set": test_set.name, "num_utterances": len(cuts)}
    row |= dict(words(transcriber, cuts, arguments.batch_size))
    peers = [
        FasterWhisper(model, folder, language=test_set.language)
        for folder in [folders["peer"].get(model)]
        if folder is not None
    ]
    row["num_timed"] = min(arguments.timed, len(cuts))
    row["threads"] = torch.get_num_threads()
    row["times"] = [
        {
            "system": each.label, "batch_size": each.batch_size, "encoder_seconds": each.encoder_seconds,
            "decoder_seconds": each.decoder_seconds, "seconds": each.seconds, "rtfx": each.rtfx,
            "decoder_speedup": each.speedup_vs_generate, "speedup": each.total_speedup_vs_generate,
        }
        for each in times(transcriber, peers, spread(list(cuts), arguments.timed), arguments.rounds)
    ]  # fmt: skip
    return row


@dataclass(frozen=True)
class Fit:
    """Heads to compare: what of the plain fit is changed, and how many recordings of LibriSpeech it learns from."""

    name: str
    changes: Mapping[str, object]
    recordings: int = 10 * GROUP  # whole groups of lessons, so that those of fewer are among them


FITS = [
    Fit("as by default", {}),
    Fit("latent", {"head_type": "latent"}),
    Fit("residual", {"head_type": "residual"}),
    Fit("K = 3", {"num_heads": 3}),
    Fit("K = 8", {"num_heads": 8}),
    Fit("0.4 hours", {}, 2 * GROUP),
    Fit("1.1 hours", {}, 5 * GROUP),
]


def fitted(one: Fit, model: str, arguments: argparse.Namespace) -> Path:
    """The folder of a fit's heads; an interrupted fit goes on."""
    folder = arguments.fits / one.name.replace(" ", "")
    if (folder / "heads.json").exists():
        return folder
    corpus = arguments.speech / "librispeech"
    lines = [json.loads(line) for line in (corpus / "manifest.jsonl").read_text().splitlines()]
    part = [line for line in lines if line["use"] == "train"][: one.recordings]
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "part.jsonl"
    manifest.write_text(
        "".join(json.dumps({**each, "audio": str((corpus / each["audio"]).resolve())}) + "\n" for each in part)
    )

    @contextmanager
    def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda amount: None

    config = FitConfig(**{"updates": arguments.updates, "precision": arguments.precision, **one.changes})
    lessons = arguments.fits / "lessons"
    return fit(model, [manifest], folder, config, cache=lessons, progress=progress, complain=print)


def compared(one: Fit, model: str, arguments: argparse.Namespace) -> dict[str, object]:
    """A fit's row: what it is, and its calls on utterances for development."""
    folder = fitted(one, model, arguments)
    transcriber = load(model, adapter=folder)
    assert isinstance(transcriber, WhisperTranscriber)
    cuts = list(read_manifest(arguments.speech / "librispeech" / "manifest.jsonl", use="dev").cuts)
    cuts = spread(cuts, arguments.limit or 100)
    reports = evaluated(transcriber, cuts, arguments.batch_size)
    assert transcriber.heads is not None
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "name": one.name,
        "num_heads": transcriber.heads.config.num_heads,
        "head_type": transcriber.heads.config.head_type,
        "hours": transcriber.heads.config.fitted_hours,
        "updates": transcriber.heads.config.updates,
        "megabytes": sum(path.stat().st_size for path in folder.glob("heads.*")) / 1e6,
        "accuracies": [log[-1][f"dev_accuracy_{k}"] for k in range(2, transcriber.heads.config.num_heads + 1)],
        "ctc_wer": reports["autoregressive"].ctc_wer,
        "num_utterances": len(cuts),
        **{f"call_reduction_{name}": report.call_reduction for name, report in reports.items()},
    }


def tables(known: Mapping[str, Sequence[Mapping]]) -> list[str]:
    """Markdown of all rows."""
    rows = known["rows"]
    page = [
        "",
        "| model | test set | utterances | as `generate` % | WER % (95% interval) | calls: mtp | ctc | both | target |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        same = min(row[f"same_as_generate_{name}"] for name in ("autoregressive", *STRATEGIES))
        fewer = " | ".join(f"{row[f'call_reduction_{name}']:.2f}x" for name in STRATEGIES)
        target = TARGETS.get(row["test_set"].split("/")[0], TARGET)
        wer, low, high = (100 * row[name] for name in ("wer", "wer_low", "wer_high"))
        page.append(
            f"| {row['model']} | {row['test_set']} | {row['num_utterances']} | {100 * same:.2f} "
            f"| {wer:.2f} ({low:.2f} to {high:.2f}) | {fewer} | {target:g}x |"
        )
    page += [
        "",
        "| model | test set | system | batch | encoder s | decoder s | decoder, times faster | in all, times faster |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        for each in row["times"]:
            parts = [each["encoder_seconds"], each["decoder_seconds"], each["decoder_speedup"], each["speedup"]]
            shown = " | ".join("" if part is None else f"{part:.2f}" for part in parts)
            page.append(f"| {row['model']} | {row['test_set']} | {each['system']} | {each['batch_size']} | {shown} |")
    if known["fits"]:
        page += [
            "",
            "| fit | K | heads | hours | MB | right guesses of heads 2 to K % | CTC WER % | calls: mtp | ctc | both |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
    for row in known["fits"]:
        right = " ".join(f"{100 * accuracy:.0f}" for accuracy in row["accuracies"])
        fewer = " | ".join(f"{row[f'call_reduction_{name}']:.2f}x" for name in STRATEGIES)
        page.append(
            f"| {row['name']} | {row['num_heads']} | {row['head_type']} | {row['hours']:.1f} | {row['megabytes']:.1f} "
            f"| {right} | {100 * row['ctc_wer']:.1f} | {fewer} |"
        )
    return page


def write(known: Mapping[str, Sequence[Mapping]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "existing-models.json").write_text(json.dumps(known, indent=1) + "\n")
    page = folder / "existing-models.md"
    before = page.read_text().split(MARK)[0] if page.exists() else "# Make your model faster\n\n"
    page.write_text(before + MARK + "\n" + "\n".join(tables(known)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speech", type=Path, required=True)
    for kind, what in (
        ("model", "NAME=FOLDER of a Whisper; one whose name ends in .en writes English alone"),
        ("adapter", "NAME=FOLDER of heads fitted to it; those in the package without it"),
        ("peer", "NAME=FOLDER of the same Whisper for faster-whisper"),
    ):
        parser.add_argument(f"--{kind}", action="append", default=[], help=what, required=kind == "model")
    parser.add_argument("--limit", type=int, help="so many utterances a set")
    parser.add_argument("--timed", type=int, default=40, help="so many of them are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="for the words")
    parser.add_argument("--fits", type=Path, help="folder of fits to compare, and of their lessons")
    parser.add_argument("--updates", type=int, default=600, help="of each of these fits")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of their products")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    folders = {
        kind: dict(pair.split("=", 1) for pair in getattr(arguments, kind)) for kind in ("model", "adapter", "peer")
    }
    file = arguments.output / "existing-models.json"
    known = json.loads(file.read_text()) if file.exists() else {"rows": [], "fits": []}
    if arguments.fits:
        model = next(iter(folders["model"].values()))
        for one in FITS:
            if any(row["name"] == one.name for row in known["fits"]):
                continue
            print(one.name, flush=True)
            known["fits"].append(compared(one, model, arguments))
            write(known, arguments.output)
        return
    for model in folders["model"]:
        for test_set in ENGLISH if model.endswith(".en") else ENGLISH + OTHERS:
            if any((row["model"], row["test_set"]) == (model, test_set.name) for row in known["rows"]):
                continue
            cuts = test_set.cuts(arguments.speech, arguments.limit)
            print(model, test_set.name, len(cuts), flush=True)
            known["rows"].append(measured(model, test_set, cuts, folders, arguments=arguments))
            write(known, arguments.output)
    write(known, arguments.output)


if __name__ == "__main__":
    main()
