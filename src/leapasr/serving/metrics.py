"""What the server tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from leapasr.decoding.trace import accept_lengths
from leapasr.running import DecodedChunk

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The metrics of one server, each described where it is made.

    Args:
        num_requests: gives the number of transcriptions in hand.
        num_chunks: gives the number of chunks that wait for a place in the batch.
    """

    def __init__(self, *, num_requests: Callable[[], int], num_chunks: Callable[[], int]):
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "leapasr", "registry": self._registry}
        self.responses = Counter("responses", "Responses of the API by status.", ["status"], **own)
        self.latency = Histogram(
            "request_seconds", "From a transcription's request to its end.", buckets=SECONDS, **own
        )
        self.batch_size = Histogram("batch_size", "Chunks in a decoder call.", buckets=LENGTHS, **own)
        self.accept_length = Histogram("accept_length", "Tokens from a decoder call.", buckets=LENGTHS, **own)
        self._audio = Counter("audio_seconds", "Audio transcribed, silence left out.", **own)
        self._encoder = Counter("encoder_seconds", "Computing time of features and encoder.", **own)
        self._decoder = Counter("decoder_seconds", "Computing time of decoding.", **own)
        Gauge("requests_in_hand", "Transcriptions in hand: uploaded, waiting or computed.", **own).set_function(
            num_requests
        )
        Gauge("queue_length", "Chunks that wait for a place in the batch.", **own).set_function(num_chunks)
        self.rtfx = Gauge("rtfx", "Seconds of audio to a second of computing, since the start.", **own)
        self._computed = [0.0, 0.0]  # seconds of audio, and of computing

    def observe(self, done: DecodedChunk) -> None:
        """Count a chunk that has been decoded."""
        self._audio.inc(done.chunk.seconds)
        self._encoder.inc(done.encoder_seconds)
        self._decoder.inc(done.seconds)
        self._computed[0] += done.chunk.seconds
        self._computed[1] += done.encoder_seconds + done.seconds
        self.rtfx.set(self._computed[0] / self._computed[1])
        for length in accept_lengths(done.result.trace):
            self.accept_length.observe(length)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


class CountedResponses:
    """Middleware that counts the responses of paths below `prefix`."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, prefix: str):
        self.app, self.metrics, self.prefix = app, metrics, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.responses.labels(message["status"]).inc()
            await send(message)

        is_counted = scope["type"] == "http" and scope["path"].startswith(self.prefix)
        await self.app(scope, receive, counted if is_counted else send)
