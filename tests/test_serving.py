"""The server on a tiny random model: what it answers, what it refuses, and that requests do not get at each other."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import soundfile
import torch
import uvicorn
from fastapi.testclient import TestClient

from leapasr.audio import SAMPLE_RATE
from leapasr.chunks import Chunk
from leapasr.decoding import DecodingOptions
from leapasr.running import RunningBatch
from leapasr.serving.app import PAGE, build_app
from leapasr.serving.batcher import Batcher
from leapasr.serving.limits import Limits
from leapasr.serving.metrics import Metrics
from leapasr.serving.server import is_loopback, served_name
from leapasr.serving.service import Service
from leapasr.subtitles import render
from leapasr.transcriber import Transcriber, load

URL, NAME = "/v1/audio/transcriptions", "tiny"
OPTIONS = DecodingOptions(draft_length="full")  # calls then do not depend on what is decoded beside them
TRACE = {"response_format": "verbose_json", "include[]": "trace"}


@pytest.fixture(scope="module")
def transcriber(tiny_model_folder) -> Transcriber:
    made = load(tiny_model_folder, device="cpu")
    return Transcriber(made.model, made.processor, language="en")


@pytest.fixture(scope="module")
def flac(babble) -> Callable[..., bytes]:
    """A FLAC file's bytes: `flac(seconds, seed)`; 1.28 s are a chunk."""

    def make(seconds: float, seed: int = 0) -> bytes:
        return encoded(babble(seconds, seed), "flac")

    return make


def encoded(samples: np.ndarray, format: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format=format)
    return file.getvalue()


def make_service(transcriber: Transcriber, *, batch_size: int = 4, **limits) -> Service:
    return Service(transcriber, name=NAME, options=OPTIONS, batch_size=batch_size, limits=Limits(**limits))


@pytest.fixture(scope="module")
def client(transcriber) -> Iterator[TestClient]:
    with TestClient(build_app(make_service(transcriber, upload_bytes=3_000_000, audio_seconds=20), api_key=None)) as it:
        yield it


def post(client: TestClient, audio: bytes, name: str = "speech.flac", **fields):
    return client.post(URL, files={"file": (name, audio)}, data=fields)


def refusal(response, status: int) -> dict:
    """What an error says; each has the same four fields."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def events_of(text: str) -> list[dict]:
    assert text.endswith("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-1]]


class Gate:
    """Lets the decoding thread encode while it is open."""

    def __init__(self):
        self.opened, self.reached = threading.Event(), threading.Event()


@pytest.fixture
def gate(transcriber, monkeypatch) -> Iterator[Gate]:
    """A gate, closed, before `transcriber`'s encoder."""
    made, encode = Gate(), transcriber.encode

    def wait_and_encode(chunks):
        made.reached.set()
        assert made.opened.wait(60)
        return encode(chunks)

    monkeypatch.setattr(transcriber, "encode", wait_and_encode)
    yield made
    made.opened.set()


