"""Strategies: how many of the guessed tokens are emitted, and on whose word.

Shapes: B rows, J drafted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from torch import Tensor

from leapasr.decoding.drafts import Drafter
from leapasr.decoding.options import DecodingOptions
from leapasr.decoding.trace import DraftToken

LEADING = 2  # guesses of heads that go before CTC's tokens at most


class Strategy:
    """The role: what the loop asks before and after each decoder call. By default nothing is drafted or trusted.

    Strategies that ask the same of the device are equal, and share what is captured of their steps (`graphs`).

    Attributes:
        num_guesses: heads behind head 1 to evaluate after each call.
        num_further: heads behind head 1 to evaluate at the draft's end; then head 2 is evaluated at its mistakes, too.
        accepts_other_tokens: whether a drafted token that stands may be another than head 1's best.
        trusts_heads: whether guesses of heads 2..K may be emitted unchecked.
    """

    num_guesses = 0
    num_further = 0
    accepts_other_tokens = False
    trusts_heads = False

    def propose(self, drafter: Drafter, emitted: Sequence[int], guesses: Sequence[DraftToken]) -> Sequence[DraftToken]:
        """The tokens that the next call is to verify in one row."""
        return ()

    def agrees(self, draft_BJ: Tensor, tokens_BJ: Tensor, logits_BJV: Tensor) -> Tensor:
        """Whether each drafted token may stand, bool (B, J).

        Args:
            draft_BJ: drafted ids (B, J), padded with -1, which never stands.
            tokens_BJ: head 1's ids (B, J), the j-th read before the j-th drafted token.
            logits_BJV: head 1's logits (B, J, V) there.
        """
        return draft_BJ == tokens_BJ

    def num_trusted(self, guesses: Sequence[DraftToken]) -> int:
        """How many guesses to emit at once, unverified, behind head 1's token."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Autoregressive(Strategy):
    """Head 1's token, one per call."""


@dataclass(frozen=True, kw_only=True)
class Threshold(Strategy):
    """Head 1's token and the guesses behind it, up to the first whose probability is below `threshold`.

    A threshold above 1 trusts none and is `Autoregressive`.
    """

    num_guesses: int = 0
    threshold: float = field(compare=False)  # the host's business
    trusts_heads = True

    def num_trusted(self, guesses: Sequence[DraftToken]) -> int:
        return sum(1 for _ in takewhile(lambda guess: guess.probability >= self.threshold, guesses))


@dataclass(frozen=True, kw_only=True)
class Verification(Strategy):
    """Drafted tokens as far as they are what head 1 says, and head 1's token behind them (the bonus token).

    Greedy speculative decoding (Stern et al., arXiv 1811.03115): it emits what `Autoregressive` emits.
    """

    num_guesses: int = 0
    num_further: int = 0

    def propose(self, drafter: Drafter, emitted: Sequence[int], guesses: Sequence[DraftToken]) -> Sequence[DraftToken]:
        return drafter.propose(emitted, guesses)


@dataclass(frozen=True, kw_only=True)
class RelaxedVerification(Verification):
    """`Verification` that takes a drafted token for head 1's own if head 1 finds it likely enough.

    That is: it is among head 1's `top` best and at least `ratio` times as probable as the best (as in typical
    acceptance, Cai et al., arXiv 2401.10774, with a bound on the rank). The text may differ from autoregressive
    decoding's; ``top = 1`` or ``ratio = 1`` is `Verification`, ties aside.
    """

    ratio: float
    top: int
    accepts_other_tokens = True

    def agrees(self, draft_BJ: Tensor, tokens_BJ: Tensor, logits_BJV: Tensor) -> Tensor:
        drafted_BJ1 = logits_BJV.gather(-1, draft_BJ.clamp(min=0)[..., None])
        ranks_BJ = (logits_BJV > drafted_BJ1).sum(-1)
        shares_BJ = (drafted_BJ1[..., 0] - logits_BJV.amax(-1)).double().exp()
        return (draft_BJ >= 0) & (ranks_BJ < self.top) & (shares_BJ >= self.ratio)


def build_strategy(options: DecodingOptions, num_heads: int) -> Strategy:
    """The strategy that `options` name, for a model of `num_heads` heads."""
    num_guesses = options.num_heads_used(num_heads) - 1
    num_further = num_guesses if options.drafts_used == "mtp" else 0  # a reading of CTC's has its own end
    if options.drafts_used == "both":
        num_guesses = min(num_guesses, LEADING)
    match options.strategy:
        case "autoregressive" | "beam":  # a beam search has a loop of its own
            return Autoregressive()
        case "threshold":
            assert options.threshold is not None
            return Threshold(num_guesses=num_guesses, threshold=options.threshold)
        case "verify":
            return Verification(num_guesses=num_guesses, num_further=num_further)
        case "relaxed":
            assert options.ratio is not None
            assert options.top_used is not None
            return RelaxedVerification(
                num_guesses=num_guesses, ratio=options.ratio, top=options.top_used, num_further=num_further
            )
