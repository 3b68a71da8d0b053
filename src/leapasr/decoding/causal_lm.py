"""transformers' causal LMs, and a Speech-LLaMA's, as decoders of the loop.

Shapes: B rows, W step width, S cache slots, J drafted tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from leapasr.decoding.cache import RaggedCache
from leapasr.decoding.graphs import CudaGraphs, Graphs
from leapasr.decoding.interface import Prompts, Ways
from leapasr.decoding.lean import STEADY_SLOTS, LeanLayers
from leapasr.decoding.packing import Packer, Product, can_round
from leapasr.decoding.unembedding import RoughUnembedding
from leapasr.model.draft_layers import DraftLayers, read_hidden
from leapasr.model.mtp_heads import MTPHeads
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration

CAPTURING = ("cuda",)  # devices whose operations can be captured


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
