"""Transcribing files: which they are, what is made of each and where it goes, and what is said in the end."""

from __future__ import annotations

import glob
import math
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, get_args

from leapasr.audio import AudioError, declared_seconds
from leapasr.chunks import WHOLE, Clip, check_clips
from leapasr.decoding import DecodingOptions
from leapasr.subtitles import Format, Layout, render
from leapasr.transcriber import Transcriber
from leapasr.transcription import Transcription

STDIN = Path("-")
SPOOL_BYTES = 2**24  # of standard input, beyond which it is kept on disk
SHOWN_FILES = 3
LEAST_TOLD = 0.5  # seconds of measuring that are worth a word
AUDIO_SUFFIXES = frozenset(
    {".aac", ".ac3", ".aif", ".aiff", ".amr", ".au", ".caf", ".flac", ".m4a", ".m4b", ".mka", ".mkv", ".mov", ".mp2"}
    | {".mp3", ".mp4", ".mpga", ".oga", ".ogg", ".opus", ".spx", ".wav", ".weba", ".webm", ".wma", ".wv"}
)


@dataclass
class Summary:
    """What transcribing files took.

    Attributes:
        seconds: wall-clock, reading and writing included; not loading the model, nor what follows.
        measuring_seconds: for finding out what is fastest on this machine, which is kept for the next time.
    """

    num_files: int = 0
    num_bad: int = 0
    num_skipped: int = 0
    num_silent: int = 0
    num_truncated: int = 0
    audio_seconds: float = 0.0
    seconds: float = 0.0
    measuring_seconds: float = 0.0
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
        if self.audio_seconds and self.seconds:
            parts[0] += f" (RTFx {self.audio_seconds / self.seconds:.1f})"
        if self.decoder_calls:
            fewer = self.num_tokens / self.decoder_calls
            parts.append(
                f"{self.decoder_calls} decoder calls, autoregressive {self.num_tokens} ({fewer:.2f} times fewer)"
            )
        if self.measuring_seconds >= LEAST_TOLD:
            parts.append(f"{self.measuring_seconds:.1f} s more, this once, to find out what is fastest on this machine")
        if self.num_skipped:
            parts.append(f"{self.num_skipped} skipped")
        if self.num_silent:
            parts.append(f"{self.num_silent} silent")
        if self.num_truncated:
            parts.append(f"{self.num_truncated} texts cut short")
        if self.num_bad:
            parts.append(f"{self.num_bad} not transcribed")
        return "; ".join(parts)


@dataclass(frozen=True)
class Job:
    """Files to be transcribed, and what is to be made of each.

    Attributes:
        files: those left to do; `STDIN` stands for standard input.
        done: those whose transcripts are there already.
        formats: of the transcripts.
        outputs: for each of `files` a path for each of `formats`; None: transcripts are printed.
        word_times: whether words get their times.
        layout: of subtitles.
    """

    files: list[Path]
    done: list[Path]
    formats: tuple[Format, ...]
    outputs: list[list[Path]] | None
    word_times: bool
    layout: Layout

    def audio_seconds(self) -> float | None:
        """How long the files say that they are; None if one of them does not."""
        seconds = [None if file == STDIN else declared_seconds(file) for file in self.files]
        known = [each for each in seconds if each is not None]
        return sum(known) if len(known) == len(seconds) else None


