"""What a frozen model makes of audio, computed once and kept on disk: heads then learn from it without the model.

A lesson holds what the model wrote greedily (no transcript is needed), the decoder's states from which it wrote it,
and the encoder's frames. Short recordings are joined now and then (`joined`): the model hears windows of one length,
and these are filled in all ways when it is used.

Shapes: T frames, M tokens, U = M + 1 places (before the first token, and behind each), D width.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from lhotse.cut import Cut
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from leapasr.audio import SAMPLE_RATE, AudioError
from leapasr.chunks import Chunk, by_length
from leapasr.data.manifests import read_manifest, use_of
from leapasr.decoding import DecodingOptions
from leapasr.evaluation.evaluate import samples_of
from leapasr.model.speech_llama import join_rows
from leapasr.model.storage import replace_files
from leapasr.running import EncodedBatch
from leapasr.training.encoder_cache import audio_key
from leapasr.transcriber import as_blocks
from leapasr.transcribing import audio_files
from leapasr.whisper_transcriber import SAMPLES_PER_FRAME, WhisperTranscriber

GREEDY = DecodingOptions(strategy="autoregressive")
GROUP = 64  # recordings whose lessons are written together: what an interruption loses
BATCH_SIZE = 16
PAUSE_SECONDS = 0.3  # of silence between recordings that are joined
PARTS = ("tokens", "states", "frames")
WITHOUT = "without"  # in a shard's metadata: keys of recordings that gave no lesson
OF_ONE, WITH = "-", "+"  # between recording and number in a lesson's name, and between those that are joined


@dataclass(frozen=True)
class Recording:
    """Audio to learn from.

    Attributes:
        key: of its lessons.
        name: for messages.
        read: gives its 16 kHz samples (num_samples,), or raises AudioError.
        language: code, if it is known.
    """

    key: str
    name: str
    read: Callable[[], np.ndarray]
    language: str | None = None


@dataclass(frozen=True)
class Lesson:
    """tokens int64 (M,), the decoder's states (U, D) and the encoder's frames (T, D), float32."""

    tokens: Tensor
    states: Tensor
    frames: Tensor


def find_recordings(paths: Sequence[Path]) -> tuple[list[Recording], list[str]]:
    """The recordings of manifests, and of folders of audio files; and a message for each that cannot be used.

    Of a manifest whose lines have a ``use``, only what is for training is taken.

    Raises:
        ValueError: a manifest cannot be read, or there is nothing to learn from.
    """
    found: dict[str, Recording] = {}
    problems: list[str] = []
    for path in paths:
        recordings = _of_manifest(path, problems) if path.is_file() else map(_of_file, audio_files([path]))
        found |= {recording.key: recording for recording in recordings}
    if not found:
        raise ValueError(f"no audio to learn from in {', '.join(map(str, paths))}")
    return list(found.values()), problems


def _of_manifest(path: Path, problems: list[str]) -> Iterator[Recording]:
    manifest = read_manifest(path)
    problems += [f"{path}: {problem}" for problem in manifest.problems]
    for cut in manifest.cuts:
        if use_of(cut) in (None, "train"):
            yield _of_cut(cut)


def _of_cut(cut: Cut) -> Recording:
    language = cut.supervisions[0].language if cut.supervisions else None
    return Recording(audio_key(cut), cut.id, lambda: samples_of(cut), language)


def _of_file(path: Path) -> Recording:
    status = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:24]
    return Recording(key, str(path), lambda: np.concatenate(list(as_blocks(path)) or [np.zeros(0, np.float32)]))


class Distillation:
    """Lessons in `folder`, as safetensors shards; a shard appears when it is whole.

    Raises:
        ValueError: a shard is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._shards: dict[str, Path] = {}  # by lesson
        self._lengths: dict[str, tuple[int, int]] = {}  # tokens and frames
        self._done: set[str] = set()
        for path in sorted(folder.glob("*.safetensors")):
            self._take_in(path)

    def _take_in(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as shard:
                self._done |= set((shard.metadata() or {}).get(WITHOUT, "").split())
                for name in shard.keys():  # noqa: SIM118 (no mapping)
                    lesson, part = name.split("/")
                    self._shards[lesson] = path
                    self._done |= recordings_of(lesson)
                    if part == "frames":
                        num_tokens = shard.get_slice(f"{lesson}/tokens").get_shape()[0]
                        self._lengths[lesson] = num_tokens, shard.get_slice(name).get_shape()[0]
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and it is computed again") from error

    def lessons(self, recordings: Sequence[Recording]) -> list[str]:
        """Names of the lessons that are there of those recordings and no others."""
        keys = {recording.key for recording in recordings}
        return sorted(lesson for lesson in self._shards if recordings_of(lesson) <= keys)

    def num_frames(self, lesson: str) -> int:
        return self._lengths[lesson][1]

    def tokens(self, lesson: str) -> Tensor:
        """Token ids int64 (M,) of a lesson."""
        with safe_open(self._shards[lesson], "pt") as shard:
            return shard.get_tensor(f"{lesson}/tokens").long()

    def lesson(self, lesson: str) -> Lesson:
        with safe_open(self._shards[lesson], "pt") as shard:
            tokens, states, frames = (shard.get_tensor(f"{lesson}/{part}") for part in PARTS)
        return Lesson(tokens.long(), states.float(), frames.float())

    def missing(self, recordings: Sequence[Recording]) -> list[Recording]:
        return [recording for recording in recordings if recording.key not in self._done]

    def compute(
        self,
        transcriber: WhisperTranscriber,
        recordings: Sequence[Recording],
        *,
        advance: Callable[[int], None],
        complain: Callable[[str], None],
    ) -> None:
        """Let `transcriber`, without heads, write what is said in `recordings`, and keep what heads learn from.

        Texts that were cut short are left out: the model was lost there. What cannot be read is tried again next time.

        Args:
            advance: is told how many recordings are done. complain: is told which cannot be read.

        Raises:
            OSError: a shard cannot be written; those that are whole stay.
        """
        waiting = iter(recordings)
        while group := list(islice(waiting, GROUP)):
            chunks: list[Chunk[str]] = []
            read = []
            for recording in group:
                try:
                    samples = recording.read()
                except AudioError as error:
                    complain(str(error))
                    continue
                read.append(recording.key)
                cut = transcriber.cut([(0, samples)], language=recording.language)
                chunks += [
                    Chunk(f"{recording.key}{OF_ONE}{n}", 0.0, chunk.samples, chunk.language or transcriber.language)
                    for n, chunk in enumerate(cut)
                ]
            tensors: dict[str, Tensor] = {}
            for batch in by_length(list(joined(chunks, transcriber.max_seconds)), BATCH_SIZE):
                tensors |= learn(transcriber, transcriber.encode(batch))
            if read:
                self._write(read, tensors)
            advance(len(group))

    def _write(self, read: Sequence[str], tensors: dict[str, Tensor]) -> None:
        """Keep what was learnt of the recordings with these keys; of some it may be nothing."""
        without = set(read) - {key for name in tensors for key in recordings_of(name.split("/")[0])}
        name = hashlib.sha256(" ".join(read).encode()).hexdigest()[:24] + ".safetensors"
        metadata = {WITHOUT: " ".join(sorted(without))}
        try:
            replace_files(self.folder, lambda folder: save_file(tensors, folder / name, metadata))
        except SafetensorError as error:
            raise OSError(f"cannot write {self.folder / name}: {error}") from error
        self._take_in(self.folder / name)


def recordings_of(lesson: str) -> set[str]:
    """Keys of the recordings that a lesson is of."""
    return {part.split(OF_ONE)[0] for part in lesson.split(WITH)}


def joined(chunks: Sequence[Chunk[str]], max_seconds: float) -> Iterator[Chunk[str]]:
    """Neighbours of one known language joined to stretches of all lengths, some left alone; names are joined too.

    How long a stretch is to become at most is drawn, evenly up to `max_seconds`, by the name of its first part.
    """
    waiting = deque(chunks)
    while waiting:
        parts = [waiting.popleft()]
        seconds = parts[0].seconds
        longest = random.Random(parts[0].recording).uniform(0, max_seconds)
        while waiting and (language := waiting[0].language) and language == parts[0].language:
            seconds += PAUSE_SECONDS + waiting[0].seconds
            if seconds > longest:
                break
            parts.append(waiting.popleft())
        pause = np.zeros(int(PAUSE_SECONDS * SAMPLE_RATE), np.float32)
        samples = [piece for part in parts for piece in (pause, part.samples)][1:]
        name = WITH.join(part.recording for part in parts)
        yield Chunk(name, 0.0, np.concatenate(samples), parts[0].language)


@torch.inference_mode()
def learn(transcriber: WhisperTranscriber, batch: EncodedBatch) -> dict[str, Tensor]:
    """The lessons of a batch: ``NAME/tokens`` int32, ``NAME/states`` and ``NAME/frames`` float16, by chunk names."""
    decoder, prompts = transcriber.decoder, batch.prompts
    results = transcriber.decode(batch, GREEDY).results
    longest = max(len(result.tokens) for result in results)
    texts_BM = torch.tensor(
        [[*result.tokens, *[0] * (longest - len(result.tokens))] for result in results], device=decoder.device
    ).long()
    inputs_BWD, _ = join_rows(prompts.embeddings_BLD, prompts.lengths_B, decoder.embed(texts_BM, texts_BM))
    cache = decoder.new_cache(prompts)
    hidden_BWD = decoder.call(inputs_BWD, *cache.plan(inputs_BWD.shape[1], decoder.dtype), cache)
    frames_BTD = prompts.memory_BMD
    assert frames_BTD is not None
    lessons: dict[str, Tensor] = {}
    for row, (chunk, result) in enumerate(zip(batch.chunks, results, strict=True)):
        if result.truncated:
            continue
        first, num_frames = int(prompts.lengths_B[row]) - 1, -(-len(chunk.samples) // SAMPLES_PER_FRAME)
        states_UD = hidden_BWD[row, first : first + len(result.tokens) + 1]
        parts = (
            torch.tensor(result.tokens, dtype=torch.int32),
            states_UD.half().cpu(),
            frames_BTD[row, :num_frames].half().cpu(),
        )
        lessons |= {f"{chunk.recording}/{name}": part.contiguous() for name, part in zip(PARTS, parts, strict=True)}
    return lessons


def seconds_of(num_frames: int) -> float:
    """Of audio, by the encoder's frames."""
    return num_frames * SAMPLES_PER_FRAME / SAMPLE_RATE
