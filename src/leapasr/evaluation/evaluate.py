"""Transcribe test sets with several strategies, score them, and set them against autoregressive decoding.

Each batch is encoded once and decoded with every strategy. What the figures mean:

- a *decoder call* is one forward pass of the decoder for one row, the prefill included;
- *tokens* are what decoding emitted, end-of-text included (greedy CTC has none);
- *seconds* are those of features, encoder and this strategy's decoding; reading audio files, loading the model and
  the other strategies do not count.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
from lhotse.audio.utils import AudioLoadingError, DurationMismatchError
from lhotse.cut import Cut

from leapasr.audio import SAMPLE_RATE, AudioError, resample
from leapasr.chunks import Chunk, by_length, windows
from leapasr.decoding import DecodingOptions
from leapasr.decoding.trace import TokenRecord, accept_length_histogram
from leapasr.evaluation.scoring import (
    Interval,
    WordErrors,
    count_errors,
    word_error_rate,
    word_error_rate_difference,
)
from leapasr.text import NORMALIZER, PLAIN, Normalizer
from leapasr.transcriber import Transcriber

Strategy = DecodingOptions | Literal["ctc"]  # decoding, or the encoder's greedy CTC output alone

_UNREADABLE = (AudioLoadingError, DurationMismatchError, soundfile.LibsndfileError, OSError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Utterance:
    """One utterance as a strategy wrote it; `tokens` are without end-of-text, `reference` as in the manifest."""

    id: str
    reference: str
    hypothesis: str
    tokens: list[int]
    calls: int


@dataclass(frozen=True)
class Report:
    """Figures of one strategy on one test set; rates are fractions of one, times are in seconds.

    Attributes:
        test_set: what was evaluated, for people to read.
        strategy, threshold, ratio, top, beam_size, drafts, draft_length, num_heads: of the options, or ``ctc``;
            `num_heads` is what was used, head 1 included, and `drafts` what was verified, None for other strategies.
        batch_size, dtype, device: how it was computed.
        normalizer: what both sides go through before words are counted, `wer_plain` aside.
        wer, wer_low, wer_high: word error rate with its 95% interval, by bootstrap over utterances.
        wer_change, wer_change_low, wer_change_high: `wer` minus that of autoregressive decoding, paired.
        wer_plain: word error rate after the plain normaliser.
        ctc_wer: that of the encoder's greedy CTC output alone.
        num_utterances, num_words, audio_seconds: size of the test set, words as normalised.
        decoder_calls: summed over rows, prefills included.
        tokens: emitted tokens, end-of-text included.
        tokens_per_call: None without a single call (silence alone, or greedy CTC).
        call_reduction: autoregressive calls ÷ this strategy's calls on the same audio; None without a single call.
        identical_to_autoregressive: share of utterances with the same tokens.
        num_truncated: chunks that a guard ended, by the guard (``length``, ``repetition``).
        encoder_seconds, decoder_seconds, seconds: features and encoder, this strategy's decoding, and both.
        rtfx: audio seconds ÷ `seconds`; None where everything is silent.
        accept_lengths: how many steps emitted 1, 2, 3, ... tokens.
        problems: manifest lines and audio that were left out, a message each.
        utterances: what was written, in the order of the manifest.
    """

    test_set: str
    strategy: str
    threshold: float | None
    ratio: float | None
    top: int | None
    beam_size: int | None
    drafts: str | None
    draft_length: str | None
    num_heads: int
    batch_size: int
    dtype: str
    device: str
    normalizer: str
    wer: float
    wer_low: float
    wer_high: float
    wer_change: float
    wer_change_low: float
    wer_change_high: float
    wer_plain: float
    ctc_wer: float
    num_utterances: int
    num_words: int
    audio_seconds: float
    decoder_calls: int
    tokens: int
    tokens_per_call: float | None
    call_reduction: float | None
    identical_to_autoregressive: float
    num_truncated: dict[str, int]
    encoder_seconds: float
    decoder_seconds: float
    seconds: float
    rtfx: float | None
    accept_lengths: dict[int, int]
    problems: list[str]
    utterances: list[Utterance] = field(repr=False)

    @property
    def label(self) -> str:
        """The strategy in a few words: ``verify both full``, ``threshold 0.9``, ``beam 4 both``."""
        numbers = [f"{value:g}" for value in (self.beam_size, self.threshold, self.ratio) if value is not None]
        full = "full" if self.draft_length == "full" else None
        return " ".join([self.strategy, *numbers, *filter(None, (self.drafts, full))])

    def figures(self) -> dict[str, Any]:
        """All but the utterances, as JSON has it."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "utterances"}

    def word_errors(self, normalizer: Normalizer = NORMALIZER) -> WordErrors:
        """The errors of each utterance."""
        references = [utterance.reference for utterance in self.utterances]
        return count_errors(references, [utterance.hypothesis for utterance in self.utterances], normalizer)


