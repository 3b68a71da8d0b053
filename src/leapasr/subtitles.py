"""Transcriptions as files: plain text, JSON, SubRip (srt) and WebVTT (vtt) subtitles."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any, Literal, get_args

from leapasr.decoding.trace import TokenRecord
from leapasr.transcription import Segment, Transcription, Word

Format = Literal["txt", "json", "srt", "vtt"]

MAX_CUE_CHARACTERS = 84  # two lines of 42, as broadcasters have it
MAX_CUE_SECONDS = 7.0
PAUSE_SECONDS = 1.0  # a silence that ends a cue
HOLD_SECONDS = 0.5  # how long a cue stays behind its last word, where the next leaves room


@dataclass(frozen=True)
class Cue:
    """Text to be shown from `start` to `end`, seconds from the recording's start."""

    start: float
    end: float
    text: str


def cues(transcription: Transcription) -> list[Cue]:
    """The subtitles of a recording: sentences or parts of them where words have times, else whole segments."""
    found = [cue for segment in transcription.segments for cue in _segment_cues(segment)]
    last = Cue(transcription.audio_seconds, transcription.audio_seconds, "")
    return [
        Cue(cue.start, max(cue.end, min(cue.end + HOLD_SECONDS, following.start)), cue.text)
        for cue, following in pairwise([*found, last])
    ]


def _segment_cues(segment: Segment) -> Iterator[Cue]:
    if segment.words:
        for words in _cue_words(segment.words):
            yield Cue(words[0].start, words[-1].end, _joined(words))
    elif segment.text:
        yield Cue(segment.start, segment.end, segment.text)


def _cue_words(words: Iterable[Word]) -> Iterator[list[Word]]:
    """Cut behind sentences and pauses, and before a cue gets too long."""
    cue: list[Word] = []
    for word in words:
        if cue and (
            cue[-1].text.endswith((".", "?", "!"))
            or word.start - cue[-1].end >= PAUSE_SECONDS
            or word.end - cue[0].start > MAX_CUE_SECONDS
            or len(_joined([*cue, word])) > MAX_CUE_CHARACTERS
        ):
            yield cue
            cue = []
        cue.append(word)
    if cue:
        yield cue


def _joined(words: Iterable[Word]) -> str:
    return " ".join(word.text for word in words)


def render(transcription: Transcription, format: Format, *, audio: str) -> str:
    """A transcription in a format, line end included; `audio` names the recording where the format has a place for it.

    Raises:
        ValueError: no such format.
    """
    match format:
        case "txt":
            return f"{transcription.text}\n"
        case "json":
            return as_json(transcription, audio=audio)
        case "srt":
            return as_srt(transcription)
        case "vtt":
            return as_vtt(transcription)
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


def as_srt(transcription: Transcription) -> str:
    """SubRip: numbered cues with times as ``00:00:01,500``."""
    blocks = [
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{cue.text}\n"
        for number, cue in enumerate(cues(transcription), start=1)
    ]
    return "\n".join(blocks)


def as_vtt(transcription: Transcription) -> str:
    """WebVTT: cues with times as ``00:00:01.500``."""
    blocks = [f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{cue.text}\n" for cue in cues(transcription)]
    return "\n".join(["WEBVTT\n", *blocks])


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
