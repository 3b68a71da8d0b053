"""Matrix products of few rows on a CPU, with weights that lie in memory as its kernels read them.

A product of a few rows takes about as long as its weights take to be read, and a library that is given plain weights
lays them out anew in every call: most of a decoder call's time. PyTorch's compiler packs weights once when it freezes a
model, through operators that are used here without it, for products of any number of rows.

Where a CPU has AMX a product of numbers that are rounded to bfloat16 takes a third of the time, and as long for a dozen
rows as for one. What is written may then not depend on how many tokens a call has, so a row of such a product has to
have, bit for bit, the same numbers whatever rows are beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import psutil
import torch
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]
Products = Callable[[Tensor], Sequence[Tensor]]  # of one input with several weights
Packing = Literal["mkl", "onednn"]  # of float32, by whose kernels: which are faster differs; bfloat16 is oneDNN's
PACKINGS: tuple[Packing, ...] = get_args(Packing)

ROWS_HINT = 16  # what layouts are made for; other numbers of rows are as right, and about as fast
LEFT_FREE = 2**31  # bytes of memory that packed copies leave to caches, and to whatever else runs
CHECKED = (1, 3, 24)  # rows of the products that packed weights have to get right before they are used
LONGEST_UNCUT = 448  # terms of a sum that oneDNN does not cut into parts, whose number depends on that of the rows
ROWS_TOGETHER = 8  # numbers of rows are rounded up to these: oneDNN compiles for each, and keeps 1,024 shapes in all
ROWS_UNCUT = 32  # of a product with longer sums: up to so many rows they are cut alike


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


def can_round(model: nn.Module) -> bool:
    """Whether products of a model's weights can be `rounded` here; they need half the memory of float32 weights."""
    weights = list(model.parameters())
    if any(weight.device.type != "cpu" or weight.dtype != torch.float32 for weight in weights):
        return False
    num_bytes = sum(weight.nbytes for weight in weights) // 2
    has_room = psutil.virtual_memory().available >= num_bytes + LEFT_FREE
    return has_room and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def rounded(linears: Sequence[nn.Linear]) -> Product:
    """The outputs of `linears` side by side, in bfloat16, from weights and inputs that are rounded to it.

    What a row gets does not depend on the rows beside it, if there are 64 inputs or more (`decoding.costs.steady` tries
    it out: it is no promise of oneDNN's).
    """
    weight = torch.cat([linear.weight.detach() for linear in linears]).bfloat16()
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([linear.bias.detach() for linear in linears]).bfloat16()
    packed = _by_onednn(weight, bias)
    is_cut = weight.shape[1] > LONGEST_UNCUT

    def product(x: Tensor) -> Tensor:
        num_rows = x.shape[:-1].numel()
        rows = x.new_empty(-(-num_rows // ROWS_TOGETHER) * ROWS_TOGETHER, x.shape[-1], dtype=torch.bfloat16)
        rows[:num_rows] = x.flatten(0, -2)
        parts = [packed(part) for part in rows.split(ROWS_UNCUT)] if is_cut else [packed(rows)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:num_rows].view(*x.shape[:-1], -1)

    return product


@dataclass(frozen=True)
class Packer:
    """Gives matrix products the form in which they are done.

    Attributes:
        packing: how weights are packed; None: they stay as they are.
        rounded: products are `rounded`, whatever `packing` says.
    """

    packing: Packing | None = None
    rounded: bool = False

    def product(self, linear: nn.Linear) -> Product:
        """What does what `linear` does."""
        if self.rounded:
            return rounded([linear])
        return linear if self.packing is None else pack(linear, self.packing)

    def products(self, *linears: nn.Linear) -> Products:
        """What each of `linears`, all with a bias or none, gives of the same inputs."""
        if self.rounded:
            joint, sizes = rounded(linears), [linear.out_features for linear in linears]
            return lambda x: joint(x).split(sizes, -1)
        each = [self.product(linear) for linear in linears]
        return lambda x: [product(x) for product in each]


AS_THEY_ARE = Packer()


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
