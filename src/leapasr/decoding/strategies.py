"""Strategies: how many of the guessed tokens are emitted, and on whose word.

Shapes: B rows, J drafted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from torch import Tensor

from leapasr.decoding.drafts import Drafter
from leapasr.decoding.options import DecodingOptions
from leapasr.decoding.trace import DraftToken


class Strategy:
    """The role: what the loop asks before and after each decoder call. By default nothing is drafted or trusted.

    Attributes:
        num_guesses: heads behind head 1 to evaluate after each call.
    """

    num_guesses = 0

    def propose(self, drafter: Drafter, emitted: Sequence[int], guesses: Sequence[DraftToken]) -> Sequence[DraftToken]:
        """The tokens that the next call is to verify in one row."""
        return ()

    def num_trusted(self, guesses: Sequence[DraftToken]) -> int:
        """How many guesses to emit at once, unverified, behind head 1's token."""
        return 0


class Autoregressive(Strategy):
    """Head 1's token, one per call."""


class Threshold(Strategy):
    """Head 1's token and the guesses behind it, up to the first whose probability is below `threshold`.

    A threshold above 1 trusts none and is `Autoregressive`.
    """

    def __init__(self, num_guesses: int, threshold: float):
        self.num_guesses = num_guesses
        self.threshold = threshold

    def num_trusted(self, guesses: Sequence[DraftToken]) -> int:
        return sum(1 for _ in takewhile(lambda guess: guess.probability >= self.threshold, guesses))


class Verification(Strategy):
    """Drafted tokens as far as they are what head 1 says, and head 1's token behind them (the bonus token).

    Greedy speculative decoding (Stern et al., arXiv 1811.03115): it emits what `Autoregressive` emits.
    """

    def __init__(self, num_guesses: int):
        self.num_guesses = num_guesses

    def propose(self, drafter: Drafter, emitted: Sequence[int], guesses: Sequence[DraftToken]) -> Sequence[DraftToken]:
        return drafter.propose(emitted, guesses)


def matching_prefix(draft_BJ: Tensor, predicted_BJ: Tensor) -> Tensor:
    """Length int64 (B,) of the longest prefix of each row's draft that equals head 1's tokens.

    Args:
        draft_BJ: drafted ids (B, J), padded with -1.
        predicted_BJ: head 1's ids (B, J), the j-th read before the j-th drafted token.
    """
    return (draft_BJ == predicted_BJ).long().cumprod(-1).sum(-1)


def build_strategy(options: DecodingOptions, num_heads: int) -> Strategy:
    """The strategy that `options` name, for a model of `num_heads` heads."""
    num_guesses = (options.num_heads or num_heads) - 1
    match options.strategy:
        case "autoregressive":
            return Autoregressive()
        case "threshold":
            assert options.threshold is not None
            return Threshold(num_guesses, options.threshold)
        case "verify":
            return Verification(num_guesses)
