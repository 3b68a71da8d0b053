"""The CTC head, and what it says of frames without the logits of all of them at once.

A vocabulary of many thousand tokens for each of 25 frames a second is tens of megabytes, and to write and read them
again takes a CPU longer than to compute them. Most frames are blank, and of the others one token matters.

Shapes: B rows, T frames, D width of what the head reads, V vocabulary, C tokens of a block, N frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from leapasr.model.argmax import argmax
from leapasr.model.precision import as_scores

BLOCK_SIZE = 4096  # tokens whose logits are computed at a time, so that a core's cache has room for them

Blocks = Iterable[tuple[int, Tensor]]  # first token ids, and logits (..., C) from there on


class SharedCTCHead(nn.Module):
    """A CTC head that finds tokens through the decoder's unembedding, and the blank by a vector of its own.

    A vocabulary of many thousand tokens is then known from the start: as rows of random weights, most of them would be
    met too seldom, and CTC would stay on its all-blank plateau.

    Args:
        adapter_size, hidden_size: widths of adapter frames and of the unembedding.
        blank_token_id: the row of the unembedding in whose place the blank is.
    """

    def __init__(self, adapter_size: int, hidden_size: int, *, blank_token_id: int):
        super().__init__()
        self.blank_token_id = blank_token_id
        self.projection = nn.Linear(adapter_size, hidden_size)
        self.blank = nn.Linear(adapter_size, 1)

    def forward(self, frames_BTD: Tensor, unembedding_VD: Tensor) -> Tensor:
        """Adapter frames (B, T, adapter_size) to logits (B, T, V)."""
        ((_, logits_BTV),) = self.blocks(frames_BTD, unembedding_VD)
        return logits_BTV

    def blocks(self, frames: Tensor, unembedding_VD: Tensor, size: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """The logits of frames (..., adapter_size), of so many tokens at a time, in any order; None: of all at once."""
        projected, blank = self.projection(frames), self.blank(frames)[..., 0]
        size = size or len(unembedding_VD)
        firsts = list(range(0, len(unembedding_VD), size))
        firsts.insert(0, firsts.pop(self.blank_token_id // size))  # where the likeliest token of most frames is
        for first in firsts:
            logits = nn.functional.linear(projected, unembedding_VD[first : first + size])
            if first <= self.blank_token_id < first + size:
                logits[..., self.blank_token_id - first] = blank
            yield first, logits

    @torch.no_grad()
    def reset_from(self, norm: nn.Module) -> None:
        """Take adapter frames for what the decoder's last norm gives, as far as their widths allow."""
        size = min(self.projection.weight.shape)
        self.projection.weight[:size, :size] = torch.diag(norm.weight[:size])  # type: ignore[index,arg-type]


class CTCScores:
    """What a CTC head says of frames: logits that are computed where, and when, somebody asks for them.

    Where gradients are asked for, or on a GPU, it is those of all tokens at once, and they are kept.

    Args:
        frames_BTD: what the head reads.
        blocks: of frames (..., D) gives logits (..., V), so many tokens at a time; None: all at once.
        best_BT: see below, if it is known.

    Attributes:
        best_BT: the likeliest token of each frame, of equal ones the first: int64 (B, T).
        logits_BTV: all logits.
    """

    def __init__(
        self, frames_BTD: Tensor, blocks: Callable[[Tensor, int | None], Blocks], best_BT: Tensor | None = None
    ):
        self.frames_BTD, self.blocks = frames_BTD, blocks
        self._best_BT = best_BT

    @classmethod
    def of(cls, logits_BTV: Tensor) -> CTCScores:
        """Where the logits are there already."""
        return cls(logits_BTV, lambda logits, _: [(0, logits)])

    @cached_property
    def logits_BTV(self) -> Tensor:
        return self.logits(self.frames_BTD)

    @property
    def best_BT(self) -> Tensor:
        if self._best_BT is None:
            self._best_BT = argmax(self.logits_BTV) if self._at_once else self._best_by_blocks()
        return self._best_BT

    @property
    def _at_once(self) -> bool:
        return torch.is_grad_enabled() or self.frames_BTD.device.type != "cpu"

    def logits(self, frames: Tensor) -> Tensor:
        """Logits (..., V) of some of the frames (..., D)."""
        ((_, logits),) = self.blocks(frames, None)
        return logits

    def log_probabilities(self, row: int, length: int) -> Tensor:
        """Of all tokens in the first frames of a row: natural logs (length, V) in float32."""
        return self.logits(self.frames_BTD[row, :length]).float().log_softmax(-1)

    def probabilities(self, places_BT: Tensor) -> Tensor:
        """Of the likeliest token at these places, bool (B, T), in at least float32: (N,), row by row."""
        frames_ND, best_N = self.frames_BTD[places_BT], self.best_BT[places_BT]
        sums, scores_N = [], torch.full_like(best_N, -torch.inf, dtype=torch.float32)
        for first, logits_NC in self.blocks(frames_ND, None if self._at_once else BLOCK_SIZE):
            scores_NC = as_scores(logits_NC)
            sums.append(scores_NC.logsumexp(-1))
            C = scores_NC.shape[-1]
            here_N = scores_NC.gather(-1, (best_N - first).clamp(0, C - 1)[:, None])[:, 0]
            scores_N = torch.where((best_N >= first) & (best_N < first + C), here_N, scores_N)
        return (scores_N - torch.stack(sums).logsumexp(0)).exp()

    def _best_by_blocks(self) -> Tensor:
        best_BT = highest_BT = None
        for first, logits_BTC in self.blocks(self.frames_BTD, BLOCK_SIZE):
            found_BT = argmax(logits_BTC, above=highest_BT)
            scores_BT = logits_BTC.gather(-1, found_BT[..., None])[..., 0]
            found_BT += first
            if best_BT is None or highest_BT is None:
                best_BT, highest_BT = found_BT, scores_BT
            else:
                is_higher_BT = (scores_BT > highest_BT) | ((scores_BT == highest_BT) & (found_BT < best_BT))
                best_BT = torch.where(is_higher_BT, found_BT, best_BT)
                highest_BT = torch.where(is_higher_BT, scores_BT, highest_BT)
        assert best_BT is not None
        return best_BT
