"""What the decoding loop asks of a decoder.

Shapes: B rows, L prompt positions, W step width, S cache slots, J drafted tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from leapasr.decoding.cache import RaggedCache
from leapasr.decoding.packing import Packing


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
        graphs: these (`graphs.Graphs`); None: a step is made of one operation after the other.
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
    graphs: Any

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
