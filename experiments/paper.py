r"""The paper's experiment, reproduced: head architectures and numbers of heads, before and after MWER training.

    python experiments/paper.py --speech SPEECH --synthetic MANIFEST --manifest TRAIN.jsonl=WEIGHT … --work FOLDER

One common start (a trained model whose further heads are taken away), equal budgets of updates for all variants, then
every variant on every set. SPEECH and the test MANIFEST as for experiments/results.py. What is trained or scored
already, by the work folder, is not repeated; `--only NAME …` runs some of the rows, `--part` one part. Writes
docs/experiment.md, .json and .png, of the rows that are there.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from results import percent, test_sets
from strategies import measure_limits

from leapasr.config import MWER, WHISPER_SCALES, Stage, Task
from leapasr.data.augmentation import NO_AUGMENTATION
from leapasr.data.manifests import read_manifest, spread
from leapasr.decoding import DecodingOptions
from leapasr.evaluation.evaluate import Report, evaluate
from leapasr.evaluation.scoring import Interval, WordErrors, word_error_rate_difference
from leapasr.model.precision import PRECISIONS
from leapasr.model.retrofitting import set_heads
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration
from leapasr.training.run import load_initial, prepare, weighted
from leapasr.transcriber import load, locate

AUTOREGRESSIVE = DecodingOptions(strategy="autoregressive")
LOSSLESS = {
    "autoregressive": AUTOREGRESSIVE,
    "verify mtp": DecodingOptions(strategy="verify", drafts="mtp"),
    "verify both": DecodingOptions(strategy="verify", draft_length="full"),
}
FURTHER = {
    "verify ctc": DecodingOptions(strategy="verify", drafts="ctc", draft_length="full"),
    "relaxed both 0.3": DecodingOptions(strategy="relaxed", ratio=0.3),
    "beam 4": DecodingOptions(strategy="beam", draft_length="full"),
    **{f"threshold {at}": DecodingOptions(strategy="threshold", threshold=at) for at in (0.95, 0.9, 0.8, 0.7, 0.5)},
}
FIRST_SET, DEV = "librispeech/test (official test-clean)", "librispeech/dev"


@dataclass(frozen=True)
class Variant:
    """A model of the experiment.

    heads, num_heads, draft_layers: its further heads; ``latent`` stands for none where `num_heads` is 1.
    seed: of its training; None for the start, which is not trained.
    frozen: the further heads train alone, and head 1 and its decoder stay as the start has them.
    after: the variant that it goes on from; None is the common start. mwer: of MWER training; None is cross-entropy.
    headline: it is decoded with every strategy.
    """

    heads: str
    num_heads: int
    seed: int | None = 1
    draft_layers: int = 0
    frozen: bool = False
    after: Variant | None = None
    mwer: MWER | None = None
    headline: bool = False

    @property
    def name(self) -> str:
        architecture = "K = 1" if self.num_heads == 1 else f"{self.heads} {self.num_heads}"
        if self.draft_layers:
            architecture += f", {self.draft_layers} layers of their own"
        if self.frozen:
            architecture += ", head 1 frozen"
        if self.seed is None:
            return f"{architecture}, the start"
        if self.after is None:
            return f"{architecture}, seed {self.seed}"
        if self.mwer is None:
            return f"{self.after.name}, further"
        calls = f" and {self.mwer.calls_weight:g} calls" if self.mwer.calls_weight else ""
        return f"{self.after.name}, MWER{calls}"

    @property
    def baseline(self) -> Variant | None:
        """What it went on from, or head 1 alone of the same seed; None for the start."""
        if self.after is not None or self.seed is None:
            return self.after
        return START if self.num_heads == 1 else latent(1, self.seed)

    @property
    def folder(self) -> str:
        return self.name.replace(" = ", "").replace(",", "").replace(" ", "-")


START = Variant("latent", 1, seed=None)


def latent(num_heads: int, seed: int) -> Variant:
    """What is trained with several seeds; the first is decoded with every strategy."""
    return Variant("latent", num_heads, seed, headline=seed == 1)


def variants() -> list[Variant]:
    """All models, those that others go on from before them."""
    one, four = ([latent(number, seed) for seed in (1, 2)] for number in (1, 4))
    others = [Variant(heads, 4) for heads in ("projection", "residual", "sequential")]
    others += [Variant("latent", number) for number in (2, 6, 8)]
    others += [Variant("latent", 8, draft_layers=2), Variant("latent", 4, frozen=True)]
    others.append(Variant("latent", 8, draft_layers=2, frozen=True))
    trained = [replace(each, after=each, mwer=MWER()) for each in (*one, *four)]
    controls = [replace(each, after=each, headline=False) for each in (one[0], four[0])]
    of_calls = replace(four[0], after=four[0], mwer=MWER(calls_weight=0.1), headline=False)
    return [START, *one, *four, *others, *trained, *controls, of_calls]


def stage_of(variant: Variant, arguments: argparse.Namespace) -> Stage:
    """What the variant is trained by; the encoder is frozen in all of them."""
    common: dict[str, Any] = dict(
        frozen_encoder_layers=None, lr_scale=WHISPER_SCALES, ctc_weight=0.0,
        averaging=0.98, augmentation=NO_AUGMENTATION, batch=arguments.batch, head_weights=arguments.head_weight,
    )  # fmt: skip
    if variant.after is None:
        updates = arguments.updates
        task: Task = "heads" if variant.frozen else "joint"
        return Stage(task, task, updates, learning_rate=4e-4, warmup=updates // 8, final_lr=0.1, **common)
    updates, rate = arguments.mwer_updates, arguments.mwer_rate
    common |= {"learning_rate": rate, "warmup": updates // 8, "final_lr": 0.1}
    if variant.mwer is None:
        return Stage("joint", "joint", updates, **common)
    return Stage("mwer", "mwer", updates, mwer=variant.mwer, **common)


def make_start(arguments: argparse.Namespace) -> Path:
    """The common start: the given model, or the one that ships, with head 1 alone."""
    folder = arguments.work / "start"
    if not folder.exists():
        model, processor = load_initial(Path(locate(arguments.model)))
        set_heads(model, num_heads=1, draft_layers=0, seed=0)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def train(variant: Variant, arguments: argparse.Namespace) -> None:
    """Train `variant`, if that was not done before; of the training, its model and its log stay."""
    folder = arguments.work / variant.folder
    if (folder / "trained").exists():
        return
    if variant == START:
        shutil.copytree(make_start(arguments), folder / "model")
        (folder / "trained").touch()
        return
    print(f"training: {variant.name}", flush=True)
    stage = stage_of(variant, arguments)
    heads: dict[str, Any] = {}
    if variant.after is None:
        start = make_start(arguments)
        heads = {"num_heads": variant.num_heads, "head_type": variant.heads, "draft_layers": variant.draft_layers}
    else:
        start = arguments.work / variant.after.folder / "model"
    trainer = prepare(
        None, (stage,), manifests=weighted(arguments.manifest), dev=(), text=(), output=folder, initial_model=start,
        seed=variant.seed, encoder_cache=arguments.work / "frames", precision=arguments.precision,
        report=lambda message: None, **heads,
    )  # fmt: skip
    trainer.run()
    (folder / "trained").touch()
    shutil.rmtree(folder / stage.name)
    (folder / "checkpoint.pt").unlink()


def scores_of(variant: Variant, test_set: str, arguments: argparse.Namespace) -> Path:
    return arguments.work / variant.folder / f"{test_set.split(' ')[0].replace('/', '-')}.json"


def is_scored(variant: Variant, sets: Mapping[str, Any], arguments: argparse.Namespace) -> bool:
    """Whether it, and what it is compared with, was decoded on all sets."""
    needed = (variant, variant.baseline or variant)
    return all(scores_of(each, name, arguments).exists() for each in needed for name in sets)


def score(variant: Variant, sets: Mapping[str, tuple[Path, str | None]], arguments: argparse.Namespace) -> None:
    """Decode the sets with `variant`, those that were not before: figures, and the errors of every utterance."""
    transcriber = None
    for name, (manifest, use) in sets.items():
        path = scores_of(variant, name, arguments)
        if path.exists():
            continue
        print(f"decoding: {variant.name}, {name}", flush=True)
        transcriber = transcriber or load(arguments.work / variant.folder / "model", dtype=arguments.dtype)
        named = LOSSLESS | (FURTHER if variant.headline and name == FIRST_SET else {})
        if variant.num_heads == 1:
            named = {key: options for key, options in named.items() if key in ("autoregressive", "beam 4")}
        limit = arguments.first_limit if name == FIRST_SET else arguments.limit
        cuts = list(read_manifest(manifest, use=use, limit=limit).cuts)
        reports = evaluate(transcriber, cuts, list(named.values()), batch_size=arguments.batch_size, test_set=name)
        figures = {key: scored(each) for key, each in zip(named, reports, strict=True)}
        if name == FIRST_SET and variant.num_heads > 1:
            limits = measure_limits(transcriber, spread(cuts, arguments.limit), arguments.batch_size)
            figures["autoregressive"]["heads_right"] = [right / asked for right, asked in limits.right.values()]
        path.write_text(json.dumps(figures))


def scored(report: Report) -> dict[str, Any]:
    """A report's figures with the errors of every utterance."""
    errors = report.word_errors()
    of_each = (errors.num_words_N, errors.substitutions_N, errors.deletions_N, errors.insertions_N)
    return report.figures() | {"errors": np.stack(of_each).tolist()}


