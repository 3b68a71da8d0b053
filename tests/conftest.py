"""Shared fixtures: a tiny Speech-LLaMA with random weights that says varied things and stops at varied lengths."""

from __future__ import annotations

import copy
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, WhisperConfig, WhisperFeatureExtractor

from leapasr.audio import SAMPLE_RATE
from leapasr.model.configuration import SpeechLlamaConfig
from leapasr.model.processing import SpeechLlamaProcessor
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration
from leapasr.training.tokenizer import train_tokenizer

VOCAB_SIZE, BOS, EOS, PAD = 48, 1, 2, 0


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def a_cache_of_its_own(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def tiny_config(
    *,
    head_type: str = "latent",
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    max_position_embeddings: int = 256,
    vocab_size: int = VOCAB_SIZE,
    ctc_lookahead: int = 3,
    ctc_positions: bool = False,
    draft_layers: int = 0,
) -> SpeechLlamaConfig:
    """A configuration of some ten thousand parameters: 16 wide encoder, two LLaMA layers of 32, four heads."""
    encoder = WhisperConfig(
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        max_source_positions=64,
    )
    decoder = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=max_position_embeddings,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return SpeechLlamaConfig(
        encoder,
        decoder,
        adapter_size=16,
        adapter_layers=1,
        adapter_attention_heads=2,
        adapter_ffn_size=32,
        num_heads=num_heads,
        ctc_lookahead=ctc_lookahead,
        ctc_positions=ctc_positions,
        head_type=head_type,
        draft_layers=draft_layers,
    )


@cache
def _build(dtype: torch.dtype, fields: tuple[tuple[str, object], ...]) -> SpeechLlamaForConditionalGeneration:
    torch.manual_seed(0)
    model = SpeechLlamaForConditionalGeneration(tiny_config(**dict(fields))).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # wide enough for the text to depend on what came before
            parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5, generator=generator)
    model.get_input_embeddings().weight.normal_(0, 1, generator=generator)
    model.get_output_embeddings().weight[EOS] *= 1.25  # end-of-text now and then
    return model.to(dtype)


@pytest.fixture(scope="session")
def build_tiny_model() -> Callable[..., SpeechLlamaForConditionalGeneration]:
    """Builds (once per set of arguments) a tiny random model: `build_tiny_model(head_type="residual", num_heads=2)`.

    Takes the arguments of `tiny_config`, and `dtype`, float64 by default. Weights are frozen, not zero, the same in
    every run, and shared: do not change them.
    """

    def build(*, dtype: torch.dtype = torch.float64, **fields: object) -> SpeechLlamaForConditionalGeneration:
        return _build(dtype, tuple(sorted(fields.items())))

    return build


@pytest.fixture(scope="session")
def tiny_model_folder(build_tiny_model, tmp_path_factory) -> Path:
    """The tiny random model, float32, saved with a processor: four heads, 1.28 s of audio at once. Do not change it.

    Heads 2..4 say what head 1 says, and end-of-text is rarer than elsewhere: some drafts are right, most are not.
    """
    folder = tmp_path_factory.mktemp("tiny-model")
    model = copy.deepcopy(build_tiny_model(dtype=torch.float32))
    model.get_output_embeddings().weight[EOS] /= 1.25
    model.mtp_heads.reset_from(model.get_output_embeddings())
    model.save_pretrained(folder)
    tokenizer = train_tokenizer(["the cat sat on the mat"], vocab_size=80)
    SpeechLlamaProcessor(WhisperFeatureExtractor(feature_size=8), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """`with full_disk(num_bytes):` every file that grows beyond `num_bytes` fails to be written, by the system."""

    @contextmanager
    def limited(num_bytes: int) -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limited


@pytest.fixture(scope="session")
def babble() -> Callable[..., np.ndarray]:
    """Makes sound of which the tiny model writes varied text: `babble(seconds, seed)`, 16 kHz float32 samples."""

    def make(seconds: float, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        times = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
        frequencies = 100 * 2 ** rng.uniform(0, 6, size=len(times) // 800 + 1)  # a tone each 50 ms
        tones = np.sin(2 * np.pi * frequencies.repeat(800)[: len(times)] * times)
        return (0.3 * tones + rng.normal(0, 0.001, len(times))).astype(np.float32)

    return make
