"""Long recordings through the shipped model: joined utterances give the words of the utterances, seams and all.

The last test needs LibriSpeech: LEAPASR_SPEECH names a folder with librispeech/manifest.jsonl.
"""

import importlib.resources
import os
import random
from pathlib import Path

import numpy as np
import pytest

from leapasr.audio import SAMPLE_RATE, read_audio
from leapasr.data.manifests import read_manifest
from leapasr.decoding import DecodingOptions
from leapasr.evaluation.scoring import count_errors, count_word_errors
from leapasr.text import NORMALIZER
from leapasr.transcriber import load

SAMPLES = sorted(Path(str(importlib.resources.files("leapasr") / "samples")).glob("*.flac"))
OPTIONS = DecodingOptions(draft_length="full")
CHAPTERS = ("7021-79759", "121-123852")  # the shortest two of test-clean with utterances as long as a chunk may be


@pytest.fixture(scope="module")
def transcriber():
    return load(device="cpu")


def words(text: str) -> list[str]:
    return NORMALIZER(text).split()


def joined(paths: list[Path]) -> np.ndarray:
    """Recordings with a little room noise behind each."""
    noise = np.random.default_rng(0).normal(0, 1e-3, SAMPLE_RATE * 3 // 10).astype(np.float32)
    return np.concatenate([part for path in paths for part in (read_audio(path), noise)])


def test_joined_samples_lose_and_double_no_word(transcriber):
    """A minute of the samples in random order: each word of theirs once, hardly one heard otherwise."""
    order = random.Random(0).choices(SAMPLES, k=11)
    alone = {path: transcriber.transcribe(path, OPTIONS).text for path in SAMPLES}
    together = transcriber.transcribe(joined(order), OPTIONS)
    assert len(together.segments) >= 3
    reference = " ".join(alone[path] for path in order)
    num_words, substituted, deleted, inserted = count_word_errors(reference, together.text, NORMALIZER)
    assert (deleted, inserted) == (0, 0)
    assert substituted <= 0.03 * num_words


def test_long_noise_says_nothing(transcriber):
    """And does not hide what is said behind it."""
    noise = np.random.default_rng(0).normal(0, 0.02, 30 * SAMPLE_RATE).astype(np.float32)
    assert transcriber.transcribe(noise, OPTIONS).segments == []
    assert transcriber.transcribe(noise, OPTIONS, vad_filter=False).text != ""
    sample = read_audio(SAMPLES[-1])
    behind = transcriber.transcribe(np.concatenate([noise, sample]), OPTIONS)
    assert words(behind.text)[-5:] == words(transcriber.transcribe(sample, OPTIONS).text)[-5:]


@pytest.mark.skipif(
    "LEAPASR_SPEECH" not in os.environ, reason="set LEAPASR_SPEECH to a folder with librispeech/manifest.jsonl"
)
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_joined_utterances_lose_and_double_no_word(transcriber, chapter):
    manifest = read_manifest(Path(os.environ["LEAPASR_SPEECH"]) / "librispeech" / "manifest.jsonl", use="test")
    cuts = sorted((cut for cut in manifest.cuts if cut.id.startswith(f"{chapter}-")), key=lambda cut: cut.id)
    samples = [cut.load_audio()[0] for cut in cuts]
    reference = " ".join(cut.supervisions[0].text for cut in cuts)
    alone = " ".join(result.text for result in transcriber.transcribe(samples, OPTIONS))
    joined = transcriber.transcribe(np.concatenate(samples), OPTIONS).text
    errors, errors_alone = (count_errors([reference], [text], NORMALIZER) for text in (joined, alone))
    assert errors.deletions_N.sum() <= errors_alone.deletions_N.sum() + 1
    assert errors.insertions_N.sum() <= errors_alone.insertions_N.sum() + 1
    assert errors.errors_N.sum() <= errors_alone.errors_N.sum() + 2
