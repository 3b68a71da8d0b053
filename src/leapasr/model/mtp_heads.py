"""Multi-token prediction: heads 2..K, which guess tokens further ahead from the state that gives the next one.

Four architectures behind one interface. h is the decoder's last hidden state (after its final norm), E the
decoder's unembedding, shared by all but `projection`.

Shapes: B rows, L positions, D model width, V vocabulary, J drafted tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from leapasr.model.argmax import argmax
from leapasr.model.configuration import SpeechLlamaConfig


class MTPHeads(nn.Module, ABC):
    """Heads 2..K of one architecture.

    `lm_head` and `embed_tokens` are the decoder's own modules, passed in: the heads never own them.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    @abstractmethod
    def training_logits(self, hidden_BLD: Tensor, next_embeddings_BLD: Tensor, lm_head: nn.Linear) -> list[Tensor]:
        """Logits of heads 2..K at every position, teacher forced: K − 1 tensors (B, L, V).

        `next_embeddings_BLD[:, u]` embeds y[u+1], the token that head 1 is to predict at u; head k predicts
        y[u+k] there and may look at y[u+1..u+k−1] only.
        """

    @abstractmethod
    def draft_logits(
        self,
        hidden_BD: Tensor,
        first_tokens_B: Tensor,
        lm_head: Callable[[Tensor], Tensor],
        embed_tokens: nn.Embedding,
        num_drafts: int,
        drafted: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, J, V) of heads 2..J+1 after head 1's choice `first_tokens_B`; later heads follow greedily.

        `drafted` holds the ids of `lm_head`'s outputs, if these are a part of the vocabulary.
        """

    def draft_logits_each(
        self,
        asked: Sequence[tuple[Tensor, Tensor, int]],
        lm_head: Callable[[Tensor], Tensor],
        embed_tokens: nn.Embedding,
        drafted: Tensor | None = None,
    ) -> list[Tensor]:
        """`draft_logits` of several (hidden_BD, first_tokens_B, num_drafts), together where that is faster."""
        return [
            self.draft_logits(hidden_BD, tokens_B, lm_head, embed_tokens, num, drafted)
            for hidden_BD, tokens_B, num in asked
        ]

    def reset_from(self, lm_head: nn.Linear) -> None:
        """Start every head as a copy of head 1, so that training begins from a model that already reads."""


class ProjectionHeads(MTPHeads):
    """Independent projections W_k h, W_k ∈ R^{V×D} (Medusa, arXiv 2401.10774, without the residual block)."""

    def __init__(self, num_heads: int, hidden_size: int, vocab_size: int):
        super().__init__(num_heads)
        self.projections = nn.ModuleList([nn.Linear(hidden_size, vocab_size, bias=False) for _ in range(num_heads - 1)])

    def training_logits(self, hidden_BLD, next_embeddings_BLD, lm_head):
        return [projection(hidden_BLD) for projection in self.projections]

    def draft_logits(self, hidden_BD, first_tokens_B, lm_head, embed_tokens, num_drafts, drafted=None):
        return torch.stack([projection(hidden_BD) for projection in self.projections[:num_drafts]], 1)

    def reset_from(self, lm_head):
        for weight in self.projections.parameters():
            weight.data.copy_(lm_head.weight.data)


class LatentHeads(MTPHeads):
    """Latent-space expansion E·(W_k h), W_k ∈ R^{D×D}, E shared (Raj et al., arXiv 2409.08148).

    The W_k are one matrix, so that all heads are one product.
    """

    def __init__(self, num_heads: int, hidden_size: int):
        super().__init__(num_heads)
        self.expansion = nn.Linear(hidden_size, (num_heads - 1) * hidden_size, bias=False)

    def expand(self, hidden: Tensor, num_drafts: int) -> Tensor:
        """States of heads 2..J+1: (..., D) → (..., J, D)."""
        D = hidden.shape[-1]
        return nn.functional.linear(hidden, self.expansion.weight[: num_drafts * D]).unflatten(-1, (num_drafts, D))

    def training_logits(self, hidden_BLD, next_embeddings_BLD, lm_head):
        return list(lm_head(self.expand(hidden_BLD, self.num_heads - 1)).unbind(-2))

    def draft_logits(self, hidden_BD, first_tokens_B, lm_head, embed_tokens, num_drafts, drafted=None):
        return lm_head(self.expand(hidden_BD, num_drafts))

    def draft_logits_each(self, asked, lm_head, embed_tokens, drafted=None):
        states = [self.expand(hidden_BD, num_drafts) for hidden_BD, _, num_drafts in asked]
        logits = lm_head(torch.cat([state.flatten(0, 1) for state in states]))
        pieces = logits.split([state.shape[0] * state.shape[1] for state in states])
        return [piece.unflatten(0, state.shape[:2]) for piece, state in zip(pieces, states, strict=True)]

    def reset_from(self, lm_head):
        D = self.expansion.in_features
        self.expansion.weight.data.copy_(torch.eye(D).repeat(self.num_heads - 1, 1))


class ResidualHeads(LatentHeads):
    """E·(h + SiLU(W_k h)): Medusa's residual block before the shared unembedding."""

    def expand(self, hidden, num_drafts):
        return hidden.unsqueeze(-2) + nn.functional.silu(super().expand(hidden, num_drafts))

    def reset_from(self, lm_head):
        self.expansion.weight.data.zero_()


