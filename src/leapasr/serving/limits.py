"""What a request may take: bytes, seconds of audio, time, and a place in the queue."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http import HTTPStatus

from fastapi import Request

from leapasr.serving.errors import ApiError

RETRY_SECONDS = 2  # what a client that is turned away is told to wait


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        upload_bytes: most bytes of a request's body.
        audio_seconds: longest recording.
        num_requests: most transcriptions in hand, those being uploaded and those that wait included.
        timeout: seconds for a request, from its first byte to its last word.

    Raises:
        ValueError: a limit is not positive.
    """

    upload_bytes: int = 25_000_000
    audio_seconds: float = 3600.0
    num_requests: int = 64
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"the server's limit {name} must be greater than 0, got {value}")


class Queue:
    """The transcriptions in hand."""

    def __init__(self, limit: int):
        self.limit = limit
        self.length = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place.

        Raises:
            ApiError: none is free.
        """
        if self.length >= self.limit:
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"the server has {self.length} requests in hand, which is its limit: try again in {RETRY_SECONDS} s",
                code="queue_full",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        self.length += 1
        try:
            yield
        finally:
            self.length -= 1


@asynccontextmanager
async def deadline(when: float, error: ApiError) -> AsyncIterator[None]:
    """Raises `error` where the block has not ended at `when`, by the event loop's clock."""
    try:
        async with asyncio.timeout_at(when):
            yield
    except TimeoutError:
        raise error from None


def check_key(request: Request, key: str | None) -> None:
    """Raises ApiError if the server has a key and the request does not give it as ``Authorization: Bearer KEY``."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if key is None or (scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode(), key.encode())):
        return
    raise ApiError(
        HTTPStatus.UNAUTHORIZED,
        "this server wants an API key: send the header 'Authorization: Bearer KEY'"
        if not given
        else "the API key is not this server's",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
