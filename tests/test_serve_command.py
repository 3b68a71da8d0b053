"""`leapasr serve` as a process: what it says, and how it ends."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import soundfile

from leapasr.audio import SAMPLE_RATE
from leapasr.transcriber import load

COMMAND = [sys.executable, "-c", "from leapasr.cli import app; app()", "serve"]


@pytest.fixture
def server(tiny_model_folder) -> Iterator[subprocess.Popen]:
    arguments = ["--model", str(tiny_model_folder), "--device", "cpu", "--port", "0"]
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    yield process
    process.kill()
    process.wait()


def port_of(server: subprocess.Popen) -> int:
    said = []
    for line in server.stdout:
        said.append(line)
        if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
            return int(found[1])
    raise AssertionError(f"it never started: {''.join(said)}")


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionError:
        return True
    return False


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(10_000), b""))


def test_sigterm_finishes_what_is_in_hand_refuses_the_rest_and_exits_0(server, tiny_model_folder, babble, tmp_path):
    soundfile.write(tmp_path / "a.flac", babble(2, 1), SAMPLE_RATE)
    expected = load(tiny_model_folder, device="cpu").transcribe(tmp_path / "a.flac").text
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    body = form + (tmp_path / "a.flac").read_bytes() + b"\r\n--b--\r\n"
    head = f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n\r\n"
    port = port_of(server)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\n{head}".encode() + body[:1000])
        with socket.create_connection(("127.0.0.1", port), timeout=60) as other:
            other.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert b"leapasr_requests_in_hand 1.0" in read_all(other)
        server.send_signal(signal.SIGTERM)
        while not is_refused(port):
            assert server.poll() is None
        connection.sendall(body[1000:])
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert expected.encode() in answer
    assert server.wait(60) == 0
    assert "Traceback" not in server.stdout.read()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "nowhere"], 2, "model folder not found: nowhere"),
        (["--timeout", "0"], 2, "limit timeout must be greater than 0, got 0"),
        (["--port", "70000"], 2, "65535"),
    ],
)
def test_bad_arguments(arguments, code, message):
    from typer.testing import CliRunner

    from leapasr.cli import app

    result = CliRunner().invoke(app, ["serve", *arguments])
    assert (result.exit_code, message in result.output) == (code, True), result.output


def test_a_port_that_is_taken(tiny_model_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*COMMAND, "--model", str(tiny_model_folder), "--device", "cpu", "--port", port],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1
    assert "address already in use" in done.stderr
    assert f"leapasr: the server did not start at 127.0.0.1, port {port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_extra(monkeypatch):
    import importlib.util

    from typer.testing import CliRunner

    from leapasr.cli import app

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else find(name))
    for name in [name for name in sys.modules if name.startswith("leapasr.serving")]:
        monkeypatch.delitem(sys.modules, name)
    result = CliRunner().invoke(app, ["serve"])
    assert result.exit_code == 1
    assert "the server needs fastapi: pip install 'leapasr[serve]'" in result.output