def plan(
    paths: Sequence[Path],
    *,
    format: Format | Literal["all"],
    output_folder: Path | None,
    overwrite: bool = False,
    word_times: bool | None = None,
    max_line_width: int | None = None,
    max_line_count: int | None = None,
    nbest: int | None = None,
    explained: bool = False,
) -> Job:
    """What is to be done for `paths`: files, folders, globs and `STDIN`.

    Args:
        format: of the transcripts; several formats, or times of several files, need a folder.
        output_folder: a transcript a file goes there; None prints them.
        overwrite: do again what is done: files all of whose transcripts are there, none older than its recording.
        word_times: whether words get their times; None: where the format has a place for them.
        max_line_width, max_line_count: of subtitles; None as in `Layout`.
        nbest: texts of a stretch of audio. explained: whether explanations are written instead of texts.

    Raises:
        ValueError: there are no such files, or what is asked for has no place to go.
    """
    formats: tuple[Format, ...] = get_args(Format) if format == "all" else (format,)
    given = {"max_line_width": max_line_width, "max_line_count": max_line_count}
    lines = {name: value for name, value in given.items() if value is not None}
    if explained and formats != ("txt",):
        raise ValueError(f"explanations are for people to read, not for format {format!r}, whose trace says the same")
    if (nbest or 1) > 1 and "json" not in formats:
        raise ValueError(f"{nbest} texts of the same audio do not fit format {format!r}: choose 'json'")
    if word_times and formats == ("txt",):
        raise ValueError("format 'txt' has no place for the times of words: choose 'json', or subtitles")
    if lines and not {"vtt", "srt", "tsv"} & set(formats):
        raise ValueError(f"{' and '.join(lines)} are for subtitles, not for format {format!r}")
    if lines and word_times is False:
        raise ValueError(f"{' and '.join(lines)} need the times of words: do not leave these out")
    if output_folder is not None and output_folder.exists() and not output_folder.is_dir():
        raise ValueError(f"{output_folder} is a file: transcripts need a folder")
    if output_folder is None and len(formats) > 1:
        raise ValueError(f"{len(formats)} formats do not fit one stream: give an output folder")
    files = audio_files(paths)
    if output_folder is None and len(files) > 1 and format in ("vtt", "srt", "tsv"):
        raise ValueError(f"{len(files)} files do not fit one stream of {format}: give an output folder")
    todo, done, outputs = files, [], None
    if output_folder is not None:
        relative = relative_paths(files, paths)
        named = [output_paths(relative, output_folder, suffix) for suffix in formats]
        places = {file: list(outputs) for file, *outputs in zip(files, *named, strict=True)}
        is_done = {file: not overwrite and _is_done(file, places[file]) for file in files}
        done = [file for file in files if is_done[file]]
        todo = [file for file in files if not is_done[file]]
        outputs = [places[file] for file in todo]
    word_times = formats != ("txt",) if word_times is None else word_times
    return Job(todo, done, formats, outputs, word_times, Layout(**lines))


def _is_done(file: Path, outputs: Sequence[Path]) -> bool:
    """Whether all of `outputs` are there, none older than `file`; never for standard input."""
    try:
        return file != STDIN and min(output.stat().st_mtime for output in outputs) >= file.stat().st_mtime
    except OSError:
        return False


