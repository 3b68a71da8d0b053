"""The server under load, and under what no client should send; docs/serving.md.

    python experiments/serving_load.py --clients 50 --seconds 180 --bad 200 --json docs/serving.json

Load: clients send recordings of mixed lengths, each its next when the last is answered, to a server, and then to one
that decodes one chunk at a time. Every text is compared with the one that `leapasr transcribe` writes for the file.
Faults: one bad request after the other, each followed by a look at whether a good one is still served. With
schemathesis installed, its own requests are made from the OpenAPI schema as well.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import urllib3

import leapasr
from leapasr.audio import SAMPLE_RATE, read_audio
from leapasr.transcribing import audio_files

COMMAND = [sys.executable, "-c", "from leapasr.cli import app; app()"]
SAMPLES = Path(leapasr.__file__).parent / "samples"
PATH = "/v1/audio/transcriptions"
CONTAINERS = {
    "wav": "pcm_s16le",
    "flac": "flac",
    "mp3": "libmp3lame",
    "ogg": "libopus",
    "webm": "libopus",
    "mp4": "aac",
}
MAX_SECONDS = 300  # of a recording, for the server of the faults
ANSWER_SECONDS = 120.0  # a server that is silent for longer, with nothing else to do, hangs
PATIENCE = 600.0  # seconds that a client waits behind others


@dataclass
class Load:
    """What a server did under load; seconds of audio, of wall-clock, and of waiting for an answer; memory in MB."""

    batch_size: int
    num_requests: int = 0
    num_turned_away: int = 0
    problems: Counter = field(default_factory=Counter)
    audio_seconds: float = 0.0
    seconds: float = 0.0
    waits: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        settled = self.memory[len(self.memory) // 5 :]  # what is allocated once, has been
        half = len(settled) // 2
        return {
            "batch_size": self.batch_size,
            "requests": self.num_requests,
            "turned_away": self.num_turned_away,
            "problems": dict(self.problems),
            "audio_seconds": round(self.audio_seconds, 1),
            "seconds": round(self.seconds, 1),
            "rtfx": round(self.audio_seconds / self.seconds, 2),
            "median_wait": round(statistics.median(self.waits), 2) if self.waits else None,
            "longest_wait": round(max(self.waits), 2) if self.waits else None,
            "memory_mb_first_half": round(max(settled[:half], default=0)),
            "memory_mb_second_half": round(max(settled[half:], default=0)),
        }


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[int, subprocess.Popen]]:
    """A server process and its port; it has to exit with 0 in the end."""
    command = [*COMMAND, "serve", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    port = next(
        (int(found[1]) for line in process.stdout if (found := re.search(r"on http://[\d.]+:(\d+)", line))), None
    )
    if port is None:
        raise RuntimeError(f"the server ended with {process.wait()}: {' '.join(command)}")
    drain = threading.Thread(target=process.stdout.read)
    drain.start()
    try:
        yield port, process
    finally:
        process.terminate()
        code = process.wait(ANSWER_SECONDS)
        drain.join()
        if code:
            raise RuntimeError(f"the server ended with {code}")


def memory(process: subprocess.Popen) -> float:
    """Resident memory in MB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def join_recordings(sources: Sequence[Path], folder: Path, *, number: int, seed: int) -> list[Path]:
    """Recordings of mixed lengths: 1 to 8 of `sources`, in any order, with pauses."""
    rng = random.Random(seed)
    speech = [read_audio(path) for path in sources]
    paths = []
    for index in range(number):
        pause = np.zeros(int(rng.uniform(0.2, 1.5) * SAMPLE_RATE), dtype=np.float32)
        pieces = [piece for _ in range(rng.choice([1, 1, 1, 2, 2, 4, 8])) for piece in (rng.choice(speech), pause)]
        paths.append(folder / f"{index:03}.flac")
        soundfile.write(paths[-1], np.concatenate(pieces), SAMPLE_RATE)
    return paths


def texts_of_command(paths: Sequence[Path], folder: Path) -> list[str]:
    """What `leapasr transcribe` writes for each file."""
    subprocess.run([*COMMAND, "transcribe", *map(str, paths), "--output-dir", str(folder)], check=True)
    return [(folder / path.with_suffix(".txt").name).read_text() for path in paths]


def post(
    port: int, audio: bytes, *, name: str = "a", timeout: float = ANSWER_SECONDS, **fields: str
) -> urllib3.BaseHTTPResponse:
    form = {**fields, "file": (name, audio)}
    return urllib3.request("POST", f"http://127.0.0.1:{port}{PATH}", fields=form, timeout=timeout, retries=False)


