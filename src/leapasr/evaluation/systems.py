"""The systems that are timed side by side: our strategies, greedy CTC, transformers' `generate`, faster-whisper."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from leapasr.chunks import Chunk, by_length
from leapasr.decoding import DecodingOptions
from leapasr.evaluation.peers import FasterWhisper, generate, generate_whisper
from leapasr.model.precision import cast
from leapasr.running import EncodedBatch, timed
from leapasr.transcriber import MIXED, Transcriber
from leapasr.whisper_transcriber import WhisperTranscriber
from leapasr.workers import num_workers, share_out

STRATEGIES = (
    DecodingOptions(strategy="autoregressive"),
    DecodingOptions(strategy="verify", drafts="mtp"),
    DecodingOptions(strategy="verify", drafts="both"),
    DecodingOptions(strategy="threshold", threshold=0.9),
)
GENERATE, AUTOREGRESSIVE = "hf/generate", "leapasr/autoregressive"


@dataclass
class Run:
    """What a system made of all utterances once.

    Attributes:
        texts: of each utterance. tokens: ids of each, without end-of-text; None of a model with other tokens.
        num_calls: decoder calls summed over rows; None where they are not counted.
        encoder_seconds, decoder_seconds: None where they cannot be told apart.
    """

    texts: list[str]
    tokens: list[list[int]] | None = None
    num_calls: int | None = None
    encoder_seconds: float | None = None
    decoder_seconds: float | None = None


class System(ABC):
    """What is timed.

    Attributes:
        name: ``leapasr/verify``, ``hf/generate``, ...
        drafts: what is verified, if anything.
        batched: whether it takes more than one utterance at a time.
        process: id of that in which it runs.
    """

    name: str
    drafts: str | None = None
    batched = True
    process: int | str = "self"

    @abstractmethod
    def run(self, samples: Sequence[np.ndarray], batch_size: int) -> Run:
        """Write what is said in each utterance (16 kHz samples), this many at a time."""


@dataclass
class Leapasr(System):
    """One of our strategies, on the way that `Transcriber.transcribe` takes."""

    transcriber: Transcriber
    options: DecodingOptions

    def __post_init__(self) -> None:
        threshold = self.options.threshold
        self.name = f"leapasr/{self.options.strategy}" + ("" if threshold is None else f" {threshold:g}")
        self.drafts = self.options.drafts_used

    def run(self, samples: Sequence[np.ndarray], batch_size: int) -> Run:
        done = self.transcriber.transcribe(list(samples), self.options, batch_size=batch_size)
        return Run(
            texts=[each.text for each in done],
            tokens=[[token for segment in each.segments for token in segment.tokens] for each in done],
            num_calls=sum(each.decoder_calls for each in done),
            encoder_seconds=sum(each.encoder_seconds for each in done),
            decoder_seconds=sum(each.decoder_seconds for each in done),
        )


@dataclass
class GreedyCTC(System):
    """The encoder and the CTC head alone: the floor."""

    transcriber: Transcriber
    name = "leapasr/ctc"

    def run(self, samples: Sequence[np.ndarray], batch_size: int) -> Run:
        return _by_batches(
            self.transcriber,
            samples,
            batch_size,
            lambda batch: [result.tokens for result in self.transcriber.decode_ctc(batch).results],
            number=num_workers(self.transcriber.model.device, min(batch_size, len(samples))),
        )


@dataclass
class Generate(System):
    """transformers' greedy `generate` with the same encoder and decoder.

    Args:
        lookup: tokens of its prompt lookup, or 0.
        dtype: of a copy of the decoder; None: the decoder as it is.
    """

    transcriber: Transcriber
    lookup: int = 0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.name = "hf/prompt lookup" if self.lookup else GENERATE
        self.batched = not self.lookup
        self.model = self.transcriber.model
        if self.dtype is not None:
            self.name += " " + str(self.dtype).removeprefix("torch.")
            self.model = copy.deepcopy(self.model)
            cast(self.model, self.dtype)

    def run(self, samples: Sequence[np.ndarray], batch_size: int) -> Run:
        options = {"prompt_lookup_num_tokens": self.lookup} if self.lookup else {}
        ends = self.transcriber.decoder.end_tokens

        def decode(batch: EncodedBatch) -> list[list[int]]:
            prompts = batch.prompts.to(self.model.decoder.dtype)
            written = generate(self.model, prompts, max_tokens=max(batch.max_tokens), **options)
            return [
                [token for token in row[:most] if token not in ends]
                for row, most in zip(written, batch.max_tokens, strict=True)
            ]

        return _by_batches(self.transcriber, samples, batch_size, decode)


@dataclass
class GenerateWhisper(System):
    """A Whisper's own greedy `generate`, on the same encoder's frames."""

    transcriber: WhisperTranscriber
    name = GENERATE

    def run(self, samples: Sequence[np.ndarray], batch_size: int) -> Run:
        transcriber = self.transcriber

        def decode(batch: EncodedBatch) -> list[list[int]]:
            frames_BTD = batch.prompts.memory_BMD
            assert frames_BTD is not None
            return generate_whisper(
                transcriber.model, frames_BTD, language=transcriber.language, task=transcriber.options.task
            )

        return _by_batches(transcriber, samples, batch_size, decode)


@dataclass
class Whisper(System):
    """faster-whisper, int8, greedy."""

    model: FasterWhisper

    def __post_init__(self) -> None:
        self.name, self.process = f"faster-whisper/{self.model.name}", self.model.process

    def run(self, samples: Sequence[np.ndarray], batch_size: int) -> Run:
        return Run(self.model.transcribe(samples, batch_size=batch_size))


def _by_batches(
    transcriber: Transcriber,
    samples: Sequence[np.ndarray],
    batch_size: int,
    decode: Callable[[EncodedBatch], list[list[int]]],
    *,
    number: int = 1,
) -> Run:
    """Encode batches of like length and let `decode` write the ids of each; so many threads share the rows."""
    texts = [""] * len(samples)
    tokens: list[list[int]] = [[] for _ in samples]
    encoder_seconds = decoder_seconds = 0.0
    pieces: list[tuple[int, float, list[int]]] = []

    def work(batches: Iterator[Sequence[Chunk[int]]]) -> Iterator[tuple[EncodedBatch, list[list[int]], float]]:
        for chunks in batches:
            batch = transcriber.encode(chunks)
            with timed(transcriber.model.device) as timer:
                written = decode(batch)
            yield batch, written, timer.seconds

    batches = by_length(transcriber.cut(enumerate(samples)), batch_size // number)
    for batch, written, seconds in share_out(work, batches, number):
        encoder_seconds += batch.seconds / number
        decoder_seconds += seconds / number
        pieces += [(chunk.recording, chunk.start, ids) for chunk, ids in zip(batch.chunks, written, strict=True)]
    for index, _, ids in sorted(pieces, key=lambda piece: piece[:2]):
        tokens[index] += ids
        texts[index] = f"{texts[index]} {transcriber.processor.decode_text(ids)}".strip()
    return Run(texts, tokens, None, encoder_seconds, decoder_seconds)


def build_systems(
    transcriber: Transcriber, peers: Sequence[FasterWhisper] = (), strategies: Sequence[DecodingOptions] = STRATEGIES
) -> list[System]:
    """All that `bench` times."""
    if isinstance(transcriber, WhisperTranscriber):
        heads = [] if transcriber.heads is None else [options for options in strategies if options.drafts]
        ours = [options for options in strategies if not options.drafts]
        return [
            *(Leapasr(transcriber, options) for options in (*ours, *heads)),
            GenerateWhisper(transcriber),
            *map(Whisper, peers),
        ]
    return [
        GreedyCTC(transcriber),
        *(Leapasr(transcriber, options) for options in strategies),
        Generate(transcriber),
        *([Generate(transcriber, dtype=torch.bfloat16)] if transcriber.dtype == MIXED else []),
        # its assisted generation goes wrong with a cache that something was put into before
        *([] if transcriber.model.config.speech_as_memory else [Generate(transcriber, lookup=8)]),
        *map(Whisper, peers),
    ]
