"""A LLaMA's layers in few operations.

A decoder call of a few tokens is short, and transformers' modules spend a part of it around the matrix products. Here
is the same arithmetic on the same weights, with what a call of the decoding loop needs and nothing else: the mask is
there already, and so are the positions. transformers' own forward pass does all training and every other architecture,
and is what tests hold this one to.

Shapes: B rows, W inputs, S slots of the cache, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel, LlamaRMSNorm

from leapasr.decoding.packing import AS_THEY_ARE, Packer, Product, Products
from leapasr.model.draft_layers import DraftLayers, NoFeedForward

LEAST_INPUTS, MOST_INPUTS = 4, 32  # of an attention that is to be steady
STEADY_SLOTS = 16  # slots that it sees are a multiple of these
STEADY_TURNS = ("default", "linear", "llama3", "yarn")  # transformers' kinds of rotary positions
LEAST_TURN = 2.0**-16  # radians; by less, a number that is rounded to bfloat16 is not turned
TABLE_SIZE = 1024  # positions whose turns are computed at a time


class LeanLayers:
    """`leapasr.model.draft_layers.read_hidden` of a LLaMA.

    Args:
        body: a `LlamaModel` in evaluation mode, such that it `fit`s.
        draft_layers: of that body; None where there are none.
        packer: gives matrix products the form in which they are done. Where they are rounded, an input gets, bit for
            bit, the same numbers however many inputs a call has, whose slots are then a multiple of `STEADY_SLOTS`.
    """

    def __init__(self, body: Any, draft_layers: DraftLayers | None, packer: Packer = AS_THEY_ARE):
        self._steady = packer.rounded
        self._tables: tuple[Tensor, ...] = (torch.empty(0), torch.empty(0))
        self._rotary: nn.Module = body.rotary_emb
        self._is_turning = not packer.rounded or _largest_turn(body) >= LEAST_TURN  # not where positions are learnt
        self._layers, self._norm = [_Layer(layer, packer) for layer in body.layers], body.norm
        self._draft_layers: list[_Layer] = []
        if draft_layers is not None:
            self._branching, self._draft_norm = draft_layers.branching, draft_layers.body.norm
            self._draft_layers = [_Layer(layer, packer) for layer in draft_layers.body.layers]

    @staticmethod
    def fit(body: nn.Module, draft_layers: DraftLayers | None) -> bool:
        """Whether all of it is what this stands for: no other architecture, nothing wrapped around a layer's parts."""
        bodies = [body] if draft_layers is None else [body, draft_layers.body]
        return all(type(each) is LlamaModel and all(map(_is_plain, each.layers)) for each in bodies)

    @staticmethod
    def can_be_steady(body: Any) -> bool:
        """Whether the turns of a position are the same in calls of any length, so that products may be rounded."""
        return body.rotary_emb.rope_type in STEADY_TURNS

    def __call__(
        self, embeddings_BWD: Tensor, positions_BW: Tensor, mask_B1WS: Tensor, cache: Cache | None, *, drafting: bool
    ) -> Tensor:
        """Last hidden states (B, W, D) or, with draft layers, (B, W, 2D)."""
        turns = None
        if self._is_turning:
            cos_BWC, sin_BWC = self._turns(embeddings_BWD, positions_BW)
            turns = cos_BWC[:, None], _turned(sin_BWC)[:, None]
        if self._steady:
            mask_B1WS = mask_B1WS.clamp(min=torch.finfo(torch.bfloat16).min).bfloat16()
        rest = turns, mask_B1WS, cache
        hidden = branch = embeddings_BWD
        for place, layer in enumerate(self._layers):
            hidden = layer(hidden, *rest)
            if self._draft_layers and place + 1 == self._branching:
                branch = hidden
        hidden = _normed(hidden, self._norm)
        if not self._draft_layers or not drafting:
            return hidden
        for layer in self._draft_layers:
            branch = layer(branch, *rest)
        return torch.cat([hidden, _normed(branch, self._draft_norm)], -1)

    def _turns(self, embeddings_BWD: Tensor, positions_BW: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, W, C) by which positions turn queries and keys.

        Steady, they are from tables: of many numbers a library's cosines may be others than of few.
        """
        if not self._steady:
            return self._rotary(embeddings_BWD, positions_BW)
        tables, last = self._tables, int(positions_BW.max())
        if last >= len(tables[0]):
            starts = range(len(tables[0]), last + 1, TABLE_SIZE)
            ranges = [torch.arange(start, start + TABLE_SIZE)[None] for start in starts]
            more = [self._rotary(embeddings_BWD, positions) for positions in ranges]
            tables = tuple(torch.cat([table, *(part[n][0] for part in more)]) for n, table in enumerate(tables))
            self._tables = tables
        cos_PC, sin_PC = tables
        return cos_PC[positions_BW], sin_PC[positions_BW]


class _Layer:
    def __init__(self, layer: Any, packer: Packer):
        attention: Any = layer.self_attn
        self.index: int = attention.layer_idx
        self.head_width: int = attention.head_dim
        self.grouped: bool = attention.num_key_value_groups > 1
        self.attention_norm, self.norm = layer.input_layernorm, layer.post_attention_layernorm
        q, k, v, o = _attention_parts(attention)
        self.qkv, self.o = packer.products(q, k, v), packer.product(o)
        self.gate_up: Products | None = None
        if not isinstance(layer.mlp, NoFeedForward):
            gate, up, down = _feed_forward_parts(layer.mlp)
            self.gate_up, self.down = packer.products(gate, up), packer.product(down)
            self.activation: Product = layer.mlp.act_fn
        self.attend = _steady_attention if packer.rounded else nn.functional.scaled_dot_product_attention

    def __call__(
        self, hidden_BWD: Tensor, turns: tuple[Tensor, Tensor] | None, mask_B1WS: Tensor, cache: Cache | None
    ) -> Tensor:
        B, W, _ = hidden_BWD.shape
        q, k, v = (
            part.view(B, W, -1, self.head_width).transpose(1, 2)
            for part in self.qkv(_normed(hidden_BWD, self.attention_norm))
        )
        if turns is not None:
            q, k = _rotated(q, *turns), _rotated(k, *turns)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        attended = self.attend(q, k, v, mask_B1WS, enable_gqa=self.grouped)
        hidden_BWD = hidden_BWD + self.o(attended.transpose(1, 2).reshape(B, W, -1))
        if self.gate_up is None:
            return hidden_BWD
        gate, up = self.gate_up(_normed(hidden_BWD, self.norm))
        return hidden_BWD + self.down(self.activation(gate.contiguous()) * up)


def _steady_attention(q: Tensor, k: Tensor, v: Tensor, mask_B1WS: Tensor, *, enable_gqa: bool) -> Tensor:
    """Attention in bfloat16, in which what an input gets does not depend on how many there are.

    PyTorch's kernels for one query, and for more than a few dozen, sum in other orders than those between.
    """
    attended, k, v = [], k.bfloat16(), v.bfloat16()
    for some_q, some_mask in zip(q.bfloat16().split(MOST_INPUTS, 2), mask_B1WS.split(MOST_INPUTS, 2), strict=True):
        num = some_q.shape[2]
        if num < LEAST_INPUTS:
            some_q = nn.functional.pad(some_q, (0, 0, 0, LEAST_INPUTS - num))
            some_mask = nn.functional.pad(some_mask, (0, 0, 0, LEAST_INPUTS - num))
        part = nn.functional.scaled_dot_product_attention(some_q, k, v, some_mask, enable_gqa=enable_gqa)
        attended.append(part[:, :, :num])
    return attended[0] if len(attended) == 1 else torch.cat(attended, 2)


def _largest_turn(body: Any) -> float:
    """Radians by which the last position turns, at most; infinite if queries and keys are not only turned."""
    rotary = body.rotary_emb
    if rotary.rope_type not in STEADY_TURNS or rotary.attention_scaling != 1:
        return math.inf
    return float(rotary.inv_freq.abs().max()) * body.config.max_position_embeddings


def _attention_parts(attention: Any) -> tuple[nn.Linear, ...]:
    return attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj


def _feed_forward_parts(mlp: Any) -> tuple[nn.Linear, ...]:
    return mlp.gate_proj, mlp.up_proj, mlp.down_proj


def _is_plain(layer: Any) -> bool:
    if type(layer) is not LlamaDecoderLayer or type(layer.input_layernorm) is not LlamaRMSNorm:
        return False
    parts = _attention_parts(layer.self_attn)
    if not isinstance(layer.mlp, NoFeedForward):
        parts += _feed_forward_parts(layer.mlp)
    return all(type(part) is nn.Linear for part in parts)


def _normed(x: Tensor, norm: Any) -> Tensor:
    return nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _turned(sin: Tensor) -> Tensor:
    """`sin`, the first half negative: the factors of a vector whose halves have changed places."""
    first, second = sin.chunk(2, -1)
    return torch.cat([-first, second], -1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([second, first], -1), sin)