@contextmanager
def live(service: Service, api_key: str | None = None) -> Iterator[int]:
    """The server on a real port of the loopback interface."""
    server = uvicorn.Server(uvicorn.Config(build_app(service, api_key=api_key), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def wait_until(is_so: Callable[[], bool]) -> None:
    for _ in range(6000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("waited a minute in vain")


@pytest.mark.parametrize("format", ["json", "text", "srt", "vtt"])
def test_formats(client, transcriber, flac, format):
    audio = flac(2.5, 1)
    result = transcriber.transcribe(audio, word_times=True)
    response = post(client, audio, response_format=format)
    assert response.status_code == 200
    if format == "json":
        assert response.json() == {"text": result.text, "usage": {"type": "duration", "seconds": 3}}
    else:
        assert response.text == render(result, "txt" if format == "text" else format, audio="")
    assert len(result.text) > 10
    assert post(client, audio).json()["text"] == result.text


def test_verbose_json(client, transcriber, flac):
    audio = flac(2.5, 1)
    result = transcriber.transcribe(audio, word_times=True)
    verbose = post(client, audio, response_format="verbose_json").json()
    assert (verbose["text"], verbose["duration"], "words" in verbose) == (result.text, 2.5, False)
    assert verbose["language"] == "english"
    assert [(each["start"], each["end"], each["text"], each["tokens"]) for each in verbose["segments"]] == [
        (round(each.start, 3), round(each.end, 3), each.text, each.tokens) for each in result.segments
    ]
    log_probabilities = [record.log_probability for record in result.segments[0].trace]
    assert verbose["segments"][0]["avg_logprob"] == pytest.approx(np.mean(log_probabilities), abs=1e-4)
    fields = {"response_format": "verbose_json", "timestamp_granularities[]": "word"}
    words = post(client, audio, **fields).json()
    assert "segments" not in words
    assert words["words"] == [
        {"word": word.text, "start": round(word.start, 3), "end": round(word.end, 3)}
        for segment in result.segments
        for word in segment.words
    ]
    fields["timestamp_granularities[]"] = ["word", "segment"]
    assert {"words", "segments"} <= set(post(client, audio, **fields).json())


def test_trace(client, transcriber, flac):
    audio = flac(2.5, 1)
    result = transcriber.transcribe(audio, OPTIONS, word_times=True)
    trace = post(client, audio, **TRACE).json()["leapasr"]
    assert (trace["decoder_calls"], trace["num_tokens"]) == (result.decoder_calls, result.num_tokens)
    assert sum(int(length) * count for length, count in trace["accept_lengths"].items()) == result.num_tokens
    assert sum(trace["accept_lengths"].values()) == result.decoder_calls
    for segment, expected in zip(trace["segments"], result.segments, strict=True):
        assert "".join(token["text"] for token in segment["tokens"]).strip() == expected.text
        assert [token["source"] for token in segment["tokens"]] == [record.source for record in expected.trace]
        assert [token["step"] for token in segment["tokens"]] == [record.step for record in expected.trace]
        times = [(token["start"], token["end"]) for token in segment["tokens"][: len(expected.tokens)]]
        unknown = [(None, None)] * len(expected.tokens)  # too many tokens for the audio
        assert times == ([(round(start, 3), round(end, 3)) for start, end in expected.token_times] or unknown)
    assert (trace["srt"], trace["vtt"]) == (render(result, "srt", audio=""), render(result, "vtt", audio=""))


@pytest.mark.parametrize("fields", [{}, TRACE])
def test_a_stream_gives_the_text_piece_by_piece_and_then_the_whole(client, flac, fields):
    audio = flac(4, 3)
    whole = post(client, audio, **fields).json()
    response = post(client, audio, stream="true", **fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    *deltas, done = events_of(response.text)
    assert {event["type"] for event in deltas} == {"transcript.text.delta"}
    assert len(deltas) >= 3
    assert "".join(event["delta"] for event in deltas) == whole["text"]
    assert done.pop("type") == "transcript.text.done"
    for segment in [*whole.get("segments", []), *done.get("segments", [])]:
        segment["avg_logprob"] = round(segment["avg_logprob"], 3)  # another batch, another rounding
    for trace in (whole.get("leapasr", {}), done.get("leapasr", {})):
        for token in (token for segment in trace.get("segments", []) for token in segment["tokens"]):
            del token["probability"]
    assert done == whole


def test_silence(client):
    audio = encoded(np.zeros(20_000), "wav")
    assert post(client, audio).json()["text"] == ""
    assert post(client, audio, response_format="srt").text == ""
    assert [event["type"] for event in events_of(post(client, audio, stream="true").text)] == ["transcript.text.done"]
    assert post(client, audio, **TRACE).json()["leapasr"]["num_tokens"] == 0


def test_where_nobody_speaks_there_is_no_text(client, transcriber, flac, monkeypatch):
    """As `leapasr transcribe` does, the server leaves out chunks in which the CTC head hears nothing."""
    encode, blank = transcriber.encode, transcriber.model.config.blank_token_id

    def deaf(chunks):
        batch = encode(chunks)
        with torch.inference_mode():
            for row, chunk in enumerate(chunks):
                if chunk.start < 1:
                    batch.ctc.best_BT[row] = blank
        return batch

    audio = flac(4, 3)
    everything = transcriber.transcribe(audio)
    monkeypatch.setattr(transcriber, "encode", deaf)
    heard = transcriber.transcribe(audio)
    assert len(everything.segments) > len(heard.segments) > 1
    verbose = post(client, audio, response_format="verbose_json").json()
    assert (verbose["text"], len(verbose["segments"])) == (heard.text, len(heard.segments))
    assert verbose["duration"] == 4
    *deltas, done = events_of(post(client, audio, stream="true").text)
    assert "".join(event["delta"] for event in deltas) == done["text"] == heard.text


@pytest.mark.parametrize("name", ["../../etc/passwd", "/dev/null", "a\x00b", "C:\\x", "x" * 1000, "ü.flac", "-"])
def test_a_file_name_is_only_a_name(client, transcriber, flac, name):
    response = post(client, flac(1, 2), name)
    assert response.json()["text"] == transcriber.transcribe(flac(1, 2)).text


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"language": "de"}, "language: language 'de' asked for, but the model writes 'en' alone", "language"),
        ({"prompt": "Dear Sir"}, "prompt: initial prompt 'Dear Sir' given, but the model takes none", "prompt"),
        ({"temperature": "0.2"}, "nothing is sampled: leave it out, or give 0, got '0.2'", "temperature"),
        ({"temperature": "warm"}, "temperature: Input should be a valid number.*'warm'", "temperature"),
        ({"response_format": "diarized_json"}, "response_format: Input should be 'json'.*'diarized", "response_format"),
        ({"stream": "perhaps"}, "stream: Input should be a valid boolean.*'perhaps'", "stream"),
        ({"stream": "true", "response_format": "srt"}, "a stream of events is no 'srt' file", None),
        ({"timestamp_granularities[]": "word"}, "need response_format 'verbose_json', got 'json'", None),
        ({"include[]": "logprobs", **{"response_format": "verbose_json"}}, "should be 'trace', got 'logprobs'", "inc"),
        ({"chunking_strategy": "server_vad"}, "should be 'auto', got 'server_vad'", "chunking_strategy"),
        ({"known_speaker_names[]": "Ann"}, "no such parameter: leave it out", "known_speaker_names[]"),
        ({"nonsense": "1"}, "nonsense: this server has no such parameter", "nonsense"),
        ({"response_format": ["json", "text"]}, "'response_format' is given twice", "response_format"),
        ({"prompt": "x" * 70_000}, "Part exceeded maximum size of 64KB", None),
        ({f"f{n}": "x" for n in range(40)}, "Too many fields", None),
    ],
)
def test_what_cannot_be_honoured_is_refused(client, flac, fields, message, param):
    error = refusal(post(client, flac(0.5), **fields), 400)
    assert re.search(message, error["message"]), error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param or (param == "inc" and error["param"] == "include[]")