def compare(first: Report, second: Report) -> Interval:
    """Word error rate of `second` minus that of `first` with its 95% interval, paired by utterance.

    Raises:
        ValueError: they are not of the same utterances.
    """
    first_ids, second_ids = ([utterance.id for utterance in report.utterances] for report in (first, second))
    if first_ids != second_ids:
        only = sorted(set(first_ids) ^ set(second_ids))
        raise ValueError(
            f"reports of different utterances cannot be paired: {len(only)} are in one alone {only[:3]}, or the order "
            "differs"
        )
    return word_error_rate_difference(first.word_errors(), second.word_errors())


def samples_of(cut: Cut) -> np.ndarray:
    """16 kHz mono samples (num_samples,) of a cut.

    Raises:
        AudioError: they cannot be read; the message names the cut.
    """
    try:
        return resample(cut.load_audio().mean(0), cut.sampling_rate)
    except _UNREADABLE as error:
        reason = str(error).split(" Details:")[0].splitlines() or [type(error).__name__]
        raise AudioError(f"{cut.id}: its audio cannot be read ({reason[0]})") from error


def reference_of(cut: Cut) -> str:
    """What is said in a cut."""
    return " ".join(supervision.text or "" for supervision in cut.supervisions)


@dataclass
class _Tally:
    """What one strategy has given so far; a piece is a chunk of an utterance."""

    pieces: dict[int, list[tuple[float, list[int], str]]] = field(default_factory=dict)
    calls: Counter[int] = field(default_factory=Counter)
    traces: list[Sequence[TokenRecord]] = field(default_factory=list)
    truncated: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def tokens(self, key: int) -> list[int]:
        return [token for _, tokens, _ in sorted(self.pieces.get(key, [])) for token in tokens]

    def text(self, key: int) -> str:
        return " ".join(text for _, _, text in sorted(self.pieces.get(key, [])) if text)


@dataclass
class _Run:
    """The whole set, with every strategy."""

    transcriber: Transcriber
    cuts: dict[int, Cut]
    tallies: dict[Strategy, _Tally]
    batch_size: int
    test_set: str
    problems: list[str]
    encoder_seconds: float = 0.0
    audio_seconds: float = 0.0

    def samples(self) -> Iterator[tuple[int, np.ndarray]]:
        """Samples of every cut, by its key; a cut that cannot be read is taken out of the run."""
        for key, cut in list(self.cuts.items()):
            try:
                samples = samples_of(cut)
            except AudioError as error:
                self.problems.append(str(error))
                del self.cuts[key]
                continue
            self.audio_seconds += len(samples) / SAMPLE_RATE
            yield key, samples

    def add(self, chunks: Sequence[Chunk]) -> None:
        """Encode a batch, and decode it with every strategy."""
        encoded = self.transcriber.encode(chunks)
        self.encoder_seconds += encoded.seconds
        for strategy, tally in self.tallies.items():
            if isinstance(strategy, DecodingOptions):
                decoded = self.transcriber.decode(encoded, strategy)
            else:
                decoded = self.transcriber.decode_ctc(encoded)
            tally.seconds += decoded.seconds
            for chunk, result in zip(chunks, decoded.results, strict=True):
                text = self.transcriber.processor.decode_text(result.tokens)
                tally.pieces.setdefault(chunk.recording, []).append((chunk.start, result.tokens, text))
                tally.calls[chunk.recording] += result.num_calls
                tally.traces.append(result.trace)
                if result.truncated:
                    tally.truncated[result.truncated] += 1

    def utterances(self, strategy: Strategy) -> list[Utterance]:
        tally = self.tallies[strategy]
        return [
            Utterance(cut.id, reference_of(cut), tally.text(key), tally.tokens(key), tally.calls[key])
            for key, cut in self.cuts.items()
        ]

    def word_errors(self, strategy: Strategy, normalizer: Normalizer = NORMALIZER) -> WordErrors:
        texts = [self.tallies[strategy].text(key) for key in self.cuts]
        return count_errors(list(map(reference_of, self.cuts.values())), texts, normalizer)

    def report(self, strategy: Strategy) -> Report:
        baseline = _autoregressive(strategy)
        tally, baseline_tally = self.tallies[strategy], self.tallies[baseline]
        errors = self.word_errors(strategy)
        rate, change = word_error_rate(errors), word_error_rate_difference(self.word_errors(baseline), errors)
        calls, num_tokens = tally.calls.total(), sum(map(len, tally.traces))
        seconds = self.encoder_seconds + tally.seconds
        model = self.transcriber.model
        return Report(
            test_set=self.test_set,
            **_settings(strategy, self.transcriber.decoder.num_heads),
            batch_size=self.batch_size,
            dtype=self.transcriber.dtype,
            device=str(model.device),
            normalizer=NORMALIZER.name,
            wer=rate.value,
            wer_low=rate.low,
            wer_high=rate.high,
            wer_change=change.value,
            wer_change_low=change.low,
            wer_change_high=change.high,
            wer_plain=self.word_errors(strategy, PLAIN).rate,
            ctc_wer=self.word_errors("ctc").rate,
            num_utterances=len(self.cuts),
            num_words=errors.num_words,
            audio_seconds=self.audio_seconds,
            decoder_calls=calls,
            tokens=num_tokens,
            tokens_per_call=num_tokens / calls if calls else None,
            call_reduction=baseline_tally.calls.total() / calls if calls else None,
            identical_to_autoregressive=sum(tally.tokens(key) == baseline_tally.tokens(key) for key in self.cuts)
            / len(self.cuts),
            num_truncated=dict(tally.truncated),
            encoder_seconds=self.encoder_seconds,
            decoder_seconds=tally.seconds,
            seconds=seconds,
            rtfx=self.audio_seconds / seconds if seconds else None,
            accept_lengths=dict(sorted(accept_length_histogram(tally.traces).items())),
            problems=self.problems,
            utterances=self.utterances(strategy),
        )


