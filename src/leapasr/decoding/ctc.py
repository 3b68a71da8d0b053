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
from leapasr.model.ctc_head import CTCScores
from leapasr.model.encoders import padding_mask


@torch.inference_mode()
def greedy_ctc(ctc: CTCScores, lengths_B: Tensor, *, blank: int) -> list[list[int]]:
    """The likeliest token of every frame, repetitions merged and blanks left out: ids of each row.

    Args:
        ctc: of frames (B, T).
        lengths_B: valid frames int64 (B,); what lies behind is not read.
        blank: id of the blank.
    """
    keep_BT = begins(ctc.best_BT, blank)
    return [
        row[:length][keep[:length]].tolist()
        for row, keep, length in zip(ctc.best_BT, keep_BT, lengths_B.tolist(), strict=True)
    ]


@torch.inference_mode()
def read_ctc(ctc: CTCScores, lengths_B: Tensor, *, blank: int) -> list[Reading]:
    """What `greedy_ctc` reads, with the probability of each token where it is surest; arguments as there."""
    valid_BT = padding_mask(lengths_B, ctc.best_BT.shape[1])
    begins_BT, spoken_BT = begins(ctc.best_BT, blank) & valid_BT, (ctc.best_BT != blank) & valid_BT
    probabilities_N = ctc.probabilities(spoken_BT)  # of a few of all frames: most are blank
    readings = []
    num_spoken = spoken_BT.sum(1).tolist()
    rows = zip(ctc.best_BT, begins_BT, spoken_BT, probabilities_N.split(num_spoken), strict=True)
    for best_T, begin_T, spoken_T, probabilities in rows:
        tokens = best_T[begin_T]
        surest = probabilities.new_zeros(len(tokens))
        surest.scatter_reduce_(0, begin_T.cumsum(0)[spoken_T] - 1, probabilities, "amax")
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
    scores_TS = log_probs_TV[:, torch.from_numpy(labels).to(log_probs_TV.device)].double().cpu().numpy()
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
