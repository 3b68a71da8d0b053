"""What the decoding loop asks of a decoder, and how transformers' causal LMs answer.

Shapes: B rows, L prompt positions, W step width, S cache slots, J drafted tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from leapasr.decoding.cache import RaggedCache
from leapasr.decoding.graphs import CudaGraphs, Graphs
from leapasr.decoding.lean import STEADY_SLOTS, LeanLayers
from leapasr.decoding.packing import Packer, Packing, Product, can_round
from leapasr.decoding.unembedding import RoughUnembedding
from leapasr.model.draft_layers import DraftLayers, read_hidden
from leapasr.model.mtp_heads import MTPHeads
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration

CAPTURING = ("cuda",)  # devices whose operations can be captured


@dataclass(frozen=True)
class Prompts:
    """What rows begin with: embeddings_BLD (B, L, D), begin-of-text included, right-padded; lengths_B int64 (B,).

    positions_BL int64 (B, L) says where each place lies for the decoder; None: one behind the other. Text goes on
    behind the prompt's places, consecutively, whatever these say.

    A decoder with a memory of speech (`SpeechLlamaConfig.speech_as_memory`) keeps memory_BMD (B, M, D), of lengths
    memory_lengths_B (B,), in its cache before all else; its prompt is what is left: begin-of-text. Without lengths the
    memory is for cross-attention: it takes no slots, and all of it is looked at.
    """

    embeddings_BLD: Tensor
    lengths_B: Tensor
    positions_BL: Tensor | None = None
    memory_BMD: Tensor | None = None
    memory_lengths_B: Tensor | None = None

    @property
    def num_slots(self) -> list[int]:
        """What each row fills of the cache before its text: memory and prompt."""
        slots_B = self.lengths_B if self.memory_lengths_B is None else self.lengths_B + self.memory_lengths_B
        return slots_B.tolist()

    def to(self, dtype: torch.dtype) -> Prompts:
        """The same in another floating-point type."""
        memory_BMD = None if self.memory_BMD is None else self.memory_BMD.to(dtype)
        return replace(self, embeddings_BLD=self.embeddings_BLD.to(dtype), memory_BMD=memory_BMD)

    def select(self, rows: Sequence[int]) -> Prompts:
        """Some of the rows, padded as they are."""
        return replace(self, **{name: value[rows] for name, value in vars(self).items() if value is not None})

    def row(self, index: int) -> Prompts:
        """One row by itself, without padding."""
        length, memory_length = self.lengths_B[index], None
        memory = None if self.memory_BMD is None else self.memory_BMD[index : index + 1]
        if memory is not None and self.memory_lengths_B is not None:
            memory_length = self.memory_lengths_B[index : index + 1]
            memory = memory[:, : int(memory_length)]
        return Prompts(
            self.embeddings_BLD[index : index + 1, :length],
            self.lengths_B[index : index + 1],
            None if self.positions_BL is None else self.positions_BL[index : index + 1, :length],
            memory,
            memory_length,
        )


@dataclass(frozen=True)
class Ways:
    """Ways to compute the same, of which a machine has its fastest.

    Attributes:
        packing: how weights are packed for products of few rows (`packing`); None: not at all.
        rough: logits that need not be exact are rough (`unembedding`).
        rounded: products are of numbers that are rounded to bfloat16 (`packing.rounded`), and so is attention, which is
            another computation than without; only where a decoder `may_round`.
        captured: steps of the loop are captured as CUDA graphs (`graphs`); only where a decoder `may_capture`.
    """

    packing: Packing | None = None
    rough: bool = False
    rounded: bool = False
    captured: bool = False


class Decoder(Protocol):
    """A decoder with K heads.

    Attributes:
        num_heads: K, head 1 included.
        max_positions: positions that it knows, prompt and text together.
        max_text: tokens of the longest text that it can write.
        vocab_size: V.
        end_tokens: token ids that end a text.
        draft_tokens: ids int64 (C,) that heads 2..K choose from, in the order of their logits; None: all.
        device: where its inputs go.
        dtype: its floating-point type, in which masks are given.
        may_round: whether `prepare` may be asked for rounded products.
        may_capture: whether it may be asked for captured steps.
        graphs: these; None: a step is made of one operation after the other.
    """

    num_heads: int
    max_positions: int
    max_text: int
    vocab_size: int
    end_tokens: frozenset[int]
    draft_tokens: Tensor | None
    device: torch.device
    dtype: torch.dtype
    may_round: bool
    may_capture: bool
    graphs: Graphs | None

    def new_cache(self, prompts: Prompts) -> RaggedCache:
        """A cache for the rows of `prompts` that holds their memory, and nothing else."""

    def embed(self, tokens_BW: Tensor, places_BW: Tensor) -> Tensor:
        """Embeddings (B, W, D) of token ids (B, W) at these places of their texts; begin-of-text lies at place 0."""

    def call(
        self,
        embeddings_BWD: Tensor,
        positions_BW: Tensor,
        mask_B1WS: Tensor,
        cache: RaggedCache | None,
        *,
        drafting: bool = True,
    ) -> Tensor:
        """One forward pass: what the heads read of each input, (B, W, H), H as the decoder likes.

        Args:
            embeddings_BWD: inputs.
            positions_BW: the position of each; padding may lie beyond `max_positions`.
            mask_B1WS: additive, 0 where an input may look and the least finite value elsewhere.
            cache: written at the positions, not committed; None attends to the inputs alone.
            drafting: whether heads 2..K will be asked, here or anywhere else with this cache.
        """

    def prepare(self, ways: Ways) -> None:
        """Work in these ways from now on, as far as the decoder knows them; what is emitted stays, unless rounded.

        Copies of weights that earlier ways took are let go first.
        """

    def logits(self, hidden: Tensor, *, exact: bool = True) -> Tensor:
        """Head 1's logits (..., V) from what `call` gave (..., H); not exact, only the likeliest token has to be."""

    def draft_logits(self, hidden_BH: Tensor, first_tokens_B: Tensor, num_drafts: int, *, exact: bool = True) -> Tensor:
        """Logits (B, J, V) of heads 2..J+1 from what `call` gave (B, H), where head 1 chose `first_tokens_B`.

        With `draft_tokens` (B, J, C). Not exact, they are as good as drafts need.
        """

    def draft_logits_each(self, asked: Sequence[tuple[Tensor, Tensor, int]], *, exact: bool = True) -> list[Tensor]:
        """`draft_logits` of several (hidden_BH, first_tokens_B, num_drafts)."""