def audio_files(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths`, those that globs match, and the audio files (by suffix) in folders and their subfolders.

    What a glob or folder stands for is sorted; what is there twice is kept once; a path that does not exist is kept,
    for its own message.

    Raises:
        ValueError: a folder holds no audio file, or a glob matches none.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(
                file for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file()
            )
            if not inside:
                raise ValueError(f"{path} holds no audio file ({', '.join(sorted(AUDIO_SUFFIXES))})")
        elif glob.has_magic(str(path)) and not path.exists():
            inside = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
            if not inside:
                raise ValueError(f"no file matches {path}")
        else:
            inside = [path]
        found |= dict.fromkeys(inside)
    return list(found)


def relative_paths(files: Sequence[Path], paths: Sequence[Path]) -> list[Path]:
    """`files`, found in `paths`, as seen from the folder that `paths` share; `STDIN` as ``stdin``.

    That folder does not depend on what folders hold and globs match: a file's place stays when others come to it.
    """
    bases = [os.path.abspath(_base(path)) for path in paths if path != STDIN]
    root = os.path.commonpath(bases) if bases else ""
    return [Path("stdin") if file == STDIN else Path(os.path.abspath(file)).relative_to(root) for file in files]


def _base(path: Path) -> Path:
    """The folder that what `path` stands for lies in."""
    if path.is_dir():
        return path
    if path.exists():
        return path.parent
    return next(parent for parent in path.parents if not glob.has_magic(str(parent)))


def output_paths(files: Sequence[Path], folder: Path, suffix: str) -> list[Path]:
    """A different file in `folder` for each of the relative paths `files`, with `suffix` in the place of its own.

    Where two would be one (``a.wav`` and ``a.mp3``), each keeps its suffix in its name (``a.wav.txt``).
    """
    short = [path.with_suffix(f".{suffix}") for path in files]
    counts = Counter(short)
    return [
        folder / (path if counts[path] == 1 else long.with_name(f"{long.name}.{suffix}"))
        for path, long in zip(short, files, strict=True)
    ]


def clips_of(text: str) -> tuple[Clip, ...]:
    """Clips from ``START,END,START,END,...`` in seconds; the last end may be left out: the recording's.

    Raises:
        ValueError: `text` is something else, or they are not one behind the other.
    """
    try:
        places = [float(place) for place in text.split(",")]
    except ValueError:
        raise ValueError(f"clips are START,END,START,END,... in seconds, got {text!r}") from None
    if len(places) % 2:
        places.append(math.inf)
    clips = tuple(zip(places[::2], places[1::2], strict=True))
    check_clips(clips)
    return clips


def transcribe_files(
    transcriber: Transcriber,
    job: Job,
    options: DecodingOptions,
    *,
    batch_size: int,
    clips: Sequence[Clip] = WHOLE,
    language: str | None = None,
    vad_filter: bool = True,
    explanation: Callable[[Transcription], str] | None = None,
    write: Callable[[str], None],
    complain: Callable[[str], None],
    progress: Callable[[float], None] | None = None,
) -> Summary:
    """Transcribe the files of `job`; one that cannot be read is complained about, and the rest goes on.

    A transcript is written when it is whole, or not at all.

    Args:
        explanation: makes of a transcription what is written instead of its text.
        write: takes a transcript as text, with its line end; that of one of several files begins with the file's name.
        complain: takes a message about a file.
        progress: called with the seconds of audio transcribed since it was last called.

    Raises:
        ValueError: the options do not fit the model or each other.
        OSError: the output folder cannot be written.
    """
    if job.done:
        names = [*map(str, job.done[:SHOWN_FILES]), *["..."][: len(job.done) - SHOWN_FILES]]
        complain(
            f"{len(job.done)} of {len(job.files) + len(job.done)} files skipped, transcribed before: {', '.join(names)}"
        )
    summary, start = Summary(num_skipped=len(job.done)), time.perf_counter()
    measured_before = transcriber.measuring_seconds
    results = transcriber.transcribe_each(
        _sources(job.files),
        options,
        batch_size=batch_size,
        word_times=job.word_times,
        clips=clips,
        language=language,
        vad_filter=vad_filter,
        progress=progress,
    )
    for index, result in results:
        file = job.files[index]
        if isinstance(result, AudioError):
            summary.num_bad += 1
            complain(f"standard input: {result}" if file == STDIN else str(result))
            continue
        summary.add(result)
        for place, format in enumerate(job.formats):
            text = explanation(result) if explanation else render(result, format, audio=str(file), layout=job.layout)
            if job.outputs is not None:
                _write_whole(job.outputs[index][place], text)
            else:
                write(f"{file}: {text}" if format == "txt" and len(job.files) > 1 else text)
    summary.measuring_seconds = transcriber.measuring_seconds - measured_before
    summary.seconds = time.perf_counter() - start - summary.measuring_seconds
    return summary


def _sources(files: Iterable[Path]) -> Iterator[Path | IO[bytes]]:
    """`files`; what standard input gives lies in a file that can seek, as many formats want it, until the next."""
    for file in files:
        if file == STDIN:
            with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
                shutil.copyfileobj(sys.stdin.buffer, spool)
                spool.seek(0)
                yield spool
        else:
            yield file


def _write_whole(path: Path, text: str) -> None:
    """Write a file, folders included; one that is there before is replaced when this one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pending = path.with_name(f".leapasr-{os.getpid()}.part")
    try:
        pending.write_text(text, encoding="utf-8")
        os.replace(pending, path)
    finally:
        pending.unlink(missing_ok=True)