def load(paths: Sequence[Path], expected: Sequence[str], *, clients: int, seconds: float, batch_size: int) -> Load:
    """Let `clients` send recordings for `seconds`."""
    found, lock = Load(batch_size), threading.Lock()
    audio = [path.read_bytes() for path in paths]
    lengths = [soundfile.info(path).duration for path in paths]

    def client(number: int, port: int, end: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            index, start = rng.randrange(len(paths)), time.monotonic()
            try:
                answer = post(port, audio[index], timeout=PATIENCE, response_format="text")
                status, text = answer.status, answer.data.decode()
            except urllib3.exceptions.HTTPError as error:
                status, text = 0, type(error).__name__
            with lock:
                if status == 429:
                    found.num_turned_away += 1
                else:
                    found.num_requests += 1
                    found.waits.append(time.monotonic() - start)
                    found.audio_seconds += lengths[index]
                    if status != 200:
                        found.problems[f"{status} {text[:100]}"] += 1
                    elif text != expected[index]:
                        found.problems["another text than the command's"] += 1
            if status == 429:
                time.sleep(float(answer.headers["Retry-After"]))

    with serving("--batch-size", batch_size) as (port, process):
        start = time.monotonic()
        threads = [threading.Thread(target=client, args=(number, port, start + seconds)) for number in range(clients)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            found.memory.append(memory(process))
            time.sleep(1)
        found.seconds = time.monotonic() - start
    return found


# --- what no client should send: each of these gives an answer's status and text


def encode(samples: np.ndarray, container: str, codec: str) -> bytes:
    """Samples as a file of any container."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        for piece in (*av.AudioResampler(stream.format, "mono", 48_000).resample(frame), None):
            output.mux(stream.encode(piece))  # type: ignore[attr-defined]
    return file.getvalue()


def answer(port: int, data: bytes, *, pause: float = 0.0, leave: bool = False) -> tuple[int, str]:
    """Send bytes, in two pieces with a pause if asked for, and read the answer, if the client does not leave before."""
    text = ""
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS) as connection:
        try:
            connection.sendall(data[: len(data) // 2])
            time.sleep(pause)
            connection.sendall(data[len(data) // 2 :])
        except ConnectionError:
            pass  # refused before its end: the answer may be there
        if leave:
            return 0, "left"
        try:
            while piece := connection.recv(65_536):
                text += piece.decode(errors="replace")
        except ConnectionError:
            pass  # the server does not wait for the rest of what it has refused
        except TimeoutError:
            return -1, "no answer"
    return (int(text.split()[1]), text.partition("\r\n\r\n")[2]) if text.startswith("HTTP/1.1 ") else (-1, text)


def request(
    body: bytes, *, kind: str = "multipart/form-data; boundary=b", length: int | None = None, more: str = ""
) -> bytes:
    size = len(body) if length is None else length
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n"
    return f"{head}{more}\r\n".encode() + body


def form(audio: bytes, **fields: str) -> bytes:
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()
    ]
    head = '--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    return "".join([*parts, head]).encode() + audio + b"\r\n--b--\r\n"


def bad_requests(
    speech: np.ndarray, *, number: int, seed: int
) -> Iterator[tuple[str, Callable[[int], tuple[int, str]]]]:
    """(kind, what to do at a port) of `number` requests, all kinds in turn."""
    rng = random.Random(seed)
    files = {name: encode(speech, name, codec) for name, codec in CONTAINERS.items()}
    bomb = io.BytesIO()
    soundfile.write(bomb, np.zeros(20 * MAX_SECONDS * SAMPLE_RATE, dtype=np.int16), SAMPLE_RATE, format="flac")

    def sent(audio: bytes, **fields: str) -> Callable[[int], tuple[int, str]]:
        return lambda port: answer(port, request(form(audio, **fields)))

    def damaged(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(rng.choice([1, 10, 100, 1000])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)

    names = [
        "../../etc/passwd",
        "/dev/zero",
        "a\\..\\b",
        "%2e%2e/x",
        "a\0b",
        "x" * 1000,
        "file:///etc/passwd",
        "|id",
        "con",
    ]
    fields = [
        {"language": "xx"},
        {"prompt": "x" * 10_000},
        {"temperature": "nan"},
        {"response_format": "exe"},
        {"stream": "2"},
        {"model": "../x"},
        {"timestamp_granularities[]": "phone"},
        {"x" * 2000: "1"},
    ]

    def endless() -> Iterator[tuple[str, Callable[[int], tuple[int, str]]]]:
        while True:
            for name, data in files.items():
                yield f"cut short: {name}", sent(data[: rng.randrange(len(data))])
                yield f"damaged: {name}", sent(damaged(data))
                yield f"damaged head: {name}", sent(damaged(data[:200]) + data[200:])
            yield "no audio", sent(rng.randbytes(rng.randrange(5000)))
            yield "playlist of local files", sent(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
            yield "silence bomb", sent(bomb.getvalue())
            yield "fields", sent(files["flac"], **rng.choice(fields))
            name = rng.choice(names)
            yield (
                "file name",
                lambda port, name=name: (lambda got: (got.status, got.data.decode()))(
                    post(port, files["flac"], name=name)
                ),
            )
            yield "no form", lambda port: answer(port, request(rng.randbytes(500), kind="application/json"))
            yield "damaged form", lambda port: answer(port, request(damaged(form(files["flac"])[:300])))
            yield "huge header", lambda port: answer(port, request(b"", more=f"X: {'x' * 200_000}\r\n"))
            yield "many headers", lambda port: answer(port, request(b"", more="X: y\r\n" * 20_000))
            yield "no HTTP", lambda port: answer(port, rng.randbytes(300) + b"\r\n\r\n")
            yield "too large", lambda port: answer(port, request(b"x" * 100_000, length=10**12))
            yield "slow upload", lambda port: answer(port, request(form(files["flac"])), pause=3)
            yield (
                "left while uploading",
                lambda port: answer(port, request(form(files["flac"]), length=10**6), leave=True),
            )
            yield "left while waiting", lambda port: answer(port, request(form(files["flac"])), leave=True)
            yield "left a stream", lambda port: answer(port, request(form(files["flac"], stream="true")), leave=True)

    made = endless()
    for _ in range(number):
        yield next(made)


GOOD = ("slow upload", "file name")  # what is not as bad as it looks


def faults(speech: Path, expected: str, *, number: int, seed: int) -> dict[str, dict[str, int]]:
    """For each kind of bad request how often it got which answer; a problem is one that it should not have got."""
    found: dict[str, Counter] = {}
    with serving("--max-seconds", MAX_SECONDS, "--timeout", 30) as (port, process):
        for kind, send in bad_requests(read_audio(speech), number=number, seed=seed):
            status, text = send(port)
            if kind in GOOD:
                is_right = status == 200 and json.loads(text)["text"] == expected.strip()
            elif kind.startswith("left"):
                is_right = status == 0
            elif kind.startswith(("cut", "damaged:", "damaged head")) and status == 200:
                is_right = True  # what is left is a recording, too
            elif kind in ("huge header", "many headers", "no HTTP"):
                is_right = 400 <= status < 500
            else:
                is_right = 400 <= status < 500 and len(json.loads(text)["error"]["message"]) > 20
            counts = found.setdefault(kind, Counter())
            counts[str(status)] += 1
            good = post(port, speech.read_bytes(), response_format="text")
            if not is_right or process.poll() is not None or (good.status, good.data.decode()) != (200, expected):
                counts["problems"] += 1
                print(f"{kind}: {status} {text[:300]}; a good request: {good.status}", file=sys.stderr)
    return {kind: dict(counts) for kind, counts in found.items()}


def schema(*, examples: int) -> str | None:
    """What schemathesis says in its last lines; None where it is not installed."""
    program = shutil.which("schemathesis")
    if program is None:
        return None
    with serving("--timeout", 30) as (port, _):
        url = f"http://127.0.0.1:{port}/openapi.json"
        command = [program, "run", url, "--max-examples", str(examples), "--no-color"]
        command += ["--exclude-checks", "positive_data_acceptance"]  # no schema tells which bytes are audio
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    return f"exit code {done.returncode}: " + " ".join(done.stdout.split()[-40:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audio", type=Path, nargs="+", default=[SAMPLES], help="speech to make recordings of")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=180, help="of load, for each of the two servers")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--recordings", type=int, default=40, help="different recordings that clients send")
    parser.add_argument("--bad", type=int, default=200, help="bad requests")
    parser.add_argument("--examples", type=int, default=100, help="requests that schemathesis makes of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    numbers = {key: value for key, value in vars(arguments).items() if isinstance(value, int | float)}
    results: dict[str, Any] = {"arguments": numbers}

    def keep(**figures: Any) -> None:
        results.update(figures)
        print(json.dumps(figures, indent=2), flush=True)
        if arguments.json:
            arguments.json.write_text(f"{json.dumps(results, indent=2)}\n")

    sources = audio_files(arguments.audio)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = join_recordings(sources, folder, number=arguments.recordings, seed=arguments.seed)
        expected = texts_of_command(paths, folder / "texts")
        if arguments.seconds:
            loads = [
                load(paths, expected, clients=arguments.clients, seconds=arguments.seconds, batch_size=size).figures()
                for size in (arguments.batch_size, 1)
            ]
            keep(load=loads, throughput_ratio=round(loads[0]["rtfx"] / loads[1]["rtfx"], 2))
        if arguments.bad:
            shortest = min(range(len(paths)), key=lambda index: soundfile.info(paths[index]).duration)
            keep(faults=faults(paths[shortest], expected[shortest], number=arguments.bad, seed=arguments.seed))
        if arguments.examples:
            keep(schemathesis=schema(examples=arguments.examples))


if __name__ == "__main__":
    main()
