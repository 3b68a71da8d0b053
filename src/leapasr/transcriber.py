"""Transcriber: audio in, text out. Joins audio, processor, model and decoding; `load` makes one.

Shapes: B rows, T CTC frames, V vocabulary.
"""

from __future__ import annotations

import importlib.resources
import os
import re
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, overload

import numpy as np
import torch
from huggingface_hub import metadata_load
from transformers import PreTrainedModel
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE
from transformers.utils import cached_file
from yaml import YAMLError

from leapasr.audio import SAMPLE_RATE, AudioError, read_blocks
from leapasr.chunks import WHOLE, Chunk, Clip, by_length, check_clips, clipped, cut_pieces, cut_recording, windows
from leapasr.decoding import DecodingOptions, DecodingResult, Prompts, SpeechLlamaDecoder, build_loop
from leapasr.decoding.costs import FREE, CallCosts, find_costs, find_ways
from leapasr.decoding.ctc import greedy_ctc, read_ctc
from leapasr.decoding.drafts import Drafter, Reading, build_drafter
from leapasr.decoding.guards import MAX_TOKENS_AT_LEAST, MAX_TOKENS_PER_SECOND, token_bound
from leapasr.decoding.interface import Decoder, Ways
from leapasr.decoding.rejoin import Spelling
from leapasr.decoding.rules import Rules
from leapasr.memory import release_freed
from leapasr.model.checkpoints import CheckpointError
from leapasr.model.encoders import FEATURE_RATE
from leapasr.model.information import ModelInformation, describe
from leapasr.model.precision import bfloat16_speedup
from leapasr.model.processing import SpeechLlamaProcessor, spelling
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration
from leapasr.model.whisper import is_whisper
from leapasr.running import DecodedChunk, EncodedBatch, RunningBatch, timed
from leapasr.transcription import Segment, Transcription, timed_words, token_times
from leapasr.workers import num_workers, share_out

if TYPE_CHECKING:
    from leapasr.whisper_transcriber import WhisperOptions

MAX_CHUNK_SECONDS = 25.0
MIN_FILTERED_SECONDS = 1.0  # in shorter chunks the CTC head may miss the only word

DEFAULT_OPTIONS = DecodingOptions()
MIXED = "mixed"  # the speech side in bfloat16, the decoder in float32, where it pays with rounded products
AUTO = "auto"  # mixed where that is measured to be faster, else float32
AUTO_SPEEDUP = 1.5  # of products in bfloat16, from which on mixed is taken
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    MIXED: torch.float32,
    AUTO: torch.float32,
}

Audio = str | os.PathLike | bytes | IO[bytes] | np.ndarray


@dataclass(frozen=True)
class DecodedBatch:
    """A result for each chunk of a batch, and the seconds that decoding took."""

    results: list[DecodingResult]
    seconds: float


@dataclass(frozen=True)
class _Done:
    """A chunk, its segment if it has one, and its part of the time that passed."""

    chunk: Chunk
    segment: Segment | None
    encoder_seconds: float
    decoder_seconds: float


