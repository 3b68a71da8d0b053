"""What a decoder call says: head 1's tokens along a draft, how much of it stands, and what heads 2..K guess next.

Shapes: B rows, R positions read by head 1, J = R − 1 drafted tokens, G guesses of heads 2..K, M places in a row, N of
all rows, H width of what heads read, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from leapasr.decoding.interface import Decoder
from leapasr.decoding.rewriting import Verdict
from leapasr.decoding.strategies import Strategy
from leapasr.decoding.trace import DraftToken
from leapasr.model.argmax import argmax
from leapasr.model.precision import as_scores

NUM_MISTAKES = 8  # of a draft of heads, at which head 2 is asked what it hears
MAX_VOCAB_SIZE = 2**24  # ids travel to the host as float32, which is exact up to here


class Reading(NamedTuple):
    """What a call said about one row, of which the draft may be shorter than R − 1 tokens.

    Attributes:
        tokens: head 1's R choices, after the last pending token and after each drafted one.
        log_probabilities: of these, natural logs.
        chances: head 1's probabilities of the R − 1 drafted tokens.
        num_accepted: drafted tokens that head 1 agrees with, before the first that it does not.
        guesses: of heads 2..K, behind `tokens[num_accepted]`.
        following: of head 2, behind `tokens` at the first places where they are not the draft's; empty unless the
            strategy wants `further`.
        further: of heads 2, 3, …, behind head 1's token after the whole draft; empty unless the strategy wants them.
    """

    tokens: list[int]
    log_probabilities: list[float]
    chances: list[float]
    num_accepted: int
    guesses: list[DraftToken]
    following: dict[int, DraftToken]
    further: list[DraftToken]

    def verdicts(self, num_drafted: int) -> list[Verdict]:
        """On each drafted token."""
        return [
            Verdict(
                self.tokens[place],
                math.exp(self.log_probabilities[place]),
                self.chances[place],
                self.following.get(place),
            )
            for place in range(num_drafted)
        ]

    def behind(self, num_drafted: int) -> list[DraftToken]:
        """What heads 1..K say comes behind the draft; empty unless the strategy wants that."""
        if not self.further:
            return []
        first = DraftToken(self.tokens[num_drafted], math.exp(self.log_probabilities[num_drafted]), "jacobi")
        return [first, *self.further]


def by_heads(tokens: Iterable[float], probabilities: Iterable[float]) -> list[DraftToken]:
    """One token of each of heads 2, 3, …"""
    return [
        DraftToken(int(token), probability, f"head{k}")
        for k, (token, probability) in enumerate(zip(tokens, probabilities, strict=True), 2)
    ]


def best_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest ids (...) of logits (..., V), and their natural-log probabilities (...) in at least float32."""
    tokens = argmax(logits)  # before any cast, for ties to fall as in transformers' greedy search
    scores = as_scores(logits)
    above = scores - scores.gather(-1, tokens[..., None])  # of the likeliest 0, and of no other more
    return tokens, -above.exp_().sum(-1).log_()


def drafted_ids(decoder: Decoder, places: Tensor) -> Tensor:
    """The ids of these outputs of heads 2..K."""
    return places if decoder.draft_tokens is None else decoder.draft_tokens[places]


