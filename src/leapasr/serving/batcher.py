"""One thread owns the model; chunks of all requests are decoded in one batch, which they join as places get free."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field, replace

from leapasr.chunks import Chunk
from leapasr.decoding import DecodingOptions
from leapasr.running import DecodedChunk
from leapasr.serving.metrics import Metrics
from leapasr.transcriber import Transcriber
from leapasr.transcription import Segment

log = logging.getLogger(__name__)


class DecodingError(RuntimeError):
    """The model failed at the batch that a chunk was in."""


@dataclass(frozen=True)
class HeardChunk:
    """What is said in the chunk that begins at `start` (None: nothing), and the seconds that it took to find out."""

    start: float
    segment: Segment | None
    encoder_seconds: float
    decoder_seconds: float


@dataclass(eq=False)
class _Job:
    """One request's chunks; `waiting` is guarded by the batcher's condition, `done` belongs to the event loop."""

    word_times: bool
    loop: asyncio.AbstractEventLoop
    waiting: deque[Chunk[_Job]] = field(default_factory=deque)
    done: asyncio.Queue[HeardChunk | DecodingError] = field(default_factory=asyncio.Queue)
    is_left: bool = False

    def deliver(self, result: HeardChunk | DecodingError) -> None:
        """From the decoding thread."""
        self.loop.call_soon_threadsafe(self.done.put_nowait, result)


class Batcher:
    """Decodes what `segments` is given, until `close`.

    Requests take turns, a chunk each, so that a short recording does not wait for the end of a long one.

    Args:
        transcriber: the decoding thread encodes and decodes with it.
        options: how to decode.
        batch_size: most chunks in the batch.

    Raises:
        ValueError: the options do not fit the model, or `batch_size` is less than 1.
    """

    def __init__(self, transcriber: Transcriber, options: DecodingOptions, *, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.transcriber, self.options, self.batch_size = transcriber, options, batch_size
        self._running = transcriber.running(options)
        self._jobs: deque[_Job] = deque()  # those with chunks that wait, the next one first
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    @property
    def num_waiting(self) -> int:
        """Chunks that wait for a place in the batch."""
        with self._changed:
            return sum(len(job.waiting) for job in self._jobs)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self, metrics: Metrics) -> None:
        """Begin to decode; `metrics` is told of every call and chunk."""
        self._metrics = metrics
        self._thread.start()

    def close(self) -> None:
        """Decode what is there, then stop."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    async def heard(self, chunks: Sequence[Chunk], *, word_times: bool) -> AsyncGenerator[HeardChunk, None]:
        """What is said in the chunks of a recording, in their order, each as soon as it and those before are decoded.

        Leaving the iteration early takes what still waits out of the queue, and out of the batch before its next call.

        Raises:
            DecodingError: the model failed.
        """
        job = _Job(word_times, asyncio.get_running_loop())
        job.waiting.extend(replace(chunk, recording=job) for chunk in chunks)
        early: dict[float, HeardChunk] = {}
        try:
            if chunks:
                with self._changed:
                    self._jobs.append(job)
                    self._changed.notify()
            for chunk in chunks:
                while chunk.start not in early:
                    result = await job.done.get()
                    if isinstance(result, DecodingError):
                        raise result
                    early[result.start] = result
                yield early.pop(chunk.start)
        finally:
            with self._changed:
                job.is_left = True
                job.waiting.clear()
                if job in self._jobs:
                    self._jobs.remove(job)

    def _run(self) -> None:
        finished: deque[DecodedChunk] = deque()
        while self._waits_for_work():
            chunks: list[Chunk[_Job]] = []
            try:
                self._running.drop([chunk for chunk in self._running.chunks if chunk.recording.is_left])
                chunks = self._take()
                if chunks:
                    self._running.add(self.transcriber.encode(chunks))
                if self._running:
                    size = len(chunks) or len(self._running)  # who joins has a call of their own
                    self._metrics.batch_size.observe(size)
                    finished.extend(self._running.step())
                while finished:
                    self._finish(finished[0])
                    finished.popleft()
            except Exception:
                log.exception("the model failed at a batch: its requests get an error, others go on")
                self._fail([*self._running.chunks, *chunks, *(done.chunk for done in finished)])
                self._running = self.transcriber.running(self.options)
                finished.clear()

    def _waits_for_work(self) -> bool:
        """Waits until there is something to decode; False where there is nothing left, and nothing to come."""
        with self._changed:
            while not (self._jobs or self._running or self._is_closing):
                self._changed.wait()
            return bool(self._jobs or self._running)

    def _take(self) -> list[Chunk[_Job]]:
        """Chunks for the free places, once half are free."""
        num_running = len(self._running)
        with self._changed:
            chunks: list[Chunk[_Job]] = []
            if num_running <= self.batch_size // 2:
                while self._jobs and num_running + len(chunks) < self.batch_size:
                    job = self._jobs.popleft()
                    chunks.append(job.waiting.popleft())
                    if job.waiting:
                        self._jobs.append(job)
            return chunks

    def _finish(self, done: DecodedChunk) -> None:
        job: _Job = done.chunk.recording
        self._metrics.observe(done)
        if not job.is_left:
            speaks = self.transcriber.hears_speech(done)
            segment = self.transcriber.segment(done, word_times=job.word_times) if speaks else None
            job.deliver(HeardChunk(done.chunk.start, segment, done.encoder_seconds, done.seconds))

    def _fail(self, chunks: Iterable[Chunk[_Job]]) -> None:
        """Tell the requests that these chunks are of."""
        for job in {chunk.recording for chunk in chunks}:
            job.deliver(DecodingError("the model failed at the batch that this request was in: see the server's log"))
