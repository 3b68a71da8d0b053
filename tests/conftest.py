"""Shared fixtures: a tiny Speech-LLaMA with random weights that says varied things and stops at varied lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, WhisperConfig, WhisperFeatureExtractor

from leapasr.model.configuration import SpeechLlamaConfig
from leapasr.model.processing import SpeechLlamaProcessor
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration
from leapasr.training.tokenizer import train_tokenizer

VOCAB_SIZE, BOS, EOS, PAD = 48, 1, 2, 0


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


def tiny_config(
    *, head_type: str = "latent", num_heads: int = 4, num_key_value_heads: int = 2, max_position_embeddings: int = 256
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
        vocab_size=VOCAB_SIZE,
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
        head_type=head_type,
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
    """The tiny random model, float32, saved with a processor: four heads, 1.28 s of audio at once. Do not change it."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = train_tokenizer(["the cat sat on the mat"], vocab_size=80)
    build_tiny_model(dtype=torch.float32).save_pretrained(folder)
    SpeechLlamaProcessor(WhisperFeatureExtractor(feature_size=8), tokenizer).save_pretrained(folder)
    return folder
