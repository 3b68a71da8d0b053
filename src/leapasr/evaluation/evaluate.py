"""Transcribe test sets with several strategies, score them, and set them against autoregressive decoding.

Each batch is encoded once and decoded with every strategy. What the figures mean:

- a *decoder call* is one forward pass of the decoder for one row, the prefill included;
- *tokens* are what decoding emitted, end-of-text included;
- *seconds* are those of features, encoder and this strategy's decoding; reading audio files, loading the model and
  the other strategies do not count.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from lhotse.audio.utils import AudioLoadingError, DurationMismatchError
from lhotse.cut import Cut

from leapasr.audio import SAMPLE_RATE, resample
from leapasr.chunks import by_length, windows
from leapasr.decoding import DecodingOptions
from leapasr.decoding.trace import TokenRecord, accept_length_histogram
from leapasr.evaluation.scoring import WordErrors, count_errors, word_error_rate
from leapasr.text import Normalizer
from leapasr.transcriber import Transcriber

NORMALIZER, PLAIN = Normalizer("whisper_english"), Normalizer("plain")
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
        strategy, threshold, num_heads: of the options; `num_heads` is what was used, head 1 included.
        batch_size, dtype, device: how it was computed.
        normalizer: what both sides go through before `wer` and `ctc_wer` are counted.
        wer, wer_low, wer_high: word error rate with its 95% interval, by bootstrap over utterances.
        wer_plain: word error rate after the plain normaliser.
        ctc_wer: that of the encoder's greedy CTC output alone.
        num_utterances, num_words, audio_seconds: size of the test set, words as normalised.
        decoder_calls: summed over rows, prefills included.
        tokens: emitted tokens, end-of-text included.
        tokens_per_call: None without a single call (silence alone).
        call_reduction: autoregressive calls ÷ this strategy's calls on the same audio; None without a single call.
        identical_to_autoregressive: share of utterances with the same tokens.
        num_truncated: chunks that a guard ended, by the guard (``length``, ``repetition``).
        encoder_seconds, decoder_seconds, seconds: features and encoder, this strategy's decoding, and both.
        rtfx: audio seconds ÷ `seconds`.
        accept_lengths: how many steps emitted 1, 2, 3, ... tokens.
        problems: manifest lines and audio that were left out, a message each.
        utterances: what was written, in the order of the manifest.
    """

    strategy: str
    threshold: float | None
    num_heads: int
    batch_size: int
    dtype: str
    device: str
    normalizer: str
    wer: float
    wer_low: float
    wer_high: float
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

    def figures(self) -> dict[str, Any]:
        """All but the utterances, as JSON has it."""
        return {name: value for name, value in asdict(self).items() if name != "utterances"}


@dataclass
class _Tally:
    """What one strategy has given so far; a piece is a chunk of an utterance."""

    pieces: dict[int, list[tuple[float, list[int], str]]] = field(default_factory=dict)
    calls: Counter[int] = field(default_factory=Counter)
    traces: list[Sequence[TokenRecord]] = field(default_factory=list)
    truncated: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, key: int, start: float, tokens: list[int], text: str) -> None:
        self.pieces.setdefault(key, []).append((start, tokens, text))

    def tokens(self, key: int) -> list[int]:
        return [token for _, tokens, _ in sorted(self.pieces.get(key, [])) for token in tokens]

    def text(self, key: int) -> str:
        return " ".join(text for _, _, text in sorted(self.pieces.get(key, [])) if text)


@dataclass
class _Run:
    """The whole set, with every strategy."""

    cuts: dict[int, Cut]
    tallies: dict[DecodingOptions, _Tally]
    ctc: _Tally = field(default_factory=_Tally)
    encoder_seconds: float = 0.0
    audio_seconds: float = 0.0


