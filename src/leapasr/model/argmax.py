"""The likeliest ids."""

from __future__ import annotations

import torch
from torch import Tensor

WIDENED = 32  # rows of bfloat16 that become float32 at a time: so many stay in a core's cache
BLOCK = 128  # neighbours of which `top` first takes the best alone


def argmax(logits: Tensor) -> Tensor:
    """`logits.argmax(-1)`, of equal ones the first, int64 (...).

    On a CPU by NumPy, which is about ten times as fast at it as PyTorch 2.13, and no slower than a decoder call should
    be able to bear: a call asks for dozens of rows of a whole vocabulary.
    """
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        return logits.argmax(-1)
    values = logits.detach()
    if values.dtype != torch.bfloat16:
        return torch.from_numpy(values.numpy().argmax(-1))
    rows = values.reshape(-1, values.shape[-1]).split(WIDENED)  # NumPy has no bfloat16
    best = [torch.from_numpy(row.float().numpy().argmax(-1)) for row in rows]
    return torch.cat(best).view(values.shape[:-1]) if best else torch.empty(values.shape[:-1], dtype=torch.long)


def top(logits: Tensor, number: int) -> Tensor:
    """``logits.topk(number).indices``, int64 (..., number): ids of the largest, the largest first.

    They lie in the blocks with the largest maxima, so that nearly all ids are looked at by a maximum only: on a CPU
    several times as fast for a large vocabulary.
    """
    num_blocks = logits.shape[-1] // BLOCK
    if logits.device.type != "cpu" or num_blocks <= number:
        return logits.topk(number).indices
    in_blocks = logits[..., : num_blocks * BLOCK].unflatten(-1, (num_blocks, BLOCK))
    blocks = in_blocks.amax(-1).topk(number, sorted=False).indices
    ids = (blocks[..., None] * BLOCK + torch.arange(BLOCK)).flatten(-2)
    rest = torch.arange(num_blocks * BLOCK, logits.shape[-1]).expand(*logits.shape[:-1], -1)
    ids = torch.cat([ids, rest], -1)
    return ids.gather(-1, logits.gather(-1, ids).topk(number).indices)
