"""The decoding loop: every strategy, every draft source, any number of rows at any positions.

A step is one decoder call. It feeds each row's *pending* tokens (emitted, but not in the cache yet; before the
prefill, the prompt) and the draft behind them; keeps the draft as far as head 1 agrees; emits that, head 1's next
token, and what the strategy trusts; and reads from the same call what heads 2..K guess next. Rows are padded on the
right, where the causal mask hides it.

Shapes: B rows, L prompt positions, W step width, R positions read by head 1, J drafted tokens, G guesses of heads
2..K, D width, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, compress
from typing import ClassVar

import torch
from torch import Tensor

from leapasr.decoding.cache import RaggedCache
from leapasr.decoding.costs import FREE, CallCosts, num_worth_drafting
from leapasr.decoding.drafts import Drafter, MTPDrafter
from leapasr.decoding.graphs import Fed
from leapasr.decoding.guards import Guards, guard_rows
from leapasr.decoding.interface import Decoder, Prompts
from leapasr.decoding.options import DecodingOptions, DecodingResult, Truncation
from leapasr.decoding.reading import MAX_VOCAB_SIZE, Reading, joined, look, readings
from leapasr.decoding.rewriting import until_end
from leapasr.decoding.rules import Rules
from leapasr.decoding.strategies import Strategy, build_strategy
from leapasr.decoding.trace import DraftToken, TokenRecord
from leapasr.model.speech_llama import join_positions, join_rows


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


def text_places(cache: RaggedCache, prompt_lengths: Sequence[int]) -> list[int]:
    """Where in its text the next input of each row lies; begin-of-text lies at place 0."""
    return [1 + max(0, held - length) for held, length in zip(cache.lengths, prompt_lengths, strict=True)]


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
        texts = [row.tokens for row in rows]
        rules = self._rules if self._rules is not None and any(map(self._rules.bind, texts)) else None
        places = text_places(cache, [row.prompt_length for row in rows])
        said = None
        if prompts is None and rules is None and self.decoder.graphs is not None:
            said = self.decoder.graphs.run(
                self.strategy, list(map(Fed, cache.lengths, places, num_known, tokens)), cache
            )
        if said is None:
            hidden_BWD = self._call(tokens, places, cache, prompts)
            said = self._read(hidden_BWD, num_known, drafts, texts, rules)
        if prompts is None:
            self._observe(max(map(len, tokens)), 1 + sum(reading.num_accepted for reading in said) / len(rows))
        for row, draft, reading in zip(rows, drafts, said, strict=True):
            row.num_calls += 1
            row.drafter.review(reading.verdicts(len(draft)), reading.num_accepted, reading.behind(len(draft)))
            self._emit(row, draft, reading)
        cache.commit([known + reading.num_accepted for known, reading in zip(num_known, said, strict=True)])

    def _call(
        self,
        tokens: Sequence[Sequence[int]],
        places: Sequence[int],
        cache: RaggedCache,
        prompts: Prompts | None,
    ) -> Tensor:
        """Feed each row's tokens, behind the prompts if given: hidden states (B, W, D) of all that was fed.

        Args:
            places: of each row's first token (`text_places`).
        """
        tokens_BW = self._padded(tokens, 0)
        places_BW = torch.tensor(places, device=tokens_BW.device)[:, None] + torch.arange(
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
        rules: Rules | None,
    ) -> list[Reading]:
        """All that a call says, in one transfer to the host.

        Args:
            hidden_BWD: hidden states of everything fed.
            num_known: inputs of each row before its draft.
            drafts: each row's draft. texts: its tokens before that.
            rules: that they obey.
        """
        drafted = [[drafted.token for drafted in draft] for draft in drafts]
        draft_BJ = self._padded(drafted, -1)
        if max(num_known) > 1:
            rows_B1 = torch.arange(len(drafts), device=hidden_BWD.device)[:, None]
            last_known_B1 = torch.tensor(num_known, device=hidden_BWD.device)[:, None] - 1
            index_BR = last_known_B1 + torch.arange(draft_BJ.shape[1] + 1, device=hidden_BWD.device)
            hidden_BRD = hidden_BWD[rows_B1, index_BR.clamp_(max=hidden_BWD.shape[1] - 1)]
        else:
            hidden_BRD = hidden_BWD
        obeyed = None if rules is None else lambda logits_BRV: rules.obeyed(logits_BRV, texts, drafted)
        tables = look(self.decoder, self.strategy, hidden_BRD, draft_BJ, obeyed=obeyed)
        return readings(joined(tables).cpu(), [table.shape[1] for table in tables])

    def _emit(self, row: _Row, draft: Sequence[DraftToken], reading: Reading) -> None:
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
