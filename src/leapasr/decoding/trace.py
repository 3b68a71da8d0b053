"""The trace: what was emitted when, who proposed it, and how sure they were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class DraftToken(NamedTuple):
    """A proposed token: its id, its probability under whoever proposed it, and their name (``head2``, ...)."""

    token: int
    probability: float
    source: str


class TokenRecord(NamedTuple):
    """How one token came to be emitted.

    Attributes:
        token: its id; end-of-text has a record too.
        step: the row's decoder call that emitted it, counted from 0, the prefill.
        source: ``head1`` (next-token head), ``bonus`` (next-token head, behind a verified draft) or the name of the
            draft source whose token was accepted or trusted (``head2``, ..., ``ctc``, ``jacobi``).
        draft_probability: the draft source's probability of it; None for ``head1`` and ``bonus``.
        log_probability: head 1's natural-log probability of it; None if trusted without verification.
        rejected: the draft token that stood here and that head 1 replaced; None if there was none.
    """

    token: int
    step: int
    source: str
    draft_probability: float | None
    log_probability: float | None
    rejected: DraftToken | None = None


def accept_lengths(trace: Sequence[TokenRecord]) -> list[int]:
    """Tokens that each step emitted, end-of-text included, in the order of the steps."""
    return list(Counter(record.step for record in trace).values())


def accept_length_histogram(traces: Iterable[Sequence[TokenRecord]]) -> Counter[int]:
    """How many steps, over all rows, emitted 1, 2, 3, ... tokens."""
    return Counter(length for trace in traces for length in accept_lengths(trace))
