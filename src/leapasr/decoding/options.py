"""DecodingOptions, checked once, and DecodingResult."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from leapasr.decoding.trace import TokenRecord

StrategyName = Literal["autoregressive", "threshold", "verify", "relaxed", "beam"]
DraftsName = Literal["mtp", "ctc", "both"]
DraftLength = Literal["worthwhile", "full"]
VERIFYING = ("verify", "relaxed", "beam")  # strategies that check drafts
WEIGHING = ("verify", "beam")  # of them, those that emit the same whatever is drafted, and may draft less
DEFAULT_DRAFTS: DraftsName = "both"
DEFAULT_DRAFT_LENGTH: DraftLength = "worthwhile"
DEFAULT_TOP = 3
DEFAULT_BEAM = 4
Truncation = Literal["length", "repetition"]


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How to decode.

    Args:
        strategy: ``autoregressive`` calls the decoder once per token; ``verify`` has the next call check what heads
            2..K drafted and emits what ``autoregressive`` emits; ``threshold`` emits the heads' tokens unchecked
            as long as they are sure enough; ``relaxed`` is ``verify`` that also accepts drafted tokens which head 1
            finds nearly as likely as its best; ``beam`` searches for the likeliest texts.
        threshold: least probability, in [0, 1], at which ``threshold`` trusts a head. With it, ``beam`` trusts heads,
            too; without it, it checks drafts, and its scores are head 1's.
        num_heads: heads to use, head 1 included; None uses all that the model has.
        ratio: for ``relaxed``, least probability of an accepted token, in [0, 1], as a share of that of head 1's best.
        top: for ``relaxed``, an accepted token is among so many of head 1's best; None is `DEFAULT_TOP`.
        beam_size: for ``beam``, hypotheses kept; None is `DEFAULT_BEAM`.
        nbest: for ``beam``, hypotheses in the result, of the `beam_size`; None is 1.
        drafts: what ``verify``, ``relaxed`` and ``beam`` check: ``mtp``, the tokens of heads 2..K; ``ctc``, what the
            CTC head read; ``both``, CTC's tokens behind those heads' tokens that are sure. None is ``both``, or ``mtp``
            where there is no CTC head.
        draft_length: of drafts from CTC: ``worthwhile`` (the default) cuts them where their chances are not worth a
            wider call, by what calls cost on this machine; ``full`` checks all that is drafted, for the fewest calls.
            What is emitted is the same.
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
    beam_size: int | None = None
    nbest: int | None = None
    drafts: DraftsName | None = None
    draft_length: DraftLength | None = None
    max_tokens: int | None = None
    max_repeats: int | None = 10

    def __post_init__(self) -> None:
        if self.strategy not in get_args(StrategyName):
            raise ValueError(f"unknown strategy {self.strategy!r}: choose one of {', '.join(get_args(StrategyName))}")
        if self.strategy == "threshold":
            if self.threshold is None:
                raise ValueError("strategy 'threshold' needs a threshold: give one from 0 to 1, such as 0.9")
        elif self.threshold is not None and self.strategy != "beam":
            raise ValueError(
                f"threshold {self.threshold} has no meaning for strategy {self.strategy!r}: "
                "leave it out or choose strategy 'threshold'"
            )
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is a probability from 0 to 1, got {self.threshold}")
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
        if self.strategy == "beam":
            size = DEFAULT_BEAM if self.beam_size is None else self.beam_size
            if size < 1:
                raise ValueError(f"beam_size must be at least 1, got {size}")
            if self.nbest is not None and not 1 <= self.nbest <= size:
                raise ValueError(f"nbest must be from 1 to the beam's size {size}, got {self.nbest}")
        elif self.beam_size is not None or self.nbest is not None:
            raise ValueError(
                f"beam_size {self.beam_size} and nbest {self.nbest} have no meaning for strategy {self.strategy!r}: "
                "leave them out or choose strategy 'beam'"
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
                    f"drafts {self.drafts!r} are for strategies {', '.join(VERIFYING)}, not {self.strategy!r}: "
                    "leave them out"
                )
            if self.threshold is not None:
                raise ValueError(
                    f"drafts {self.drafts!r} have no meaning for a beam with threshold {self.threshold}, which "
                    "checks none: leave one of them out"
                )
        if self.draft_length is not None:
            if self.draft_length not in get_args(DraftLength):
                known = ", ".join(get_args(DraftLength))
                raise ValueError(f"unknown draft_length {self.draft_length!r}: choose one of {known}")
            if self.draft_length_used is None:
                raise ValueError(
                    f"draft_length {self.draft_length!r} is for strategies {', '.join(WEIGHING)} with drafts from CTC, "
                    f"not {self.strategy!r} with drafts {self.drafts_used!r}: leave it out"
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
    def drafts_used(self) -> DraftsName | None:
        """What is checked, the default filled in; None where nothing is."""
        if self.strategy not in VERIFYING or (self.strategy == "beam" and self.threshold is not None):
            return None
        return self.drafts or DEFAULT_DRAFTS

    @property
    def top_used(self) -> int | None:
        """`top`, the default filled in; None for other strategies than ``relaxed``."""
        return (self.top or DEFAULT_TOP) if self.strategy == "relaxed" else None

    @property
    def beam_size_used(self) -> int | None:
        """`beam_size`, the default filled in; None for other strategies than ``beam``."""
        return (self.beam_size or DEFAULT_BEAM) if self.strategy == "beam" else None

    @property
    def draft_length_used(self) -> DraftLength | None:
        """`draft_length`, the default filled in; None where it has no meaning (the heads' own drafts are short)."""
        if self.strategy not in WEIGHING or not self.reads_ctc:
            return None
        return self.draft_length or DEFAULT_DRAFT_LENGTH

    @property
    def reads_ctc(self) -> bool:
        """Whether drafts come from what CTC read, which each row's drafter must then be given."""
        return self.drafts_used in ("ctc", "both")

    def num_heads_used(self, num_heads: int) -> int:
        """Heads that are evaluated, head 1 included, of a model that has `num_heads`."""
        if self.strategy == "autoregressive" or self.drafts_used == "ctc":
            return 1
        return self.num_heads or num_heads

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
class Hypothesis:
    """One text of a beam search.

    Attributes:
        tokens: its ids, without end-of-text.
        score: the sum of the natural-log probabilities of its tokens, end-of-text included: head 1's, or of a beam
            with a threshold those of the heads that were trusted.
        truncated: as in `DecodingResult`.
    """

    tokens: list[int]
    score: float
    truncated: Truncation | None


@dataclass(frozen=True)
class DecodingResult:
    """What decoding gave for one row.

    Attributes:
        tokens: the text's token ids, without end-of-text.
        num_calls: decoder calls, the prefill included.
        trace: a record of every emitted token in order: those of `tokens`, then those that no text keeps
            (end-of-text, or repetitions that were cut).
        truncated: None if the row ended by itself, else ``length`` or ``repetition``.
        hypotheses: of a beam search, the best texts, `tokens` first; else none.
    """

    tokens: list[int]
    num_calls: int
    trace: list[TokenRecord]
    truncated: Truncation | None
    hypotheses: list[Hypothesis] = field(default_factory=list)

    @property
    def log_probabilities(self) -> list[float | None]:
        """Head 1's natural-log probability of each of `tokens`; None where it was trusted unverified.

        Of a beam search to float32's precision, else to about 0.01 (`decoding.unembedding`).
        """
        return [record.log_probability for record in self.trace[: len(self.tokens)]]