@dataclass(frozen=True)
class Row:
    """A row of docs/experiment.json: a variant, decoded by one strategy, on one set.

    wer_difference: `wer` minus that of `baseline` with the same strategy (autoregressive, where it has it not), paired
        by utterance.
    """

    name: str
    heads: str | None
    num_heads: int
    draft_layers: int
    frozen: bool
    mwer: bool
    seed: int | None
    set: str
    strategy: str
    drafts: str | None
    wer: float
    wer_low: float
    wer_high: float
    baseline: str | None
    wer_difference: float
    difference_low: float
    difference_high: float
    call_reduction: float | None
    tokens_per_call: float | None
    decoder_seconds: float
    num_utterances: int


class Results:
    """What variants were found to do."""

    def __init__(self, chosen: Sequence[Variant], work: Path):
        self.chosen, self.work = chosen, work
        self.scores = {each: self._read(each) for each in chosen}
        self.rows = {
            (variant, test_set, strategy): self._row(variant, test_set, strategy)
            for variant, by_set in self.scores.items()
            for test_set, by_strategy in by_set.items()
            for strategy in by_strategy
        }

    def _read(self, variant: Variant) -> dict[str, dict[str, dict[str, Any]]]:
        written = [json.loads(path.read_text()) for path in sorted((self.work / variant.folder).glob("*.json"))]
        return {scores["autoregressive"]["test_set"]: scores for scores in written}

    def errors(self, variant: Variant, test_set: str, strategy: str) -> WordErrors:
        return WordErrors(*np.array(self.scores[variant][test_set][strategy]["errors"], dtype=np.int64))

    def difference(self, variant: Variant, test_set: str, strategy: str = "autoregressive") -> Interval:
        """Word error rate minus that of the baseline."""
        baseline = variant.baseline or variant
        of_baseline = strategy if strategy in self.scores[baseline][test_set] else "autoregressive"
        before = self.errors(baseline, test_set, of_baseline)
        return word_error_rate_difference(before, self.errors(variant, test_set, strategy))

    def _row(self, variant: Variant, test_set: str, strategy: str) -> Row:
        figures, baseline = self.scores[variant][test_set][strategy], variant.baseline
        change = self.difference(variant, test_set, strategy)
        return Row(
            name=variant.name,
            heads=None if variant.num_heads == 1 else variant.heads,
            num_heads=variant.num_heads,
            draft_layers=variant.draft_layers,
            frozen=variant.frozen,
            mwer=variant.mwer is not None,
            seed=variant.seed,
            set=test_set,
            strategy=strategy,
            drafts=figures["drafts"],
            **{name: figures[name] for name in ("wer", "wer_low", "wer_high", "call_reduction", "tokens_per_call",
                                                "decoder_seconds", "num_utterances")},
            baseline=baseline and baseline.name,
            wer_difference=change.value,
            difference_low=change.low,
            difference_high=change.high,
        )  # fmt: skip

    def heads_right(self, variant: Variant) -> str:
        """How often heads 2..K guess, behind each token, what head 1 then writes, in percent."""
        shares = self.scores[variant][FIRST_SET]["autoregressive"].get("heads_right", ())
        return " ".join(f"{100 * share:.0f}" for share in shares) or "–"

    def list_share(self, variant: Variant) -> float:
        """Share of an update's time that finding its N-best lists took, the median over the log."""
        lines = map(json.loads, (self.work / variant.folder / "metrics.jsonl").read_text().splitlines())
        return float(np.median([line["search_seconds"] * line["updates_per_second"] for line in lines]))


