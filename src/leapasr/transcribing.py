"""Transcribing files: which they are, where their transcripts go, and what is said in the end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from leapasr.audio import AudioError
from leapasr.decoding import DecodingOptions
from leapasr.subtitles import Format, render
from leapasr.transcriber import Transcriber
from leapasr.transcription import Transcription

AUDIO_SUFFIXES = frozenset(
    {".aac", ".ac3", ".aif", ".aiff", ".amr", ".au", ".caf", ".flac", ".m4a", ".m4b", ".mka", ".mkv", ".mov", ".mp2"}
    | {".mp3", ".mp4", ".mpga", ".oga", ".ogg", ".opus", ".spx", ".wav", ".weba", ".webm", ".wma", ".wv"}
)


@dataclass
class Summary:
    """What transcribing files took; `seconds` is wall-clock, reading and writing included, loading the model not."""

    num_files: int = 0
    num_bad: int = 0
    num_silent: int = 0
    num_truncated: int = 0
    audio_seconds: float = 0.0
    seconds: float = 0.0
    decoder_calls: int = 0
    num_tokens: int = 0

    def add(self, transcription: Transcription) -> None:
        self.num_files += 1
        self.num_silent += not transcription.segments
        self.num_truncated += len(transcription.truncated)
        self.audio_seconds += transcription.audio_seconds
        self.decoder_calls += transcription.decoder_calls
        self.num_tokens += transcription.num_tokens

    def __str__(self) -> str:
        files = f"{self.num_files} file{'s' * (self.num_files != 1)}"
        parts = [f"{files}, {self.audio_seconds:.1f} s of audio in {self.seconds:.2f} s"]
        if self.seconds:
            parts[0] += f" (RTFx {self.audio_seconds / self.seconds:.1f})"
        if self.decoder_calls:
            fewer = self.num_tokens / self.decoder_calls
            parts.append(
                f"{self.decoder_calls} decoder calls, autoregressive {self.num_tokens} ({fewer:.2f} times fewer)"
            )
        if self.num_silent:
            parts.append(f"{self.num_silent} silent")
        if self.num_truncated:
            parts.append(f"{self.num_truncated} texts cut short")
        if self.num_bad:
            parts.append(f"{self.num_bad} not transcribed")
        return "; ".join(parts)


def audio_files(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths`, and the audio files (by suffix) in the folders among them, sorted, subfolders included.

    What is there twice is kept once; a path that does not exist is kept, for its own message.

    Raises:
        ValueError: a folder holds no audio file.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            found[path] = None
            continue
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file())
        if not inside:
            raise ValueError(f"{path} holds no audio file ({', '.join(sorted(AUDIO_SUFFIXES))})")
        found |= dict.fromkeys(inside)
    return list(found)


def output_paths(files: Sequence[Path], folder: Path, suffix: str) -> list[Path]:
    """A different file in `folder` for each of `files`: named alike, in the subfolders that they do not share.

    Where two would be one (``a.wav`` and ``a.mp3``), each keeps its suffix in its name (``a.wav.txt``).
    """
    parents = [str(file.absolute().parent) for file in files]
    root = Path(os.path.commonpath(parents)) if parents else Path()
    relative = [file.absolute().relative_to(root) for file in files]
    short = [path.with_suffix(f".{suffix}") for path in relative]
    return [
        folder / (path if short.count(path) == 1 else long.with_name(f"{long.name}.{suffix}"))
        for path, long in zip(short, relative, strict=True)
    ]


def check_output(
    files: Sequence[Path],
    *,
    format: Format,
    output_folder: Path | None,
    nbest: int | None = None,
    explained: bool = False,
) -> None:
    """Raises ValueError where transcripts of `files`, `nbest` of a stretch, or explanations have no place to go."""
    if explained and format != "txt":
        raise ValueError(f"explanations are for people to read, not for format {format!r}, whose trace says the same")
    if (nbest or 1) > 1 and format != "json":
        raise ValueError(f"{nbest} texts of the same audio do not fit format {format!r}: choose 'json'")
    if output_folder is None and len(files) > 1 and format in ("srt", "vtt"):
        raise ValueError(f"{len(files)} files do not fit one stream of {format} subtitles: give an output folder")
    if output_folder is not None and output_folder.exists() and not output_folder.is_dir():
        raise ValueError(f"{output_folder} is a file: transcripts need a folder")


def transcribe_files(
    transcriber: Transcriber,
    files: Sequence[Path],
    options: DecodingOptions,
    *,
    format: Format,
    output_folder: Path | None,
    batch_size: int,
    explanation: Callable[[Transcription], str] | None = None,
    write: Callable[[str], None],
    complain: Callable[[str], None],
    progress: Callable[[float], None] | None = None,
) -> Summary:
    """Transcribe `files`; one that cannot be read is complained about, and the rest goes on.

    Args:
        format: of the transcripts; subtitles of several files need a folder.
        output_folder: a transcript a file goes there; None hands them all to `write`.
        explanation: makes of a transcription what is written instead of its text.
        write: takes a transcript as text, with its line end; that of one of several files begins with the file's name.
        complain: takes a message about a file.
        progress: called with the seconds of audio transcribed since it was last called.

    Raises:
        ValueError: the options do not fit the model or each other.
        OSError: the output folder cannot be written.
    """
    check_output(
        files, format=format, output_folder=output_folder, nbest=options.nbest, explained=explanation is not None
    )
    outputs = None if output_folder is None else output_paths(files, output_folder, format)
    summary, start = Summary(), time.perf_counter()
    results = transcriber.transcribe_each(
        files, options, batch_size=batch_size, word_times=format != "txt", progress=progress
    )
    for index, result in results:
        if isinstance(result, AudioError):
            summary.num_bad += 1
            complain(str(result))
            continue
        summary.add(result)
        text = explanation(result) if explanation else render(result, format, audio=str(files[index]))
        if outputs is None:
            write(f"{files[index]}: {text}" if format == "txt" and len(files) > 1 else text)
        else:
            outputs[index].parent.mkdir(parents=True, exist_ok=True)
            outputs[index].write_text(text, encoding="utf-8")
    summary.seconds = time.perf_counter() - start
    return summary
