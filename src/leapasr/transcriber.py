"""Transcriber: audio in, text out. Joins audio, processor, model and decoding; `load` makes one.

Shapes: B rows, T CTC frames, V vocabulary.
"""

from __future__ import annotations

import importlib.resources
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from leapasr.audio import SAMPLE_RATE, AudioError, read_audio
from leapasr.chunks import Chunk, by_length, cut_recording, windows
from leapasr.decoding import DecodingLoop, DecodingOptions, DecodingResult, Prompts, SpeechLlamaDecoder, build_loop
from leapasr.decoding.costs import FREE, CallCosts, known_costs
from leapasr.decoding.ctc import greedy_ctc, read_ctc
from leapasr.decoding.drafts import Drafter, build_drafter
from leapasr.decoding.guards import MAX_TOKENS_AT_LEAST, MAX_TOKENS_PER_SECOND, token_bound
from leapasr.model.checkpoints import CheckpointError
from leapasr.model.encoders import FEATURE_RATE
from leapasr.model.processing import SpeechLlamaProcessor
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration
from leapasr.transcription import Segment, Transcription, timed_words, token_times

MAX_CHUNK_SECONDS = 25.0

DEFAULT_OPTIONS = DecodingOptions()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Audio = str | os.PathLike | bytes | np.ndarray


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """Chunks on the decoder's side of the encoder.

    Attributes:
        chunks: B chunks.
        prompts: the decoder's prompts.
        max_tokens: each row's token bound.
        ctc_logits_BTV, ctc_lengths_B: CTC logits (B, T, V), `model.ctc_frame_rate` frames a second, and lengths (B,).
        seconds: time that features and encoder took.
    """

    chunks: Sequence[Chunk]
    prompts: Prompts
    max_tokens: list[int]
    ctc_logits_BTV: Tensor
    ctc_lengths_B: Tensor
    seconds: float


@dataclass(frozen=True, eq=False)
class DecodedChunk:
    """The result for row `row` of a batch, and its share of the seconds that decoding took."""

    batch: EncodedBatch
    row: int
    result: DecodingResult
    seconds: float

    @property
    def chunk(self) -> Chunk:
        return self.batch.chunks[self.row]

    @property
    def encoder_seconds(self) -> float:
        """Its share, by length, of the seconds that encoding the batch took."""
        return self.batch.seconds * self.chunk.seconds / sum(chunk.seconds for chunk in self.batch.chunks)


@dataclass(frozen=True)
class DecodedBatch:
    """A result for each chunk of a batch, and the seconds that decoding took."""

    results: list[DecodingResult]
    seconds: float


