"""A transcription request from its bytes to its text, whatever protocol it came by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from http import HTTPStatus

from leapasr.audio import SAMPLE_RATE, AudioError, read_audio
from leapasr.chunks import Chunk
from leapasr.decoding import DecodingOptions
from leapasr.serving.batcher import Batcher, DecodingError, HeardChunk
from leapasr.serving.errors import ApiError
from leapasr.serving.limits import Limits, Queue, deadline
from leapasr.serving.metrics import Metrics
from leapasr.transcriber import Transcriber
from leapasr.transcription import Transcription

NUM_READERS = 2  # threads that decode audio


@dataclass(frozen=True, eq=False)
class Recording:
    """The chunks of a recording that can hold speech, its length in seconds, and the language that was asked for."""

    chunks: list[Chunk]
    seconds: float
    language: str | None = None


class Service:
    """A model behind a queue.

    Args:
        transcriber: the model.
        name: under which it is served.
        options: how to decode.
        batch_size: most chunks in a decoder call.
        limits: of requests.

    Raises:
        ValueError: the options do not fit the model, or `batch_size` is less than 1.
    """

    def __init__(
        self, transcriber: Transcriber, *, name: str, options: DecodingOptions, batch_size: int, limits: Limits
    ):
        self.transcriber, self.name, self.limits = transcriber, name, limits
        self.batcher = Batcher(transcriber, options, batch_size=batch_size)
        self.queue = Queue(limits.num_requests)
        self.metrics = Metrics(num_requests=lambda: self.queue.length, num_chunks=lambda: self.batcher.num_waiting)
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="reading")
        self._num_places = 2 * batch_size  # recordings whose samples are in memory; those behind them wait as files

    async def start(self) -> None:
        self._places = asyncio.Semaphore(self._num_places)
        self.batcher.start(self.metrics)

    async def close(self) -> None:
        """End what is in hand, then stop."""
        await asyncio.to_thread(self.batcher.close)
        self._readers.shutdown(cancel_futures=True)

    @property
    def is_ready(self) -> bool:
        return self.batcher.is_alive

    def check(self, *, language: str | None, prompt: str) -> None:
        """Raises ApiError where the model cannot honour what a request asks for."""
        for param, asked in (("language", {"language": language}), ("prompt", {"initial_prompt": prompt or None})):
            try:
                self.transcriber.check(self.batcher.options, **asked)
            except ValueError as error:
                raise ApiError(HTTPStatus.BAD_REQUEST, f"{param}: {error}", param=param) from error

    async def open(self, audio: bytes, *, language: str | None = None, until: float, held: AsyncExitStack) -> Recording:
        """Decode a file, when its turn has come; the place that its samples take is free again when `held` closes.

        Raises:
            ApiError: it cannot be read, is damaged, or too long; or it is `until`, by the event loop's clock.
        """
        try:
            async with deadline(until, self._late):
                await held.enter_async_context(self._places)
                return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, audio, language)
        except AudioError as error:
            raise ApiError(HTTPStatus.BAD_REQUEST, f"file: {error}", param="file", code="invalid_audio") from error

    def _read(self, audio: bytes, language: str | None) -> Recording:
        samples = read_audio(audio, max_seconds=self.limits.audio_seconds, strict=True)
        chunks = self.transcriber.cut([(0, samples)], language=language)
        return Recording(chunks, len(samples) / SAMPLE_RATE, language)

    @property
    def _late(self) -> ApiError:
        return ApiError(
            HTTPStatus.GATEWAY_TIMEOUT,
            f"not transcribed within {self.limits.timeout:g} s, which is this server's limit: give shorter audio, or "
            "try again when the server has less to do",
            code="timeout",
        )

    async def heard(self, recording: Recording, *, word_times: bool, until: float) -> AsyncGenerator[HeardChunk, None]:
        """What is said in the recording's chunks, in order, each as soon as it can be had.

        Raises:
            ApiError: the model failed, or it is `until`, by the event loop's clock, and it is not done.
        """
        async with aclosing(self.batcher.heard(recording.chunks, word_times=word_times)) as chunks:
            while True:
                try:
                    async with deadline(until, self._late):
                        chunk = await anext(chunks, None)
                except DecodingError as error:
                    raise ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)) from error
                if chunk is None:
                    return
                yield chunk

    def joined(self, recording: Recording, heard: Sequence[HeardChunk]) -> Transcription:
        """The transcription of a recording from all that is heard in it."""
        return Transcription(
            [each.segment for each in heard if each.segment],
            recording.seconds,
            sum(each.encoder_seconds for each in heard),
            sum(each.decoder_seconds for each in heard),
            self.transcriber.language_of(recording.language),
        )
