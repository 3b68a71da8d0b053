"""Guards: what ends a row other than end-of-text, judged token by token, whatever the strategy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from leapasr.decoding.interface import Decoder
from leapasr.decoding.options import DecodingOptions, Truncation

# A row ends after so many tokens even if the decoder does not end it. Fast speech has about 7 a second.
MAX_TOKENS_PER_SECOND, MAX_TOKENS_AT_LEAST = 12, 16
MAX_CYCLE = 16  # tokens; the longest cycle that counts as a repetition


@dataclass(frozen=True, slots=True)
class Guards:
    """The guards of one row.

    Attributes:
        max_tokens: most tokens emitted, end-of-text not counted.
        max_repeats: a cycle of at most `MAX_CYCLE` tokens that comes this many times in a row ends the row and is
            kept once; None lets everything repeat.
    """

    max_tokens: int
    max_repeats: int | None

    def cut(self, tokens: list[int]) -> tuple[int, Truncation] | None:
        """Judge a row whose last token has just been emitted.

        Returns:
            None if it may go on, else how many of its tokens to keep, and why it ends.
        """
        if self.max_repeats is not None:
            for cycle in range(1, MAX_CYCLE + 1):
                num_repeated = cycle * self.max_repeats
                if num_repeated > len(tokens):
                    break
                if tokens[-num_repeated:] == tokens[-cycle:] * self.max_repeats:
                    return len(tokens) - num_repeated + cycle, "repetition"
        if len(tokens) >= self.max_tokens:
            return len(tokens), "length"
        return None


def token_bound(seconds: float) -> int:
    """Most tokens of a text that is said in so many seconds."""
    return MAX_TOKENS_AT_LEAST + math.ceil(MAX_TOKENS_PER_SECOND * seconds)


def guard_rows(
    options: DecodingOptions, decoder: Decoder, prompt_lengths: Sequence[int], max_tokens: Sequence[int] | None
) -> list[Guards]:
    """The guards of each row: its token bound is the least of the options', its own and the decoder's room.

    Args:
        prompt_lengths: positions of each row's prompt.
        max_tokens: each row's own bound, from its number of encoder frames; None sets none.

    Raises:
        ValueError: the bounds do not match the rows, or a row has no room for a single token.
    """
    if max_tokens is None:
        max_tokens = [decoder.max_positions] * len(prompt_lengths)
    if len(max_tokens) != len(prompt_lengths):
        raise ValueError(f"{len(max_tokens)} token bounds for {len(prompt_lengths)} prompts: give one for each")
    guards = []
    for row, (length, bound) in enumerate(zip(prompt_lengths, max_tokens, strict=True)):
        room = decoder.max_positions - length
        if room < 1:
            raise ValueError(
                f"the prompt of row {row} fills {length} of the decoder's {decoder.max_positions} positions and "
                "leaves none for text: cut the audio"
            )
        if bound < 1:
            raise ValueError(f"the token bound of row {row} must be at least 1, got {bound}")
        bound = min(room, bound, decoder.max_text, options.max_tokens or bound)
        guards.append(Guards(bound, options.max_repeats))
    return guards
