"""A Whisper that people already have, as a `Transcriber`: what it writes is what transformers' `generate` writes.

Shapes: B rows, T frames, F mel bins, D width, P pieces and the blank, V vocabulary.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from leapasr.audio import SAMPLE_RATE, AudioError
from leapasr.chunks import SHORTEST_SECONDS, WHOLE, Chunk, Clip, clipped
from leapasr.decoding import DecodingOptions, Prompts
from leapasr.decoding.ctc import greedy_ctc, read_ctc
from leapasr.decoding.drafts import Drafter, MTPDrafter, Reading
from leapasr.decoding.rules import Timestamps, WhisperRules
from leapasr.decoding.whisper import WhisperTextDecoder
from leapasr.model.checkpoints import CheckpointError
from leapasr.model.ctc_head import CTCScores
from leapasr.model.encoders import FEATURE_RATE
from leapasr.model.fitted_heads import FittedHeads, rows_of_pieces, shipped_heads
from leapasr.model.information import ModelInformation, describe_whisper
from leapasr.model.pieces import BLANK, Pieces
from leapasr.model.whisper import (
    WhisperProcessor,
    fingerprint,
    language_code,
    load_whisper_model,
    load_whisper_processor,
)
from leapasr.running import DecodedChunk, EncodedBatch, RunningBatch, timed
from leapasr.transcriber import DEFAULT_OPTIONS, Audio, Transcriber, as_blocks
from leapasr.transcription import Segment, Transcription, timed_words, token_times
from leapasr.whisper_windows import WindowedRecording, Written

TASKS = ("transcribe", "translate")
SAMPLES_PER_FRAME = 320  # of the encoder


@dataclass(frozen=True, kw_only=True)
class WhisperOptions:
    """What a Whisper is asked to write.

    Attributes:
        language: code or English name, for recordings of which none is given; None detects it.
        task: ``transcribe``, or ``translate`` (into English).
        timestamps: let the model write where segments begin and end, and go through long recordings by these, window
            by window, as transformers does. Without, long recordings are cut at silences, and stretches are
            independent of each other: faster, as they are decoded together.
        condition_on_previous_text: with timestamps, let each window go on from the text before it.

    Raises:
        ValueError: there is no such language or task, or text is to be conditioned on without timestamps.
    """

    language: str | None = None
    task: str = "transcribe"
    timestamps: bool = False
    condition_on_previous_text: bool = False

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"unknown task {self.task!r}: choose one of {', '.join(TASKS)}")
        if self.condition_on_previous_text and not self.timestamps:
            raise ValueError(
                "condition_on_previous_text needs timestamps: without them stretches of audio are decoded side by side"
            )


class WhisperTranscriber(Transcriber):
    """A Whisper and heads that were fitted to it.

    Of `DecodingOptions`, ``max_repeats`` is not read: a text that repeats itself is kept as `generate` keeps it. Beam
    search and fallback to other temperatures are transformers' (`model.generate`): they are not lossless.

    Args:
        model: in evaluation mode, on its device and in its dtype, with its generation configuration.
        processor: features and tokenizer of the model.
        heads: fitted to this model (`FittedHeads.check`); None: one token a call.
        options: what it is asked to write.

    Raises:
        ValueError: the model does not know the language or the task.
    """

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        processor: WhisperProcessor,
        heads: FittedHeads | None = None,
        *,
        options: WhisperOptions = WhisperOptions(),
    ):
        config: Any = model.generation_config
        self._generation, self.options, self.heads = config, options, heads
        if heads is not None:
            heads = self.heads = heads.to(model.device, model.dtype).eval()
            self._pieces = Pieces(processor.tokenizer, heads.config.num_pieces)
            self._unembedding_PD = rows_of_pieces(model.proj_out.weight, self._pieces)
        decoder = WhisperTextDecoder(
            model,
            None if heads is None else heads.mtp_heads,
            suppressed=config.suppress_tokens or (),
            draft_tokens=None if heads is None else heads.tokens,
        )
        self.is_multilingual: bool = bool(getattr(config, "is_multilingual", False))
        if options.task != "transcribe" and not self.is_multilingual:
            raise ValueError(f"task {options.task!r} asked for, but the model transcribes English alone")
        language = self._known_language(options.language) if options.language else None
        self._set_up(model, processor, decoder, language if self.is_multilingual else "en")

    # What may be asked for

    def _known_language(self, name: str) -> str:
        """The code of a language that the model writes.

        Raises:
            ValueError: it does not.
        """
        code = language_code(name)
        if not self.is_multilingual and code != "en":
            raise ValueError(f"language {name!r} asked for, but the model writes English alone")
        if self.is_multilingual and f"<|{code}|>" not in self._generation.lang_to_id:
            known = ", ".join(sorted(token[2:-2] for token in self._generation.lang_to_id))
            raise ValueError(f"language {name!r} is not one of the model's: {known}")
        return code

    def check(
        self, options: DecodingOptions, *, language: str | None = None, initial_prompt: str | None = None
    ) -> None:
        options.check(self.decoder.num_heads)
        if language is not None:
            self._known_language(language)
        if initial_prompt is not None:
            raise ValueError(f"initial prompt {initial_prompt!r:.80} given, and none is taken: leave it out")
        if options.strategy == "beam":
            raise ValueError(
                "beam search of a Whisper is transformers' own (model.generate(num_beams=...)): choose another strategy"
            )
        if options.strategy == "threshold" and self.options.timestamps:
            raise ValueError(
                "strategy 'threshold' trusts heads that know no rules of timestamps: choose 'verify', or no timestamps"
            )
        if self.heads is None and options.drafts is not None:
            raise ValueError(
                f"drafts {options.drafts!r} asked for, but no heads were fitted to this model: fit some with "
                "'leapasr fit', and name their folder"
            )

    def language_of(self, asked: str | None) -> str | None:
        return self.language if asked is None else self._known_language(asked)

    def describe(self, name_or_path: str) -> ModelInformation:
        return describe_whisper(self.model, self.heads, name_or_path, max_seconds=self.max_seconds)

    @property
    def max_seconds(self) -> float:
        return 2 * self.model.config.max_source_positions / FEATURE_RATE

    @property
    def _shape(self) -> str:
        heads = self.heads and (self.heads.config.num_heads, self.heads.config.head_type, self.heads.config.num_tokens)
        return f"{self.model.config.to_json_string()} {heads}"

    @cached_property
    def _timestamps(self) -> Timestamps:
        return Timestamps(
            self._generation.no_timestamps_token_id + 1,
            min(self.decoder.end_tokens),
            getattr(self._generation, "max_initial_timestamp_index", None),
        )

    @property
    def rules(self) -> WhisperRules:
        not_first = tuple(self._generation.begin_suppress_tokens or ())
        return WhisperRules(not_first, self._timestamps if self.options.timestamps else None)

    # From audio to prompts

    def begin_tokens(self, language: str | None) -> list[int]:
        """The tokens that a text in `language` (a code) begins with."""
        config = self._generation
        tokens = [config.decoder_start_token_id]
        if self.is_multilingual:
            tokens += [config.lang_to_id[f"<|{language}|>"], config.task_to_id[self.options.task]]
        if not self.options.timestamps:
            tokens.append(config.no_timestamps_token_id)
        return tokens

    @torch.inference_mode()
    def encode(self, chunks: Sequence[Chunk]) -> EncodedBatch:
        """Features, encoder and CTC head of chunks, none longer than `max_seconds`."""
        with timed(self.model.device) as timer:
            features = [self.processor.features(chunk.samples) for chunk in chunks]
            frames_BTD = self._frames(features)
            languages = self._languages(chunks, frames_BTD)
            batch = self._batch(chunks, frames_BTD, [self.begin_tokens(language) for language in languages])
        return replace(batch, seconds=timer.seconds)

    def _frames(self, features: Sequence[Tensor]) -> Tensor:
        """The encoder's frames (B, T, D) of windows of features (T', F); on a CPU one alone keeps the cores busy."""
        encoder = self.model.model.encoder
        features_BFT = torch.stack(list(features)).transpose(1, 2).to(self.model.device, encoder.conv1.weight.dtype)
        at_once = 1 if self.model.device.type == "cpu" else len(features)
        heard = [encoder(some_BFT).last_hidden_state for some_BFT in features_BFT.split(at_once)]
        return torch.cat(heard).to(self.decoder.dtype)

    def _languages(self, chunks: Sequence[Chunk], frames_BTD: Tensor) -> list[str | None]:
        """The code of each chunk's language: asked for, else detected."""
        asked = [self.language_of(chunk.language) for chunk in chunks]
        unknown = [row for row, language in enumerate(asked) if language is None]
        if unknown:
            for row, language in zip(unknown, self.detect_languages(frames_BTD[unknown]), strict=True):
                asked[row] = language
        return asked

    @torch.inference_mode()
    def detect_languages(self, frames_BTD: Tensor) -> list[str]:
        """The likeliest language of each row of the encoder's frames, as transformers' `detect_language` has it."""
        start_B1 = torch.full((len(frames_BTD), 1), self._generation.decoder_start_token_id, device=frames_BTD.device)
        prompts = self._prompts(start_B1.tolist(), frames_BTD)
        cache = self.decoder.new_cache(prompts)
        hidden_B1D = self.decoder.call(prompts.embeddings_BLD, *cache.plan(1, self.decoder.dtype), cache)
        tokens = list(self._generation.lang_to_id)
        # not the decoder's logits, which rule out these tokens
        weight_ND = self.model.proj_out.weight[[self._generation.lang_to_id[token] for token in tokens]]
        return [tokens[best][2:-2] for best in (hidden_B1D[:, 0] @ weight_ND.T).argmax(-1).tolist()]

    def _prompts(self, begin: Sequence[Sequence[int]], frames_BTD: Tensor) -> Prompts:
        lengths_B = torch.tensor([len(tokens) for tokens in begin], device=frames_BTD.device)
        padded = torch.tensor([[*tokens, *[0] * (max(map(len, begin)) - len(tokens))] for tokens in begin])
        padded = padded.to(frames_BTD.device)
        return Prompts(self.decoder.embed(padded, padded), lengths_B, None, frames_BTD)

    def _batch(self, chunks: Sequence[Chunk], frames_BTD: Tensor, begin: Sequence[Sequence[int]]) -> EncodedBatch:
        lengths_B = torch.tensor([-(-len(chunk.samples) // SAMPLES_PER_FRAME) for chunk in chunks])
        lengths_B = lengths_B.clamp(max=frames_BTD.shape[1]).to(frames_BTD.device)
        if self.heads is None:
            ctc, ctc_lengths_B = CTCScores.of(frames_BTD.new_zeros(len(chunks), 0, 1)), torch.zeros_like(lengths_B)
        else:
            heard_BTD = frames_BTD[:, : int(lengths_B.max())]
            ctc, ctc_lengths_B = self.heads.ctc_scores(heard_BTD, lengths_B, self._unembedding_PD)
        return EncodedBatch(
            chunks=chunks,
            prompts=self._prompts(begin, frames_BTD),
            max_tokens=[self.decoder.max_positions] * len(chunks),
            ctc=ctc,
            ctc_lengths_B=ctc_lengths_B,
            seconds=0.0,
        )

    # Decoding

    def running(self, options: DecodingOptions) -> RunningBatch:
        self.check(options)
        return super().running(replace(options, max_repeats=None))

    def drafters(self, batch: EncodedBatch, options: DecodingOptions) -> list[Drafter] | None:
        if self.heads is None:
            return [MTPDrafter(end_token=min(self.decoder.end_tokens)) for _ in batch.chunks]
        return super().drafters(batch, options)

    def read_ctc(self, batch: EncodedBatch) -> list[Reading]:
        if self.heads is None:
            return [Reading([], []) for _ in batch.chunks]
        readings = read_ctc(batch.ctc, batch.ctc_lengths_B, blank=BLANK)
        return [Reading(*self._pieces.join(reading.tokens, reading.probabilities)) for reading in readings]

    def greedy_ctc(self, batch: EncodedBatch) -> list[list[int]]:
        if self.heads is None:
            return [[] for _ in batch.chunks]
        rows = greedy_ctc(batch.ctc, batch.ctc_lengths_B, blank=BLANK)
        return [self._pieces.join(row, [1.0] * len(row))[0] for row in rows]

    def hears_speech(self, done: DecodedChunk) -> bool:
        """True: what the model writes stays, whatever the CTC head hears."""
        return True

    @torch.inference_mode()
    def token_times(self, done: DecodedChunk, tokens: list[int]) -> list[tuple[float, float]]:
        if self.heads is None:
            return []
        chunk, batch = done.chunk, done.batch
        num_frames = int(batch.ctc_lengths_B[done.row])
        parts = [self._pieces.split(token) for token in tokens]
        times = token_times(
            [place for part in parts for place in part],
            batch.ctc.log_probabilities(done.row, num_frames),
            frame_rate=SAMPLE_RATE / SAMPLES_PER_FRAME / self.heads.config.encoder_stacking,
            blank=BLANK,
            start=chunk.start,
            end=chunk.end,
        )
        ends = list(accumulate(map(len, parts)))
        moments = [times[0][0], *(end for _, end in times)] if times else []  # of a token without pieces, by its place
        return [
            (times[first][0] if stop > first else moments[first], moments[stop])
            for first, stop in zip([0, *ends], ends if times else (), strict=False)
        ]

    # With timestamps

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
        if not self.options.timestamps:
            yield from super().transcribe_each(
                sources, options, batch_size=batch_size, word_times=word_times, clips=clips, language=language,
                vad_filter=vad_filter, progress=progress,
            )  # fmt: skip
            return
        self._check_call(options, batch_size, clips, language)
        yield from _Sequential(self, options, batch_size, clips, language, word_times, progress).run(sources)

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
        if not self.options.timestamps:
            return super().stream(
                audio, options, batch_size=batch_size, word_times=word_times, clips=clips, language=language,
                vad_filter=vad_filter,
            )  # fmt: skip
        self._check_call(options, batch_size, clips, language)
        return _Sequential(self, options, 1, clips, language, word_times, None).segments_of(audio)

    def _check_call(
        self, options: DecodingOptions, batch_size: int, clips: Sequence[Clip], language: str | None
    ) -> None:
        super()._check_call(options, batch_size, clips, language)
        if self.options.timestamps and len(clips) > 1:
            raise ValueError(f"{len(clips)} clips given: with timestamps a recording is one stretch, give one clip")

    def listen_whole(self, audio: Audio, clips: Sequence[Clip]) -> tuple[np.ndarray, float]:
        """Samples (num_samples,) of the clip of a recording, and where it begins, in seconds.

        Raises:
            AudioError: the recording cannot be read.
        """
        pieces = [samples for _, samples in clipped(as_blocks(audio), clips, name="the recording")]
        return (np.concatenate(pieces) if pieces else np.zeros(0, np.float32)), clips[0][0]

    def windowed(self, samples: np.ndarray) -> WindowedRecording:
        """A recording of 16 kHz samples (num_samples,), none of it heard yet."""
        extractor = self.processor.feature_extractor
        features_FT = np.zeros((extractor.feature_size, 0), np.float32)
        if len(samples) >= SHORTEST_SECONDS * SAMPLE_RATE:
            given = extractor(samples, sampling_rate=SAMPLE_RATE, truncation=False, padding=False)
            features_FT = np.asarray(given.input_features[0])
        window = 2 * self.model.config.max_source_positions
        return WindowedRecording(torch.as_tensor(features_FT).T, window, self._timestamps.begin)

    @torch.inference_mode()
    def encode_windows(self, stretches: Sequence[_Stretch]) -> EncodedBatch:
        """The next window of each of several recordings."""
        chunks = []
        for stretch in stretches:
            recording = stretch.recording
            first = recording.place * SAMPLE_RATE // FEATURE_RATE
            heard = stretch.samples[first : first + recording.num_frames * SAMPLE_RATE // FEATURE_RATE]
            chunks.append(Chunk(stretch, stretch.offset + recording.start, heard, stretch.language))
        with timed(self.model.device) as timer:
            frames_BTD = self._frames([stretch.recording.next_window() for stretch in stretches])
            languages = self._languages(chunks, frames_BTD)
            begin = [
                [*self._previous(stretch.recording), *self.begin_tokens(language)]
                for stretch, language in zip(stretches, languages, strict=True)
            ]
            batch = self._batch(chunks, frames_BTD, begin)
        for stretch, language in zip(stretches, languages, strict=True):
            stretch.language = language
        return replace(batch, seconds=timer.seconds)

    def _previous(self, recording: WindowedRecording) -> list[int]:
        """What the prompt says of the text before a window."""
        if not self.options.condition_on_previous_text or not recording.written:
            return []
        most = self.decoder.max_positions // 2 - 1
        return [self._generation.prev_sot_token_id, *recording.previous_tokens(most)]


def load_whisper(
    place: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    adapter: str | os.PathLike | None = None,
    options: WhisperOptions | None = None,
    bare: bool = False,
) -> WhisperTranscriber:
    """A Whisper by hub name or folder, with the heads in `adapter`, or else those inside the package for its weights.

    Args:
        bare: without heads.

    Raises:
        ValueError: the model cannot be loaded, the heads were fitted to another one, or the options do not fit it.
    """
    try:
        model = load_whisper_model(place)
        processor = load_whisper_processor(place, model)
    except CheckpointError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"no model can be loaded from {place}: {error}") from error
    weights = fingerprint(model)
    folder = shipped_heads(weights) if adapter is None else Path(adapter)
    heads = None
    if not bare and folder is not None:
        heads = FittedHeads.load(folder)
        heads.check(weights, name=place)
    torch.nn.Module.to(model, device, dtype)
    return WhisperTranscriber(model, processor, heads, options=options or WhisperOptions())


@dataclass(eq=False)
class _Stretch:
    """A recording (or the clip of it that begins at `offset` seconds) on its way through the windows."""

    key: int
    samples: np.ndarray
    offset: float
    recording: WindowedRecording
    language: str | None
    segments: list[Segment]
    encoder_seconds: float = 0.0
    decoder_seconds: float = 0.0


class _Sequential:
    """Recordings whose windows follow from each other; those of `batch_size` recordings are decoded together."""

    def __init__(
        self,
        transcriber: WhisperTranscriber,
        options: DecodingOptions,
        batch_size: int,
        clips: Sequence[Clip],
        language: str | None,
        word_times: bool,
        progress: Callable[[float], None] | None,
    ):
        self.transcriber, self.batch_size, self.clips = transcriber, batch_size, clips
        self.language = transcriber.language_of(language)
        self.word_times, self.progress = word_times, progress
        self.running = transcriber.running(options)

    def run(self, sources: Iterable[Audio]) -> Iterator[tuple[int, Transcription | AudioError]]:
        waiting: deque[_Stretch] = deque()
        unread = enumerate(sources)
        is_more = True
        while True:
            while is_more and len(waiting) + len(self.running) < self.batch_size:
                key, source = next(unread, (-1, None))
                is_more = source is not None
                if source is None:
                    break
                try:
                    stretch = self._open(key, source)
                except AudioError as error:
                    yield key, error
                    continue
                if stretch.recording.is_done:
                    yield self._closed(stretch)
                else:
                    waiting.append(stretch)
            if not (waiting or self.running):
                return
            for stretch, _ in self._advance(waiting):
                if stretch.recording.is_done:
                    yield self._closed(stretch)
                else:
                    waiting.append(stretch)

    def segments_of(self, audio: Audio) -> Iterator[Segment]:
        """The segments of one recording, window by window."""
        stretch = self._open(0, audio)
        waiting = deque([stretch])
        while not stretch.recording.is_done:
            for _, segments in self._advance(waiting):
                yield from segments
                waiting.append(stretch)

    def _open(self, key: int, source: Audio) -> _Stretch:
        samples, offset = self.transcriber.listen_whole(source, self.clips)
        return _Stretch(key, samples, offset, self.transcriber.windowed(samples), self.language, [])

    def _closed(self, stretch: _Stretch) -> tuple[int, Transcription]:
        return stretch.key, Transcription(
            stretch.segments,
            len(stretch.samples) / SAMPLE_RATE,
            stretch.encoder_seconds,
            stretch.decoder_seconds,
            stretch.language,
        )

    def _advance(self, waiting: deque[_Stretch]) -> list[tuple[_Stretch, list[Segment]]]:
        """Let what waits join, and take a step: gives those whose windows ended, and the windows' segments."""
        if waiting:
            self.running.add(self.transcriber.encode_windows(list(waiting)))
            waiting.clear()
        ended = []
        for done in self.running.step():
            stretch: _Stretch = done.chunk.recording
            before = stretch.recording.start
            segments = self._segments(done, stretch, stretch.recording.advance(done.result.tokens))
            stretch.segments += segments
            stretch.encoder_seconds += done.encoder_seconds
            stretch.decoder_seconds += done.seconds
            if self.progress:
                self.progress(stretch.recording.start - before)
            ended.append((stretch, segments))
        return ended

    def _segments(self, done: DecodedChunk, stretch: _Stretch, written: Sequence[Written]) -> list[Segment]:
        """A window's segments; the first one has its decoder calls, the last one what was written and left out."""
        transcriber, result = self.transcriber, done.result
        texts = [[token for token in part.tokens if token < stretch.recording.timestamp_begin] for part in written]
        text = [token for part in texts for token in part]
        times = transcriber.token_times(done, text) if self.word_times else []
        segments, first = [], 0
        for index, (part, own) in enumerate(zip(written, texts, strict=True)):
            is_last = index == len(written) - 1
            stop = len(result.trace) if is_last else first + len(part.tokens)
            own_times, times = times[: len(own)], times[len(own) :]
            segments.append(
                Segment(
                    start=stretch.offset + part.start,
                    end=stretch.offset + part.end,
                    text=transcriber.processor.decode_text(own),
                    tokens=part.tokens,
                    decoder_calls=0 if index else result.num_calls,
                    truncated=result.truncated if is_last else None,
                    trace=result.trace[first:stop],
                    words=timed_words(own, own_times, transcriber.processor),
                )
            )
            first = stop
        return segments