class Transcriber:
    """A model and its processor, ready to transcribe.

    Threads may share one: any number of them may transcribe at a time, and each gets what it gets alone, token for
    token. They share the cores or the GPU, not batches: many recordings are faster in one call than in many threads.
    What `transcribe_each` and `stream` give is for one thread to iterate over, as any generator.

    Args:
        model: in evaluation mode, on its device and in its dtype.
        processor: features and tokenizer of the model.
        language: what the model writes, a code as in ``en``; None if it is several, or not known.

    Attributes:
        dtype: that the model computes in, by the names of `load`.
        measuring_seconds: spent so far on finding out what is fastest on this machine, which is kept for the next time.
    """

    decoder: Decoder

    def __init__(
        self,
        model: SpeechLlamaForConditionalGeneration,
        processor: SpeechLlamaProcessor,
        *,
        language: str | None = None,
    ):
        self._set_up(model, processor, SpeechLlamaDecoder(model), language)
        if model.speech_dtype != self.decoder.dtype:
            self.dtype = MIXED

    def _set_up(
        self, model: PreTrainedModel, processor: SpeechLlamaProcessor, decoder: Decoder, language: str | None
    ) -> None:
        self.model: Any = model.eval()
        self.processor, self.decoder, self.language = processor, decoder, language
        self.dtype = str(decoder.dtype).removeprefix("torch.")
        self._ways: Ways | None = None
        self._costs: dict[int, CallCosts] = {}  # by numbers of cores
        self._costs_lock = threading.Lock()
        self.measuring_seconds = 0.0

    @property
    def rules(self) -> Rules | None:
        """That texts obey."""
        return None

    @property
    def costs(self) -> CallCosts:
        """Of decoder calls on so many cores as this thread has: measured when first asked for, then kept in a file."""
        num_cores = torch.get_num_threads()
        with self._costs_lock:
            if self._ways is None:
                self._ways = find_ways(self.decoder, self._shape, self._spend)
            if num_cores not in self._costs:
                self._costs[num_cores] = find_costs(self.decoder, self._shape, self._ways, self._spend)
            return self._costs[num_cores]

    def _spend(self, seconds: float) -> None:
        self.measuring_seconds += seconds

    @property
    def _shape(self) -> str:
        """Tells the decoder's shape from others."""
        return self.model.config.decoder_config.to_json_string()

    def check(
        self, options: DecodingOptions, *, language: str | None = None, initial_prompt: str | None = None
    ) -> None:
        """Raises ValueError where the model cannot do what is asked.

        Args:
            options: how to decode.
            language: to be written, a code or an English name.
            initial_prompt: text to go on from, which no model here has been taught to read.
        """
        options.check(self.decoder.num_heads)
        if language is not None:
            code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
            if self.language is None:
                raise ValueError(
                    f"language {language!r} asked for, but the model does not let one choose: leave it out"
                )
            if code != self.language:
                raise ValueError(f"language {language!r} asked for, but the model writes {self.language!r} alone")
        if initial_prompt is not None:
            raise ValueError(
                f"initial prompt {initial_prompt!r:.80} given, but the model takes none: it was trained on speech alone"
            )

    def describe(self, name_or_path: str) -> ModelInformation:
        """What the model is made of, which was loaded from `name_or_path`."""
        return describe(self.model, name_or_path, max_seconds=self.max_seconds)

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
    def transcribe(  # type: ignore[overload-overlap]  # a path is an iterable, too, and taken for a path
        self, audio: Audio, options: DecodingOptions = ..., *, batch_size: int = ..., word_times: bool = ...,
        clips: Sequence[Clip] = ..., language: str | None = ..., vad_filter: bool = ...,
    ) -> Transcription: ...  # fmt: skip

    @overload
    def transcribe(
        self, audio: Iterable[Audio], options: DecodingOptions = ..., *, batch_size: int = ..., word_times: bool = ...,
        clips: Sequence[Clip] = ..., language: str | None = ..., vad_filter: bool = ...,
    ) -> list[Transcription]: ...  # fmt: skip

    def transcribe(
        self,
        audio,
        options=DEFAULT_OPTIONS,
        *,
        batch_size=8,
        word_times=False,
        clips=WHOLE,
        language=None,
        vad_filter=True,
    ):
        """Transcribe one recording, or each of several.

        Args:
            audio: a file's path, a file's bytes, a binary file object, 16 kHz mono samples (num_samples,), or an
                iterable of these.
            options: how to decode.
            batch_size: chunks of at most `max_seconds` that are computed together, whatever recordings they are of.
            word_times: give each segment its words with times, from the encoder's CTC output.
            clips: (start, end) in seconds of what is to be transcribed, of each recording; all of it without them.
                Times in the result are the recording's.
            language: refused unless it is the model's.
            vad_filter: leave out chunks of a second or more in which the CTC head hears not one token: the decoder
                writes a word there, too, that nobody said.

        Returns:
            a transcription, or a list of them for an iterable.

        Raises:
            AudioError: audio cannot be read; of several, nothing is returned then (see `transcribe_each`).
            ValueError: the model cannot do what is asked (`check`), clips are no clips, or `batch_size` is less than 1.
        """
        is_one = _is_one(audio)
        results = {}
        for index, result in self.transcribe_each(
            [audio] if is_one else audio,
            options,
            batch_size=batch_size,
            word_times=word_times,
            clips=clips,
            language=language,
            vad_filter=vad_filter,
        ):
            if isinstance(result, AudioError):
                raise result
            results[index] = result
        return results[0] if is_one else [results[index] for index in range(len(results))]

    def transcribe_each(
        self,
        sources: Iterable[Audio],
        options: DecodingOptions = DEFAULT_OPTIONS,
        *,
        batch_size: int = 8,
        word_times: bool = False,
        clips: Sequence[Clip] = WHOLE,
        language: str | None = None,
        vad_filter: bool = True,
        progress: Callable[[float], None] | None = None,
    ) -> Iterator[tuple[int, Transcription | AudioError]]:
        """Transcribe any number of recordings: yields the index of each, with its transcription or what is wrong.

        About a quarter of an hour of audio is read and transcribed at a time, of however many recordings.

        Args:
            sources: on a CPU, threads that share the work take from it, one at a time.
            progress: called with the seconds of audio done since it was last called.

        Raises:
            ValueError: as in `transcribe`.
        """
        self._check_call(options, batch_size, clips, language)
        segments: dict[int, list[Segment]] = defaultdict(list)
        seconds: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(3))  # of the encoder, the decoder, and of audio
        ended: deque[tuple[int, float | AudioError]] = deque()  # of which nothing more will be heard
        num_heard: Counter[int] = Counter()  # chunks of each
        num_done: Counter[int] = Counter()

        def heard() -> Iterator[Chunk[int]]:
            for index, source in enumerate(sources):
                try:
                    audio_seconds = yield from self.listen(index, source, clips, language=language)
                    ended.append((index, audio_seconds))
                except AudioError as error:
                    ended.append((index, error))

        def counted() -> Iterator[tuple[Chunk[int], np.ndarray]]:
            for chunk in heard():
                num_heard[chunk.recording] += 1
                yield chunk, chunk.samples

        def finished() -> Iterator[tuple[int, Transcription | AudioError]]:
            while ended and num_done[ended[0][0]] == num_heard[ended[0][0]]:
                index, end = ended.popleft()
                ordered = sorted(segments.pop(index, []), key=lambda segment: segment.start)
                encoder, decoder, speech = map(float, seconds.pop(index, np.zeros(3)))
                if isinstance(end, AudioError):
                    yield index, end
                    continue
                if progress:
                    progress(end - speech)  # silence
                yield index, Transcription(ordered, end, encoder, decoder, self.language_of(language))

        spans = windows(counted())
        ahead = [next(spans, [])]
        number = num_workers(self.model.device, min(batch_size, len(ahead[0])))
        share = batch_size // number

        def batches() -> Iterator[Sequence[Chunk[int]]]:
            while span := ahead.pop():
                batches_of_span = by_length([chunk for chunk, _ in span], share)
                del span  # or its samples would be here while the next one is read
                yield from batches_of_span
                del batches_of_span
                ahead.append(next(spans, []))

        for done in self._segments(batches(), options, number, share, word_times, vad_filter):
            recording = done.chunk.recording
            if done.segment:
                segments[recording].append(done.segment)
            seconds[recording] += [done.encoder_seconds, done.decoder_seconds, done.chunk.seconds]
            num_done[recording] += 1
            if progress:
                progress(done.chunk.seconds)
            yield from finished()
        yield from finished()

    def stream(
        self,
        audio: Audio,
        options: DecodingOptions = DEFAULT_OPTIONS,
        *,
        batch_size: int = 4,
        word_times: bool = False,
        clips: Sequence[Clip] = WHOLE,
        language: str | None = None,
        vad_filter: bool = True,
    ) -> Iterator[Segment]:
        """Transcribe one recording: yields its segments in order, each as soon as it and all before it are done.

        The recording is read while it is transcribed: what is in memory does not grow with its length. Segments are
        those of `transcribe`.

        Args:
            batch_size: as in `transcribe`; so many chunks are read before the first segment comes.

        Raises:
            AudioError: the recording cannot be read (when it is, not at the call).
            ValueError: as in `transcribe`, at the call.
        """
        self._check_call(options, batch_size, clips, language)
        heard = self.listen(0, audio, clips, language=language)
        waiting: deque[Chunk] = deque()

        def batches(chunks: Iterator[Chunk], size: int) -> Iterator[Sequence[Chunk]]:
            while batch := list(islice(chunks, size)):
                waiting.extend(batch)
                yield batch

        def in_order() -> Iterator[Segment]:
            segments: dict[float, Segment | None] = {}
            first = list(islice(heard, num_workers(self.model.device, batch_size)))
            number = num_workers(self.model.device, len(first))
            share = batch_size // number
            shared = batches(chain(first, heard), share)
            for done in self._segments(shared, options, number, share, word_times, vad_filter):
                segments[done.chunk.start] = done.segment
                while waiting and waiting[0].start in segments:
                    if following := segments.pop(waiting.popleft().start):
                        yield following

        return in_order()

    def _check_call(
        self, options: DecodingOptions, batch_size: int, clips: Sequence[Clip], language: str | None
    ) -> None:
        self.check(options, language=language)
        check_clips(clips)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")

    def language_of(self, asked: str | None) -> str | None:
        """What a transcription says of its language, where `asked` was asked for."""
        return self.language

    def listen(
        self, recording: int, audio: Audio, clips: Sequence[Clip] = WHOLE, *, language: str | None = None
    ) -> Generator[Chunk[int], None, float]:
        """The chunks of a recording that can hold speech, read as they are asked for, none longer than `max_seconds`.

        Args:
            recording: the chunks' key.

        Returns:
            (at the generator's end) the seconds of audio that were read, silence included.

        Raises:
            AudioError: the recording cannot be read.
        """
        name = str(audio) if isinstance(audio, (str, os.PathLike)) else "the recording"
        pieces = clipped(as_blocks(audio), clips, name=name)
        num_samples = yield from cut_pieces(recording, pieces, max_seconds=self.max_seconds, language=language)
        return num_samples / SAMPLE_RATE

    def _segments(
        self,
        batches: Iterable[Sequence[Chunk]],
        options: DecodingOptions,
        number: int,
        share: int,
        word_times: bool,
        vad_filter: bool,
    ) -> Iterator[_Done]:
        """Encode and decode batches of `share` chunks, by so many threads: each chunk as it is done."""

        def encoded(batches: Iterator[Sequence[Chunk]]) -> Iterator[EncodedBatch]:
            for chunks in batches:
                yield self.encode(chunks)
                release_freed()

        def work(batches: Iterator[Sequence[Chunk]]) -> Iterator[_Done]:
            for done in self.decode_each(encoded(batches), options, num_left=share // 2):
                is_kept = not vad_filter or self.hears_speech(done)
                segment = self.segment(done, word_times=word_times) if is_kept else None
                yield _Done(done.chunk, segment, done.encoder_seconds / number, done.seconds / number)

        return share_out(work, batches, number)

    def hears_speech(self, done: DecodedChunk) -> bool:
        """Whether the CTC head hears a token in a chunk; said of every chunk that is too short to tell."""
        best_T = done.batch.ctc.best_BT[done.row, : int(done.batch.ctc_lengths_B[done.row])]
        return done.chunk.seconds < MIN_FILTERED_SECONDS or bool((best_T != self.model.config.blank_token_id).any())

    def segment(self, done: DecodedChunk, *, word_times: bool = False) -> Segment:
        """What is said in a chunk, with the times of its words if `word_times`."""
        result = done.result
        times = self.token_times(done, result.tokens) if word_times else []
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

    @torch.inference_mode()
    def token_times(self, done: DecodedChunk, tokens: list[int]) -> list[tuple[float, float]]:
        """Where each of `tokens`, the text of a chunk, begins and ends in its recording, by the CTC head."""
        chunk, batch = done.chunk, done.batch
        num_frames = int(batch.ctc_lengths_B[done.row])
        return token_times(
            tokens,
            batch.ctc.log_probabilities(done.row, num_frames),
            frame_rate=self.model.ctc_frame_rate,
            blank=self.model.config.blank_token_id,
            start=chunk.start,
            end=chunk.end,
        )

    def cut(self, recordings: Iterable[tuple[int, np.ndarray]], *, language: str | None = None) -> list[Chunk[int]]:
        """The chunks of recordings (key, samples) that can hold speech, none longer than `max_seconds`."""
        return [
            chunk
            for key, samples in recordings
            for chunk in cut_recording(key, samples, max_seconds=self.max_seconds, language=language)
        ]

    @torch.inference_mode()
    def encode(self, chunks: Sequence[Chunk]) -> EncodedBatch:
        """Features, encoder and adapter of chunks, none longer than `max_seconds`."""
        model = self.model
        with timed(model.device) as timer:
            features, lengths_B = self.processor.pad([self.processor.features(chunk.samples) for chunk in chunks])
            encoding = model.encode(features.to(model.device), lengths_B.to(model.device))
            prompts = Prompts(*model.prompt(encoding))
        assert encoding.ctc is not None
        return EncodedBatch(
            chunks=chunks,
            prompts=prompts,
            max_tokens=[token_bound(length / model.ctc_frame_rate) for length in encoding.ctc_lengths_B.tolist()],
            ctc=encoding.ctc,
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
        costs = self.costs
        used = costs if options.draft_length_used == "worthwhile" else FREE
        loop = build_loop(self.decoder, options, costs=used, rules=self.rules, spell=self.spell)
        return RunningBatch(loop, self.drafters)

    def drafters(self, batch: EncodedBatch, options: DecodingOptions) -> list[Drafter] | None:
        """A draft source for each chunk that starts from what CTC reads there; None if `options` have no use for it."""
        if not options.reads_ctc:
            return None
        end_token = min(self.decoder.end_tokens)
        return [
            build_drafter(options, reading, end_token=end_token, spell=self.spell) for reading in self.read_ctc(batch)
        ]

    @cached_property
    def spell(self) -> Spelling:
        """By what texts are aligned."""
        return spelling(self.processor.tokenizer)

    def read_ctc(self, batch: EncodedBatch) -> list[Reading]:
        """What the CTC head reads in each chunk."""
        return read_ctc(batch.ctc, batch.ctc_lengths_B, blank=self.model.config.blank_token_id)

    def greedy_ctc(self, batch: EncodedBatch) -> list[list[int]]:
        """The tokens of `read_ctc`, without the work of telling how sure they are."""
        return greedy_ctc(batch.ctc, batch.ctc_lengths_B, blank=self.model.config.blank_token_id)

    def decode_ctc(self, batch: EncodedBatch) -> DecodedBatch:
        """What the CTC head alone says, greedily, without one decoder call and without a trace."""
        with timed(self.model.device) as timer:
            rows = self.greedy_ctc(batch)
        return DecodedBatch(
            [DecodingResult(tokens, num_calls=0, trace=[], truncated=None) for tokens in rows], timer.seconds
        )

    def ctc_text(self, audio: Audio) -> str:
        """What the CTC head alone writes for one recording, greedily; arguments and errors as in `transcribe`."""
        batches = (self.encode([chunk]) for chunk in self.listen(0, audio))
        texts = [self.processor.decode_text(self.decode_ctc(batch).results[0].tokens) for batch in batches]
        return " ".join(filter(None, texts))


def _is_one(audio: object) -> bool:
    """Whether `audio` is one recording (or nothing that can be read), not several."""
    single = isinstance(audio, (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray)) or hasattr(audio, "read")
    return single or not isinstance(audio, Iterable)


def as_blocks(audio: Audio) -> Iterable[np.ndarray]:
    """16 kHz mono float32 samples of a file, of its bytes, or of samples already there, in blocks (num_samples,).

    Raises:
        AudioError: the file cannot be read, or the array is not mono floating-point samples.
    """
    if not isinstance(audio, np.ndarray):
        return read_blocks(audio)
    if audio.ndim != 1 or not np.issubdtype(audio.dtype, np.floating):
        raise AudioError(
            f"samples must be floating-point, mono and 16 kHz, shape (num_samples,), got {audio.dtype} {audio.shape}: "
            "average channels, divide 16-bit integers by 32768, or give the file's path or bytes"
        )
    if not np.isfinite(audio).all():
        raise AudioError(f"{np.sum(~np.isfinite(audio))} of {len(audio)} samples are not finite numbers")
    return [audio.astype(np.float32, copy=False)]


def load(
    model: str | os.PathLike | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    adapter: str | os.PathLike | None = None,
    whisper: WhisperOptions | None = None,
) -> Transcriber:
    """Load a model and its processor.

    Args:
        model: a folder or a hub name, of a leapasr model or of a Whisper (transformers' or CTranslate2's files); None
            takes the model inside the package.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; None takes a GPU where there is one.
        dtype: ``float32`` (if None), ``bfloat16`` or ``float16``; ``mixed`` has the speech side in bfloat16, which is
            much faster where a CPU has AMX, and the decoder in float32, but for products and attention where a CPU has
            bfloat16 kernels that are faster and keep, bit for bit, what it promises (`decoding.packing`); ``auto`` is
            ``mixed`` where bfloat16 is measured to be faster on this device, else ``float32``, as it is for a Whisper.
        adapter: for a Whisper, folder of heads that were fitted to it (`leapasr fit`); None takes those inside the
            package, if there are any for its very weights.
        whisper: for a Whisper, what it is asked to write.

    Raises:
        ValueError: there is no such model, it is of another architecture, files are missing or damaged, the heads were
            fitted to another model, or the device or dtype is not known.
    """
    torch_dtype = dtype_of(dtype)
    torch_device = device_of(device)
    place = locate(model)
    if is_whisper(place):
        if dtype == MIXED:
            raise ValueError(f"dtype {MIXED!r} is for leapasr's own models, and {place} is a Whisper: choose another")
        from leapasr.whisper_transcriber import load_whisper  # it builds on this module

        return load_whisper(place, device=torch_device, dtype=torch_dtype, adapter=adapter, options=whisper)
    for name, given in (("adapter", adapter), ("whisper", whisper)):
        if given is not None:
            raise ValueError(f"{name} {str(given)!r} is for a Whisper, and {place} is none: leave it out")
    if dtype == AUTO and bfloat16_speedup(torch_device) >= AUTO_SPEEDUP:
        dtype = MIXED
    network = _read_model(place, torch_dtype)
    try:
        processor = SpeechLlamaProcessor.from_pretrained(place)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place} has no usable processor (tokenizer and features): {_first_line(error)}") from error
    torch.nn.Module.to(network, torch_device)  # transformers' own `to` has lost its types
    if dtype == MIXED:
        network.set_speech_dtype(torch.bfloat16)
    return Transcriber(network, processor, language=_language(place))


def _language(place: str) -> str | None:
    """The language on the card of a model (the README's metadata), if it is a single one."""
    card = cached_file(
        place,
        "README.md",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    try:
        languages = ((card and metadata_load(card)) or {}).get("language")
    except (ValueError, YAMLError):  # metadata that are none
        return None
    if isinstance(languages, list) and len(languages) == 1:
        languages = languages[0]
    return languages if isinstance(languages, str) else None


def dtype_of(name: str | None) -> torch.dtype:
    """A dtype by its name in `load`; None is float32.

    Raises:
        ValueError: there is none of this name.
    """
    if name is not None and name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name or "float32"]


def device_of(name: str | torch.device | None) -> torch.device:
    """A device by its name; None is a GPU where there is one.

    Raises:
        ValueError: it cannot be used.
    """
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
