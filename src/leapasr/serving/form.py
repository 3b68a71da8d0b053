"""The form of a transcription request: its fields, and how it is received without touching the disk."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from leapasr.serving.errors import ApiError

MAX_FIELDS = 32
MAX_FIELD_BYTES = 65_536

ResponseFormat = Literal["json", "text", "srt", "verbose_json", "vtt"]


class TranscriptionForm(BaseModel):
    """The fields of ``POST /v1/audio/transcriptions``, as OpenAI's API has them.

    What cannot be honoured is refused. ``include[]=trace`` is ours: verbose_json then tells how each token came about.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: bytes = Field(min_length=1, json_schema_extra={"format": "binary"}, description="Any audio container.")
    model: str | None = Field(None, description="The one model that is served; see /v1/models.")
    response_format: ResponseFormat = "json"
    timestamp_granularities: list[Literal["word", "segment"]] = Field([], alias="timestamp_granularities[]")
    stream: bool = Field(False, description="Server-sent events, a piece of text each.")
    language: str | None = Field(None, description="A code or an English name; refused unless it is the model's.")
    temperature: float = Field(0.0, description="None but 0: the likeliest text.")
    prompt: str = Field("", description="Text to go on from; refused if the model takes none.")
    chunking_strategy: Literal["auto"] = "auto"
    include: list[Literal["trace"]] = Field([], alias="include[]")

    @field_validator("temperature")
    @classmethod
    def _is_zero(cls, temperature: float) -> float:
        if temperature != 0:
            raise ValueError("the likeliest text is given, nothing is sampled: leave it out, or give 0")
        return temperature

    @model_validator(mode="after")
    def _fits(self) -> TranscriptionForm:
        if (self.timestamp_granularities or self.include) and self.response_format != "verbose_json":
            raise ValueError(
                f"timestamp_granularities[] and include[] need response_format 'verbose_json', got "
                f"{self.response_format!r}"
            )
        if self.stream and self.response_format in ("srt", "vtt"):
            raise ValueError(
                f"a stream of events is no {self.response_format!r} file: choose 'json', 'text' or 'verbose_json', or "
                "leave out stream"
            )
        return self

    @property
    def granularities(self) -> list[Literal["word", "segment"]]:
        return self.timestamp_granularities or ["segment"]

    @property
    def needs_word_times(self) -> bool:
        return self.response_format in ("srt", "vtt") or "word" in self.granularities or bool(self.include)


LISTS = {field.alias for field in TranscriptionForm.model_fields.values() if field.alias}


class _InMemory(MultiPartParser):
    spool_max_size = sys.maxsize  # the body's own limit holds


async def receive_form(request: Request, *, max_bytes: int) -> TranscriptionForm:
    """Read a request's body, and no more of it than `max_bytes`.

    Raises:
        ApiError: it is too large, no form, or its fields are wrong.
        ClientDisconnect: the client left.
    """
    too_large = ApiError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"the request is larger than {max_bytes} bytes, which is this server's limit: compress the audio (Opus, for "
        "one), or cut it",
        param="file",
        code="upload_too_large",
    )
    if int(request.headers.get("Content-Length", 0)) > max_bytes:
        raise too_large
    kind = request.headers.get("Content-Type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"the body must be multipart/form-data with a field 'file', got {kind!r}"
        )

    async def limited() -> AsyncIterator[bytes]:
        num_bytes = 0
        async for piece in request.stream():
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                raise too_large
            yield piece

    parser = _InMemory(
        request.headers,
        limited(),  # type: ignore[arg-type]
        max_files=1,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"the form cannot be read: {error.message}") from error
    try:
        return _checked(await _fields(form))
    finally:
        await form.close()


async def _fields(form: FormData) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        content = await value.read() if isinstance(value, UploadFile) else value
        if isinstance(content, bytes) != (name == "file"):
            what = "be a file" if name == "file" else "not be a file"
            raise ApiError(HTTPStatus.BAD_REQUEST, f"the field {name!r} must {what}", param=name)
        if name in LISTS:
            fields.setdefault(name, []).append(content)
        elif name in fields:
            raise ApiError(HTTPStatus.BAD_REQUEST, f"the field {name!r} is given twice", param=name)
        else:
            fields[name] = content
    return fields


def _checked(fields: dict[str, Any]) -> TranscriptionForm:
    try:
        return TranscriptionForm.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "this server has no such parameter: leave it out"
        elif first["type"] == "missing":
            message = "it is missing: give the recording as a file of this name"
        elif param in fields and param != "file":
            message += f", got {first['input']!r:.100}"
        raise ApiError(HTTPStatus.BAD_REQUEST, f"{param}: {message}" if param else message, param=param) from error
