"""The decoding loop: every strategy, every draft source, any number of rows at any positions.

A step is one decoder call. It feeds each row's *pending* tokens (emitted, but not in the cache yet; before the
prefill, the prompt) and the draft behind them; keeps the draft as far as head 1 agrees; emits that, head 1's next
token, and what the strategy trusts; and reads from the same call what heads 2..K guess next. Rows are padded on the
right, where the causal mask hides it.

Shapes: B rows, L prompt positions, W step width, R positions read by head 1, J drafted tokens, G guesses of heads
2..K, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, compress
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from leapasr.decoding.cache import RaggedCache
from leapasr.decoding.costs import FREE, CallCosts, num_worth_drafting
from leapasr.decoding.drafts import Drafter, MTPDrafter
from leapasr.decoding.guards import Guards, guard_rows
from leapasr.decoding.interface import Decoder, Prompts
from leapasr.decoding.options import DecodingOptions, DecodingResult, Truncation
from leapasr.decoding.rewriting import Verdict, until_end
from leapasr.decoding.rules import Rules
from leapasr.decoding.strategies import Strategy, build_strategy
from leapasr.decoding.trace import DraftToken, TokenRecord
from leapasr.model.argmax import argmax
from leapasr.model.precision import as_scores
from leapasr.model.speech_llama import join_positions, join_rows

NUM_MISTAKES = 8  # of a draft of heads, at which head 2 is asked what it hears
MAX_VOCAB_SIZE = 2**24  # ids travel to the host as float32, which is exact up to here


@dataclass(slots=True)
class _Row:
    """One utterance, from the moment it is added to its last token."""

    key: int
    prompt_length: int  # slots of the cache before the text
    guards: Guards
    drafter: Drafter
    tokens: list[int] = field(default_factory=list)
    trace: list[TokenRecord] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    guesses: Sequence[DraftToken] = ()
    num_calls: int = 0
    done: bool = False
    truncated: Truncation | None = None
    num_lines: ClassVar[int] = 1

    def emit(self, record: TokenRecord, end_tokens: frozenset[int]) -> None:
        """Append one token, unless it ends the text; `done` tells whether the row ends here."""
        self.trace.append(record)
        if record.token in end_tokens:
            self.done = True
            return
        self.tokens.append(record.token)
        cut = self.guards.cut(self.tokens)
        if cut is not None:
            num_kept, self.truncated = cut
            del self.tokens[num_kept:]
            self.done = True

    def result(self) -> DecodingResult:
        return DecodingResult(self.tokens, self.num_calls, self.trace, self.truncated)


class _Reading(NamedTuple):
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


def _drafted_log_probabilities(logits_BJV: Tensor, draft_BJ: Tensor, tokens_BJ: Tensor, log_probs_BJ: Tensor) -> Tensor:
    """Natural-log probabilities (B, J) of drafted tokens, from those of head 1's best; of padding (-1) anything."""
    of_both = as_scores(logits_BJV.gather(-1, torch.stack([draft_BJ.clamp(min=0), tokens_BJ], -1)))
    return log_probs_BJ + (of_both[..., 0] - of_both[..., 1])


def _staying(rows: list[_Row], cache: RaggedCache, stays: Sequence[bool]) -> list[_Row]:
    """Those of `rows` that stay; `cache` then holds their lines alone (where none stays, it is of no use)."""
    if all(stays) or not any(stays):
        return rows if all(stays) else []
    left = list(compress(range(len(rows)), stays))
    # the last ones go where others left, which moves the least
    order = [place if stays[place] else left.pop() for place in range(len(left))]
    first_lines = [0, *accumulate(row.num_lines for row in rows)]
    cache.select([line for place in order for line in range(first_lines[place], first_lines[place + 1])])
    return [rows[place] for place in order]


def _first_places(wrong_BJ: Tensor, most: int) -> Tensor:
    """Where in each row the first `most` (or J) are, int64 (B, M); J where a row has no more."""
    J = wrong_BJ.shape[1]
    places_J = torch.arange(J, device=wrong_BJ.device)
    return torch.where(wrong_BJ, places_J, J).topk(min(most, J), largest=False).values


