"""The likeliest ids."""

from __future__ import annotations

import torch
from torch import Tensor


def argmax(logits: Tensor) -> Tensor:
    """`logits.argmax(-1)`, of equal ones the first, int64 (...).

    On a CPU by NumPy, which is about ten times as fast at it as PyTorch 2.13, and no slower than a decoder call should
    be able to bear: a call asks for dozens of rows of a whole vocabulary.
    """
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        return logits.argmax(-1)
    values = logits.detach()
    return torch.from_numpy((values.float() if values.dtype == torch.bfloat16 else values).numpy().argmax(-1))
