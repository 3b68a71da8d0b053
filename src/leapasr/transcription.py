"""Transcription: what is said in a recording, segment by segment, and the times of words.

Shapes: T CTC frames, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from leapasr.decoding.ctc import align_ctc
from leapasr.decoding.options import Truncation
from leapasr.decoding.trace import TokenRecord
from leapasr.model.processing import SpeechLlamaProcessor

WORD_STARTS = ("▁", "Ġ")  # what tokenizers put before a word: SentencePiece's and byte-level BPE's
LATENESS_SECONDS = 0.07  # by which the CTC head hears a token late; docs/everyday.md says how it was found
PAUSE_SECONDS = 0.4  # silence between two tokens is heard as more than this
TAIL_SECONDS = 0.1  # what a token before a pause lasts, once it has been heard


@dataclass(frozen=True)
class Word:
    """A word with its punctuation, and where it is said, by the CTC head: seconds from the recording's start."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording and what is said there.

    Attributes:
        start, end: seconds from the recording's start.
        text: as the model writes it.
        tokens: its ids, without end-of-text.
        decoder_calls: decoder calls that it took, the prefill included.
        truncated: None if the decoder ended the text, else ``length`` or ``repetition``.
        trace: a record of each token that was emitted, end-of-text included; see `leapasr.decoding.trace`.
        alternatives: of a beam search, its texts with their scores (natural logs), `text` first; else none.
        words, token_times: words with times, and where each of `tokens` begins and ends; empty unless they were asked
            for, or where the text is too long for the audio to hold it.
    """

    start: float
    end: float
    text: str
    tokens: list[int]
    decoder_calls: int
    truncated: Truncation | None
    trace: list[TokenRecord] = field(repr=False)
    alternatives: list[tuple[str, float]] = field(default_factory=list, repr=False)
    words: list[Word] = field(default_factory=list, repr=False)
    token_times: list[tuple[float, float]] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Transcription:
    """The text of a recording.

    Attributes:
        segments: in order; silence has none.
        audio_seconds: the recording's length, or that of the clips that were chosen from it.
        encoder_seconds, decoder_seconds: computing time, of features and encoder (a batch's is split over its
            rows by their lengths) and of decoding (a call's is split evenly over the rows that are being decoded).
        language: that of the text, a code as in ``en``; None where the model does not say which one it writes.
    """

    segments: list[Segment]
    audio_seconds: float
    encoder_seconds: float
    decoder_seconds: float
    language: str | None = None

    @property
    def text(self) -> str:
        return " ".join(segment.text for segment in self.segments if segment.text)

    @property
    def words(self) -> list[Word]:
        """The words of all segments, with their times; empty unless they were asked for."""
        return [word for segment in self.segments for word in segment.words]

    @property
    def tokens(self) -> list[int]:
        """Token ids of all segments, without end-of-text."""
        return [token for segment in self.segments for token in segment.tokens]

    @property
    def decoder_calls(self) -> int:
        return sum(segment.decoder_calls for segment in self.segments)

    @property
    def num_tokens(self) -> int:
        """Emitted tokens, each segment's end-of-text included: the calls of autoregressive decoding."""
        return sum(len(segment.trace) for segment in self.segments)

    @property
    def truncated(self) -> list[Truncation]:
        """Why segments were cut short; empty if none was."""
        return [segment.truncated for segment in self.segments if segment.truncated]

    @property
    def trace(self) -> list[list[TokenRecord]]:
        """The trace of each segment."""
        return [segment.trace for segment in self.segments]


def word_spans(pieces: Sequence[str]) -> list[tuple[int, int]]:
    """(first, behind the last) piece of each word; a piece that begins with one of `WORD_STARTS` begins a word."""
    starts = [index for index, piece in enumerate(pieces) if not index or piece.startswith(WORD_STARTS)]
    return list(pairwise([*starts, len(pieces)]))


def token_times(
    tokens: Sequence[int], ctc_log_probs_TV: Tensor, *, frame_rate: float, blank: int, start: float, end: float
) -> list[tuple[float, float]]:
    """Where each of `tokens` is said: seconds from the recording's start.

    A token begins a little before the CTC head hears it, and lasts until the next begins, or else there is a pause.

    Args:
        tokens: ids of a text, without end-of-text.
        ctc_log_probs_TV: CTC log-probabilities (T, V) of the audio, `frame_rate` frames a second.
        blank: id of the CTC blank.
        start, end: where the audio lies in its recording, in seconds.

    Returns:
        (start, end) of each token, rising; none where the frames are too few for the tokens.
    """
    spans = align_ctc(ctc_log_probs_TV, tokens, blank=blank)
    if not spans:
        return []
    heard = [(first / frame_rate, stop / frame_rate) for first, stop in spans]
    starts = [start + first - min(LATENESS_SECONDS, first / 2) for first, _ in heard]
    times = []
    for (_, stop), begin, following in zip(heard, starts, [*starts[1:], math.inf], strict=True):
        until = following if following - start - stop <= PAUSE_SECONDS else start + stop + TAIL_SECONDS
        times.append((min(begin, end), min(until, end)))
    return times


def timed_words(
    tokens: Sequence[int], times: Sequence[tuple[float, float]], processor: SpeechLlamaProcessor
) -> list[Word]:
    """The words of `tokens`, each from where its first token begins to where its last ends; none without `times`."""
    if not times:
        return []
    words = []
    for first, stop in word_spans(processor.tokenizer.convert_ids_to_tokens(list(tokens))):
        text = processor.decode_text(tokens[first:stop])
        if text:
            words.append(Word(text, times[first][0], times[stop - 1][1]))
    return words
