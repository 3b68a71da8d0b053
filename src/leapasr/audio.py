"""Any audio container to 16 kHz mono float32 samples, and long recordings cut at silences."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import av
import numpy as np
import soxr

SAMPLE_RATE = 16_000
FRAME = 160  # samples: energy is measured in frames of 10 ms
QUIET_FRAMES = 20  # a cut is judged by the 0.2 s around it
NOTED_GAP_SECONDS = 0.5  # shorter holes in a damaged file are not warned about
UNKNOWN_RIFF_BYTES = 0x7FFF0000
SHORTEST_REST_SECONDS = 1.0  # what is left behind the last cut is not shorter, where that can be had
METADATA_ERRORS = "replace"  # titles and names are of no use here, in whatever encoding they are

_FULL_SCALE = {"u1": 2.0**7, "i2": 2.0**15, "i4": 2.0**31, "i8": 2.0**63}


class AudioError(ValueError):
    """Audio that cannot be read; the message names the source and says what is wrong with it."""


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Resample mono float32 `samples` (num_samples,) from `rate` Hz to 16 kHz."""
    if rate == SAMPLE_RATE:
        return samples.astype(np.float32, copy=False)
    return soxr.resample(samples, rate, SAMPLE_RATE).astype(np.float32, copy=False)


Source = str | os.PathLike | bytes | IO[bytes]