def look(
    decoder: Decoder,
    strategy: Strategy,
    hidden_BRH: Tensor,
    draft_BJ: Tensor,
    *,
    obeyed: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """All that a call says, in tables (B, ...) that `readings` understands; nothing waits for the device.

    Args:
        hidden_BRH: what `Decoder.call` gave for the last token before each draft, and for its tokens.
        draft_BJ: drafted ids, padded with -1.
        obeyed: changes head 1's exact logits (B, R, V) to those that rules allow.
    """
    exact = strategy.accepts_other_tokens or obeyed is not None
    logits_BRV = decoder.logits(hidden_BRH, exact=exact)
    if obeyed is not None:
        logits_BRV = obeyed(logits_BRV)
    tokens_BR, log_probs_BR = best_tokens(logits_BRV)
    stands_BJ = strategy.agrees(draft_BJ, tokens_BR[:, :-1], logits_BRV[:, :-1]).long().cumprod(-1)
    num_accepted_B1 = stands_BJ.sum(-1, keepdim=True)
    drafted_BJ = _drafted_log_probabilities(logits_BRV[:, :-1], draft_BJ, tokens_BR[:, :-1], log_probs_BR[:, :-1])
    if strategy.accepts_other_tokens:
        stands_BR = nn.functional.pad(stands_BJ, (0, 1)).bool()
        tokens_BR = torch.where(stands_BR, nn.functional.pad(draft_BJ, (0, 1)), tokens_BR)
        log_probs_BR = torch.where(stands_BR, nn.functional.pad(drafted_BJ, (0, 1)), log_probs_BR)
    tables = [num_accepted_B1, tokens_BR, log_probs_BR, drafted_BJ.exp()]
    asked = []  # of heads 2..K, at which places of each row
    if strategy.num_guesses:
        asked.append((num_accepted_B1, strategy.num_guesses))
    if strategy.num_further:
        asked.append((_first_places(draft_BJ != tokens_BR[:, :-1], NUM_MISTAKES), 1))
        asked.append(((draft_BJ >= 0).sum(-1, keepdim=True), strategy.num_further))
    return tables + _guess(decoder, strategy, hidden_BRH, tokens_BR, asked)


def joined(tables: Sequence[Tensor]) -> Tensor:
    """Tables (B, ...) as one, to travel to the host together."""
    return torch.cat([table.float() for table in tables], 1)


def readings(table_BC: Tensor, widths: Sequence[int]) -> list[Reading]:
    """Each row's reading, from `joined` tables of these widths that have come to the host."""
    pieces = (piece.tolist() for piece in table_BC.split(list(widths), 1))
    return [_parse(*row) for row in zip(*pieces, strict=True)]


def _parse(
    accepted: list[float],
    tokens: list[float],
    log_probabilities: list[float],
    chances: list[float],
    _behind_accepted: Sequence[float] = (),
    guesses: Sequence[float] = (),
    probabilities: Sequence[float] = (),
    mistakes: Sequence[float] = (),
    following: Sequence[float] = (),
    following_probabilities: Sequence[float] = (),
    _behind_all: Sequence[float] = (),
    further: Sequence[float] = (),
    further_probabilities: Sequence[float] = (),
) -> Reading:
    return Reading(
        tokens=[int(token) for token in tokens],
        log_probabilities=log_probabilities,
        chances=chances,
        num_accepted=int(accepted[0]),
        guesses=by_heads(guesses, probabilities),
        following={
            int(place): DraftToken(int(token), probability, "head2")
            for place, token, probability in zip(mistakes, following, following_probabilities, strict=True)
        },
        further=by_heads(further, further_probabilities),
    )


def _guess(
    decoder: Decoder,
    strategy: Strategy,
    hidden_BRH: Tensor,
    tokens_BR: Tensor,
    asked: Sequence[tuple[Tensor, int]],
) -> list[Tensor]:
    """What heads 2, 3, … say behind head 1's tokens.

    Args:
        asked: places (B, M) among the R that were read, and how many heads.

    Returns:
        for each of `asked`: places (B, M), and ids and probabilities (B, M · heads).
    """
    if not asked:
        return []
    B = len(tokens_BR)
    rows_B1 = torch.arange(B, device=tokens_BR.device)[:, None]
    logits = decoder.draft_logits_each(
        [
            (hidden_BRH[rows_B1, places].flatten(0, 1), tokens_BR.gather(1, places).flatten(), num_heads)
            for places, num_heads in asked
        ],
        exact=strategy.trusts_heads,
    )
    tables = []
    for (places_BM, num_heads), logits_NGV in zip(asked, logits, strict=True):
        best_NG, log_probs_NG = best_tokens(logits_NGV)
        width = places_BM.shape[1] * num_heads
        ids_NG = drafted_ids(decoder, best_NG)
        tables += [places_BM, ids_NG.view(B, width), log_probs_NG.exp().view(B, width)]
    return tables


def _drafted_log_probabilities(logits_BJV: Tensor, draft_BJ: Tensor, tokens_BJ: Tensor, log_probs_BJ: Tensor) -> Tensor:
    """Natural-log probabilities (B, J) of drafted tokens, from those of head 1's best; of padding (-1) anything."""
    of_both = as_scores(logits_BJV.gather(-1, torch.stack([draft_BJ.clamp(min=0), tokens_BJ], -1)))
    return log_probs_BJ + (of_both[..., 0] - of_both[..., 1])


def _first_places(wrong_BJ: Tensor, most: int) -> Tensor:
    """Where in each row the first `most` (or J) are, int64 (B, M); J where a row has no more."""
    J = wrong_BJ.shape[1]
    places_J = torch.arange(J, device=wrong_BJ.device)
    return torch.where(wrong_BJ, places_J, J).topk(min(most, J), largest=False).values