def evaluate(
    transcriber: Transcriber,
    cuts: Iterable[Cut],
    options: Sequence[DecodingOptions],
    *,
    batch_size: int = 8,
    problems: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> list[Report]:
    """Evaluate strategies on cuts, whose supervisions hold the references: a report for each of `options`.

    Args:
        cuts: 16 kHz cuts with text; one whose audio cannot be read is left out and reported as a problem.
        options: strategies. Autoregressive decoding with the same limits runs as well, for comparison.
        batch_size: rows encoded and decoded together.
        problems: messages of what was left out before, for the reports.
        progress: called with the number of utterances done since it was last called.

    Raises:
        ValueError: there is nothing to score, or the options do not fit the model.
    """
    if not options:
        raise ValueError("no decoding options to evaluate: give at least one")
    for chosen in options:
        chosen.check(transcriber.decoder.num_heads)
    cuts = list(cuts)
    problems = list(problems)
    run = _Run(dict(enumerate(cuts)), {each: _Tally() for each in [*map(_autoregressive, options), *options]})
    for window in windows(_audio(run, problems)):
        for chunks in by_length(transcriber.cut(window), batch_size):
            _add_batch(run, transcriber, chunks)
        if progress:
            progress(len(window))
    if not run.cuts:
        raise ValueError(f"no utterance has audio that can be read: {'; '.join(problems[:3]) or 'no cuts were given'}")
    references = [_reference(cut) for cut in run.cuts.values()]
    ctc_errors = count_errors(references, [run.ctc.text(key) for key in run.cuts], NORMALIZER)
    return [
        _report(run, transcriber, chosen, references, ctc_errors, batch_size=batch_size, problems=problems)
        for chosen in options
    ]


def _autoregressive(options: DecodingOptions) -> DecodingOptions:
    """Autoregressive decoding with the limits of `options`."""
    return DecodingOptions(
        strategy="autoregressive", max_tokens=options.max_tokens, max_repeats=options.max_repeats
    )  # fmt: skip


def _reference(cut: Cut) -> str:
    return " ".join(supervision.text for supervision in cut.supervisions)


def _audio(run: _Run, problems: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    """Samples of every cut, by its key; a cut that cannot be read is taken out of the run."""
    for key, cut in list(run.cuts.items()):
        try:
            samples = resample(cut.load_audio().mean(0), cut.sampling_rate)
        except _UNREADABLE as error:
            lines = str(error).splitlines() or [type(error).__name__]
            problems.append(f"{cut.id}: its audio cannot be read ({lines[0].strip()})")
            del run.cuts[key]
            continue
        run.audio_seconds += len(samples) / SAMPLE_RATE
        yield key, samples


def _add_batch(run: _Run, transcriber: Transcriber, chunks: Sequence) -> None:
    encoded = transcriber.encode(chunks)
    run.encoder_seconds += encoded.seconds
    text = transcriber.processor.decode_text
    for chunk, tokens in zip(chunks, transcriber.ctc_tokens(encoded), strict=True):
        run.ctc.add(chunk.recording, chunk.start, tokens, text(tokens))
    for options, tally in run.tallies.items():
        decoded = transcriber.decode(encoded, options)
        tally.seconds += decoded.seconds
        for chunk, result in zip(chunks, decoded.results, strict=True):
            tally.add(chunk.recording, chunk.start, result.tokens, text(result.tokens))
            tally.calls[chunk.recording] += result.num_calls
            tally.traces.append(result.trace)
            if result.truncated:
                tally.truncated[result.truncated] += 1


def _report(
    run: _Run,
    transcriber: Transcriber,
    options: DecodingOptions,
    references: list[str],
    ctc_errors: WordErrors,
    *,
    batch_size: int,
    problems: list[str],
) -> Report:
    tally, baseline = run.tallies[options], run.tallies[_autoregressive(options)]
    utterances = [
        Utterance(cut.id, reference, tally.text(key), tally.tokens(key), tally.calls[key])
        for (key, cut), reference in zip(run.cuts.items(), references, strict=True)
    ]
    hypotheses = [utterance.hypothesis for utterance in utterances]
    errors = count_errors(references, hypotheses, NORMALIZER)
    rate = word_error_rate(errors)
    calls, num_tokens = tally.calls.total(), sum(map(len, tally.traces))
    seconds = run.encoder_seconds + tally.seconds
    num_identical = sum(tally.tokens(key) == baseline.tokens(key) for key in run.cuts)
    num_heads = 1 if options.strategy == "autoregressive" else options.num_heads or transcriber.decoder.num_heads
    return Report(
        strategy=options.strategy,
        threshold=options.threshold,
        num_heads=num_heads,
        batch_size=batch_size,
        dtype=str(transcriber.model.dtype).removeprefix("torch."),
        device=str(transcriber.model.device),
        normalizer=NORMALIZER.name,
        wer=rate.value,
        wer_low=rate.low,
        wer_high=rate.high,
        wer_plain=count_errors(references, hypotheses, PLAIN).rate,
        ctc_wer=ctc_errors.rate,
        num_utterances=len(utterances),
        num_words=errors.num_words,
        audio_seconds=run.audio_seconds,
        decoder_calls=calls,
        tokens=num_tokens,
        tokens_per_call=num_tokens / calls if calls else None,
        call_reduction=baseline.calls.total() / calls if calls else None,
        identical_to_autoregressive=num_identical / len(utterances),
        num_truncated=dict(tally.truncated),
        encoder_seconds=run.encoder_seconds,
        decoder_seconds=tally.seconds,
        seconds=seconds,
        rtfx=run.audio_seconds / seconds if seconds else None,
        accept_lengths=dict(sorted(accept_length_histogram(tally.traces).items())),
        problems=problems,
        utterances=utterances,
    )


def write_reports(reports: Sequence[Report], path: Path) -> None:
    """Write figures as JSON: an object for one report, a list for several."""
    figures = [report.figures() for report in reports]
    _write(path, json.dumps(figures[0] if len(figures) == 1 else figures, indent=2) + "\n")


def write_hypotheses(report: Report, path: Path) -> None:
    """Write a JSON line an utterance: ``id``, ``reference``, ``hypothesis``, ``tokens``, ``calls``."""
    _write(path, "".join(json.dumps(asdict(utterance)) + "\n" for utterance in report.utterances))


def _write(path: Path, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