class Transcriber:
    """A model and its processor, ready to transcribe.

    Args:
        model: in evaluation mode, on its device and in its dtype.
        processor: features and tokenizer of the model.
    """

    def __init__(self, model: SpeechLlamaForConditionalGeneration, processor: SpeechLlamaProcessor):
        self.model = model.eval()
        self.processor = processor
        self.decoder = SpeechLlamaDecoder(model)

    @cached_property
    def costs(self) -> CallCosts:
        """Of decoder calls on this machine: measured when they are first needed, then kept in a file."""
        return known_costs(self.decoder, self.model.config.decoder_config.to_json_string())

    @property
    def max_seconds(self) -> float:
        """Audio that is encoded and decoded at once; longer recordings are cut at silences."""
        prompt_rate = self.model.ctc_frame_rate / self.model.config.decoder_stacking
        room = self.decoder.max_positions - MAX_TOKENS_AT_LEAST - 2
        return min(
            MAX_CHUNK_SECONDS,
            self.model.encoder.max_feature_frames / FEATURE_RATE,
            room / (prompt_rate + MAX_TOKENS_PER_SECOND),
        )

    @overload
    def transcribe(
        self, audio: Audio, options: DecodingOptions = ..., *, batch_size: int = ..., word_times: bool = ...
    ) -> Transcription: ...  # fmt: skip

    @overload
    def transcribe(
        self, audio: list[Audio], options: DecodingOptions = ..., *, batch_size: int = ..., word_times: bool = ...
    ) -> list[Transcription]: ...  # fmt: skip

    def transcribe(self, audio, options=DEFAULT_OPTIONS, *, batch_size=8, word_times=False):
        """Transcribe one recording, or each of a list.

        Args:
            audio: a file's path, a file's bytes, 16 kHz mono samples (num_samples,), or a list of these.
            options: how to decode.
            batch_size: chunks of at most `max_seconds` that are computed together, whatever recordings they are of.
            word_times: give each segment its words with times, from the encoder's CTC output.

        Returns:
            a transcription, or a list of them for a list.

        Raises:
            AudioError: audio cannot be read; of a list, nothing is returned then (see `transcribe_each`).
            ValueError: the options do not fit the model, or `batch_size` is less than 1.
        """
        is_list = isinstance(audio, (list, tuple))
        results = {}
        sources = audio if is_list else [audio]
        for index, result in self.transcribe_each(sources, options, batch_size=batch_size, word_times=word_times):
            if isinstance(result, AudioError):
                raise result
            results[index] = result
        return [results[index] for index in range(len(results))] if is_list else results[0]

    def transcribe_each(
        self,
        sources: Iterable[Audio],
        options: DecodingOptions = DEFAULT_OPTIONS,
        *,
        batch_size: int = 8,
        word_times: bool = False,
        progress: Callable[[float], None] | None = None,
    ) -> Iterator[tuple[int, Transcription | AudioError]]:
        """Transcribe any number of recordings: yields the index of each, with its transcription or what is wrong.

        About half an hour of audio is read, transcribed and yielded at a time.

        Args:
            progress: called with the seconds of audio transcribed since it was last called, silence left out.

        Raises:
            ValueError: as in `transcribe`.
        """
        options.check(self.decoder.num_heads)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        errors: list[tuple[int, AudioError]] = []

        def readable() -> Iterator[tuple[int, np.ndarray]]:
            for index, source in enumerate(sources):
                try:
                    yield index, as_samples(source)
                except AudioError as error:
                    errors.append((index, error))

        for window in windows(readable()):
            yield from _drained(errors)
            yield from self._transcribe_window(window, options, batch_size, word_times, progress)
        yield from _drained(errors)

    def _transcribe_window(
        self,
        window: Sequence[tuple[int, np.ndarray]],
        options: DecodingOptions,
        batch_size: int,
        word_times: bool,
        progress: Callable[[float], None] | None,
    ) -> Iterator[tuple[int, Transcription]]:
        segments: dict[int, list[Segment]] = {index: [] for index, _ in window}
        seconds = {index: np.zeros(2) for index, _ in window}
        batches = (self.encode(chunks) for chunks in by_length(self.cut(window), batch_size))
        for done in self.decode_each(batches, options, num_left=batch_size // 2):
            recording = done.chunk.recording
            segments[recording].append(self.segment(done, word_times=word_times))
            seconds[recording] += np.array([done.encoder_seconds, done.seconds])
            if progress:
                progress(done.chunk.seconds)
        for index, samples in window:
            ordered = sorted(segments[index], key=lambda segment: segment.start)
            yield index, Transcription(ordered, len(samples) / SAMPLE_RATE, *map(float, seconds[index]))

    def segment(self, done: DecodedChunk, *, word_times: bool = False) -> Segment:
        """What is said in a chunk, with the times of its words if `word_times`."""
        result = done.result
        times = self._token_times(done.batch, done.row, result.tokens) if word_times else []
        return Segment(
            start=done.chunk.start,
            end=done.chunk.end,
            text=self.processor.decode_text(result.tokens),
            tokens=result.tokens,
            decoder_calls=result.num_calls,
            truncated=result.truncated,
            trace=result.trace,
            alternatives=[(self.processor.decode_text(each.tokens), each.score) for each in result.hypotheses],
            words=timed_words(result.tokens, times, self.processor),
            token_times=times,
        )

    def _token_times(self, batch: EncodedBatch, row: int, tokens: list[int]) -> list[tuple[float, float]]:
        num_frames, chunk = int(batch.ctc_lengths_B[row]), batch.chunks[row]
        return token_times(
            tokens,
            batch.ctc_logits_BTV[row, :num_frames].float().log_softmax(-1),
            frame_rate=self.model.ctc_frame_rate,
            blank=self.model.config.blank_token_id,
            start=chunk.start,
            end=chunk.end,
        )

    def cut(self, recordings: Iterable[tuple[int, np.ndarray]]) -> list[Chunk[int]]:
        """The chunks of recordings (key, samples) that can hold speech, none longer than `max_seconds`."""
        return [
            chunk for key, samples in recordings for chunk in cut_recording(key, samples, max_seconds=self.max_seconds)
        ]

    @torch.inference_mode()
    def encode(self, chunks: Sequence[Chunk]) -> EncodedBatch:
        """Features, encoder and adapter of chunks, none longer than `max_seconds`."""
        model = self.model
        with _timed(model.device) as timer:
            features, lengths_B = self.processor.pad([self.processor.features(chunk.samples) for chunk in chunks])
            encoding = model.encode(features.to(model.device, model.dtype), lengths_B.to(model.device))
            prompts = Prompts(*model.prompt(encoding))
        return EncodedBatch(
            chunks=chunks,
            prompts=prompts,
            max_tokens=[token_bound(length / model.ctc_frame_rate) for length in encoding.ctc_lengths_B.tolist()],
            ctc_logits_BTV=encoding.ctc_logits_BTV,
            ctc_lengths_B=encoding.ctc_lengths_B,
            seconds=timer.seconds,
        )

    def decode(self, batch: EncodedBatch, options: DecodingOptions) -> DecodedBatch:
        """Decode a batch; it may be decoded again with other options.

        Raises:
            ValueError: the options do not fit the model.
        """
        done = sorted(self.decode_each([batch], options), key=lambda each: each.row)
        return DecodedBatch([each.result for each in done], sum(each.seconds for each in done))

    def decode_each(
        self, batches: Iterable[EncodedBatch], options: DecodingOptions, *, num_left: int = 0
    ) -> Iterator[DecodedChunk]:
        """Decode batches as they come (continuous batching): yields each chunk when it is done.

        Args:
            batches: taken one at a time, so a generator may encode them.
            num_left: rows of earlier batches that may be left when the next one is taken and joins them.

        Raises:
            ValueError: the options do not fit the model.
        """
        running = self.running(options)
        for batch in batches:
            running.add(batch)
            while len(running) > num_left:
                yield from running.step()
        while running:
            yield from running.step()

    def running(self, options: DecodingOptions) -> RunningBatch:
        """A batch without chunks, to be decoded with `options`.

        Raises:
            ValueError: the options do not fit the model.
        """
        costs = self.costs if options.draft_length_used == "worthwhile" else FREE
        return RunningBatch(self, build_loop(self.decoder, options, costs=costs))

    def drafters(self, batch: EncodedBatch, options: DecodingOptions) -> list[Drafter] | None:
        """A draft source for each chunk that starts from what CTC reads there; None if `options` have no use for it."""
        if not options.reads_ctc:
            return None
        end_token = min(self.decoder.end_tokens)
        readings = read_ctc(batch.ctc_logits_BTV, batch.ctc_lengths_B, blank=self.model.config.blank_token_id)
        return [build_drafter(options, reading, end_token=end_token) for reading in readings]

    def decode_ctc(self, batch: EncodedBatch) -> DecodedBatch:
        """What the CTC head alone says, greedily, without one decoder call and without a trace."""
        with _timed(self.model.device) as timer:
            rows = greedy_ctc(batch.ctc_logits_BTV, batch.ctc_lengths_B, blank=self.model.config.blank_token_id)
        return DecodedBatch(
            [DecodingResult(tokens, num_calls=0, trace=[], truncated=None) for tokens in rows], timer.seconds
        )

    def ctc_text(self, audio: Audio) -> str:
        """What the CTC head alone writes for one recording, greedily; arguments and errors as in `transcribe`."""
        batches = (self.encode([chunk]) for chunk in self.cut([(0, as_samples(audio))]))
        texts = [self.processor.decode_text(self.decode_ctc(batch).results[0].tokens) for batch in batches]
        return " ".join(filter(None, texts))


class RunningBatch:
    """Chunks that are being decoded together; more may join at any time (continuous batching).

    What a chunk gets does not depend on the chunks beside it.

    Args:
        transcriber: has encoded the chunks.
        loop: without rows.
    """

    def __init__(self, transcriber: Transcriber, loop: DecodingLoop):
        self._transcriber, self._loop = transcriber, loop
        self._rows: dict[int, tuple[EncodedBatch, int]] = {}
        self._seconds: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def chunks(self) -> list[Chunk]:
        """Those that are being decoded."""
        return [batch.chunks[row] for batch, row in self._rows.values()]

    def add(self, batch: EncodedBatch) -> None:
        """Let the chunks of `batch` join."""
        with _timed(self._transcriber.model.device) as timer:
            drafters = self._transcriber.drafters(batch, self._loop.options)
            keys = self._loop.add(batch.prompts, max_tokens=batch.max_tokens, drafters=drafters)
        self._rows |= {key: (batch, row) for row, key in enumerate(keys)}
        self._seconds |= dict.fromkeys(keys, timer.seconds / max(1, len(keys)))

    def step(self) -> list[DecodedChunk]:
        """One decoder call: gives the chunks that it ended."""
        with _timed(self._transcriber.model.device) as timer:
            finished = self._loop.step()
        for key in self._rows:
            self._seconds[key] += timer.seconds / len(self._rows)
        return [DecodedChunk(*self._rows.pop(key), result, self._seconds.pop(key)) for key, result in finished.items()]


def _drained(items: list) -> Iterator:
    while items:
        yield items.pop(0)


class _Timer:
    seconds = math.nan


@contextmanager
def _timed(device: torch.device) -> Iterator[_Timer]:
    """Wall-clock seconds of the block, work that an accelerator still has to do included."""
    timer = _Timer()
    _synchronize(device)
    start = time.perf_counter()
    yield timer
    _synchronize(device)
    timer.seconds = time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def as_samples(audio: Audio) -> np.ndarray:
    """16 kHz mono float32 samples (num_samples,) of a file, of its bytes, or of samples already there.

    Raises:
        AudioError: the file cannot be read, or the array is not mono floating-point samples.
    """
    if not isinstance(audio, np.ndarray):
        return read_audio(audio)
    if audio.ndim != 1 or not np.issubdtype(audio.dtype, np.floating):
        raise AudioError(
            f"samples must be floating-point, mono and 16 kHz, shape (num_samples,), got {audio.dtype} {audio.shape}: "
            "average channels, divide 16-bit integers by 32768, or give the file's path or bytes"
        )
    if not np.isfinite(audio).all():
        raise AudioError(f"{np.sum(~np.isfinite(audio))} of {len(audio)} samples are not finite numbers")
    return audio.astype(np.float32, copy=False)


def load(
    model: str | os.PathLike | None = None, *, device: str | torch.device | None = None, dtype: str | None = None
) -> Transcriber:
    """Load a model and its processor.

    Args:
        model: a folder or a hub name; None takes the model inside the package.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; None takes a GPU where there is one.
        dtype: ``float32`` (if None), ``bfloat16`` or ``float16``.

    Raises:
        ValueError: there is no such model, it is of another architecture, files are missing or damaged, or the
            device or dtype is not known.
    """
    torch_dtype = _dtype(dtype)
    torch_device = _device(device)
    place = locate(model)
    network = _read_model(place, torch_dtype)
    try:
        processor = SpeechLlamaProcessor.from_pretrained(place)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place} has no usable processor (tokenizer and features): {_first_line(error)}") from error
    torch.nn.Module.to(network, torch_device)  # transformers' own `to` has lost its types
    return Transcriber(network, processor)


def _dtype(name: str | None) -> torch.dtype:
    if name is not None and name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name or "float32"]


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(name)!r} cannot be used ({_first_line(error)}): try 'cpu'") from error
    return device


def locate(model: str | os.PathLike | None) -> str:
    """The folder or hub name that `load` loads from; None is the model inside the package.

    Raises:
        ValueError: there is no such folder, or it is none of a model.
    """
    if model is None:
        shipped = importlib.resources.files("leapasr") / "pretrained" / "tiny"
        if not shipped.is_dir():
            raise ValueError(f"this installation holds no model ({shipped} is missing): name a model folder")
        return str(shipped)
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is no model folder: it has no config.json")
        return str(path)
    if path.exists():
        raise ValueError(f"{path} is a file: give the model's folder")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) or str(model).startswith("."):
        raise ValueError(f"model folder not found: {model}")
    return str(model)


def _read_model(place: str, dtype: torch.dtype) -> SpeechLlamaForConditionalGeneration:
    try:
        return SpeechLlamaForConditionalGeneration.from_pretrained(place, dtype=dtype)
    except CheckpointError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"no model can be loaded from {place}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__
