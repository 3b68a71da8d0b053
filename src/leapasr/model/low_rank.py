"""Low-rank adaptation (LoRA, by peft) of a pretrained decoder: only the adapters train, and saving merges them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ADAPTER = "default"
_ADAPTER_MARK = ".lora_"


def add_low_rank(decoder: PreTrainedModel, *, rank: int) -> None:
    """Put adapters of rank `rank` on every linear layer of `decoder` but its unembedding, in place.

    The adapters start at zero: the decoder computes what it did. Its own weights no longer train.

    Raises:
        ValueError: `rank` is less than 1.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1:
        raise ValueError(f"the rank of low-rank adapters must be at least 1, got {rank}")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    inject_adapter_in_model(config, decoder, adapter_name=ADAPTER)


def has_low_rank(model: nn.Module) -> bool:
    """Whether `add_low_rank` was applied to the model or a part of it."""
    return any(_ADAPTER_MARK in name for name, _ in model.named_parameters())


def freeze_adapted(decoder: nn.Module) -> None:
    """Freeze what the adapters of `decoder` stand in for: all its weights but theirs. Without adapters, nothing."""
    if has_low_rank(decoder):
        for name, parameter in decoder.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and _ADAPTER_MARK in name)


@torch.no_grad()
def merged_state(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The weights `names` of `model`, as of the model without adapters that computes the same."""
    state = model.state_dict()
    state = {name: state[name] for name in names}
    if not has_low_rank(model):
        return state
    from peft.tuners import lora

    for path, layer in model.named_modules():
        if isinstance(layer, lora.Linear):
            base = layer.get_base_layer()
            assert isinstance(base, nn.Linear)
            for name in [name for name in state if name.startswith(f"{path}.")]:
                del state[name]
            state[f"{path}.weight"] = base.weight + layer.get_delta_weight(ADAPTER)
            if base.bias is not None:
                state[f"{path}.bias"] = base.bias
    return state
