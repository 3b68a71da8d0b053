"""What a text must obey besides being what the decoder finds likeliest, at every place that a call reads.

A call reads R places of a row: behind its text, and behind each drafted token. What rules forbid at a place depends on
what stands before it, drafted tokens included, so that a draft that is verified meets what it would have met token by
token.

Shapes: B rows, R places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Rules(Protocol):
    """The role: forbid tokens, given the tokens before them."""

    def bind(self, text: Sequence[int]) -> bool:
        """Whether anything may be forbidden in a call that goes on from `text`, an unfinished row's tokens so far."""

    def obeyed(self, logits_BRV: Tensor, texts: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]]) -> Tensor:
        """Exact logits with what is forbidden at −∞; `logits_BRV` itself may be changed.

        Args:
            logits_BRV: of each place; the first is behind the row's text, the r-th behind r drafted tokens.
            texts: each row's tokens so far, without its prompt.
            drafts: each row's drafted tokens, R − 1 of them at most.
        """


@dataclass(frozen=True)
class Timestamps:
    """Whisper's rules for timestamps, as in transformers' `WhisperTimeStampLogitsProcessor`.

    They come in pairs, except before end-of-text; they do not fall; the first token is one, and no later than
    `max_initial`; and where all timestamps together are likelier than any other token, it is one.

    Attributes:
        begin: id of the first timestamp, ``<|0.00|>``; all ids from it on are timestamps.
        end_token: end-of-text; ids below it are text.
        max_initial: steps of 0.02 s; None: no limit.
    """

    begin: int
    end_token: int
    max_initial: int | None = None

    @property
    def switch(self) -> int:
        """``<|notimestamps|>``, which is part of the prompt or of nothing."""
        return self.begin - 1

    def forbid(self, logits_V: Tensor, before: Sequence[int]) -> None:
        """Forbid, in place, what cannot follow the tokens `before`; likelihood aside (see `prefer`)."""
        logits_V[self.switch] = -torch.inf
        last_is_one = len(before) >= 1 and before[-1] >= self.begin
        last_but_one_is = len(before) < 2 or before[-2] >= self.begin
        if last_is_one and last_but_one_is:
            logits_V[self.begin :] = -torch.inf
        elif last_is_one:
            logits_V[: self.end_token] = -torch.inf
        latest = next((token for token in reversed(before) if token >= self.begin), None)
        if latest is not None:
            earliest = latest if last_is_one and not last_but_one_is else latest + 1
            logits_V[self.begin : earliest] = -torch.inf
        if not before:
            logits_V[: self.begin] = -torch.inf
            if self.max_initial is not None:
                logits_V[self.begin + self.max_initial + 1 :] = -torch.inf

    def prefer(self, logits_NV: Tensor) -> None:
        """Forbid, in place, all but timestamps where these together are likelier than any other token."""
        log_probs_NV = logits_NV.float().log_softmax(-1)
        likelier_N = log_probs_NV[:, self.begin :].logsumexp(-1) > log_probs_NV[:, : self.begin].amax(-1)
        logits_NV[:, : self.begin].masked_fill_(likelier_N[:, None], -torch.inf)


@dataclass(frozen=True)
class WhisperRules:
    """What Whisper's texts obey, beside the tokens that its decoder never writes.

    Attributes:
        not_first: ids that no text begins with.
        timestamps: None where the prompt asks for none.
    """

    not_first: Collection[int] = ()
    timestamps: Timestamps | None = None

    def bind(self, text: Sequence[int]) -> bool:
        return self.timestamps is not None or (not text and bool(self.not_first))

    def obeyed(self, logits_BRV: Tensor, texts: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]]) -> Tensor:
        beginning = [row for row, text in enumerate(texts) if not text]
        if beginning and self.not_first:
            logits_BRV[[[row] for row in beginning], 0, list(self.not_first)] = -torch.inf
        if self.timestamps is None:
            return logits_BRV
        for logits_RV, text, draft in zip(logits_BRV, texts, drafts, strict=True):
            for place in range(len(draft) + 1):
                self.timestamps.forbid(logits_RV[place], [*text, *draft[:place]])
        self.timestamps.prefer(logits_BRV.flatten(0, 1))
        return logits_BRV
