"""Whisper's own decoder as a `Decoder`: transformers' weights and arithmetic, with a cache whose rows stand anywhere.

The encoder's frames become keys and values of cross-attention once a row; calls then compute what is new and nothing
else. Operations and their order are those of transformers' `WhisperDecoderLayer` with ``sdpa`` attention, which tests
hold this to, bit for bit.

Shapes: B rows, L prompt positions, M frames, W inputs, S slots of the cache, H attention heads, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration

from leapasr.decoding.cache import RaggedCache
from leapasr.decoding.interface import Prompts, Ways
from leapasr.decoding.packing import Packer, Product
from leapasr.decoding.unembedding import RoughUnembedding
from leapasr.model.mtp_heads import MTPHeads

Memory = list[tuple[Tensor, Tensor]]  # of a row: keys and values (1, H, M, D / H) of each layer


class WhisperTextDecoder:
    """The decoding side of a Whisper, and for K > 1 heads 2..K.

    Build it when the model is on the device and in the dtype that it is to run in. Of `Prompts` it takes embeddings of
    the prompt's tokens, and as memory_BMD the encoder's frames, without lengths: Whisper pads audio to a length.

    Args:
        model: in evaluation mode.
        mtp_heads: heads 2..K, None for K = 1.
        suppressed: ids that are never written (transformers' ``suppress_tokens``).
        draft_tokens: ids that heads 2..K choose from (C,); None: all.
    """

    may_round = may_capture = False
    graphs = None

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        mtp_heads: MTPHeads | None = None,
        *,
        suppressed: Collection[int] = (),
        draft_tokens: Tensor | None = None,
    ):
        config, body = model.config, model.model.decoder
        self.body: Any = body
        self.lm_head: nn.Linear = model.proj_out
        self.embed_tokens: nn.Embedding = body.embed_tokens
        self.mtp_heads = mtp_heads
        self.num_heads = 1 if mtp_heads is None else mtp_heads.num_heads
        self.max_positions: int = config.max_target_positions
        self.max_text = self.max_positions
        self.vocab_size: int = config.vocab_size
        end = model.generation_config.eos_token_id
        self.end_tokens = frozenset([end] if isinstance(end, int) else end)
        self.device, self.dtype = model.device, model.dtype
        self._num_frames: int = config.max_source_positions
        self._positions_VD: Tensor = body.embed_positions.weight
        self._suppressed = torch.tensor(sorted(suppressed), dtype=torch.long, device=self.device)
        self.draft_tokens = None if draft_tokens is None else draft_tokens.to(self.device, torch.long)
        self.prepare(Ways())

    def prepare(self, ways: Ways) -> None:
        assert not ways.rounded
        self._layers: list[_Layer] = []
        self._product: Product = self.lm_head
        self._rough: RoughUnembedding | None = None
        self._draft_product: Product | None = None
        packer = Packer(ways.packing)
        self._layers = [_Layer(layer, packer) for layer in self.body.layers]
        self._product = _packed(self.lm_head, packer)
        if ways.rough and self.dtype.itemsize >= 4:
            self._rough = RoughUnembedding(self._without_suppressed(), packer)
        if self.mtp_heads is not None and self.draft_tokens is not None:
            self._draft_product = packer.product(_rows_of(self.lm_head, self.draft_tokens))
            self._draft_suppressed = torch.isin(self.draft_tokens, self._suppressed).nonzero()[:, 0]

    def _without_suppressed(self) -> nn.Linear:
        """The unembedding, with a bias that rules out what is never written."""
        weight_VD = self.lm_head.weight
        with torch.device("meta"):
            linear = nn.Linear(weight_VD.shape[1], weight_VD.shape[0])
        linear.weight = weight_VD
        bias_V = weight_VD.new_zeros(weight_VD.shape[0])
        linear.bias = nn.Parameter(bias_V.index_fill_(0, self._suppressed, -torch.inf), requires_grad=False)
        return linear

    def new_cache(self, prompts: Prompts) -> RaggedCache:
        num_rows, frames_BMD = len(prompts.lengths_B), prompts.memory_BMD
        if frames_BMD is None:  # calls are being timed: silence will do
            frames_BMD = self._positions_VD.new_zeros(1, self._num_frames, self._positions_VD.shape[1])
        layers = [layer.remember(frames_BMD) for layer in self._layers]
        rows = range(num_rows) if prompts.memory_BMD is not None else [0] * num_rows
        memory: list[Memory] = [
            [(keys[row : row + 1], values[row : row + 1]) for keys, values in layers] for row in rows
        ]
        return RaggedCache(num_rows, device=self.device, memory=memory)

    def embed(self, tokens_BW: Tensor, places_BW: Tensor) -> Tensor:
        return self.embed_tokens(tokens_BW)

    def call(
        self,
        embeddings_BWD: Tensor,
        positions_BW: Tensor,
        mask_B1WS: Tensor,
        cache: RaggedCache | None,
        *,
        drafting: bool = True,
    ) -> Tensor:
        assert cache is not None, "the encoder's frames are in the cache"
        hidden = embeddings_BWD + self._positions_VD[positions_BW.clamp(max=self.max_positions - 1)]
        for layer in self._layers:
            hidden = layer(hidden, mask_B1WS, cache)
        return self.body.layer_norm(hidden)

    def logits(self, hidden: Tensor, *, exact: bool = True) -> Tensor:
        return self._unembed(hidden) if exact or self._rough is None else self._rough.logits(hidden)

    def _unembed(self, hidden: Tensor) -> Tensor:
        return self._product(hidden).index_fill_(-1, self._suppressed, -torch.inf)

    def draft_logits(self, hidden_BH: Tensor, first_tokens_B: Tensor, num_drafts: int, *, exact: bool = True) -> Tensor:
        return self.draft_logits_each([(hidden_BH, first_tokens_B, num_drafts)], exact=exact)[0]

    def draft_logits_each(self, asked: Sequence[tuple[Tensor, Tensor, int]], *, exact: bool = True) -> list[Tensor]:
        assert self.mtp_heads is not None
        assert all(num_drafts < self.num_heads for *_, num_drafts in asked)
        if self.draft_tokens is not None:
            return self.mtp_heads.draft_logits_each(asked, self._unembed_draft, self.embed_tokens, self.draft_tokens)
        unembed = self._unembed if exact or self._rough is None else self._rough.rough
        return self.mtp_heads.draft_logits_each(asked, unembed, self.embed_tokens)

    def _unembed_draft(self, hidden: Tensor) -> Tensor:
        """Logits (..., C) of states (..., D) of heads 2..K."""
        assert self._draft_product is not None
        return self._draft_product(hidden).index_fill_(-1, self._draft_suppressed, -torch.inf)


class _Layer:
    """transformers' `WhisperDecoderLayer`, in few operations."""

    def __init__(self, layer: Any, packer: Packer):
        own, cross = layer.self_attn, layer.encoder_attn
        self.index: int = own.layer_idx
        self.head_width: int = own.head_dim
        self.scaling: float = own.scaling
        self.own_norm, self.cross_norm = layer.self_attn_layer_norm, layer.encoder_attn_layer_norm
        self.norm, self.activation = layer.final_layer_norm, layer.activation_fn
        self.q, self.k, self.v, self.o = (
            _packed(part, packer) for part in (own.q_proj, own.k_proj, own.v_proj, own.out_proj)
        )
        self.cross_q, self.cross_o = _packed(cross.q_proj, packer), _packed(cross.out_proj, packer)
        self.cross_k, self.cross_v = cross.k_proj, cross.v_proj  # for products of many rows
        self.up, self.down = _packed(layer.fc1, packer), _packed(layer.fc2, packer)

    def _heads(self, x_BWD: Tensor) -> Tensor:
        return x_BWD.view(*x_BWD.shape[:2], -1, self.head_width).transpose(1, 2).contiguous()

    def remember(self, frames_BMD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, M, D / H) of the encoder's frames (B, M, D)."""
        return self._heads(self.cross_k(frames_BMD)), self._heads(self.cross_v(frames_BMD))

    def __call__(self, hidden_BWD: Tensor, mask_B1WS: Tensor, cache: RaggedCache) -> Tensor:
        normed = self.own_norm(hidden_BWD)
        q = self._heads(self.q(normed) * self.scaling)
        k, v = cache.update(self._heads(self.k(normed)), self._heads(self.v(normed)), self.index)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, mask_B1WS, scale=1.0)
        hidden_BWD = hidden_BWD + self.o(_joined(attended))
        q = self._heads(self.cross_q(self.cross_norm(hidden_BWD)) * self.scaling)
        looked = []
        for row, memory in enumerate(cache.memory):
            k, v = memory[self.index]
            looked.append(nn.functional.scaled_dot_product_attention(q[row : row + 1], k, v, scale=1.0))
        hidden_BWD = hidden_BWD + self.cross_o(_joined(looked[0] if len(looked) == 1 else torch.cat(looked)))
        return hidden_BWD + self.down(self.activation(self.up(self.norm(hidden_BWD))))


def _rows_of(linear: nn.Linear, rows: Tensor) -> nn.Linear:
    """`linear` with some of its outputs."""
    with torch.device("meta"):
        part = nn.Linear(linear.in_features, len(rows), bias=False)
    part.weight = nn.Parameter(linear.weight.detach()[rows], requires_grad=False)
    return part


def _joined(attended_BHWD: Tensor) -> Tensor:
    return attended_BHWD.transpose(1, 2).flatten(2)


def _packed(part: nn.Module, packer: Packer) -> Product:
    """`part` as `packer` packs it; itself, if something is wrapped around it."""
    return packer.product(part) if type(part) is nn.Linear else part
