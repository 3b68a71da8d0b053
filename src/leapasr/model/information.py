"""What a model is made of, for people to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import WhisperForConditionalGeneration
from transformers.utils import cached_file

from leapasr.model.checkpoints import CTRANSLATE2_FILE
from leapasr.model.fitted_heads import FittedHeads
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration
from leapasr.model.storage import WEIGHTS_FILE


@dataclass(frozen=True)
class ModelInformation:
    """Parameters by part (tied ones once), and what the configuration says; `num_bytes` is the weights file's size."""

    parameters: dict[str, int]
    encoder: str
    decoder: str
    num_heads: int
    head_type: str
    vocab_size: int
    max_seconds: float
    stored: str
    num_bytes: int

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    def rows(self) -> list[tuple[str, str]]:
        """Names and values, to be printed."""
        parts = [(f"  {name}", f"{count:,}") for name, count in self.parameters.items()]
        return [
            ("parameters", f"{self.num_parameters:,}"),
            *parts,
            ("encoder", self.encoder),
            ("decoder", self.decoder),
            ("tokens per call (K)", str(self.num_heads)),
            ("heads 2..K", self.head_type if self.num_heads > 1 else "none"),
            ("vocabulary", f"{self.vocab_size} tokens"),
            ("audio at once", f"{self.max_seconds:g} s"),
            ("stored as", f"{self.stored}, {self.num_bytes / 1e6:.1f} MB"),
        ]


def parameters_by_part(parts: Mapping[str, nn.Module]) -> dict[str, int]:
    """How many parameters each part has, tied ones counted once."""
    counted: set[int] = set()
    parameters = {}
    for name, part in parts.items():
        own = {id(parameter): parameter.numel() for parameter in part.parameters() if id(parameter) not in counted}
        counted |= own.keys()
        parameters[name] = sum(own.values())
    return parameters


def describe(
    model: SpeechLlamaForConditionalGeneration, name_or_path: str | Path, *, max_seconds: float
) -> ModelInformation:
    """Describe a model that was loaded from `name_or_path`; `max_seconds` is the audio that it takes at once."""
    config = model.config
    encoder, decoder = config.encoder_config, config.decoder_config
    weights = cached_file(str(name_or_path), WEIGHTS_FILE)
    assert weights is not None  # the model was loaded from it
    stored = config.weight_storage if config.weight_storage == "int8" else str(config.dtype).removeprefix("torch.")
    return ModelInformation(
        parameters=parameters_by_part(dict(model.named_children())),
        encoder=f"{encoder.model_type}, {encoder.num_hidden_layers} layers of {model.encoder.output_size}",
        decoder=f"{decoder.model_type}, {decoder.num_hidden_layers} layers of {decoder.hidden_size}",
        num_heads=config.num_heads,
        head_type=config.head_type,
        vocab_size=config.vocab_size,
        max_seconds=max_seconds,
        stored=stored,
        num_bytes=Path(weights).stat().st_size,
    )


def describe_whisper(
    model: WhisperForConditionalGeneration, heads: FittedHeads | None, name_or_path: str | Path, *, max_seconds: float
) -> ModelInformation:
    """Describe a Whisper that was loaded from `name_or_path`, with `heads` fitted to it."""
    config = model.config
    parts: dict[str, nn.Module] = {"encoder": model.model.encoder, "decoder": model.model.decoder}
    if heads is not None:
        parts |= {f"fitted {name}": part for name, part in heads.named_children()}
    folder, num_bytes, stored = Path(name_or_path), 0, "float32"
    if (folder / CTRANSLATE2_FILE).is_file():
        num_bytes, stored = (folder / CTRANSLATE2_FILE).stat().st_size, "CTranslate2's file"
    elif weights := cached_file(str(name_or_path), WEIGHTS_FILE, _raise_exceptions_for_missing_entries=False):
        num_bytes = Path(weights).stat().st_size
    return ModelInformation(
        parameters=parameters_by_part(parts),
        encoder=f"whisper, {config.encoder_layers} layers of {config.d_model}",
        decoder=f"whisper, {config.decoder_layers} layers of {config.d_model}",
        num_heads=1 if heads is None else heads.config.num_heads,
        head_type="none" if heads is None else f"{heads.config.head_type}, fitted to {heads.config.base_model}",
        vocab_size=config.vocab_size,
        max_seconds=max_seconds,
        stored=stored,
        num_bytes=num_bytes,
    )
