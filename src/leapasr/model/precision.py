"""The floating-point type of a model's parts."""

from __future__ import annotations

import time
from functools import cache

import torch

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of training, by the names that users give
MEASURED_PRODUCT = (256, 512, 2048)  # rows, inputs and outputs
REPETITIONS = 3  # of which the quickest counts


@cache
def bfloat16_speedup(device: torch.device) -> float:
    """Seconds of a matrix product in float32 ÷ those of the same in bfloat16, measured once a process.

    About 5 where a CPU has AMX, and 0.2 where it has AVX2 alone.
    """
    seconds = {dtype: _seconds(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return seconds[torch.float32] / seconds[torch.bfloat16]


@torch.inference_mode()
def _seconds(device: torch.device, dtype: torch.dtype) -> float:
    num_rows, num_inputs, num_outputs = MEASURED_PRODUCT
    x = torch.ones(num_rows, num_inputs, device=device, dtype=dtype)
    weight = torch.ones(num_outputs, num_inputs, device=device, dtype=dtype)
    seconds = []
    for _ in range(REPETITIONS + 1):  # the first one builds kernels
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)[0, 0].item()  # a GPU has done it, too
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def as_scores(logits: torch.Tensor) -> torch.Tensor:
    """`logits` in at least float32, for probabilities."""
    return logits.float() if logits.dtype.itemsize < 4 else logits


def advice_against(precision: str, device: torch.device) -> str | None:
    """What to tell who trains in this precision (a name in `PRECISIONS`) where another is faster; None if none is."""
    if PRECISIONS[precision] != torch.bfloat16 or bfloat16_speedup(device) >= 1:
        return None
    times = f"{1 / bfloat16_speedup(device):.1f} times as long as in fp32"
    return f"products in {precision} take {times} on this {device.type}: --precision fp32 is faster"


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
