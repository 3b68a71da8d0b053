"""RunningBatch: chunks that are decoded together, and that come and go while they are. What they take is timed.

Shapes: B rows, T CTC frames.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from leapasr.chunks import Chunk
from leapasr.decoding import DecodingLoop, DecodingOptions, DecodingResult, Prompts
from leapasr.decoding.drafts import Drafter
from leapasr.model.ctc_head import CTCScores


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """Chunks on the decoder's side of the encoder.

    Attributes:
        chunks: B chunks.
        prompts: the decoder's prompts.
        max_tokens: each row's token bound.
        ctc, ctc_lengths_B: what CTC says of (B, T) frames, `model.ctc_frame_rate` a second, and lengths (B,).
        seconds: time that features and encoder took.
    """

    chunks: Sequence[Chunk]
    prompts: Prompts
    max_tokens: list[int]
    ctc: CTCScores
    ctc_lengths_B: Tensor
    seconds: float


@dataclass(frozen=True, eq=False)
class DecodedChunk:
    """The result for row `row` of a batch, and its share of the seconds that decoding took."""

    batch: EncodedBatch
    row: int
    result: DecodingResult
    seconds: float

    @property
    def chunk(self) -> Chunk:
        return self.batch.chunks[self.row]

    @property
    def encoder_seconds(self) -> float:
        """Its share, by length, of the seconds that encoding the batch took."""
        return self.batch.seconds * self.chunk.seconds / sum(chunk.seconds for chunk in self.batch.chunks)


class RunningBatch:
    """Chunks that are being decoded together; more may join, and some may leave, at any time (continuous batching).

    What a chunk gets does not depend on the chunks beside it.

    Args:
        loop: without rows.
        drafters: gives the draft sources of a batch's chunks, see `Transcriber.drafters`.
    """

    def __init__(self, loop: DecodingLoop, drafters: Callable[[EncodedBatch, DecodingOptions], list[Drafter] | None]):
        self._loop, self._drafters = loop, drafters
        self._rows: dict[int, tuple[EncodedBatch, int]] = {}
        self._seconds: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def chunks(self) -> list[Chunk]:
        """Those that are being decoded."""
        return [batch.chunks[row] for batch, row in self._rows.values()]

    def add(self, batch: EncodedBatch) -> None:
        """Let the chunks of `batch` join."""
        with timed(self._loop.decoder.device) as timer:
            drafters = self._drafters(batch, self._loop.options)
            keys = self._loop.add(batch.prompts, max_tokens=batch.max_tokens, drafters=drafters)
        self._rows |= {key: (batch, row) for row, key in enumerate(keys)}
        self._seconds |= dict.fromkeys(keys, timer.seconds / max(1, len(keys)))

    def drop(self, chunks: Collection[Chunk]) -> None:
        """Let `chunks` leave before they are done; the others get what they would have got."""
        keys = [key for key, (batch, row) in self._rows.items() if batch.chunks[row] in chunks]
        self._loop.drop(keys)
        for key in keys:
            del self._rows[key], self._seconds[key]

    def step(self) -> list[DecodedChunk]:
        """One decoder call: gives the chunks that it ended."""
        with timed(self._loop.decoder.device) as timer:
            finished = self._loop.step()
        for key in self._rows:
            self._seconds[key] += timer.seconds / len(self._rows)
        return [DecodedChunk(*self._rows.pop(key), result, self._seconds.pop(key)) for key, result in finished.items()]


class Timer:
    """What `timed` fills when its block ends."""

    seconds = math.nan


@contextmanager
def timed(device: torch.device) -> Iterator[Timer]:
    """Wall-clock seconds of the block, work that an accelerator still has to do included."""
    timer = Timer()
    _synchronize(device)
    start = time.perf_counter()
    yield timer
    _synchronize(device)
    timer.seconds = time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # of all streams it may not be asked while one is captured
