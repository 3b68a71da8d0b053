"""What the encoder's CTC head says on its own.

Shapes: B rows, T frames, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def greedy_ctc(logits_BTV: Tensor, lengths_B: Tensor, *, blank: int) -> list[list[int]]:
    """The likeliest token of every frame, repetitions merged and blanks left out: ids of each row.

    Args:
        logits_BTV: CTC logits (B, T, V).
        lengths_B: valid frames int64 (B,); what lies behind is not read.
        blank: id of the blank.
    """
    best_BT = logits_BTV.argmax(-1)
    is_start_BT = torch.ones_like(best_BT, dtype=torch.bool)
    is_start_BT[:, 1:] = best_BT[:, 1:] != best_BT[:, :-1]
    keep_BT = is_start_BT & (best_BT != blank)
    return [
        row[:length][keep[:length]].tolist()
        for row, keep, length in zip(best_BT, keep_BT, lengths_B.tolist(), strict=True)
    ]
