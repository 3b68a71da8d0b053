"""Training losses: CTC, cross-entropy summed over the K heads with shifted labels, and what to expect of a list of
hypotheses: word errors (minimum word error rate) and decoder calls.

Shapes: B rows, N hypotheses a row, T CTC frames, M text tokens, U = M + 1 text positions, W nodes that texts share,
K heads, G = K − 1 guesses, V vocabulary.
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


def label_log_probabilities(logits_BUV: Tensor, labels_BU: Tensor) -> Tensor:
    """Natural-log probabilities (B, U) of labels, float32; 0 where a label is `IGNORED`."""
    return -F.cross_entropy(logits_BUV.transpose(1, 2).float(), labels_BU, ignore_index=IGNORED, reduction="none")


def text_log_probabilities(
    logits_BWV: Tensor, nodes_BNU: Tensor, text_BNM: Tensor, lengths_BN: Tensor, *, end_token_id: int
) -> Tensor:
    """Natural-log probabilities (B, N) of texts, end-of-text included.

    Args:
        logits_BWV: head 1's, of the nodes that the texts share. nodes_BNU: as of `TextTrees`.
    """
    text_PM, lengths_P = text_BNM.flatten(0, 1), lengths_BN.flatten()
    labels_BNU = shifted_labels(text_PM, lengths_P, head=1, end_token_id=end_token_id).view_as(nodes_BNU)
    log_probs_BWV = logits_BWV.float().log_softmax(-1)
    rows_B11 = torch.arange(len(logits_BWV), device=logits_BWV.device)[:, None, None]
    given_BNU = log_probs_BWV[rows_B11, nodes_BNU, labels_BNU.clamp(min=0)]
    return given_BNU.masked_fill(labels_BNU == IGNORED, 0.0).sum(-1)


def list_probabilities(log_probs_BN: Tensor, listed_BN: Tensor) -> Tensor:
    """Probabilities (B, N) of hypotheses given that the text is one of the list; 0 where `listed_BN` is False."""
    return log_probs_BN.masked_fill(~listed_BN, -torch.inf).softmax(-1)


def mwer_loss(probabilities_BN: Tensor, errors_BN: Tensor, listed_BN: Tensor) -> Tensor:
    """Σ_i p̂_i (W_i − W̄), the mean over rows: minimum word error rate (Prabhavalkar et al., arXiv 1712.01818).

    Args:
        probabilities_BN: p̂, of `list_probabilities`.
        errors_BN: W, word errors of each hypothesis; W̄ is their mean over a row's list. Since p̂ sums to one, it
            centres the loss and leaves its gradient as it is.
        listed_BN: which places of a row hold a hypothesis, one at least.
    """
    means_B1 = (errors_BN * listed_BN).sum(-1, keepdim=True) / listed_BN.sum(-1, keepdim=True)
    return (probabilities_BN * (errors_BN - means_B1)).sum(-1).mean()


def drafting_probabilities(
    head_logits: Sequence[Tensor], text_BM: Tensor, lengths_B: Tensor, *, end_token_id: int
) -> Tensor:
    """Probabilities (G, B, U) that heads 2..K give at position u to the text's token u + k; 0 behind its end.

    Args:
        head_logits: G = K − 1 tensors (B, U, V), head 2 first.
    """
    probabilities = []
    for head, logits_BUV in enumerate(head_logits, 2):
        labels_BU = shifted_labels(text_BM, lengths_B, head=head, end_token_id=end_token_id)
        given_BU = label_log_probabilities(logits_BUV, labels_BU).exp()
        probabilities.append(given_BU.masked_fill(labels_BU == IGNORED, 0.0))
    return torch.stack(probabilities)


def expected_calls(drafting_GBU: Tensor, lengths_B: Tensor) -> Tensor:
    """Decoder calls (B,) to be expected for a text where each head drafts by chance what it finds likely.

    A call verifies what heads 2..K drafted, emits as many tokens of it as are the text's, in a row, and head 1's
    next; the heads read again behind these. The expectation is over drafts drawn from the heads' distributions. It
    leaves out what decoding has besides (drafts carried on from call to call, CTC's): it is there for its gradient.

    Args:
        drafting_GBU: probabilities (G, B, U) that heads 2..K give at position u to the text's token u + k; 0
            behind end-of-text.
        lengths_B: text tokens, end-of-text not counted.
    """
    num_drafts, B, U = drafting_GBU.shape
    at_least_GBU = drafting_GBU.cumprod(0)  # 1, 2, … of the drafted tokens are the text's
    one_BU = torch.ones_like(drafting_GBU[:1])
    exactly_KBU = torch.cat([one_BU, at_least_GBU]) - torch.cat([at_least_GBU, 0 * one_BU])  # 0, 1, …
    calls_KB = drafting_GBU.new_zeros(num_drafts + 1, B)  # from each of the next positions on, the nearest first
    for u in reversed(range(U - 1)):
        here_B = 1 + (exactly_KBU[..., u] * calls_KB).sum(0)
        calls_KB = torch.cat([torch.where(u < lengths_B, here_B, 0.0)[None], calls_KB[:-1]])
    return 1 + calls_KB[0]
