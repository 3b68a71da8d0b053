"""Weights from elsewhere: encoders and decoders by hub name or folder, Whisper from a CTranslate2 folder."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperModel,
)

from leapasr.model.encoders import ENCODERS

CTRANSLATE2_FILE = "model.bin"
MULTILINGUAL_VOCABULARY = 51865  # tokens of a Whisper that knows more languages than English, at least
_CTRANSLATE2_DTYPES = {0: np.float32, 4: np.float16}
_CTRANSLATE2_OTHER_DTYPES = {1: "int8", 2: "int16", 3: "int32", 5: "bfloat16"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: what is wrong with it, and where."""


class _Reader:
    """Bounds-checked little-endian reads from a file's bytes."""

    def __init__(self, path: Path):
        self.path, self.data, self.offset = path, memoryview(path.read_bytes()), 0

    def take(self, size: int) -> memoryview:
        if self.offset + size > len(self.data):
            raise CheckpointError(
                f"{self.path} is cut short: {size} bytes wanted at byte {self.offset}, {len(self.data)} in the file"
            )
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return bytes(self.take(self.number("H")))[:-1].decode("utf-8", "replace")


def read_ctranslate2(folder: Path) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 Whisper folder, as float arrays by their CTranslate2 names.

    Raises:
        CheckpointError: not a CTranslate2 file, not Whisper, quantised, or cut short.
    """
    path = Path(folder) / CTRANSLATE2_FILE
    reader = _Reader(path)
    version = reader.number("I")
    if not 4 <= version <= 6:
        raise CheckpointError(
            f"{path} is not a CTranslate2 model of a known version (4 to 6): it begins with {version}"
        )
    spec, _revision = reader.string(), reader.number("I")
    if spec != "WhisperSpec":
        raise CheckpointError(f"{path} holds a {spec!r}, not a Whisper model ('WhisperSpec')")
    variables = {}
    for _ in range(reader.number("I")):
        name = reader.string()
        shape = [reader.number("I") for _ in range(reader.number("B"))]
        type_code, size = reader.number("B"), reader.number("I")
        data = reader.take(size)
        if type_code in _CTRANSLATE2_DTYPES:
            dtype = np.dtype(_CTRANSLATE2_DTYPES[type_code])
            if size != math.prod(shape) * dtype.itemsize:
                raise CheckpointError(f"{path} is damaged: {name} of shape {shape} has {size} bytes")
            variables[name] = np.frombuffer(data, dtype).reshape(shape)
        elif name.endswith("weight"):
            stored = _CTRANSLATE2_OTHER_DTYPES.get(type_code, f"type {type_code}")
            raise CheckpointError(
                f"{path}: {name} is quantised ({stored}); convert the model again with --quantization float16"
            )
    for _ in range(reader.number("I")):
        alias, name = reader.string(), reader.string()
        if name in variables:
            variables[alias] = variables[name]
    return variables


def _whisper_names(num_encoder_layers: int, num_decoder_layers: int) -> dict[str, list[str]]:
    """CTranslate2 variable prefix → transformers module names; stacked projections name several modules."""
    names = {"encoder/conv1": ["encoder.conv1"], "encoder/conv2": ["encoder.conv2"]}
    names |= {"encoder/layer_norm": ["encoder.layer_norm"], "decoder/layer_norm": ["decoder.layer_norm"]}
    for side, count in (("encoder", num_encoder_layers), ("decoder", num_decoder_layers)):
        for n in range(count):
            theirs, ours = f"{side}/layer_{n}", f"{side}.layers.{n}"
            names[f"{theirs}/self_attention/layer_norm"] = [f"{ours}.self_attn_layer_norm"]
            names[f"{theirs}/self_attention/linear_0"] = [f"{ours}.self_attn.{p}_proj" for p in "qkv"]
            names[f"{theirs}/self_attention/linear_1"] = [f"{ours}.self_attn.out_proj"]
            names[f"{theirs}/ffn/layer_norm"] = [f"{ours}.final_layer_norm"]
            names[f"{theirs}/ffn/linear_0"] = [f"{ours}.fc1"]
            names[f"{theirs}/ffn/linear_1"] = [f"{ours}.fc2"]
            if side == "decoder":
                names[f"{theirs}/attention/layer_norm"] = [f"{ours}.encoder_attn_layer_norm"]
                names[f"{theirs}/attention/linear_0"] = [f"{ours}.encoder_attn.q_proj"]
                names[f"{theirs}/attention/linear_1"] = [f"{ours}.encoder_attn.{p}_proj" for p in "kv"]
                names[f"{theirs}/attention/linear_2"] = [f"{ours}.encoder_attn.out_proj"]
    return names


def _num_layers(variables: Iterable[str], side: str) -> int:
    return len({name.split("/")[1] for name in variables if re.match(rf"{side}/layer_\d+/", name)})


def load_ctranslate2_whisper(folder: str | Path) -> tuple[WhisperConfig, dict[str, Tensor]]:
    """Whisper from a CTranslate2 folder: its configuration, and weights for transformers' `WhisperModel`, float32.

    Raises:
        CheckpointError: the file is not a float CTranslate2 Whisper model, or is cut short.
    """
    folder = Path(folder)
    variables = read_ctranslate2(folder)

    def tensor(name: str) -> Tensor:
        if name not in variables:
            raise CheckpointError(f"{folder / CTRANSLATE2_FILE} lacks {name}: not a whole Whisper model")
        return torch.from_numpy(variables[name].astype(np.float32))

    embeddings, positions = tensor("decoder/embeddings/weight"), tensor("encoder/position_encodings/encodings")
    num_encoder_layers, num_decoder_layers = (_num_layers(variables, side) for side in ("encoder", "decoder"))
    width = embeddings.shape[1]
    num_heads = width // 64  # of every Whisper
    config = WhisperConfig(
        vocab_size=embeddings.shape[0],
        num_mel_bins=tensor("encoder/conv1/weight").shape[1],
        d_model=width,
        encoder_layers=num_encoder_layers,
        decoder_layers=num_decoder_layers,
        encoder_attention_heads=num_heads,
        decoder_attention_heads=num_heads,
        encoder_ffn_dim=tensor("encoder/layer_0/ffn/linear_0/weight").shape[0],
        decoder_ffn_dim=tensor("decoder/layer_0/ffn/linear_0/weight").shape[0],
        max_source_positions=positions.shape[0],
        max_target_positions=tensor("decoder/position_encodings/encodings").shape[0],
    )
    state = {
        "encoder.embed_positions.weight": positions,
        "decoder.embed_positions.weight": tensor("decoder/position_encodings/encodings"),
        "decoder.embed_tokens.weight": embeddings,
    }
    for theirs, ours in _whisper_names(num_encoder_layers, num_decoder_layers).items():
        fields = ("gamma", "beta") if theirs.endswith("layer_norm") else ("weight", "bias")
        for their_field, our_field in zip(fields, ("weight", "bias"), strict=True):
            parts = tensor(f"{theirs}/{their_field}").chunk(len(ours))
            for module, part in zip(ours, parts, strict=True):
                if not (module.endswith("k_proj") and our_field == "bias"):  # Whisper's keys have no bias
                    state[f"{module}.{our_field}"] = part.contiguous()
    return config, state


def load_whisper(name_or_path: str | Path) -> tuple[WhisperConfig, dict[str, Tensor]]:
    """A whole Whisper by hub name, transformers folder or CTranslate2 folder: what `load_ctranslate2_whisper` gives.

    Raises:
        CheckpointError: it is no Whisper.
    """
    if (Path(name_or_path) / CTRANSLATE2_FILE).is_file():
        return load_ctranslate2_whisper(name_or_path)
    config = AutoConfig.from_pretrained(name_or_path)
    if not isinstance(config, WhisperConfig):
        raise CheckpointError(f"{name_or_path} is a {config.model_type!r}, not a Whisper model")
    return config, WhisperModel.from_pretrained(name_or_path, dtype=torch.float32).state_dict()


def whisper_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Whisper by hub name or folder.

    Raises:
        CheckpointError: there is none, or it lacks Whisper's special tokens.
    """
    file = Path(name_or_path) / "tokenizer.json"
    if Path(name_or_path).is_dir() and not file.is_file():
        raise CheckpointError(f"{name_or_path} has no tokenizer.json: copy it from where the model came from")
    found = (
        PreTrainedTokenizerFast(tokenizer_file=str(file))
        if file.is_file()
        else PreTrainedTokenizerFast.from_pretrained(name_or_path)
    )
    missing = {"<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"} - found.get_vocab().keys()
    if missing:
        raise CheckpointError(f"the tokenizer of {name_or_path} lacks {', '.join(sorted(missing))}: not Whisper's")
    return found


