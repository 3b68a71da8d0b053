"""What the encoder's CTC head says on its own, and where it hears what the decoder said.

Shapes: B rows, T frames, V vocabulary, S states of an alignment.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from leapasr.decoding.drafts import Reading
from leapasr.model.adapter import begins
from leapasr.model.argmax import argmax
from leapasr.model.encoders import padding_mask


def greedy_ctc(logits_BTV: Tensor, lengths_B: Tensor, *, blank: int) -> list[list[int]]:
    """The likeliest token of every frame, repetitions merged and blanks left out: ids of each row.

    Args:
        logits_BTV: CTC logits (B, T, V).
        lengths_B: valid frames int64 (B,); what lies behind is not read.
        blank: id of the blank.
    """
    best_BT = argmax(logits_BTV)
    keep_BT = begins(best_BT, blank)
    return [
        row[:length][keep[:length]].tolist()
        for row, keep, length in zip(best_BT, keep_BT, lengths_B.tolist(), strict=True)
    ]


def read_ctc(logits_BTV: Tensor, lengths_B: Tensor, *, blank: int) -> list[Reading]:
    """What `greedy_ctc` reads, with the probability of each token where it is surest; arguments as there."""
    best_BT = argmax(logits_BTV)
    valid_BT = padding_mask(lengths_B, best_BT.shape[1])
    begins_BT, spoken_BT = begins(best_BT, blank) & valid_BT, (best_BT != blank) & valid_BT
    readings = []
    for logits_TV, best, begin, spoken in zip(logits_BTV, best_BT, begins_BT, spoken_BT, strict=True):
        scores_NV = logits_TV[spoken].float()  # a few of all frames: most are blank
        probabilities_N = (scores_NV.gather(-1, best[spoken][:, None])[:, 0] - scores_NV.logsumexp(-1)).exp()
        tokens = best[begin]
        surest = probabilities_N.new_zeros(len(tokens))
        surest.scatter_reduce_(0, begin.cumsum(0)[spoken] - 1, probabilities_N, "amax")
        readings.append(Reading(tokens.tolist(), surest.tolist()))
    return readings


def align_ctc(log_probs_TV: Tensor, tokens: Sequence[int], *, blank: int) -> list[tuple[int, int]] | None:
    """The frames of each token on the likeliest CTC path that reads as `tokens` (Viterbi).

    Args:
        log_probs_TV: CTC log-probabilities (T, V) of one row.
        tokens: ids without blanks.
        blank: id of the blank.

    Returns:
        (first frame, frame behind the last) of each token, in order; None if the frames are too few for the tokens.
    """
    labels = np.full(2 * len(tokens) + 1, blank)  # a blank around each token, which the path may leave out
    labels[1::2] = tokens
    S, T = len(labels), len(log_probs_TV)
    if not T:
        return None if tokens else []
    scores_TS = log_probs_TV[:, torch.from_numpy(labels)].double().cpu().numpy()
    may_skip_S = np.zeros(S, dtype=bool)
    may_skip_S[3::2] = labels[3::2] != labels[1:-2:2]
    best_S = np.full(S, -np.inf)
    best_S[:2] = scores_TS[0, :2]
    steps_TS = np.zeros((T, S), dtype=np.int8)  # states that the path moves on by, into each frame
    for t in range(1, T):
        moves_3S = np.full((3, S), -np.inf)
        moves_3S[0] = best_S
        moves_3S[1, 1:] = best_S[:-1]
        moves_3S[2, 2:] = np.where(may_skip_S[2:], best_S[:-2], -np.inf)
        steps_TS[t] = moves_3S.argmax(0)
        best_S = moves_3S.max(0) + scores_TS[t]
    state = S - 1 if S == 1 or best_S[-1] >= best_S[-2] else S - 2
    if best_S[state] == -np.inf:
        return None
    path = np.empty(T, dtype=int)
    for t in range(T - 1, -1, -1):
        path[t] = state
        state -= int(steps_TS[t, state])
    spans = []
    for index in range(len(tokens)):
        frames = np.flatnonzero(path == 2 * index + 1)
        spans.append((int(frames[0]), int(frames[-1]) + 1))
    return spans
