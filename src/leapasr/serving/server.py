"""Running the server: from its start until SIGTERM or Ctrl-C has let the requests in hand end."""

from __future__ import annotations

import signal
from pathlib import Path

import uvicorn

from leapasr.serving.app import build_app
from leapasr.serving.limits import Limits
from leapasr.serving.service import Service
from leapasr.transcriber import DEFAULT_OPTIONS, Transcriber

SHIPPED_NAME = "leapasr-tiny"


def served_name(model: str | None) -> str:
    """The name under which clients ask for a model: that of its folder, or on the hub."""
    if model is None:
        return SHIPPED_NAME
    return Path(model).resolve().name if Path(model).is_dir() else model


def is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


def serve(
    transcriber: Transcriber,
    *,
    name: str,
    host: str,
    port: int,
    api_key: str | None,
    batch_size: int,
    limits: Limits,
) -> None:
    """Serve until a signal says to stop: then requests in hand are finished, and new ones refused.

    Args:
        transcriber: the model.
        name: under which it is served.
        host, port: where to listen; port 0 is any that is free.
        api_key: what clients have to give; None: nothing.
        batch_size: most chunks in a decoder call.
        limits: of requests.

    Raises:
        ValueError: `batch_size` is less than 1.
        OSError: the address cannot be used.
    """
    service = Service(transcriber, name=name, options=DEFAULT_OPTIONS, batch_size=batch_size, limits=limits)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn stops in good order, then raises what it caught once more
    try:
        uvicorn.run(build_app(service, api_key=api_key), host=host, port=port)
    except SystemExit as error:
        raise OSError(f"the server did not start at {host}, port {port}: the lines above say why") from error