def load_encoder_config(name_or_path: str | Path) -> PreTrainedConfig:
    """The configuration of what `load_encoder` loads.

    Raises:
        CheckpointError: there is no encoder of a supported type.
    """
    if (Path(name_or_path) / CTRANSLATE2_FILE).is_file():
        return load_ctranslate2_whisper(name_or_path)[0]
    config = AutoConfig.from_pretrained(name_or_path)
    if config.model_type == "parakeet_ctc":
        return config.encoder_config
    if config.model_type not in ENCODERS:
        raise CheckpointError(f"{name_or_path} is a {config.model_type!r}; supported encoders: {', '.join(ENCODERS)}")
    return config


def load_encoder(name_or_path: str | Path) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """A pretrained speech encoder by hub name, transformers folder, or CTranslate2 Whisper folder.

    Returns its configuration and its weights, named as in the transformers encoder class, float32.

    Raises:
        CheckpointError: there is no encoder of a supported type.
    """
    if (Path(name_or_path) / CTRANSLATE2_FILE).is_file():
        whisper, state = load_ctranslate2_whisper(name_or_path)
        return whisper, {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    config = load_encoder_config(name_or_path)
    model = AutoModel.from_pretrained(name_or_path, dtype=torch.float32)
    return config, getattr(model, "encoder", model).state_dict()


def load_decoder(name_or_path: str | Path) -> PreTrainedModel:
    """A LLaMA-like causal LM by hub name or folder, float32."""
    return AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32)