class SequentialHeads(MTPHeads):
    """One small causal block, applied K − 1 times: each head sees the token drafted before it.

    s_1 = h, s_k = s_{k−1} + MLP(norm(s_{k−1}), norm(embedding of y[u+k−1])), logits E·s_k, in the manner of Hydra
    (arXiv 2402.05109) and of DeepSeek-V3's MTP modules (arXiv 2412.19437).
    """

    def __init__(self, num_heads: int, hidden_size: int):
        super().__init__(num_heads)
        self.state_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.token_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.up = nn.Linear(2 * hidden_size, 2 * hidden_size, bias=False)
        self.down = nn.Linear(2 * hidden_size, hidden_size, bias=False)

    def advance(self, state: Tensor, token_embedding: Tensor) -> Tensor:
        """The next head's state, from the previous head's state and the token before it: all (..., D)."""
        joined = torch.cat([self.state_norm(state), self.token_norm(token_embedding)], -1)
        return state + self.down(nn.functional.silu(self.up(joined)))

    def training_logits(self, hidden_BLD, next_embeddings_BLD, lm_head):
        logits, state = [], hidden_BLD
        for k in range(2, self.num_heads + 1):
            # y[u+k−1] stands `shift` positions after y[u+1]; a short text may have none that far ahead
            shift = min(k - 2, next_embeddings_BLD.shape[1])
            tokens = nn.functional.pad(next_embeddings_BLD[:, shift:], (0, 0, 0, shift))
            state = self.advance(state, tokens)
            logits.append(lm_head(state))
        return logits

    def draft_logits(self, hidden_BD, first_tokens_B, lm_head, embed_tokens, num_drafts, drafted=None):
        logits, state, tokens_B = [], hidden_BD, first_tokens_B
        for _ in range(num_drafts):
            state = self.advance(state, embed_tokens(tokens_B))
            logits.append(lm_head(state))
            best_B = argmax(logits[-1])
            tokens_B = best_B if drafted is None else drafted[best_B]
        return torch.stack(logits, 1)

    def reset_from(self, lm_head):
        self.down.weight.data.zero_()


def build_heads(config: SpeechLlamaConfig) -> MTPHeads | None:
    """Heads 2..K of `config`; None when K = 1."""
    if config.num_heads == 1:
        return None
    return new_heads(config.head_type, config.num_heads, config.decoder_config.hidden_size, config.vocab_size)


def new_heads(head_type: str, num_heads: int, hidden_size: int, vocab_size: int) -> MTPHeads:
    """Heads 2..K = `num_heads` of an architecture.

    Raises:
        ValueError: there is no such architecture.
    """
    match head_type:
        case "projection":
            return ProjectionHeads(num_heads, hidden_size, vocab_size)
        case "latent":
            return LatentHeads(num_heads, hidden_size)
        case "residual":
            return ResidualHeads(num_heads, hidden_size)
        case "sequential":
            return SequentialHeads(num_heads, hidden_size)
    raise ValueError(f"unknown head_type {head_type!r}")