def read_audio(source: Source, *, max_seconds: float = math.inf, strict: bool = False) -> np.ndarray:
    """Decode audio of any container, codec, rate and channel count.

    The memory taken is that of the result. Of a damaged file what can be decoded is given, with a warning that says
    what is missing and where.

    Args:
        source: path of a local file, a file's bytes, or a binary file object that can seek.
        max_seconds: longer audio is an error, found while decoding, whatever length the file declares.
        strict: damage is an error, not a warning.

    Returns:
        Samples (num_samples,), float32, mono (the mean of the channels), 16 kHz.

    Raises:
        AudioError: the file is missing, a directory, empty, not audio, without an audio stream or without samples;
            it is longer than `max_seconds`; or, if `strict`, it is damaged.
    """
    samples, length = np.empty(SAMPLE_RATE, dtype=np.float32), 0
    for block in read_blocks(source, max_seconds=max_seconds, strict=strict):
        end = length + len(block)
        if end > len(samples):
            samples.resize(max(end, len(samples) * 5 // 4), refcheck=False)
        samples[length:end] = block
        length = end
    samples.resize(length, refcheck=False)
    return samples


def read_blocks(source: Source, *, max_seconds: float = math.inf, strict: bool = False) -> Iterator[np.ndarray]:
    """What `read_audio` gives, in blocks of about a second, decoded and resampled as they are asked for.

    Args, warnings and errors are those of `read_audio`; errors come before the first block, but for those of
    `max_seconds` and `strict`, which come when they are found.
    """
    name, file = _opened(source)
    # A playlist inside the file must not make FFmpeg open anything else.
    options = {"protocol_whitelist": "file" if isinstance(file, str) else "pipe"}
    num_samples = 0
    try:
        declared = _declared_bytes(file)
        with av.open(file, mode="r", options=options, metadata_errors=METADATA_ERRORS) as container:
            stream = container.streams.best("audio")
            if not isinstance(stream, av.AudioStream):
                raise AudioError(f"{name} has no audio stream, only {_kinds(container)}: give a file with sound")
            damage = []
            if 0 < container.size < declared:
                damage.append(f"the file says that it has {declared} bytes, and {container.size} are there")
            for block in _decode(container, stream, name, damage, max_seconds=max_seconds, strict=strict):
                num_samples += len(block)
                yield block
    except (av.FFmpegError, OSError) as error:
        raise AudioError(f"{name} cannot be read as audio ({error.strerror}): corrupt, or no audio file") from error
    if not num_samples:
        raise AudioError(f"{name} has an audio stream but not one sample could be decoded: corrupt or zero-length")


def declared_seconds(path: str | os.PathLike) -> float | None:
    """How long a file says that its audio is, nothing decoded; None where it does not say, or cannot be read."""
    try:
        _, file = _opened(path)
        options = {"protocol_whitelist": "file"}
        with av.open(file, mode="r", options=options, metadata_errors=METADATA_ERRORS) as container:
            stream = container.streams.best("audio")
            return _declared_seconds(container, stream) or None if isinstance(stream, av.AudioStream) else None
    except (AudioError, av.FFmpegError, OSError):
        return None


def _opened(source: Source) -> tuple[str, str | IO[bytes]]:
    """A name for messages, and what FFmpeg is to open."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise AudioError("the audio given as bytes is empty (0 bytes)")
        return f"audio of {len(source)} bytes", io.BytesIO(source)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            raise AudioError(f"{path} is a directory: give an audio file")
        if not path.exists():
            raise AudioError(f"audio file not found: {path}")
        if path.is_file() and path.stat().st_size == 0:
            raise AudioError(f"{path} is empty (0 bytes)")
        return str(path), f"file:{path.absolute()}"
    if not hasattr(source, "read"):
        raise AudioError(f"audio must be a path, a file's bytes or a binary file object, got {source!r:.80}")
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else "the audio file object", source


def _declared_bytes(file: str | IO[bytes]) -> int:
    """How many bytes a WAV file says that it has, which FFmpeg does not miss where it is cut short; 0 of any other."""
    if isinstance(file, str):
        with open(file.removeprefix("file:"), "rb") as opened:
            return _declared_bytes(opened) if opened.seekable() else 0
    if not hasattr(file, "seekable") or not file.seekable():
        return 0
    place = file.tell()
    head = file.read(12)
    file.seek(place)
    size = int.from_bytes(head[4:8], "little")
    is_known = size < UNKNOWN_RIFF_BYTES  # a writer that cannot go back to its head leaves the largest number there
    return size + 8 if head[:4] == b"RIFF" and head[8:] == b"WAVE" and is_known else 0


def _kinds(container: av.container.InputContainer) -> str:
    return ", ".join(sorted({stream.type for stream in container.streams})) or "no streams"


def _decode(
    container: av.container.InputContainer,
    stream: av.AudioStream,
    name: str,
    damage: list[str],
    *,
    max_seconds: float,
    strict: bool,
) -> Iterator[np.ndarray]:
    """Blocks of samples at 16 kHz; behind the last a warning, or an error if `strict`, tells of all `damage`."""
    resampler = _Resampler()
    now = None  # where the next frame should start, by the file's own clock
    try:
        for packet in container.demux(stream):
            for frame in _frames(packet):
                if frame.time is not None:
                    if now is not None and frame.time - now > NOTED_GAP_SECONDS:
                        damage.append(f"{frame.time - now:.2f} s are missing at {now:.2f} s")
                    now = frame.time
                now = (now or 0.0) + frame.samples / frame.sample_rate
                yield from resampler.add(_mono(frame), frame.sample_rate)
                if resampler.seconds > max_seconds:
                    raise AudioError(f"{name} is longer than {max_seconds:g} s: cut it, and give the pieces")
    except av.FFmpegError as error:
        damage.append(f"decoding stopped at {resampler.seconds:.2f} s: {error.strerror}")
    yield from resampler.finish()
    decoded, declared = resampler.seconds, _declared_seconds(container, stream)
    if declared - decoded > max(NOTED_GAP_SECONDS, 0.02 * declared) and not damage:
        damage.append(f"decoding stopped at {decoded:.2f} s, though the file says that it is {declared:.2f} s long")
    if damage and decoded:
        message = f"{name} is damaged: {'; '.join(damage[:5])}; {decoded:.2f} s were decoded"
        if strict:
            raise AudioError(message)
        warnings.warn(message, stacklevel=4)


def _frames(packet: av.Packet) -> list[av.AudioFrame]:
    """The frames of a packet, none where it is damaged (the gap shows in the timestamps)."""
    try:
        return cast(list[av.AudioFrame], packet.decode())
    except av.FFmpegError:
        return []


def _declared_seconds(container: av.container.InputContainer, stream: av.AudioStream) -> float:
    """How long the file says the audio is; 0 where it does not say."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration and len(container.streams) == 1 else 0.0


def _mono(frame: av.AudioFrame) -> np.ndarray:
    """The mean of a frame's channels, (num_samples,) float32 in [-1, 1]; samples that are not numbers become 0."""
    data = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(-1, frame.layout.nb_channels).T
    kind = data.dtype.str[1:]
    mono = data[0].astype(np.float32) if len(data) == 1 else data.mean(axis=0, dtype=np.float32)
    if kind == "u1":
        mono -= 128
    if kind in _FULL_SCALE:
        mono /= _FULL_SCALE[kind]
    else:
        np.nan_to_num(mono, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    return mono


class _Resampler:
    """Mono blocks of any rate, which may change, to blocks of about a second at 16 kHz."""

    def __init__(self) -> None:
        self._rate = SAMPLE_RATE
        self._resampler: soxr.ResampleStream | None = None
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self.seconds = 0.0  # taken so far

    def add(self, block: np.ndarray, rate: int) -> Iterator[np.ndarray]:
        if rate != self._rate:
            yield from self.finish()
            self._rate = rate
            self._resampler = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32")
        self._pending.append(block)
        self._num_pending += len(block)
        self.seconds += len(block) / rate
        if self._num_pending >= rate:
            yield from self._push(last=False)

    def finish(self) -> Iterator[np.ndarray]:
        yield from self._push(last=True)

    def _push(self, *, last: bool) -> Iterator[np.ndarray]:
        block = np.concatenate([*self._pending, np.empty(0, dtype=np.float32)])
        self._pending, self._num_pending = [], 0
        if self._resampler:
            block = self._resampler.resample_chunk(block, last=last)
        if len(block):
            yield block


def is_silent(samples: np.ndarray, *, threshold_dbfs: float = -65.0) -> bool:
    """Whether no 10 ms of `samples` (num_samples,) are louder than `threshold_dbfs` (RMS, dB below full scale)."""
    energies = _frame_energies(samples)
    return not len(energies) or float(energies.max()) <= 10 ** (threshold_dbfs / 10)


def _frame_energies(samples: np.ndarray) -> np.ndarray:
    """Mean square of each 10 ms: (num_samples,) → (ceil(num_samples / 160),) float64."""
    num_whole = len(samples) // FRAME
    whole = samples[: num_whole * FRAME].reshape(num_whole, FRAME)
    energies = np.einsum("tf,tf->t", whole, whole).astype(np.float64) / FRAME
    rest = samples[num_whole * FRAME :]
    return np.append(energies, np.mean(np.square(rest, dtype=np.float64))) if len(rest) else energies


def cut_at_silences(
    samples: np.ndarray, *, max_seconds: float, search_seconds: float | None = None
) -> list[tuple[int, int]]:
    """Cut a recording into consecutive chunks, each at the quietest place of the last part of what it may hold.

    Args:
        samples: (num_samples,), 16 kHz.
        max_seconds: no chunk is longer.
        search_seconds: the part before the limit in which the quietest place is sought; a third of `max_seconds`
            if None.

    Returns:
        (start, end) of each chunk in samples: the first starts at 0, each starts where the one before ends,
        the last ends with the recording. Empty for no samples.

    Raises:
        ValueError: `max_seconds` is less than a sample, or `search_seconds` is negative.
    """
    longest = int(max_seconds * SAMPLE_RATE)
    search = longest // 3 if search_seconds is None else int(search_seconds * SAMPLE_RATE)
    if longest < 1:
        raise ValueError(f"max_seconds must be at least one sample (1/{SAMPLE_RATE} s), got {max_seconds}")
    if search < 0:
        raise ValueError(f"search_seconds must not be negative, got {search_seconds}")
    loudness = _loudness_at_frame_starts(samples) if len(samples) > longest else np.empty(0)
    chunks, start = [], 0
    while len(samples) - start > longest:
        latest = start + longest
        room_for_rest = len(samples) - int(SHORTEST_REST_SECONDS * SAMPLE_RATE)
        if start + longest // 2 < room_for_rest < latest:
            latest = room_for_rest
        earliest = max(start + 1, latest - search)
        first, last = -(-earliest // FRAME), latest // FRAME
        end = latest
        if first <= last:
            candidates = loudness[first : last + 1]
            end = (last - int(np.argmin(candidates[::-1]))) * FRAME
        chunks.append((start, end))
        start = end
    if start < len(samples):
        chunks.append((start, len(samples)))
    return chunks


def _loudness_at_frame_starts(samples: np.ndarray) -> np.ndarray:
    """Summed energy of the 0.2 s around the start of each 10 ms frame, (num_frames + 1,)."""
    total = np.concatenate([[0.0], np.cumsum(_frame_energies(samples))])
    places = np.arange(len(total))
    after = np.minimum(places + QUIET_FRAMES // 2, len(total) - 1)
    before = np.maximum(places - QUIET_FRAMES // 2, 0)
    return total[after] - total[before]
