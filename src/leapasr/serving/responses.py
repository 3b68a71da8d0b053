"""Transcriptions as OpenAI's API gives them: bodies, and events of a stream."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse, PlainTextResponse
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from leapasr.decoding.trace import TokenRecord, accept_length_histogram
from leapasr.explaining import rejected_text, token_texts
from leapasr.model.processing import SpeechLlamaProcessor
from leapasr.serving.form import TranscriptionForm
from leapasr.subtitles import render
from leapasr.transcription import Segment, Transcription

MEDIA_TYPES = {"srt": "application/x-subrip", "vtt": "text/vtt"}


def respond(transcription: Transcription, form: TranscriptionForm, processor: SpeechLlamaProcessor) -> Response:
    """The response in the format that `form` asks for."""
    match form.response_format:
        case "text":
            return PlainTextResponse(render(transcription, "txt", audio=""))
        case "srt" | "vtt" as format:
            return PlainTextResponse(render(transcription, format, audio=""), media_type=MEDIA_TYPES[format])
    return JSONResponse(body(transcription, form, processor))


def body(transcription: Transcription, form: TranscriptionForm, processor: SpeechLlamaProcessor) -> dict[str, Any]:
    """The JSON body, plain or verbose."""
    plain = {
        "text": transcription.text,
        "usage": {"type": "duration", "seconds": math.ceil(transcription.audio_seconds)},
    }
    if form.response_format != "verbose_json":
        return plain
    code = transcription.language
    verbose: dict[str, Any] = {
        "task": "transcribe",
        "language": LANGUAGES.get(code, code) if code else None,
        "duration": transcription.audio_seconds,
        **plain,
    }
    if "segment" in form.granularities:
        verbose["segments"] = [_segment(number, segment) for number, segment in enumerate(transcription.segments)]
    if "word" in form.granularities:
        verbose["words"] = [
            {"word": word.text, "start": round(word.start, 3), "end": round(word.end, 3)}
            for segment in transcription.segments
            for word in segment.words
        ]
    if form.include:
        verbose["leapasr"] = traced(transcription, processor)
    return verbose


def _segment(number: int, segment: Segment) -> dict[str, Any]:
    log_probabilities = [record.log_probability for record in segment.trace if record.log_probability is not None]
    text = segment.text.encode()
    return {
        "id": number,
        "seek": round(segment.start * 100),
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "tokens": segment.tokens,
        "temperature": 0.0,
        "avg_logprob": sum(log_probabilities) / max(1, len(log_probabilities)),
        "compression_ratio": len(text) / len(zlib.compress(text)),
        "no_speech_prob": None,  # where there is none is left out, and of the rest the model has no opinion
        "truncated": segment.truncated,
    }


def traced(transcription: Transcription, processor: SpeechLlamaProcessor) -> dict[str, Any]:
    """How the text came about: tokens with source, decoder call and times; what calls emitted; subtitles."""
    lengths = accept_length_histogram(transcription.trace)
    return {
        "decoder_calls": transcription.decoder_calls,
        "num_tokens": transcription.num_tokens,
        "accept_lengths": {str(length): count for length, count in sorted(lengths.items())},
        "segments": [
            {
                "start": round(segment.start, 3),
                "end": round(segment.end, 3),
                "tokens": [
                    _token(record, text, times, processor)
                    for record, text, times in zip_longest(
                        segment.trace, token_texts(segment, processor), segment.token_times
                    )
                ],
            }
            for segment in transcription.segments
        ],
        "srt": render(transcription, "srt", audio=""),
        "vtt": render(transcription, "vtt", audio=""),
    }


def _token(
    record: TokenRecord, text: str | None, times: tuple[float, float] | None, processor: SpeechLlamaProcessor
) -> dict[str, Any]:
    """A token; one that is not part of the text (end-of-text, or what a repetition stop took away) has no text."""
    start, end = (round(times[0], 3), round(times[1], 3)) if times else (None, None)
    return {
        "text": text or "",
        "step": record.step,
        "source": record.source,
        "probability": None if record.log_probability is None else round(math.exp(record.log_probability), 4),
        "rejected": rejected_text(record, processor) or None,
        "start": start,
        "end": end,
    }


def event(data: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
