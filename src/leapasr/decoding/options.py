"""DecodingOptions, checked once, and DecodingResult."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from leapasr.decoding.trace import TokenRecord

StrategyName = Literal["autoregressive", "threshold", "verify", "relaxed"]
DraftsName = Literal["mtp", "ctc", "both"]
VERIFYING = ("verify", "relaxed")  # strategies that check drafts
DEFAULT_DRAFTS: DraftsName = "mtp"
DEFAULT_TOP = 3
Truncation = Literal["length", "repetition"]


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How to decode.

    Args:
        strategy: ``autoregressive`` calls the decoder once per token; ``verify`` has the next call check what heads
            2..K drafted and emits what ``autoregressive`` emits; ``threshold`` emits the heads' tokens unchecked
            as long as they are sure enough; ``relaxed`` is ``verify`` that also accepts drafted tokens which head 1
            finds nearly as likely as its best.
        threshold: least probability, in [0, 1], at which ``threshold`` trusts a head.
        num_heads: heads to use, head 1 included; None uses all that the model has.
        ratio: for ``relaxed``, least probability of an accepted token, in [0, 1], as a share of that of head 1's best.
        top: for ``relaxed``, an accepted token is among so many of head 1's best; None is `DEFAULT_TOP`.
        drafts: what ``verify`` and ``relaxed`` check: ``mtp`` (the default), the tokens of heads 2..K; ``ctc``, what
            the CTC head read; ``both``, CTC's tokens behind those heads' tokens that are sure.
        max_tokens: most tokens per row, end-of-text not counted; None leaves the bound to the length of the audio.
        max_repeats: end a row when a short cycle of tokens comes this many times in a row; None never does.

    Raises:
        ValueError: a value is out of range, or options contradict each other.
    """

    strategy: StrategyName = "verify"
    threshold: float | None = None
    num_heads: int | None = None
    ratio: float | None = None
    top: int | None = None
    drafts: DraftsName | None = None
    max_tokens: int | None = None
    max_repeats: int | None = 10

    def __post_init__(self) -> None:
        if self.strategy not in get_args(StrategyName):
            raise ValueError(f"unknown strategy {self.strategy!r}: choose one of {', '.join(get_args(StrategyName))}")
        if self.strategy == "threshold":
            if self.threshold is None:
                raise ValueError("strategy 'threshold' needs a threshold: give one from 0 to 1, such as 0.9")
            if not 0 <= self.threshold <= 1:
                raise ValueError(f"threshold is a probability from 0 to 1, got {self.threshold}")
        elif self.threshold is not None:
            raise ValueError(
                f"threshold {self.threshold} has no meaning for strategy {self.strategy!r}: "
                "leave it out or choose strategy 'threshold'"
            )
        if self.strategy == "relaxed":
            if self.ratio is None:
                raise ValueError("strategy 'relaxed' needs a ratio: give one from 0 to 1, such as 0.3")
            if not 0 <= self.ratio <= 1:
                raise ValueError(f"ratio is a share from 0 to 1, got {self.ratio}")
            if self.top is not None and self.top < 1:
                raise ValueError(f"top must be at least 1, got {self.top}")
        elif self.ratio is not None or self.top is not None:
            raise ValueError(
                f"ratio {self.ratio} and top {self.top} have no meaning for strategy {self.strategy!r}: "
                "leave them out or choose strategy 'relaxed'"
            )
        if self.num_heads is not None and self.num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {self.num_heads}")
        if self.strategy == "autoregressive" and self.num_heads not in (None, 1):
            raise ValueError(
                f"strategy 'autoregressive' uses head 1 only, got num_heads {self.num_heads}: "
                "leave it out or choose another strategy"
            )
        if self.drafts is not None:
            if self.drafts not in get_args(DraftsName):
                raise ValueError(f"unknown drafts {self.drafts!r}: choose one of {', '.join(get_args(DraftsName))}")
            if self.strategy not in VERIFYING:
                raise ValueError(
                    f"drafts {self.drafts!r} are for strategies {' and '.join(VERIFYING)}, not {self.strategy!r}: "
                    "leave them out"
                )
        if self.drafts == "ctc" and self.num_heads not in (None, 1):
            raise ValueError(
                f"drafts 'ctc' use head 1 only, got num_heads {self.num_heads}: leave it out or choose other drafts"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.max_repeats is not None and self.max_repeats < 2:
            raise ValueError(f"max_repeats must be at least 2, got {self.max_repeats}: None turns the guard off")

    @property
    def reads_ctc(self) -> bool:
        """Whether drafts come from what CTC read, which each row's drafter must then be given."""
        return self.drafts in ("ctc", "both")

    def check(self, num_heads: int) -> None:
        """Check what only the model can tell.

        Args:
            num_heads: heads that the model has, head 1 included.

        Raises:
            ValueError: more heads are asked for than the model has.
        """
        if self.num_heads is not None and self.num_heads > num_heads:
            raise ValueError(f"num_heads {self.num_heads} asked for, but the model has {num_heads}")


@dataclass(frozen=True)
class DecodingResult:
    """What decoding gave for one row.

    Attributes:
        tokens: the text's token ids, without end-of-text.
        num_calls: decoder calls, the prefill included.
        trace: a record of every emitted token in order: those of `tokens`, then those that no text keeps
            (end-of-text, or repetitions that were cut).
        truncated: None if the row ended by itself, else ``length`` or ``repetition``.
    """

    tokens: list[int]
    num_calls: int
    trace: list[TokenRecord]
    truncated: Truncation | None

    @property
    def log_probabilities(self) -> list[float | None]:
        """Head 1's natural-log probability of each of `tokens`; None where it was trusted unverified."""
        return [record.log_probability for record in self.trace[: len(self.tokens)]]