@cache
def num_extra(folder: Path) -> int:
    """Parameters of further heads, and of their layers."""
    model = SpeechLlamaForConditionalGeneration.from_pretrained(folder)
    parts = [part for part in (model.mtp_heads, model.draft_layers) if part is not None]
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"


def interval(value: float, low: float, high: float) -> str:
    return f"{percent(value)} ({percent(low)} to {percent(high)})"


def heads_table(results: Results) -> list[str]:
    """Markdown: every variant of cross-entropy alone on the first set."""
    lines = [
        "| variant | further parameters | WER %, head 1 | minus K = 1 (that: minus the start) | calls, mtp "
        "| calls, mtp and CTC | heads 2, 3, … right % | decoder time of verify mtp, autoregressive 1 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in results.chosen:
        if variant.after is not None:
            continue
        plain = results.rows[variant, FIRST_SET, "autoregressive"]
        mtp, both = (results.rows.get((variant, FIRST_SET, name)) for name in ("verify mtp", "verify both"))
        extra = num_extra(results.work / variant.folder / "model")
        change = interval(plain.wer_difference, plain.difference_low, plain.difference_high)
        seconds = f"{mtp.decoder_seconds / plain.decoder_seconds:.2f}" if mtp else "–"
        lines.append(
            f"| {variant.name} | {extra / 1e6:.2f}M | {interval(plain.wer, plain.wer_low, plain.wer_high)} "
            f"| {change if plain.baseline else '–'} | {times(mtp and mtp.call_reduction)} "
            f"| {times(both and both.call_reduction)} | {results.heads_right(variant)} | {seconds} |"
        )
    return lines


def sets_table(results: Results) -> list[str]:
    """Markdown: head 1's WER and the calls of every variant on every set."""
    sets = list(results.scores[results.chosen[0]])
    lines = ["| WER %, head 1; calls, mtp; calls, mtp and CTC | " + " | ".join(sets) + " |",
             "| --- |" + " --- |" * len(sets)]  # fmt: skip
    for variant in results.chosen:
        cells = []
        for test_set in sets:
            rows = [results.rows.get((variant, test_set, name)) for name in LOSSLESS]
            cells.append("; ".join([percent(rows[0].wer), *(times(row.call_reduction) for row in rows[1:] if row)]))  # type: ignore[union-attr]
        lines.append(f"| {variant.name} | " + " | ".join(cells) + " |")
    return lines


def mwer_table(results: Results) -> list[str]:
    """Markdown: what further training brought, by set."""
    lines = [
        "| variant | set | WER % before | after | difference | relative % | calls, mtp, before and after |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in results.chosen:
        if variant.after is None:
            continue
        for test_set in results.scores[variant]:
            before, after = (results.rows[each, test_set, "autoregressive"] for each in (variant.after, variant))
            calls = [results.rows.get((each, test_set, "verify mtp")) for each in (variant.after, variant)]
            change = interval(after.wer_difference, after.difference_low, after.difference_high)
            lines.append(
                f"| {variant.name} | {test_set} | {percent(before.wer)} | {percent(after.wer)} | {change} "
                f"| {100 * after.wer_difference / before.wer:.1f} "
                f"| {', '.join(times(row and row.call_reduction) for row in calls)} |"
            )
    return lines


def strategies_table(results: Results) -> list[str]:
    """Markdown: every strategy on the first set, of variants that were decoded with all."""
    lines = [
        "| variant | strategy | WER % | minus baseline | calls | tokens per call |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for variant in results.chosen:
        for strategy in (*LOSSLESS, *FURTHER) if variant.headline else ():
            row = results.rows.get((variant, FIRST_SET, strategy))
            if row is not None:
                lines.append(
                    f"| {variant.name} | {strategy} | {interval(row.wer, row.wer_low, row.wer_high)} "
                    f"| {interval(row.wer_difference, row.difference_low, row.difference_high)} "
                    f"| {times(row.call_reduction)} | {row.tokens_per_call or 0:.2f} |"
                )
    return lines


def draw(results: Results, path: Path) -> None:
    """WER against call reduction for trusted heads; calls against the number of heads."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    for variant in results.chosen:
        rows = [row for (each, test_set, strategy), row in results.rows.items()
                if each == variant and test_set == FIRST_SET and strategy.startswith("threshold")]  # fmt: skip
        if rows:
            points = sorted((row.call_reduction or 1.0, 100 * row.wer) for row in rows)
            left.plot(*zip(*points, strict=True), marker="o", label=f"{variant.name}, threshold")
    left.set_xlabel("decoder calls, times fewer than autoregressive")
    left.set_ylabel("WER %")
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    by_number = sorted(
        (variant.num_heads, results.rows[variant, FIRST_SET, "verify mtp"].call_reduction)
        for variant in results.chosen
        if variant.heads == "latent" and variant.num_heads > 1 and variant.seed == 1
        and not variant.draft_layers and not variant.frozen and variant.after is None
    )  # fmt: skip
    right.plot(*zip(*by_number, strict=True), marker="o", label="latent")
    for variant in results.chosen:
        if variant.num_heads == 4 and variant.heads != "latent":
            row = results.rows[variant, FIRST_SET, "verify mtp"]
            right.plot(4, row.call_reduction, marker="x", linestyle="", label=variant.heads)
    right.set_xlabel("heads, head 1 included")
    right.set_ylabel("decoder calls, times fewer (verify mtp)")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def write(results: Results, arguments: argparse.Namespace) -> None:
    """docs/experiment.md, .json and .png."""
    page = [
        "# The paper's experiment",
        "",
        f"`experiments/paper.py`: one start, the model that ships with head 1 alone; {arguments.updates} updates of "
        f"{arguments.batch:g} s with all heads' cross-entropy (further heads weigh {arguments.head_weight:g} · "
        f"0.8^(k−1)), then, where it says so, {arguments.mwer_updates} of MWER on lists of {MWER().nbest}, rate "
        f"{arguments.mwer_rate:g}, or as many further ones of cross-entropy. Encoder and CTC stay as they are. "
        f"Decoding in {arguments.dtype}, batch {arguments.batch_size}, {torch.get_num_threads()} CPU threads; drafts "
        "of CTC in full. What follows from it: [training.md](training.md).",
        "",
        f"## Heads, on {FIRST_SET}",
        "",
        *heads_table(results),
        "",
        "## All sets",
        "",
        *sets_table(results),
        "",
        "## MWER",
        "",
        *mwer_table(results),
        "",
        "Finding the lists takes "
        + ", ".join(f"{100 * results.list_share(each):.0f}%" for each in results.chosen if each.mwer)
        + " of an update's time.",
        "",
        f"## Strategies, on {FIRST_SET}",
        "",
        *strategies_table(results),
        "",
        "![WER against calls of trusted heads, and calls by the number of heads](experiment.png)",
    ]
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw(results, arguments.output / "experiment.png")
    (arguments.output / "experiment.md").write_text("\n".join(page) + "\n")
    rows = [vars(row) for row in results.rows.values()]
    (arguments.output / "experiment.json").write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the start, folder or hub name; the shipped model without it")
    parser.add_argument("--manifest", action="append", required=True, help="training manifest, PATH or PATH=WEIGHT")
    parser.add_argument("--speech", type=Path, required=True, help="folder with librispeech, commonvoice_en and an4")
    parser.add_argument("--synthetic", type=Path, help="manifest of synthetic speech that was not trained on")
    parser.add_argument("--updates", type=int, default=400, help="of cross-entropy")
    parser.add_argument("--mwer-updates", type=int, default=150)
    parser.add_argument("--mwer-rate", type=float, default=1e-4)
    parser.add_argument("--head-weight", type=float, default=0.01)
    parser.add_argument("--batch", type=float, default=65, help="seconds of audio an update")
    parser.add_argument("--limit", type=int, default=100, help="so many utterances a set")
    parser.add_argument("--first-limit", type=int, default=400, help=f"so many of {FIRST_SET}")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of training")
    parser.add_argument("--dtype", default="float32", help="for decoding")
    parser.add_argument("--only", nargs="+", help="names of variants, those that they go on from included")
    parser.add_argument("--part", choices=("train", "score", "write"), help="all of them without it")
    parser.add_argument("--work", type=Path, default=Path("work/experiment"))
    parser.add_argument("--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()

    chosen = variants()
    if arguments.only:
        unknown = set(arguments.only) - {each.name for each in chosen}
        if unknown:
            parser.error(f"unknown: {', '.join(sorted(unknown))}; there are: {'; '.join(each.name for each in chosen)}")
        chosen = [each for each in chosen if each.name in arguments.only]
    sets = test_sets(arguments.speech, arguments.synthetic)
    sets[DEV] = (arguments.speech / "librispeech/manifest.jsonl", "dev")
    if arguments.part in (None, "train"):
        for variant in chosen:
            train(variant, arguments)
    if arguments.part in (None, "score"):
        for variant in chosen:
            score(variant, sets, arguments)
    if arguments.part == "write" or (arguments.part is None and not arguments.only):
        write(Results([each for each in variants() if is_scored(each, sets, arguments)], arguments.work), arguments)


if __name__ == "__main__":
    main()
