"""Logits in bfloat16, where a machine is faster at it, without a change of what is emitted.

A large part of a call's time goes into the unembedding: V rows of weights for each place. Drafts are checked, so their
logits may be rough. Of head 1 the likeliest token must be the very one of exact arithmetic. How far off a rough logit
can be is known, so only tokens that are within that of the best are computed again.

Shapes: ... any places, D width, V vocabulary, C candidates, N places that are computed in full.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leapasr.decoding.packing import AS_THEY_ARE, Packer
from leapasr.model.argmax import top

NUM_CANDIDATES = 8
ROUNDING = 2.0**-9  # largest relative error of a number in bfloat16
SUMMATION = 1.01  # and a little more, for the order of float32 sums


class RoughUnembedding:
    """`unembedding` in bfloat16, beside it.

    Args:
        unembedding: in at least float32, frozen.
        packer: gives products the form in which they are done.
    """

    def __init__(self, unembedding: nn.Linear, packer: Packer = AS_THEY_ARE):
        self.exact = unembedding
        weight_VD = unembedding.weight.detach()
        with torch.device("meta"):
            plain = nn.Linear(unembedding.in_features, unembedding.out_features, bias=False)
        plain.weight = nn.Parameter(weight_VD.bfloat16(), requires_grad=False)
        self._multiply = packer.product(plain)
        self._longest = float(weight_VD.norm(dim=-1).max())

    def rough(self, hidden: Tensor) -> Tensor:
        """Rough logits (..., V) of hidden states (..., D), in the unembedding's dtype."""
        logits = self._multiply(hidden.bfloat16()).to(self.exact.weight.dtype)
        return logits if self.exact.bias is None else logits.add_(self.exact.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) that are exact for the likeliest tokens, and rough for those that cannot be."""
        logits = self.rough(hidden)
        candidates = top(logits, min(NUM_CANDIDATES, logits.shape[-1]))
        last = logits.gather(-1, candidates[..., -1:])[..., 0]
        exact = (self.exact.weight[candidates] @ hidden[..., None])[..., 0]
        if self.exact.bias is not None:
            exact = exact + self.exact.bias[candidates]
        logits.scatter_(-1, candidates, exact)
        unsure = last + self.error(hidden) >= exact.amax(-1)
        if bool(unsure.any()):
            logits[unsure] = self.exact(hidden[unsure])
        return logits

    def error(self, hidden: Tensor) -> Tensor:
        """How far off rough logits can be (...): both factors of each product are rounded, and so is their sum.

        The products' sizes sum up to no more than the product of the two vectors' lengths.
        """
        return 3 * ROUNDING * SUMMATION * self._longest * hidden.norm(dim=-1)