def test_what_says_nothing_new_is_taken(client, flac):
    fields = {"prompt": "", "temperature": "0", "chunking_strategy": "auto", "model": NAME}
    for language in ("en", "English"):
        assert post(client, flac(0.5), language=language, **fields).status_code == 200


def test_a_language_that_is_not_known(tiny_model_folder, flac):
    with TestClient(build_app(make_service(load(tiny_model_folder, device="cpu")), api_key=None)) as client:
        assert post(client, flac(0.5), response_format="verbose_json").json()["language"] is None
        error = refusal(post(client, flac(0.5), language="en"), 400)
        assert "the model does not let one choose" in error["message"]


BOUNDARY = {"Content-Type": "multipart/form-data; boundary=b"}
PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"json": {"file": "x"}}, 415, "must be multipart/form-data with a field 'file', got 'application/json'"),
        ({"content": b"x"}, 415, "got ''"),
        ({"data": {"model": NAME}, "files": {"f": b""}}, 400, "the field 'f' must not be a file"),
        ({"files": {"model": (None, NAME)}}, 400, "file: it is missing: give the recording"),
        ({"files": {"file": (None, "text")}}, 400, "the field 'file' must be a file"),
        ({"files": [("file", ("a", b"1")), ("file", ("b", b"2"))]}, 400, "Too many files"),
        ({"content": b"--b--", "headers": {"Content-Type": "multipart/form-data"}}, 400, "Missing boundary"),
        ({"content": b"nonsense", "headers": BOUNDARY}, 400, "the form cannot be read"),
        ({"content": PART + b"cut off", "headers": BOUNDARY}, 400, "file: it is missing: give the recording"),
        ({"content": b"", "headers": BOUNDARY}, 400, "file: it is missing: give the recording"),
        ({"files": {"file": ("a.wav", b"")}}, 400, "file: Data should have at least 1 byte"),
        ({"files": {"file": ("a.wav", b"no audio")}}, 400, "file: audio of 8 bytes cannot be read as audio"),
        ({"data": {"model": "whisper-1"}, "files": {"file": b"1"}}, 404, "no model 'whisper-1' here: .* has 'tiny'"),
    ],
)
def test_bad_forms(client, request_, status, message):
    error = refusal(client.post(URL, **request_), status)
    assert re.search(message, error["message"]), error