class DecodingLoop:
    """Rows being decoded together; more may join, and some may leave, at any time.

        loop = DecodingLoop(decoder, options)
        keys = loop.add(prompts)
        while loop:
            for key, result in loop.step().items(): ...

    What a row gets does not depend on the rows beside it.

    Args:
        decoder: see `Decoder`.
        options: see `DecodingOptions`.
        strategy: another strategy than the one that the options name.
        costs: of the decoder's calls. Where drafts do not change what is emitted, they are cut where their chances
            are no longer worth a wider call; `FREE` leaves them as they are.
        rules: that texts obey; None: none. Guesses that are trusted unchecked do not.

    Raises:
        ValueError: the options ask for what the decoder does not have.
    """

    def __init__(
        self,
        decoder: Decoder,
        options: DecodingOptions,
        *,
        strategy: Strategy | None = None,
        costs: CallCosts = FREE,
        rules: Rules | None = None,
    ):
        assert decoder.vocab_size < MAX_VOCAB_SIZE
        options.check(decoder.num_heads)
        self.decoder = decoder
        self.options = options
        self.strategy = strategy or build_strategy(options, decoder.num_heads)
        self._drafting = self.strategy.num_guesses > 0
        self._rows: list[_Row] = []
        self._cache: RaggedCache | None = None
        self._waiting: deque[tuple[list[_Row], Prompts]] = deque()
        self._num_added = 0
        self._costs, self._rules = costs, rules
        self._width, self._gain = 4.0, 3.0  # of calls behind the prefill: their width, and tokens that a row gets

    def __bool__(self) -> bool:
        """Whether there is a row left to decode."""
        return bool(self._rows or self._waiting)

    def add(
        self, prompts: Prompts, *, max_tokens: Sequence[int] | None = None, drafters: Sequence[Drafter] | None = None
    ) -> list[int]:
        """Let rows join; their prefill is a coming step of its own.

        Args:
            prompts: what the rows begin with.
            max_tokens: each row's token bound, from its number of encoder frames.
            drafters: each row's draft source, for strategy ``verify``; None takes the one that the options name.

        Returns:
            the rows' keys, under which `step` returns their results.

        Raises:
            ValueError: bounds or drafters do not match the rows, or a prompt leaves no room for text.
        """
        num_rows = len(prompts.lengths_B)
        if drafters is None:
            if self.options.drafts in ("ctc", "both"):
                raise ValueError(f"drafts {self.options.drafts!r} need what CTC read: give each row its drafter")
            end_token = min(self.decoder.end_tokens)
            drafters = [MTPDrafter(end_token=end_token) for _ in range(num_rows)]
        if len(drafters) != num_rows:
            raise ValueError(f"{len(drafters)} drafters for {num_rows} prompts: give one for each")
        lengths = prompts.num_slots
        guards = guard_rows(self.options, self.decoder, lengths, max_tokens)
        keys = range(self._num_added, self._num_added + num_rows)
        self._num_added += num_rows
        if num_rows:
            rows = [self._new_row(*row) for row in zip(keys, lengths, guards, drafters, strict=True)]
            self._waiting.append((rows, prompts))
        return list(keys)

    def _new_row(self, key: int, prompt_length: int, guards: Guards, drafter: Drafter) -> _Row:
        return _Row(key, prompt_length, guards, drafter)

    @torch.inference_mode()
    def step(self) -> dict[int, DecodingResult]:
        """One decoder call: the prefill of rows that wait, if any do, else the next step of all others.

        Returns:
            the results of the rows that ended, by their keys.
        """
        if self._waiting:
            rows, prompts = self._waiting.popleft()
            cache = self.decoder.new_cache(prompts)
            self._advance(rows, cache, prompts)
        else:
            assert self._cache is not None, "step() without rows: add some first"
            rows, cache = self._rows, self._cache
            self._rows, self._cache = [], None
            self._advance(rows, cache, None)
        going = _staying(rows, cache, [not row.done for row in rows])
        if going:
            if self._cache is None:
                self._cache = cache
            else:
                self._cache.join(cache)
            self._rows = self._rows + going
        return {row.key: row.result() for row in rows if row.done}

    @torch.inference_mode()
    def drop(self, keys: Collection[int]) -> None:
        """Let rows go before they end; the others get what they would have got. Keys of ended rows do nothing."""
        waiting, self._waiting = self._waiting, deque()
        for rows, prompts in waiting:
            places = [place for place, row in enumerate(rows) if row.key not in keys]
            if places:
                self._waiting.append(([rows[place] for place in places], prompts.select(places)))
        if self._cache is not None:
            self._rows = _staying(self._rows, self._cache, [row.key not in keys for row in self._rows])
            if not self._rows:
                self._cache = None

    def _advance(self, rows: list[_Row], cache: RaggedCache, prompts: Prompts | None) -> None:
        """Feed pending tokens (or the prompts) and drafts, emit what comes of it, commit what holds."""
        drafts = [self._draft(row) for row in rows]
        num_known = [len(row.pending) for row in rows] if prompts is None else prompts.lengths_B.tolist()
        if self._costs is not FREE and not self.strategy.accepts_other_tokens:
            drafts = self._worthwhile(drafts, max(num_known))
        tokens = [row.pending + [drafted.token for drafted in draft] for row, draft in zip(rows, drafts, strict=True)]
        hidden_BWD = self._call(tokens, cache, [row.prompt_length for row in rows], prompts)
        readings = self._read(hidden_BWD, num_known, drafts, [row.tokens for row in rows])
        if prompts is None:
            self._observe(hidden_BWD.shape[1], 1 + sum(reading.num_accepted for reading in readings) / len(rows))
        for row, draft, reading in zip(rows, drafts, readings, strict=True):
            row.num_calls += 1
            row.drafter.review(reading.verdicts(len(draft)), reading.num_accepted, reading.behind(len(draft)))
            self._emit(row, draft, reading)
        cache.commit([known + reading.num_accepted for known, reading in zip(num_known, readings, strict=True)])

    def _call(
        self,
        tokens: Sequence[Sequence[int]],
        cache: RaggedCache,
        prompt_lengths: Sequence[int],
        prompts: Prompts | None,
    ) -> Tensor:
        """Feed each row's tokens, behind the prompts if given: hidden states (B, W, D) of all that was fed."""
        tokens_BW = self._padded(tokens, 0)
        num_fed = [1 + max(0, held - length) for held, length in zip(cache.lengths, prompt_lengths, strict=True)]
        places_BW = torch.tensor(num_fed, device=tokens_BW.device)[:, None] + torch.arange(
            tokens_BW.shape[1], device=tokens_BW.device
        )
        embeddings_BWD = self.decoder.embed(tokens_BW, places_BW)
        if prompts is not None and any(tokens):
            num_tokens_B = torch.tensor([len(row) for row in tokens], device=self.decoder.device)
            embeddings_BWD, _ = join_rows(prompts.embeddings_BLD, prompts.lengths_B, embeddings_BWD, num_tokens_B)
        elif prompts is not None:
            embeddings_BWD = prompts.embeddings_BLD
        positions_BW, mask_B1WS = cache.plan(embeddings_BWD.shape[1], self.decoder.dtype)
        if prompts is not None and prompts.positions_BL is not None:
            positions_BW = join_positions(prompts.positions_BL, prompts.lengths_B, embeddings_BWD.shape[1])
        return self.decoder.call(embeddings_BWD, positions_BW, mask_B1WS, cache, drafting=self._drafting)

    def _draft(self, row: _Row) -> Sequence[DraftToken]:
        """What the row's next call verifies: nothing that could not be emitted."""
        draft = self.strategy.propose(row.drafter, row.tokens, row.guesses)
        room = row.guards.max_tokens - len(row.tokens) - 1  # the bonus token takes one
        return until_end(draft[:room], self.decoder.end_tokens)

    def _observe(self, width: int, gain: float) -> None:
        """Let a call of this width, which brought a row so many tokens, count for what calls are worth."""
        self._width += (width - self._width) / 8
        self._gain += (gain - self._gain) / 8

    def _worthwhile(self, drafts: Sequence[Sequence[DraftToken]], width: int) -> list[Sequence[DraftToken]]:
        """Each row's draft as far as it is worth making a call of this `width` wider."""
        num_drafted = num_worth_drafting(
            [[drafted.probability for drafted in draft] for draft in drafts],
            self._costs,
            width=width,
            seconds_per_token=self._costs(len(drafts), round(self._width)) / (len(drafts) * self._gain),
        )
        return [draft[:num_drafted] for draft in drafts]

    def _padded(self, rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        """Ids of uneven rows as one int64 tensor, padded on the right."""
        width = max(map(len, rows))
        padded = [[*row, *[fill] * (width - len(row))] for row in rows]
        return torch.tensor(padded, dtype=torch.long, device=self.decoder.device)

    def _read(
        self,
        hidden_BWD: Tensor,
        num_known: Sequence[int],
        drafts: Sequence[Sequence[DraftToken]],
        texts: Sequence[Sequence[int]],
    ) -> list[_Reading]:
        """All that a call says, in one transfer to the host.

        Args:
            hidden_BWD: hidden states of everything fed.
            num_known: inputs of each row before its draft.
            drafts: each row's draft. texts: its tokens before that.
        """
        B, W, _ = hidden_BWD.shape
        drafted = [[drafted.token for drafted in draft] for draft in drafts]
        draft_BJ = self._padded(drafted, -1)
        R = draft_BJ.shape[1] + 1
        rows_B = torch.arange(B, device=hidden_BWD.device)
        if max(num_known) > 1:
            last_known_B = torch.tensor(num_known, device=hidden_BWD.device) - 1
            index_BR = last_known_B[:, None] + torch.arange(R, device=hidden_BWD.device)
            hidden_BRD = hidden_BWD[rows_B[:, None], index_BR.clamp_(max=W - 1)]
        else:
            hidden_BRD = hidden_BWD
        rules = self._rules if self._rules is not None and any(map(self._rules.bind, texts)) else None
        logits_BRV = self.decoder.logits(hidden_BRD, exact=self.strategy.accepts_other_tokens or rules is not None)
        if rules is not None:
            logits_BRV = rules.obeyed(logits_BRV, texts, drafted)
        tokens_BR, log_probs_BR = best_tokens(logits_BRV)
        stands_BJ = self.strategy.agrees(draft_BJ, tokens_BR[:, :-1], logits_BRV[:, :-1]).long().cumprod(-1)
        num_accepted_B = stands_BJ.sum(-1)
        drafted_BJ = _drafted_log_probabilities(logits_BRV[:, :-1], draft_BJ, tokens_BR[:, :-1], log_probs_BR[:, :-1])
        if self.strategy.accepts_other_tokens:
            stands_BR = nn.functional.pad(stands_BJ, (0, 1)).bool()
            tokens_BR = torch.where(stands_BR, nn.functional.pad(draft_BJ, (0, 1)), tokens_BR)
            log_probs_BR = torch.where(stands_BR, nn.functional.pad(drafted_BJ, (0, 1)), log_probs_BR)
        columns = [num_accepted_B[:, None], tokens_BR, log_probs_BR, drafted_BJ.exp()]

        asked = []  # of heads 2..K, at which places of each row
        if self.strategy.num_guesses:
            asked.append((num_accepted_B[:, None], self.strategy.num_guesses))
        if self.strategy.num_further:
            asked.append((_first_places(draft_BJ != tokens_BR[:, :-1], NUM_MISTAKES), 1))
            asked.append(((draft_BJ >= 0).sum(-1, keepdim=True), self.strategy.num_further))
        columns += self._guess(hidden_BRD, tokens_BR, asked)

        table = torch.cat([column.float() for column in columns], 1).cpu()
        pieces = (piece.tolist() for piece in table.split([column.shape[1] for column in columns], 1))
        return [self._parse(*row) for row in zip(*pieces, strict=True)]

    def _guess(self, hidden_BRH: Tensor, tokens_BR: Tensor, asked: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
        """What heads 2, 3, … say behind head 1's tokens.

        Args:
            hidden_BRH, tokens_BR: what `call` gave, and head 1's tokens.
            asked: places (B, M) among these R, and how many heads.

        Returns:
            for each of `asked`: places (B, M), and ids and probabilities (B, M · heads).
        """
        if not asked:
            return []
        B = len(tokens_BR)
        rows_B1 = torch.arange(B, device=tokens_BR.device)[:, None]
        logits = self.decoder.draft_logits_each(
            [
                (hidden_BRH[rows_B1, places].flatten(0, 1), tokens_BR.gather(1, places).flatten(), num_heads)
                for places, num_heads in asked
            ],
            exact=self.strategy.trusts_heads,
        )
        columns = []
        for (places_BM, num_heads), logits_NGV in zip(asked, logits, strict=True):
            best_NG, log_probs_NG = best_tokens(logits_NGV)
            guesses_NG = self._drafted(best_NG)
            width = places_BM.shape[1] * num_heads
            columns += [places_BM, guesses_NG.view(B, width), log_probs_NG.exp().view(B, width)]
        return columns

    def _drafted(self, places: Tensor) -> Tensor:
        """The ids of these outputs of heads 2..K."""
        return places if self.decoder.draft_tokens is None else self.decoder.draft_tokens[places]

    @staticmethod
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
    ) -> _Reading:
        return _Reading(
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

    def _emit(self, row: _Row, draft: Sequence[DraftToken], reading: _Reading) -> None:
        """Emit accepted tokens, head 1's token behind them and trusted guesses, until the row ends."""
        step, num_accepted = row.num_calls - 1, reading.num_accepted
        trusted = reading.guesses[: self.strategy.num_trusted(reading.guesses)]
        records = [
            TokenRecord(token, step, drafted.source, drafted.probability, log_probability)
            for drafted, token, log_probability in zip(
                draft[:num_accepted], reading.tokens, reading.log_probabilities, strict=False
            )
        ]
        records.append(
            TokenRecord(
                token=reading.tokens[num_accepted],
                step=step,
                source="bonus" if draft else "head1",
                draft_probability=None,
                log_probability=reading.log_probabilities[num_accepted],
                rejected=draft[num_accepted] if num_accepted < len(draft) else None,
            )
        )
        records += [TokenRecord(guess.token, step, guess.source, guess.probability, None) for guess in trusted]
        for record in records:
            row.emit(record, self.decoder.end_tokens)
            if row.done:
                return
        row.pending = [reading.tokens[num_accepted], *(guess.token for guess in trusted)]
        row.guesses = reading.guesses[len(trusted) :]