class CausalLMDecoder:
    """A `Decoder` made of any LLaMA-like transformers causal LM and, for K > 1, heads 2..K.

    Build it when the LM is on the device and in the dtype that it is to run in.

    Args:
        causal_lm: takes ``inputs_embeds``, ``position_ids``, a 4-D ``attention_mask`` and ``past_key_values``, attends
            to all earlier positions, and its logits are its output embeddings times its last hidden state.
        mtp_heads: heads 2..K, None for K = 1. draft_layers: what they alone read through.
        body: the LM without its unembedding; None: its `base_model`. Where a larger model is around it, that one's
            generation configuration says what ends a text.
        may_round: its products may be of numbers that are rounded to bfloat16, where the LM is in float32 on a CPU that
            can do that, and of an architecture that `LeanLayers` fit.

    Attributes:
        ways: that it works in.

    Raises:
        ValueError: the LM has no end-of-text token.
    """

    draft_tokens: Tensor | None = None

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        mtp_heads: MTPHeads | None = None,
        draft_layers: DraftLayers | None = None,
        *,
        body: nn.Module | None = None,
        may_round: bool = False,
    ):
        config = causal_lm.config.get_text_config()
        end = (config if body is None else causal_lm.generation_config).eos_token_id  # type: ignore[union-attr]
        if end is None:
            raise ValueError("the decoder's configuration has no eos_token_id: texts would never end")
        self.body: Any = causal_lm.base_model if body is None else body
        self.lm_head: nn.Linear = causal_lm.get_output_embeddings()
        self.embed_tokens: nn.Embedding = causal_lm.get_input_embeddings()  # type: ignore[assignment]
        self.mtp_heads, self.draft_layers = mtp_heads, draft_layers
        self._is_lean = LeanLayers.fit(self.body, draft_layers)
        self.num_heads = 1 if mtp_heads is None else mtp_heads.num_heads
        self.max_positions: int = config.max_position_embeddings
        self.max_text = self.max_positions
        self.vocab_size: int = config.vocab_size
        self.end_tokens = frozenset([end] if isinstance(end, int) else end)
        self.device = causal_lm.device
        self.dtype = causal_lm.dtype
        steady = self._is_lean and LeanLayers.can_be_steady(self.body)
        self.may_round = may_round and steady and can_round(causal_lm)
        self.may_capture = steady and self.device.type in CAPTURING
        self.prepare(Ways())

    @property
    def _cache_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.ways.rounded else None

    def new_cache(self, prompts: Prompts) -> RaggedCache:
        multiple = STEADY_SLOTS if self.ways.rounded else 1
        return RaggedCache(len(prompts.lengths_B), device=self.device, dtype=self._cache_dtype, multiple=multiple)

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
        if self._lean is not None:
            return self._lean(embeddings_BWD, positions_BW, mask_B1WS, cache, drafting=drafting)
        return read_hidden(
            self.body,
            self.draft_layers if drafting else None,
            embeddings_BWD,
            position_ids=positions_BW,
            attention_mask=mask_B1WS,
            past_key_values=cache,
            use_cache=cache is not None,
        )

    def prepare(self, ways: Ways) -> None:
        assert self.may_round or not ways.rounded
        assert self.may_capture or not ways.captured
        assert not (ways.captured and ways.rough), "rough logits have to ask how sure they are"
        self.ways = ways
        self.graphs: Graphs | None = None
        self._rough: RoughUnembedding | None = None
        self._lean: LeanLayers | None = None
        self._unembed: Product = self.lm_head
        packer = Packer(ways.packing)  # of the unembedding, which is not rounded: the likeliest token is to be exact
        if ways.rough and self.dtype.itemsize >= 4:
            self._rough = RoughUnembedding(self.lm_head, packer)
        self._unembed = packer.product(self.lm_head)
        if self._is_lean:
            self._lean = LeanLayers(self.body, self.draft_layers, Packer(ways.packing, ways.rounded))
        if ways.captured:
            self.graphs = Graphs(self, partial(CudaGraphs, self.device))

    def logits(self, hidden: Tensor, *, exact: bool = True) -> Tensor:
        own = hidden[..., : self.lm_head.in_features]
        return self._unembed(own) if exact or self._rough is None else self._rough.logits(own)

    def draft_logits(self, hidden_BH: Tensor, first_tokens_B: Tensor, num_drafts: int, *, exact: bool = True) -> Tensor:
        return self.draft_logits_each([(hidden_BH, first_tokens_B, num_drafts)], exact=exact)[0]

    def draft_logits_each(self, asked: Sequence[tuple[Tensor, Tensor, int]], *, exact: bool = True) -> list[Tensor]:
        assert self.mtp_heads is not None
        assert all(num_drafts < self.num_heads for *_, num_drafts in asked)
        width = self.lm_head.in_features
        asked = [(hidden_BH[:, -width:], tokens_B, num_drafts) for hidden_BH, tokens_B, num_drafts in asked]
        unembed = self._unembed if exact or self._rough is None else self._rough.rough
        return self.mtp_heads.draft_logits_each(asked, unembed, self.embed_tokens)


class SpeechLlamaDecoder(CausalLMDecoder):
    """The decoding side of a Speech-LLaMA; if the speech side is in bfloat16, products may be rounded to that."""

    def __init__(self, model: SpeechLlamaForConditionalGeneration):
        may_round = model.speech_dtype == torch.bfloat16
        super().__init__(model.decoder, model.mtp_heads, model.draft_layers, may_round=may_round)
        self._embed_text, self._remember = model.embed_text, model.remember
        if model.config.text_positions:
            self.max_text = model.config.text_positions - 1

    def embed(self, tokens_BW: Tensor, places_BW: Tensor) -> Tensor:
        return self._embed_text(tokens_BW, places_BW)

    def new_cache(self, prompts: Prompts) -> RaggedCache:
        cache = super().new_cache(prompts)
        if prompts.memory_BMD is not None and prompts.memory_lengths_B is not None:
            cache.plan(prompts.memory_BMD.shape[1], self.dtype)
            self._remember(prompts.memory_BMD, cache, prompts.memory_lengths_B, dtype=self._cache_dtype)
            cache.commit(prompts.memory_lengths_B.tolist())
        return cache
