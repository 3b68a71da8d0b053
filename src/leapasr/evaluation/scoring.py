"""Word error rates, with intervals by bootstrap over utterances.

Shapes: N utterances, S bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import kaldialign
import numpy as np

from leapasr.text import Normalizer

NUM_SAMPLES = 2000
CONFIDENCE = 0.95
_BLOCK = 2**22  # drawn indices in memory at once


class Interval(NamedTuple):
    """A value with the bounds of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class WordErrors:
    """Errors of each utterance, all int64 (N,), against `num_words_N` reference words.

    Raises:
        ValueError: there is not one reference word.
    """

    num_words_N: np.ndarray
    substitutions_N: np.ndarray
    deletions_N: np.ndarray
    insertions_N: np.ndarray

    def __post_init__(self) -> None:
        if not self.num_words_N.sum():
            raise ValueError(f"the references of {len(self.num_words_N)} utterances hold no word: nothing to score")

    @property
    def errors_N(self) -> np.ndarray:
        return self.substitutions_N + self.deletions_N + self.insertions_N

    @property
    def num_words(self) -> int:
        return int(self.num_words_N.sum())

    @property
    def rate(self) -> float:
        """Word error rate: errors ÷ reference words over all utterances, a fraction of one."""
        return float(self.errors_N.sum() / self.num_words)


def count_errors(references: Sequence[str], hypotheses: Sequence[str], normalizer: Normalizer) -> WordErrors:
    """Count the word errors of N hypotheses against their references, both normalised.

    Raises:
        ValueError: there are not as many hypotheses as references, or the references hold no word.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references: give one for each")
    rows = [
        count_word_errors(reference, hypothesis, normalizer)
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    ]
    return WordErrors(*np.array(rows, dtype=np.int64).reshape(-1, 4).T)


def count_word_errors(reference: str, hypothesis: str, normalizer: Normalizer) -> tuple[int, int, int, int]:
    """Words of the reference, and substitutions, deletions and insertions of the hypothesis; both normalised."""
    words = normalizer(reference).split()
    counts = kaldialign.edit_distance(words, normalizer(hypothesis).split())
    return len(words), counts["sub"], counts["del"], counts["ins"]


def word_error_rate(
    errors: WordErrors, *, confidence: float = CONFIDENCE, num_samples: int = NUM_SAMPLES, seed: int = 0
) -> Interval:
    """The word error rate and its percentile-bootstrap interval over utterances (Bisani and Ney, ICASSP 2004)."""
    rates_S = _resampled(errors.errors_N, errors.num_words_N, num_samples, seed)
    return Interval(errors.rate, *_bounds(rates_S, confidence))


def word_error_rate_difference(
    first: WordErrors,
    second: WordErrors,
    *,
    confidence: float = CONFIDENCE,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
) -> Interval:
    """Word error rate of `second` minus that of `first`, paired: each bootstrap sample is scored by both.

    Raises:
        ValueError: they were not counted on the same references.
    """
    if not np.array_equal(first.num_words_N, second.num_words_N):
        raise ValueError(
            f"the two systems were scored on different references ({len(first.num_words_N)} utterances with "
            f"{first.num_words} words, and {len(second.num_words_N)} with {second.num_words}): a paired comparison "
            "needs the same, in the same order"
        )
    more_N = second.errors_N - first.errors_N
    rates_S = _resampled(more_N, first.num_words_N, num_samples, seed)
    return Interval(float(more_N.sum() / first.num_words), *_bounds(rates_S, confidence))


def _resampled(errors_N: np.ndarray, num_words_N: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Errors ÷ words (S,) of S samples of N utterances, drawn with replacement."""
    N = len(errors_N)
    blocks = []
    for rows, rng in _blocks(num_samples, max(1, _BLOCK // N), seed):
        chosen_SN = rng.integers(N, size=(rows, N))
        blocks.append(errors_N[chosen_SN].sum(1) / np.maximum(num_words_N[chosen_SN].sum(1), 1))
    return np.concatenate(blocks)


def _blocks(total: int, size: int, seed: int) -> Iterator[tuple[int, np.random.Generator]]:
    rng = np.random.default_rng(seed)
    for start in range(0, total, size):
        yield min(size, total - start), rng


def _bounds(rates_S: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(rates_S, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
