"""Recordings cut to what the encoder hears at once, and grouped into batches of like length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from leapasr.audio import SAMPLE_RATE, cut_at_silences, is_silent

SHORTEST_SECONDS = 0.1  # nothing can be said in less
WINDOW_SECONDS = 1800.0  # audio held in memory at once: 115 MB

Key = TypeVar("Key")


@dataclass(frozen=True, eq=False)
class Chunk(Generic[Key]):
    """A stretch of a recording: whose it is, where it begins in it (seconds), and its 16 kHz samples (num_samples,)."""

    recording: Key
    start: float
    samples: np.ndarray

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE

    @property
    def end(self) -> float:
        """Where it ends in its recording, in seconds."""
        return self.start + self.seconds


def cut_recording(recording: Key, samples: np.ndarray, *, max_seconds: float) -> list[Chunk[Key]]:
    """The chunks of a recording that can hold speech: none is longer than `max_seconds`, silence is left out."""
    spans = cut_at_silences(samples, max_seconds=max_seconds)
    chunks = [Chunk(recording, start / SAMPLE_RATE, samples[start:end]) for start, end in spans]
    return [chunk for chunk in chunks if chunk.seconds >= SHORTEST_SECONDS and not is_silent(chunk.samples)]


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
