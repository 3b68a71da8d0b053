"""The floating-point type of a model's parts."""

from __future__ import annotations

import torch

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of training, by the names that users give


def cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast weights in place, and learnt buffers, but not those that are computed at the start.

    Rotary frequencies in bfloat16 would turn positions by other angles than those of the model once it is loaded.
    """
    computed = [
        (module, name, module.get_buffer(name))
        for module in model.modules()
        for name in module._non_persistent_buffers_set
    ]
    model.to(dtype)
    for module, name, buffer in computed:
        setattr(module, name, buffer)
