"""Matrix products of few rows on a CPU, with weights that lie in memory as its kernels read them.

A product of a few rows takes about as long as its weights take to be read, and a library that is given plain weights
lays them out anew in every call: most of a decoder call's time. PyTorch's compiler packs weights once when it freezes a
model, through operators that are used here without it, for products of any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import psutil
import torch
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]
Packing = Literal["mkl", "onednn"]  # of float32, by whose kernels: which are faster differs; bfloat16 is oneDNN's
PACKINGS: tuple[Packing, ...] = get_args(Packing)

ROWS_HINT = 16  # what layouts are made for; other numbers of rows are as right, and about as fast
LEFT_FREE = 2**31  # bytes of memory that packed copies leave to caches, and to whatever else runs
CHECKED = (1, 3, 24)  # rows of the products that packed weights have to get right before they are used


def pack(linear: nn.Linear, packing: Packing) -> Product:
    """What does what `linear` does, from a packed copy of its weights as they are now; `linear` itself if none can be.

    The copy takes as much memory as the weights: of a decoder that half fills the machine, some stay as they are.
    float32 and bfloat16 on a CPU can be packed.
    """
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    if weight.device.type != "cpu" or psutil.virtual_memory().available < weight.nbytes + LEFT_FREE:
        return linear
    if weight.dtype == torch.float32 and packing == "mkl" and torch.backends.mkl.is_available():
        product = _by_mkl(weight, bias)
    elif (weight.dtype == torch.float32 and packing == "onednn" and torch.backends.mkldnn.is_available()) or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        product = _by_onednn(weight, bias)
    else:
        return linear
    return product if _agree(product, linear) else linear


def _by_mkl(weight: Tensor, bias: Tensor | None) -> Product:
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, ROWS_HINT)

    def product(x: Tensor) -> Tensor:
        return torch.ops.mkl._mkl_linear(x, packed, weight, bias, x.numel() // x.shape[-1])

    return product


def _by_onednn(weight: Tensor, bias: Tensor | None) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)

    def product(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return product


def packer(packing: Packing | None) -> Callable[[nn.Linear], Product]:
    """`pack` in one way; None leaves weights as they are."""
    return as_it_is if packing is None else partial(pack, packing=packing)


def as_it_is(linear: nn.Linear) -> Product:
    """Not packed."""
    return linear


@torch.no_grad()
def _agree(product: Product, linear: nn.Linear) -> bool:
    """Whether a product is that of `linear`, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    for num_rows in CHECKED:
        x = torch.randn(num_rows, linear.in_features, generator=generator).to(linear.weight.dtype)
        expected = linear(x).float()
        tolerance = torch.finfo(x.dtype).eps * expected.abs().max() * linear.in_features**0.5
        if not (product(x).float() - expected).abs().max() <= tolerance:
            return False
    return True