def evaluate(
    transcriber: Transcriber,
    cuts: Iterable[Cut],
    strategies: Sequence[Strategy],
    *,
    batch_size: int = 8,
    test_set: str = "",
    problems: Sequence[str] = (),
    progress: Callable[[float], None] | None = None,
) -> list[Report]:
    """Evaluate strategies on cuts, whose supervisions hold the references: a report for each of `strategies`.

    Args:
        cuts: cuts with text; one whose audio cannot be read is left out and reported as a problem.
        strategies: decoding options, or ``"ctc"``. Greedy CTC and autoregressive decoding with the same limits run as
            well, for comparison.
        batch_size: rows encoded and decoded together.
        test_set: a name for the reports.
        problems: messages of what was left out before, for the reports.
        progress: called with the seconds of audio done since it was last called.

    Raises:
        ValueError: there is nothing to score, or the options do not fit the model.
    """
    if not strategies:
        raise ValueError("no strategy to evaluate: give at least one")
    for strategy in strategies:
        if isinstance(strategy, DecodingOptions):
            transcriber.check(strategy)
        elif strategy != "ctc":
            raise ValueError(f"unknown strategy {strategy!r}: give decoding options, or 'ctc'")
    needed: list[Strategy] = ["ctc", *map(_autoregressive, strategies), *strategies]
    tallies = {strategy: _Tally() for strategy in needed}
    run = _Run(transcriber, dict(enumerate(cuts)), tallies, batch_size, test_set, list(problems))
    for window in windows(run.samples()):
        left = sum(len(samples) for _, samples in window) / SAMPLE_RATE
        for chunks in by_length(transcriber.cut(window), batch_size):
            run.add(chunks)
            if progress:
                done = sum(chunk.seconds for chunk in chunks)
                progress(done)
                left -= done
        if progress:
            progress(left)  # silence
    if not run.cuts:
        shown = "; ".join(run.problems[:3]) or "no cuts were given"
        raise ValueError(f"no utterance has audio that can be read: {shown}")
    return [run.report(strategy) for strategy in strategies]


def _autoregressive(strategy: Strategy) -> DecodingOptions:
    """Autoregressive decoding with the limits of `strategy`."""
    if not isinstance(strategy, DecodingOptions):
        return DecodingOptions(strategy="autoregressive")
    return DecodingOptions(strategy="autoregressive", max_tokens=strategy.max_tokens, max_repeats=strategy.max_repeats)


def _settings(strategy: Strategy, num_heads: int) -> dict[str, Any]:
    """What a report says of the strategy, for a model of `num_heads` heads."""
    if not isinstance(strategy, DecodingOptions):
        unset = dict.fromkeys(("threshold", "ratio", "top", "beam_size", "drafts", "draft_length"))
        return {"strategy": strategy, "num_heads": 0} | unset
    return {
        "strategy": strategy.strategy,
        "threshold": strategy.threshold,
        "ratio": strategy.ratio,
        "top": strategy.top_used,
        "beam_size": strategy.beam_size_used,
        "drafts": strategy.drafts_used,
        "draft_length": strategy.draft_length_used,
        "num_heads": strategy.num_heads_used(num_heads),
    }


def write_reports(reports: Sequence[Report], path: Path) -> None:
    """Write figures as JSON: an object for one report, a list for several."""
    figures = [report.figures() for report in reports]
    _write(path, json.dumps(figures[0] if len(figures) == 1 else figures, indent=2) + "\n")


def write_hypotheses(reports: Sequence[Report], path: Path) -> None:
    """Write a JSON line an utterance: ``id``, ``reference``, ``hypothesis``, ``tokens``, ``calls``."""
    utterances = [utterance for report in reports for utterance in report.utterances]
    _write(path, "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in utterances))


def _write(path: Path, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
