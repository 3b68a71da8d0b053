"""What runs in faster-whisper's own process (`leapasr.evaluation.peers`), which has no need of torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from leapasr.audio import SAMPLE_RATE

_models: list[FasterWhisperModel] = []  # the one of this process


def load(folder: str, language: str, device: str, num_threads: int) -> int:
    """Load this process's model, and give the process's id; errors as of `FasterWhisperModel`."""
    _models.append(FasterWhisperModel(folder, language, device, num_threads))
    return os.getpid()


def transcribe(samples: Sequence[np.ndarray], batch_size: int) -> list[str]:
    """What `FasterWhisperModel.transcribe` of this process's model writes."""
    return _models[0].transcribe(samples, batch_size=batch_size)


class FasterWhisperModel:
    """A faster-whisper model, int8, greedy, without its fallback to other temperatures.

    Args:
        folder: a CTranslate2 folder of an English or multilingual Whisper.
        language: of what it is to hear. device: ``cpu`` or ``cuda``. num_threads: of a CPU.

    Raises:
        ImportError: faster-whisper is not installed.
        ValueError: the folder holds no such model.
    """

    def __init__(self, folder: str, language: str, device: str, num_threads: int):
        try:
            from faster_whisper import BatchedInferencePipeline, WhisperModel
        except ImportError as error:
            raise ImportError("faster-whisper is not installed: pip install 'leapasr[bench]'") from error
        logging.getLogger("faster_whisper").setLevel(logging.ERROR)
        self.language = language
        try:
            self.model = WhisperModel(folder, device=device, compute_type="int8", cpu_threads=num_threads)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{folder} holds no model that faster-whisper can read: {error}") from error
        self.pipeline = BatchedInferencePipeline(self.model)

    def transcribe(self, samples: Sequence[np.ndarray], *, batch_size: int = 1) -> list[str]:
        """The text of each utterance (16 kHz samples, at most 30 s), several at a time by its batched pipeline."""
        options: dict[str, Any] = {
            "language": self.language, "beam_size": 1, "temperature": 0.0, "without_timestamps": True,
        }  # fmt: skip
        if batch_size == 1:
            texts = []
            for audio in samples:
                segments, _ = self.model.transcribe(audio, **options)
                texts.append(" ".join(segment.text.strip() for segment in segments))
            return texts
        seconds = [-(-len(audio) // SAMPLE_RATE) for audio in samples]  # each begins at a whole second of one recording
        starts = np.cumsum([0, *seconds]).tolist()
        recording = np.zeros(starts[-1] * SAMPLE_RATE, np.float32)
        clips = []
        for start, audio in zip(starts, samples, strict=False):
            recording[start * SAMPLE_RATE :][: len(audio)] = audio
            clips.append({"start": start, "end": start + len(audio) / SAMPLE_RATE})
        segments, _ = self.pipeline.transcribe(recording, batch_size=batch_size, clip_timestamps=clips, **options)
        pieces: dict[int, list[str]] = {start: [] for start in starts[:-1]}
        for segment in segments:
            pieces[segment.seek // self.model.frames_per_second].append(segment.text.strip())
        return [" ".join(texts) for texts in pieces.values()]
