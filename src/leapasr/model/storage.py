"""Models on disk: one safetensors file, as floats or as 8-bit matrices with a scale per row.

In 8 bits a matrix is stored as int8 with a float32 scale for each output channel (row), under its name and its
name + ``_scale``; small matrices, norms and biases stay float32. Whisper's position table, where it is the sinusoids
that transformers computes, is left out and computed again; where it is not, it is stored in float16. What is loaded
from 8 bits and stored in 8 bits again gives the same file.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.whisper.modeling_whisper import sinusoids

from leapasr.model.checkpoints import CheckpointError
from leapasr.model.low_rank import merged_state

WEIGHTS_FILE = "model.safetensors"
SCALE_SUFFIX = "_scale"
POSITIONS = "encoder.encoder.embed_positions.weight"
MIN_QUANTISED_ELEMENTS = 4096  # below this, 8 bits save nothing that matters
_SCALE_MANTISSA_BITS = 16  # so that 127 · scale is exact in float32, and storing again finds the same scale


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (num_rows, ...) to int8 of its shape and float32 scales (num_rows,); matrix ≈ int8 · scale.

    No element is off by more than half its row's scale, which is the row's largest magnitude / 127 (rounded up).
    """
    rows = matrix.detach().float().flatten(1)
    mantissa, exponent = torch.frexp(rows.abs().amax(1) / 127)
    scale = torch.ldexp((mantissa * 2**_SCALE_MANTISSA_BITS).ceil() / 2**_SCALE_MANTISSA_BITS, exponent)
    scale = torch.where(scale == 0, 1.0, scale)
    return (rows / scale[:, None]).round().to(torch.int8).view(matrix.shape), scale


def widen(quantised: Tensor, scale: Tensor) -> Tensor:
    """The float32 matrix of what `quantise` gives."""
    return quantised.float() * scale.view(-1, *[1] * (quantised.ndim - 1))


def to_int8(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights as they are stored in 8 bits."""
    stored = {}
    for name, value in state.items():
        if name == POSITIONS:
            if not torch.equal(value.float().cpu(), sinusoids(*value.shape)):
                stored[name] = value.half()
        elif value.ndim >= 2 and value.numel() > MIN_QUANTISED_ELEMENTS:
            stored[name], stored[name + SCALE_SUFFIX] = quantise(value)
        else:
            stored[name] = value.float() if value.is_floating_point() else value
    return stored


def from_int8(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights out of what `to_int8` gives; float32, the position table aside if it was left out."""
    state = {}
    for name, value in stored.items():
        if value.dtype == torch.int8:
            if name + SCALE_SUFFIX not in stored:
                raise CheckpointError(f"{name} is stored in 8 bits, but its scales ({name + SCALE_SUFFIX}) are missing")
            state[name] = widen(value, stored[name + SCALE_SUFFIX])
        elif stored.get(name.removesuffix(SCALE_SUFFIX), value).dtype != torch.int8:
            state[name] = value.float() if value.is_floating_point() else value
    return state


def own_names(model: PreTrainedModel) -> list[str]:
    """Names of the model's weights and persistent buffers, tied ones once."""
    seen: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        seen.setdefault(id(value), name)
    return list(seen.values())


def replace_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder beside `folder`, flush it to disk, and move its files into `folder`.

    Until everything is written, nothing in `folder` changes: what is there survives a full disk.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
        write(Path(name))
        files = sorted(Path(name).iterdir())
        for file in files:
            with file.open("rb") as written:
                os.fsync(written.fileno())
        folder.mkdir(exist_ok=True)
        for file in files:
            os.replace(file, folder / file.name)


def save(model: PreTrainedModel, folder: Path, *, weights: str) -> None:
    """Write configuration and weights (``float``: as they are, ``int8``) into `folder`; low-rank adapters are merged.

    Raises:
        ValueError: `weights` is neither ``float`` nor ``int8``.
        OSError: the disk is full or cannot be written; what was in `folder` is unchanged.
    """
    if weights not in ("float", "int8"):
        raise ValueError(f"unknown weights {weights!r}: choose 'float' or 'int8'")
    config = copy.deepcopy(model.config)
    config.weight_storage = weights
    for part in (config, config.encoder_config, config.decoder_config):
        part.dtype = "float32" if weights == "int8" else str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    own = merged_state(model, own_names(model))
    state = {name: value.contiguous().cpu() for name, value in (to_int8(own) if weights == "int8" else own).items()}

    def write(pending: Path) -> None:
        config.save_pretrained(pending)
        try:
            save_file(state, pending / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {folder / WEIGHTS_FILE}: {error}") from error
        (pending / WEIGHTS_FILE).chmod((pending / "config.json").stat().st_mode)  # safetensors lets only the owner read

    replace_files(folder, write)


def read(path: Path, architecture: PreTrainedModel) -> dict[str, Tensor]:
    """The weights in a file that `save` wrote, as `architecture` (a model, perhaps on the meta device) needs them.

    Raises:
        CheckpointError: the file is damaged, lacks weights, or is of another architecture.
    """
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}; copy or download it again") from error
    in_8_bits = any(value.dtype == torch.int8 for value in stored.values())
    state = from_int8(stored) if in_8_bits else stored
    shapes = architecture.state_dict()
    if in_8_bits and POSITIONS in shapes and POSITIONS not in state:
        state[POSITIONS] = sinusoids(*shapes[POSITIONS].shape)
    wanted = own_names(architecture)
    missing = [name for name in wanted if name not in state]
    strange = [name for name in state if name not in shapes]
    other = [name for name in wanted if name in state and state[name].shape != shapes[name].shape]
    if other:
        found, needed = tuple(state[other[0]].shape), tuple(shapes[other[0]].shape)
        raise CheckpointError(
            f"{path} is of another architecture than its config.json: {other[0]} has shape {found}, not {needed}"
        )
    if strange:
        raise CheckpointError(
            f"{path} is of another architecture than its config.json: {len(strange)} weights are not in the model "
            f"({strange[0]}, ...)"
        )
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of the model's weights ({missing[0]}, ...): it is incomplete"
        )
    return state
