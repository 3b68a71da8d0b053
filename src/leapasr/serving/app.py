"""The routes of the server."""

import asyncio
import importlib.resources
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

import leapasr
from leapasr.serving.batcher import HeardChunk
from leapasr.serving.errors import ApiError, ErrorBody, add_error_handlers
from leapasr.serving.form import TranscriptionForm, receive_form
from leapasr.serving.limits import check_key, deadline
from leapasr.serving.metrics import CountedResponses
from leapasr.serving.responses import MEDIA_TYPES, body, event, respond
from leapasr.serving.service import Recording, Service
from leapasr.transcription import Transcription

PAGE = importlib.resources.files("leapasr.serving") / "page"

Result = TypeVar("Result")

TRANSCRIPTION_FORMATS = {
    "application/json": {"schema": {"type": "object", "required": ["text"]}},
    **{media_type: {} for media_type in ("text/plain", *MEDIA_TYPES.values(), "text/event-stream")},
}


def build_app(service: Service, *, api_key: str | None) -> FastAPI:
    """The server's application.

    Args:
        service: not yet started; starts and ends with the application.
        api_key: what clients have to give to use ``/v1``; None: nothing.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()

    def has_key(request: Request) -> None:
        check_key(request, api_key)

    async def admitted(request: Request) -> AsyncIterator[AsyncExitStack]:
        """A place in the queue, and what else the request comes to hold, until its response has ended."""
        has_key(request)
        async with AsyncExitStack() as held:
            held.enter_context(service.queue.place())
            held.enter_context(service.metrics.latency.time())
            yield held

    app = FastAPI(
        title="leapasr",
        version=leapasr.__version__,
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(CountedResponses, metrics=service.metrics, prefix="/v1/")
    add_error_handlers(app)
    created = int(time.time())

    @app.post("/v1/audio/transcriptions", **_documented())
    async def transcribe(request: Request, held: Annotated[AsyncExitStack, Depends(admitted)]) -> Response:
        """Transcribe a recording."""
        until = asyncio.get_running_loop().time() + service.limits.timeout
        slow = ApiError(
            HTTPStatus.REQUEST_TIMEOUT, f"the upload took longer than {service.limits.timeout:g} s", code="timeout"
        )
        async with deadline(until, slow):
            form = await receive_form(request, max_bytes=service.limits.upload_bytes)
        if form.model not in (None, service.name):
            raise _unknown_model(form.model, service)
        service.check(language=form.language, prompt=form.prompt)
        recording = await _unless_gone(request, service.open(form.file, language=form.language, until=until, held=held))
        if form.stream:
            events = _events(service, recording, form, until)
            held.push_async_callback(events.aclose)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        transcription = await _unless_gone(request, _transcribe(service, recording, form, until))
        return await asyncio.to_thread(respond, transcription, form, service.transcriber.processor)

    def model_card() -> dict[str, Any]:
        return {"id": service.name, "object": "model", "created": created, "owned_by": "leapasr"}

    @app.get("/v1/models", dependencies=[Depends(has_key)], responses=_errors(401))
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [model_card()]}

    @app.get("/v1/models/{model:path}", dependencies=[Depends(has_key)], responses=_errors(401, 404))
    async def model(model: str) -> dict[str, Any]:
        """The model of this name."""
        if model != service.name:
            raise _unknown_model(model, service)
        return model_card()

    @app.get("/health", responses=_errors(503))
    async def health() -> dict[str, str]:
        """Whether requests can be served, and by which model."""
        if not service.is_ready:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the decoding thread is not running: see the server's log")
        return {"status": "ok", "model": service.name}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(str(PAGE / "index.html"))

    app.mount("/page", StaticFiles(directory=str(PAGE)))
    return app


def _documented() -> dict[str, Any]:
    """What the schema says of a transcription: the body is read by hand, while its size is watched."""
    schema = TranscriptionForm.model_json_schema(by_alias=True)
    return {
        "response_class": Response,
        "responses": _errors(400, 401, 404, 408, 413, 415, 429, 500, 504)
        | {200: {"description": "The transcription.", "content": TRANSCRIPTION_FORMATS}},
        "openapi_extra": {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}},
    }


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": ErrorBody} for code in codes}


def _unknown_model(name: str | None, service: Service) -> ApiError:
    message = f"there is no model {name!r} here: this server has {service.name!r}"
    return ApiError(HTTPStatus.NOT_FOUND, message, param="model", code="model_not_found")


async def _transcribe(service: Service, recording: Recording, form: TranscriptionForm, until: float) -> Transcription:
    heard = service.heard(recording, word_times=form.needs_word_times, until=until)
    return service.joined(recording, [chunk async for chunk in heard])


async def _events(
    service: Service, recording: Recording, form: TranscriptionForm, until: float
) -> AsyncGenerator[str, None]:
    """A delta for each segment, then the whole; an error that comes now is an event, too."""
    heard: list[HeardChunk] = []
    has_text = False
    try:
        async with aclosing(service.heard(recording, word_times=form.needs_word_times, until=until)) as chunks:
            async for chunk in chunks:
                heard.append(chunk)
                if not (chunk.segment and chunk.segment.text):
                    continue
                delta = f" {chunk.segment.text}" if has_text else chunk.segment.text
                has_text = True
                place = {"end": chunk.segment.end, "duration": recording.seconds}
                yield event(
                    {"type": "transcript.text.delta", "delta": delta} | ({"leapasr": place} if form.include else {})
                )
    except ApiError as error:
        yield event(error.body)
        return
    whole = await asyncio.to_thread(body, service.joined(recording, heard), form, service.transcriber.processor)
    yield event({"type": "transcript.text.done"} | whole)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled where the client leaves.

    Raises:
        ClientDisconnect: it left.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnection(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