def test_damaged_and_overlong_audio(client, flac):
    audio = flac(10)
    error = refusal(post(client, audio[: len(audio) // 2]), 400)
    assert re.search(r"is damaged: .*; \d\.\d+ s were decoded", error["message"]), error
    assert error["code"] == "invalid_audio"
    bomb = encoded(np.zeros(600 * SAMPLE_RATE, dtype=np.int16), "flac")
    assert len(bomb) < 200_000
    assert "is longer than 20 s" in refusal(post(client, bomb), 400)["message"]


def test_a_declared_size_over_the_limit_is_refused_unread(client):
    error = refusal(client.post(URL, content=b"", headers=BOUNDARY | {"Content-Length": "3000001"}), 413)
    assert "larger than 3000000 bytes, which is this server's limit" in error["message"]


def test_uploads_do_not_touch_the_disk(client, monkeypatch):
    def rollover(self):
        raise AssertionError("an upload goes to a temporary file")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", rollover)
    audio = encoded(np.random.default_rng(0).normal(0, 0.1, 18 * 48_000).astype(np.float32), "wav")
    assert len(audio) > 1_500_000
    assert "longer than" in refusal(post(client, audio), 400)["message"]


def test_paths_and_methods_that_are_not_there(client):
    assert "GET /v1/nothing: Not Found" in refusal(client.get("/v1/nothing"), 404)["message"]
    refusal(client.get(URL), 405)
    refusal(client.get("/page/../app.py"), 404)
    refusal(client.get("/page/%2e%2e/app.py"), 404)


def test_models_and_health(client):
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"]) == (NAME, "model")
    assert client.get(f"/v1/models/{NAME}").json() == card
    assert refusal(client.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"
    assert client.get("/health").json() == {"status": "ok", "model": NAME}


def test_the_schema_names_every_field(client):
    schema = client.get("/openapi.json").json()["paths"][URL]["post"]
    form = schema["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"file", "model", "response_format", "timestamp_granularities[]", "stream"} <= set(form["properties"])
    assert form["required"] == ["file"]
    assert {"200", "400", "401", "413", "429", "504"} <= set(schema["responses"])


@pytest.mark.parametrize(
    ("header", "status"), [(None, 401), ("Bearer wrong", 401), ("Basic secret", 401), ("Bearer secret", 200)]
)
def test_api_key(transcriber, flac, header, status):
    app = build_app(make_service(transcriber), api_key="secret")
    headers = {"Authorization": header} if header else {}
    with TestClient(app, headers=headers) as client:
        for response in (client.get("/v1/models"), post(client, flac(0.5))):
            assert response.status_code == status
            if status == 401:
                assert refusal(response, 401)["code"] == "invalid_api_key"
                assert "secret" not in response.text
        assert client.get("/health").status_code == client.get("/").status_code == 200


def test_metrics(transcriber, flac):
    with TestClient(build_app(make_service(transcriber), api_key=None)) as client:
        result = post(client, flac(2.5, 1), **TRACE).json()["leapasr"]
        refusal(post(client, b"no audio"), 400)
        figures = dict(re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", client.get("/metrics").text, flags=re.MULTILINE))
    seconds = sum(segment["end"] - segment["start"] for segment in result["segments"])
    expected = {
        'leapasr_responses_total{status="200"}': 1,
        'leapasr_responses_total{status="400"}': 1,
        "leapasr_request_seconds_count": 2,
        "leapasr_accept_length_count": result["decoder_calls"],
        "leapasr_accept_length_sum": result["num_tokens"],
        "leapasr_requests_in_hand": 0,
        "leapasr_queue_length": 0,
        "leapasr_audio_seconds_total": seconds,
    }
    assert {name: float(figures[name]) for name in expected} == pytest.approx(expected)
    assert float(figures["leapasr_batch_size_count"]) > 0
    computed = float(figures["leapasr_encoder_seconds_total"]) + float(figures["leapasr_decoder_seconds_total"])
    assert float(figures["leapasr_rtfx"]) == pytest.approx(seconds / computed)


def test_many_clients_each_get_their_own_text(client, transcriber, flac):
    recordings = [flac(0.3 + 0.4 * seed, seed) for seed in range(10)]
    with ThreadPoolExecutor(10) as pool:
        texts = list(pool.map(lambda audio: post(client, audio).json()["text"], recordings))
    assert texts == [transcriber.transcribe(audio).text for audio in recordings]
    assert len(set(texts)) == 10


def test_a_full_queue_turns_clients_away(transcriber, flac, gate):
    app = build_app(make_service(transcriber, num_requests=2), api_key=None)
    with TestClient(app) as client, ThreadPoolExecutor(2) as pool:
        served = [pool.submit(post, client, flac(0.5, seed)) for seed in range(2)]
        wait_until(lambda: "leapasr_requests_in_hand 2.0" in client.get("/metrics").text)
        response = post(client, flac(0.5))
        error = refusal(response, 429)
        assert (error["code"], int(response.headers["Retry-After"]) > 0) == ("queue_full", True)
        assert "has 2 requests in hand, which is its limit" in error["message"]
        assert client.get("/health").status_code == 200
        gate.opened.set()
        assert [each.result().status_code for each in served] == [200, 200]
        assert post(client, flac(0.5)).status_code == 200


def test_a_request_that_takes_too_long(transcriber, flac, gate):
    with TestClient(build_app(make_service(transcriber, timeout=1), api_key=None)) as client:
        error = refusal(post(client, flac(0.5)), 504)
        assert "not transcribed within 1 s" in error["message"]
        (event,) = events_of(post(client, flac(0.5), stream="true").text)
        assert event["error"]["code"] == "timeout"
        assert "leapasr_requests_in_hand 0.0" in client.get("/metrics").text
        gate.opened.set()


@pytest.mark.parametrize("seconds", [1.2, 4])
@pytest.mark.parametrize("method", ["encode", "segment"])
def test_a_model_that_fails_fails_the_requests_of_that_batch_only(
    transcriber, flac, monkeypatch, caplog, method, seconds
):
    works, failures = getattr(transcriber, method), [RuntimeError("out of memory")]

    def fail_once(*args, **kwargs):
        if failures:
            raise failures.pop()
        return works(*args, **kwargs)

    audio = flac(seconds, 3)
    expected = transcriber.transcribe(audio, OPTIONS)
    assert min(segment.decoder_calls for segment in expected.segments) > 1  # none ends in the call that it joins with
    monkeypatch.setattr(transcriber, method, fail_once)
    with TestClient(build_app(make_service(transcriber, timeout=60), api_key=None)) as client:
        error = refusal(post(client, audio), 500)
        assert error["type"] == "server_error"
        assert "out of memory" in caplog.text
        assert post(client, audio).json()["text"] == expected.text


def send_head(port: int, *, length: int | None) -> socket.socket:
    """A connection on which the head of a request, and the beginning of its form, have been sent."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: {BOUNDARY['Content-Type']}\r\n{size}\r\n\r\n"
    connection.sendall(head.encode())
    return connection


def test_an_upload_without_a_length_is_stopped_at_the_limit(transcriber):
    with live(make_service(transcriber, upload_bytes=200_000)) as port, send_head(port, length=None) as connection:
        piece = b"%x\r\n" % 10_000 + b"x" * 10_000 + b"\r\n"
        connection.sendall(b"%x\r\n" % len(PART) + PART + b"\r\n" + piece * 21)  # and no end
        answer = connection.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"upload_too_large" in answer or b"upload_too_large" in connection.recv(10_000)


def test_an_upload_that_takes_too_long(transcriber):
    with live(make_service(transcriber, timeout=0.5)) as port, send_head(port, length=1000) as connection:
        connection.sendall(PART)
        answer = connection.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 408 ")


def upload(audio: bytes, **fields: str) -> bytes:
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()
    ]
    return "".join(parts).encode() + PART + audio + b"\r\n--b--\r\n"


@pytest.mark.parametrize("fields", [{}, {"stream": "true"}])
def test_a_client_that_leaves_frees_its_places(transcriber, flac, gate, fields):
    service = make_service(transcriber, num_requests=1, batch_size=2)
    with live(service) as port:
        body = upload(flac(8), **fields)
        with send_head(port, length=len(body)) as connection:
            connection.sendall(body)
            wait_until(lambda: service.batcher.num_waiting >= 4)
            assert service.queue.length == 1
        wait_until(lambda: service.queue.length == 0)
        assert service.batcher.num_waiting == 0
        gate.opened.set()
        body = upload(flac(1, 2))
        with send_head(port, length=len(body)) as connection:
            connection.sendall(body)
            assert connection.recv(10_000).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_leaves_unread_what_is_sent_frees_its_chunks(transcriber, flac, monkeypatch):
    """It has gone while an event is being sent to it; when its request ends, none of its chunks waits any more."""
    encode, opened, num_encoded = transcriber.encode, threading.Event(), itertools.count()

    def only_the_first(chunks):
        assert next(num_encoded) == 0 or opened.wait(60)
        return encode(chunks)

    monkeypatch.setattr(transcriber, "encode", only_the_first)
    body = upload(flac(8), stream="true")
    headers = [(b"content-type", BOUNDARY["Content-Type"].encode()), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": URL, "query_string": b"", "headers": headers}

    async def run() -> tuple[int, int]:
        service, sending = make_service(transcriber, batch_size=1), asyncio.Event()
        app = build_app(service, api_key=None)
        received = iter([{"type": "http.request", "body": body}])

        async def receive() -> dict:
            if message := next(received, None):
                return message
            await sending.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            if message["type"] == "http.response.body":
                assert service.batcher.num_waiting >= 4
                sending.set()
                await asyncio.Future()

        await service.start()
        await app(scope, receive, send)
        left = service.queue.length, service.batcher.num_waiting
        opened.set()
        await service.close()
        return left

    assert asyncio.run(run()) == (0, 0)


def test_a_client_that_leaves_while_it_uploads_frees_its_place(transcriber):
    service = make_service(transcriber)
    with live(service) as port:
        with send_head(port, length=1000) as connection:
            connection.sendall(PART)
            wait_until(lambda: service.queue.length == 1)
        wait_until(lambda: service.queue.length == 0)


def test_heads_that_are_no_http_or_too_large(transcriber):
    with live(make_service(transcriber)) as port:
        for head in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 200_000 + b"\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                connection.sendall(head)
                assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")


def chunks_of(babble, num_chunks: int) -> list[Chunk]:
    return [Chunk(0, float(number), babble(0.5, number)) for number in range(num_chunks)]


def test_requests_take_turns(transcriber, babble, gate):
    """A short recording that comes behind a long one is done before it."""
    order = []

    async def collect(batcher: Batcher, name: str, num_chunks: int) -> None:
        heard = [each async for each in batcher.heard(chunks_of(babble, num_chunks), word_times=False)]
        assert [each.start for each in heard] == list(range(num_chunks))
        order.append(name)

    async def run() -> None:
        batcher = Batcher(transcriber, DecodingOptions(), batch_size=2)
        batcher.start(Metrics(num_requests=lambda: 0, num_chunks=lambda: batcher.num_waiting))
        long = asyncio.create_task(collect(batcher, "long", 12))
        await asyncio.to_thread(gate.reached.wait)
        short = asyncio.create_task(collect(batcher, "short", 1))
        while batcher.num_waiting < 11:  # one or two of the long one's are at the gate
            await asyncio.sleep(0.01)
        gate.opened.set()
        await asyncio.gather(long, short)
        await asyncio.to_thread(batcher.close)
        assert not batcher.is_alive

    asyncio.run(run())
    assert order == ["short", "long"]


def test_what_is_decoded_for_a_client_leaves_with_it(transcriber, babble, monkeypatch):
    """Its rows leave the batch in the middle of their texts; the row beside them goes on as if nothing were."""
    options = DecodingOptions(strategy="autoregressive")
    ours = [Chunk(0, 0.0, babble(1.2, 7))]
    (expected,) = transcriber.decode(transcriber.encode(ours), options).results
    sizes, step, reached, opened = [], RunningBatch.step, threading.Event(), threading.Event()

    def step_and_wait(running: RunningBatch):
        sizes.append(len(running))
        finished = step(running)
        if len(sizes) == 2:
            reached.set()
            assert opened.wait(60)
        return finished

    monkeypatch.setattr(RunningBatch, "step", step_and_wait)

    async def hear(batcher: Batcher, chunks: list[Chunk]) -> list[list[int]]:
        return [each.segment.tokens async for each in batcher.heard(chunks, word_times=False)]

    async def run() -> list[list[int]]:
        batcher = Batcher(transcriber, options, batch_size=4)
        leaving = asyncio.create_task(hear(batcher, chunks_of(babble, 3)))
        staying = asyncio.create_task(hear(batcher, ours))
        while batcher.num_waiting < 4:
            await asyncio.sleep(0.01)
        batcher.start(Metrics(num_requests=lambda: 0, num_chunks=lambda: batcher.num_waiting))
        await asyncio.to_thread(reached.wait)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        opened.set()
        tokens = await staying
        await asyncio.to_thread(batcher.close)
        return tokens

    assert asyncio.run(run()) == [expected.tokens]
    assert sizes[:2] == [4, 4]
    assert sizes[2:] == [1] * (expected.num_calls - 2)


def test_closing_ends_what_waits(transcriber, babble, gate):
    async def run() -> int:
        batcher = Batcher(transcriber, DecodingOptions(), batch_size=2)
        batcher.start(Metrics(num_requests=lambda: 0, num_chunks=lambda: batcher.num_waiting))

        async def count() -> int:
            return len([each async for each in batcher.heard(chunks_of(babble, 7), word_times=False)])

        counted = asyncio.create_task(count())
        await asyncio.to_thread(gate.reached.wait)
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        gate.opened.set()
        num_segments = await counted
        await closing
        return num_segments

    assert asyncio.run(run()) == 7


def test_bad_limits(transcriber):
    with pytest.raises(ValueError, match="limit timeout must be greater than 0, got 0"):
        Limits(timeout=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        make_service(transcriber, batch_size=0)


def test_names(tiny_model_folder):
    assert served_name(None) == "leapasr-tiny"
    assert served_name(str(tiny_model_folder) + "/") == tiny_model_folder.name
    assert served_name("someone/model") == "someone/model"
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::")] == [True] * 3 + [
        False
    ] * 2


def test_the_page_has_all_it_needs_with_it(client):
    html = client.get("/").text
    for name in re.findall(r'(?:href|src)="(page/[^"]+)"', html):
        assert client.get(f"/{name}").status_code == 200
    assert 'lang="en"' in html
    for file in PAGE.iterdir():
        assert not re.search(r"https?://", file.read_text()), "the page must work offline"


def test_the_openai_client_works_unchanged(transcriber, flac):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    result = transcriber.transcribe(flac(2.5, 1), word_times=True)
    with live(make_service(transcriber), api_key="secret") as port:
        ai = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0)
        assert [model.id for model in ai.models.list()] == [NAME]
        assert ai.models.retrieve(NAME).id == NAME
        create, file = ai.audio.transcriptions.create, ("a.flac", flac(2.5, 1))
        assert create(model=NAME, file=file).text == result.text
        assert create(model=NAME, file=file, response_format="text") == f"{result.text}\n"
        assert create(model=NAME, file=file, response_format="srt") == render(result, "srt", audio="")
        assert create(model=NAME, file=file, response_format="vtt") == render(result, "vtt", audio="")
        verbose = create(
            model=NAME,
            file=file,
            response_format="verbose_json",
            timestamp_granularities=["word", "segment"],
            language="en",
            temperature=0,
        )
        assert (verbose.text, verbose.duration) == (result.text, 2.5)
        assert [word.word for word in verbose.words] == [word.text for each in result.segments for word in each.words]
        assert [segment.text for segment in verbose.segments] == [segment.text for segment in result.segments]
        *deltas, done = create(model=NAME, file=file, stream=True)
        assert "".join(event.delta for event in deltas) == done.text == result.text
        with pytest.raises(openai.BadRequestError, match="the model takes none") as caught:
            create(model=NAME, file=file, prompt="Dear Sir")
        assert caught.value.param == "prompt"
        with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
            create(model="whisper-1", file=file)
        with pytest.raises(openai.AuthenticationError, match="not this server's"):
            ai.with_options(api_key="wrong").audio.transcriptions.create(model=NAME, file=file)
