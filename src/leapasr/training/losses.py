"""Training losses: CTC, and cross-entropy summed over the K heads with shifted labels.

Shapes: B rows, T CTC frames, M text tokens, U = M + 1 text positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100


def shifted_labels(text_BM: Tensor, lengths_B: Tensor, *, head: int, end_token_id: int) -> Tensor:
    """Labels (B, U) of head `head` (1 is the next-token head) at every text position.

    Position u has seen y[1..u]; its label is y[u + head], where y[length + 1] is end-of-text and everything
    behind that is `IGNORED`: no head is taught across the end of a text or on padding.
    """
    B, M = text_BM.shape
    ended_BU = F.pad(text_BM, (0, 1)).scatter(1, lengths_B[:, None], end_token_id)
    position = torch.arange(M + 1, device=text_BM.device)[None]
    ended_BU = ended_BU.masked_fill(position > lengths_B[:, None], IGNORED)
    shift = min(head - 1, M + 1)
    return F.pad(ended_BU[:, shift:], (0, shift), value=IGNORED)


def with_slips(text_BM: Tensor, probability: float, *, vocab_size: int) -> Tensor:
    """Token ids (B, M) as a decoder may have written them: each is with `probability` not the right one.

    Half of the slips repeat the token before, half are any token. Taught on right texts alone, a decoder loses its
    place with its first mistake and repeats itself (exposure bias: Bengio et al., arXiv 1506.03099). Labels stay
    right.
    """
    slips_BM = torch.rand(text_BM.shape, device=text_BM.device) < probability
    repeats_BM = torch.rand(text_BM.shape, device=text_BM.device) < 0.5
    before_BM = torch.cat([text_BM[:, :1], text_BM[:, :-1]], 1)
    other_BM = torch.where(repeats_BM, before_BM, torch.randint_like(text_BM, vocab_size))
    return torch.where(slips_BM, other_BM, text_BM)


def mtp_loss(
    head_logits: Sequence[Tensor], text_BM: Tensor, lengths_B: Tensor, *, weights: Sequence[float], end_token_id: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Σ_k weights[k−1] · cross-entropy of head k.

    Args:
        head_logits: K tensors (B, U, V), head 1 first.
        text_BM: token ids (B, M); lengths_B: their valid lengths (B,).
        weights: K weights.

    Returns:
        the loss; every head's mean cross-entropy; every head's top-1 accuracy given the true prefix.
    """
    assert len(head_logits) == len(weights), (len(head_logits), len(weights))
    losses, accuracies = [], []
    for head, logits_BUV in enumerate(head_logits, 1):
        labels_BU = shifted_labels(text_BM, lengths_B, head=head, end_token_id=end_token_id)
        valid = labels_BU != IGNORED
        logits, labels = logits_BUV[valid].float(), labels_BU[valid]
        losses.append(F.cross_entropy(logits, labels) if len(labels) else logits_BUV.sum() * 0)
        accuracies.append(
            (logits.detach().argmax(-1) == labels).float().mean() if len(labels) else logits.new_zeros(())
        )
    weighted = (weight * loss for weight, loss in zip(weights, losses, strict=True))
    total = sum(weighted, start=head_logits[0].new_zeros((), dtype=torch.float32))
    return total, losses, accuracies


def ctc_loss(logits_BTV: Tensor, lengths_B: Tensor, text_BM: Tensor, text_lengths_B: Tensor, *, blank: int) -> Tensor:
    """CTC loss per text token. A row whose text is longer than its frames allow gives no gradient."""
    log_probs_TBV = logits_BTV.float().log_softmax(-1).transpose(0, 1)
    loss = F.ctc_loss(
        log_probs_TBV, text_BM, lengths_B, text_lengths_B, blank=blank, reduction="sum", zero_infinity=True
    )
    return loss / text_lengths_B.sum().clamp(min=1)
