"""Recordings cut to what the encoder hears at once, and grouped into batches of like length."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from leapasr.audio import (
    FRAME,
    QUIET_FRAMES,
    SAMPLE_RATE,
    SHORTEST_REST_SECONDS,
    AudioError,
    cut_at_silences,
    is_silent,
)

SHORTEST_SECONDS = 0.1  # nothing can be said in less
WINDOW_SECONDS = 900.0  # audio held in memory at once: 58 MB

Key = TypeVar("Key")
Clip = tuple[float, float]  # start and end in seconds of a recording
WHOLE: tuple[Clip, ...] = ((0.0, math.inf),)


@dataclass(frozen=True, eq=False)
class Chunk(Generic[Key]):
    """A stretch of a recording: whose it is, where it begins in it (seconds), and its 16 kHz samples (num_samples,).

    language: code of that which is to be written; None leaves it to the model.
    """

    recording: Key
    start: float
    samples: np.ndarray
    language: str | None = None

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE

    @property
    def end(self) -> float:
        """Where it ends in its recording, in seconds."""
        return self.start + self.seconds


def cut_recording(
    recording: Key, samples: np.ndarray, *, max_seconds: float, language: str | None = None
) -> list[Chunk[Key]]:
    """The chunks of a recording that can hold speech: none is longer than `max_seconds`, silence is left out."""
    return list(cut_pieces(recording, [(0, samples)], max_seconds=max_seconds, language=language))


def cut_pieces(
    recording: Key, pieces: Iterable[tuple[int, np.ndarray]], *, max_seconds: float, language: str | None = None
) -> Generator[Chunk[Key], None, int]:
    """Chunks as of `cut_recording`, of a recording that comes piece by piece; a few chunks' audio is held at once.

    Args:
        pieces: (first sample in the recording, samples), in order; no chunk reaches over a gap between them.
        language: of the chunks.

    Returns:
        (at the generator's end) how many samples there were.
    """
    # A chunk's end depends on no more than this: its longest, the rest that is to be left, the loudness around a cut.
    decisive = int((max_seconds + SHORTEST_REST_SECONDS) * SAMPLE_RATE) + QUIET_FRAMES * FRAME
    held: list[np.ndarray] = []
    start = num_held = num_heard = 0

    def cut(*, more: bool) -> Iterator[Chunk[Key]]:
        """The chunks of what is held; while there is `more` to come, those alone whose ends it cannot change."""
        nonlocal held, start, num_held
        samples = np.concatenate(held) if len(held) > 1 else held[0]
        done = 0
        for first, end in cut_at_silences(samples, max_seconds=max_seconds):
            if more and first + decisive > len(samples):
                break
            chunk = Chunk(recording, (start + first) / SAMPLE_RATE, samples[first:end], language)
            if chunk.seconds >= SHORTEST_SECONDS and not is_silent(chunk.samples):
                yield chunk
            done = end
        held, start, num_held = [samples[done:]], start + done, num_held - done

    for first, samples in pieces:
        if first != start + num_held:
            if held:
                yield from cut(more=False)
            held, start, num_held = [], first, 0
        held.append(samples)
        num_held += len(samples)
        num_heard += len(samples)
        if num_held >= 4 * decisive:
            yield from cut(more=True)
    if held:
        yield from cut(more=False)
    return num_heard


def check_clips(clips: Sequence[Clip]) -> None:
    """Raises ValueError unless there is a clip, each ends behind its start, and none begins before another's end."""
    if not clips:
        raise ValueError("no clips: give at least one start")
    end = 0.0
    for clip in clips:
        if not end <= clip[0] < clip[1] or clip[0] == math.inf:
            raise ValueError(
                f"clips are (start, end) in seconds, one behind the other, got {clip[0]:g} to {clip[1]:g} s"
                + (f" behind {end:g} s" if end else "")
            )
        end = clip[1]


def clipped(blocks: Iterable[np.ndarray], clips: Sequence[Clip], *, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """What of a recording lies in `clips`, as (first sample in it, samples); no block behind them is asked for.

    A clip may end behind the recording's end.

    Args:
        name: of the recording, for messages.

    Raises:
        AudioError: the recording ends before a clip begins.
    """
    first = 0
    for block in blocks:
        for start, end in clips:
            low = max(round(start * SAMPLE_RATE) - first, 0)
            high = len(block) if end == math.inf else max(round(end * SAMPLE_RATE) - first, 0)
            if len(part := block[low:high]):
                yield first + low, part
        first += len(block)
        if first >= clips[-1][1] * SAMPLE_RATE:
            return
    seconds, late = first / SAMPLE_RATE, clips[-1][0]
    if 0 < late >= seconds:
        raise AudioError(f"{name} is {seconds:.2f} s long: no clip can begin at {late:g} s")


def by_length(chunks: Iterable[Chunk[Key]], batch_size: int) -> Iterator[Sequence[Chunk[Key]]]:
    """Batches of at most `batch_size` chunks, the longest first, so that little is padded.

    Raises:
        ValueError: `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    ordered = sorted(chunks, key=lambda chunk: -len(chunk.samples))
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def windows(
    recordings: Iterable[tuple[Key, np.ndarray]], *, seconds: float = WINDOW_SECONDS
) -> Iterator[list[tuple[Key, np.ndarray]]]:
    """Group recordings, in their order, until each group holds `seconds` of audio: what is in memory at once."""
    window, num_samples = [], 0
    for key, samples in recordings:
        window.append((key, samples))
        num_samples += len(samples)
        if num_samples >= seconds * SAMPLE_RATE:
            yield window
            window, num_samples = [], 0
    if window:
        yield window
