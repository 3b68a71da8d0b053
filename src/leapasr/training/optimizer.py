"""AdamW over float32 master weights, for models that compute in bfloat16, with an averaged copy.

bfloat16 keeps 8 bits of mantissa: a small update to a weight is rounded away. So the optimizer holds a float32
copy of every trained weight, updates that, and writes it back. The exponential moving average of the masters
is what is evaluated and saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class MasterAdamW:
    """AdamW on float32 masters of `named_parameters`, with global norm clipping and weight averaging.

    Args:
        named_parameters: trained parameters by name, in any float dtype.
        lr_scale: factor on the learning rate by name prefix; the longest prefix that fits counts.
        weight_decay: on matrices only.
        averaging: decay of the moving average (0: none, the averaged weights are the masters).
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        *,
        lr_scale: dict[str, float] | None = None,
        weight_decay: float = 0.01,
        averaging: float = 0.999,
        betas: tuple[float, float] = (0.9, 0.98),
    ):
        named = list(named_parameters)
        if not named:
            raise ValueError("nothing to train: every parameter is frozen")
        self.parameters: list[Tensor] = [p for _, p in named]
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.averages = [m.clone() for m in self.masters]
        self.averaging, self.num_updates = averaging, 0
        scales = sorted((lr_scale or {}).items(), key=lambda item: -len(item[0]))
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for (name, parameter), master in zip(named, self.masters, strict=True):
            scale = next((value for prefix, value in scales if name.startswith(prefix)), 1.0)
            groups.setdefault((scale, weight_decay if parameter.ndim > 1 else 0.0), []).append(master)
        self.inner = torch.optim.AdamW(
            [{"params": p, "scale": s, "weight_decay": d} for (s, d), p in groups.items()], betas=betas, fused=True
        )

    @torch.no_grad()
    def step(self, learning_rate: float, max_norm: float) -> float:
        """One update from the parameters' gradients; returns the gradients' norm before clipping.

        The gradients are consumed. A norm that is not finite changes nothing: the caller decides.
        """
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, max_norm))
        if not torch.isfinite(torch.tensor(norm)):
            return norm
        for group in self.inner.param_groups:
            group["lr"] = learning_rate * group["scale"]
        self.inner.step()
        self.num_updates += 1
        decay = min(self.averaging, (1 + self.num_updates) / (10 + self.num_updates)) if self.averaging else 0.0
        torch._foreach_lerp_(self.averages, self.masters, 1 - decay)
        torch._foreach_copy_([p.data for p in self.parameters], self.masters)
        return norm

    @contextmanager
    def averaged(self):
        """While inside, the model's parameters are the averaged weights."""
        torch._foreach_copy_([p.data for p in self.parameters], self.averages)
        try:
            yield
        finally:
            torch._foreach_copy_([p.data for p in self.parameters], self.masters)

    def state_dict(self) -> dict[str, Any]:
        return {
            "masters": self.masters,
            "averages": self.averages,
            "inner": self.inner.state_dict(),
            "num_updates": self.num_updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(self.masters, state["masters"])
        torch._foreach_copy_(self.averages, state["averages"])
        self.inner.load_state_dict(state["inner"])
        self.num_updates = state["num_updates"]
        torch._foreach_copy_([p.data for p in self.parameters], self.masters)
