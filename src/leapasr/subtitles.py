"""Transcriptions as files: plain text, JSON, SubRip (srt) and WebVTT (vtt) subtitles, tab-separated lines (tsv)."""

from __future__ import annotations

import html
import json
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any, Literal, get_args

from leapasr.decoding.trace import TokenRecord
from leapasr.text import ends_sentence
from leapasr.transcription import Segment, Transcription, Word

Format = Literal["txt", "vtt", "srt", "tsv", "json"]

MAX_CUE_SECONDS = 7.0
PAUSE_SECONDS = 1.0  # a silence that ends a cue
HOLD_SECONDS = 0.5  # how long a cue stays behind its last word, where the next leaves room


@dataclass(frozen=True)
class Layout:
    """How subtitles are set: at most `max_line_count` lines a cue, of at most `max_line_width` characters each.

    A word that is longer has a line to itself.

    Raises:
        ValueError: one of them is less than 1.
    """

    max_line_width: int = 42  # as broadcasters have it
    max_line_count: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def lines(self, text: str) -> list[str]:
        """`text` broken into lines, as many as it takes."""
        return textwrap.wrap(text, self.max_line_width, break_long_words=False, break_on_hyphens=False)


DEFAULT_LAYOUT = Layout()


@dataclass(frozen=True)
class Cue:
    """Text, in lines, to be shown from `start` to `end`, seconds from the recording's start."""

    start: float
    end: float
    text: str


def cues(transcription: Transcription, layout: Layout = DEFAULT_LAYOUT) -> list[Cue]:
    """The subtitles of a recording: sentences or parts of them where words have times, else whole segments.

    A whole segment has as many lines as its text takes.
    """
    found = _spoken(transcription, layout)
    end = max([transcription.audio_seconds, *(segment.end for segment in transcription.segments)])
    return [
        Cue(cue.start, max(cue.end, min(cue.end + HOLD_SECONDS, following.start)), cue.text)
        for cue, following in pairwise([*found, Cue(end, end, "")])
    ]


def _spoken(transcription: Transcription, layout: Layout) -> list[Cue]:
    """Cues that last as long as their words."""
    return [cue for segment in transcription.segments for cue in _segment_cues(segment, layout)]


def _segment_cues(segment: Segment, layout: Layout) -> Iterator[Cue]:
    if segment.words:
        for words in _cue_words(segment.words, layout):
            yield Cue(words[0].start, words[-1].end, "\n".join(layout.lines(_joined(words))))
    elif segment.text:
        yield Cue(segment.start, segment.end, "\n".join(layout.lines(segment.text)))


def _cue_words(words: Iterable[Word], layout: Layout) -> Iterator[list[Word]]:
    """Cut behind sentences and pauses, and before a cue gets too long."""
    cue: list[Word] = []
    for word in words:
        if cue and (
            ends_sentence(cue[-1].text)
            or word.start - cue[-1].end >= PAUSE_SECONDS
            or word.end - cue[0].start > MAX_CUE_SECONDS
            or len(layout.lines(_joined([*cue, word]))) > layout.max_line_count
        ):
            yield cue
            cue = []
        cue.append(word)
    if cue:
        yield cue


def _joined(words: Iterable[Word]) -> str:
    return " ".join(word.text for word in words)


def render(transcription: Transcription, format: Format, *, audio: str, layout: Layout = DEFAULT_LAYOUT) -> str:
    """A transcription in a format, line end included.

    Args:
        audio: names the recording where the format has a place for it.
        layout: of cues.

    Raises:
        ValueError: no such format.
    """
    match format:
        case "txt":
            return f"{transcription.text}\n"
        case "vtt":
            return as_vtt(transcription, layout)
        case "srt":
            return as_srt(transcription, layout)
        case "tsv":
            return as_tsv(transcription, layout)
        case "json":
            return as_json(transcription, audio=audio)
    raise ValueError(f"unknown format {format!r}: choose one of {', '.join(get_args(Format))}")


def as_json(transcription: Transcription, *, audio: str) -> str:
    """Text, segments, words, and how they came about, on one line; times in seconds."""
    segments = [
        {
            "start": round(segment.start, 3),
            "end": round(segment.end, 3),
            "text": segment.text,
            "tokens": segment.tokens,
            "decoder_calls": segment.decoder_calls,
            "truncated": segment.truncated,
            "words": [
                {"text": word.text, "start": round(word.start, 3), "end": round(word.end, 3)} for word in segment.words
            ],
            "nbest": [{"text": text, "score": score} for text, score in segment.alternatives],
            "trace": [_traced(record, times) for record, times in zip_longest(segment.trace, segment.token_times)],
        }
        for segment in transcription.segments
    ]
    fields = {
        "audio": audio,
        "text": transcription.text,
        "language": transcription.language,
        "audio_seconds": transcription.audio_seconds,
        "decoder_calls": transcription.decoder_calls,
        "num_tokens": transcription.num_tokens,
        "segments": segments,
    }
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _traced(record: TokenRecord, times: tuple[float, float] | None) -> dict[str, Any]:
    """A token of the trace, with the times that it has if it is part of the text."""
    rejected = record.rejected and record.rejected._asdict()
    heard = {"start": round(times[0], 3), "end": round(times[1], 3)} if times else {"start": None, "end": None}
    return record._asdict() | {"rejected": rejected} | heard


def as_srt(transcription: Transcription, layout: Layout = DEFAULT_LAYOUT) -> str:
    """SubRip: numbered cues with times as ``00:00:01,500``."""
    blocks = [
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{cue.text}\n"
        for number, cue in enumerate(cues(transcription, layout), start=1)
    ]
    return "\n".join(blocks)


def as_vtt(transcription: Transcription, layout: Layout = DEFAULT_LAYOUT) -> str:
    """WebVTT: cues with times as ``00:00:01.500``; ``& < >`` of the text are escaped."""
    blocks = [
        f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{html.escape(cue.text, quote=False)}\n"
        for cue in cues(transcription, layout)
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def as_tsv(transcription: Transcription, layout: Layout = DEFAULT_LAYOUT) -> str:
    """A line a cue: start and end of its words in whole milliseconds, and the words, tabs in between."""
    rows = [
        f"{round(cue.start * 1000)}\t{round(cue.end * 1000)}\t{' '.join(cue.text.split())}\n"
        for cue in _spoken(transcription, layout)
    ]
    return "".join(["start\tend\ttext\n", *rows])


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
