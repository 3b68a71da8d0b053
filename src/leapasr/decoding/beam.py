"""Beam search in blocks: the hypotheses of a textbook beam search, in a fraction of its decoder calls.

A textbook beam search makes a decoder call for each token: it needs to know what may follow each of its N hypotheses.
Here a call tells that for whole stretches of text. Tokens are nodes of a tree; a call feeds, for each hypothesis, the
tokens that are new and a draft of how it goes on, and so gives head 1's distribution at every one of these nodes.
The search then goes on by itself, token by token, until it needs a node that no call has read. What is known ahead
also tells which other nodes it will need soon: those ride on the same call.

So hypotheses are compared at the same length only, whatever the drafts, no sequence comes about twice, and a score is
the sum of head 1's log-probabilities, end-of-text included, without length normalisation: scores only fall, hence the
search ends, exactly, when as many hypotheses as are wanted have ended and lead the beam. With a threshold the search
also takes the heads' own distributions for nodes ahead of a call, as far as the heads are sure: fewer calls, scores
that are not head 1's. This is the prefix-based beam search of Raj et al. (arXiv 2409.08148), with hypotheses of
different lengths compared where they are of one length.

Shapes: B lines, W step width, D width, V vocabulary, N beam.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from leapasr.decoding.cache import RaggedCache
from leapasr.decoding.costs import FREE, CallCosts
from leapasr.decoding.drafts import Drafter
from leapasr.decoding.guards import Guards
from leapasr.decoding.interface import Decoder, Prompts
from leapasr.decoding.loop import DecodingLoop, text_places
from leapasr.decoding.options import DecodingOptions, DecodingResult, Hypothesis, Truncation
from leapasr.decoding.reading import best_tokens, by_heads, drafted_ids
from leapasr.decoding.rejoin import Rejoining, Spelling, as_one
from leapasr.decoding.trace import DraftToken, TokenRecord
from leapasr.model.argmax import top
from leapasr.model.precision import as_scores

LINES_PER_HYPOTHESIS = 2  # cache rows of one utterance in a call: the beam's own, and as many that it may need soon


class _Next(NamedTuple):
    """The N likeliest tokens behind a node, likeliest first, with their natural-log probabilities.

    step: the call that told; source: the head that did, ``head1`` if it was verified.
    """

    tokens: list[int]
    log_probabilities: list[float]
    step: int
    source: str = "head1"


@dataclass(eq=False, slots=True)
class _Node:
    """A token behind those of its parents; the root is the prompt."""

    parent: _Node | None
    token: int
    depth: int
    children: dict[int, _Node] = field(default_factory=dict)
    next: _Next | None = None
    hidden: Tensor | None = None
    drafted: DraftToken | None = None
    drafter: Drafter | None = None

    def child(self, token: int) -> _Node:
        if token not in self.children:
            self.children[token] = _Node(self, token, self.depth + 1)
        return self.children[token]

    def path(self) -> list[_Node]:
        """The nodes from the root to this one, both included: as many as its depth, and one."""
        nodes = [self]
        while nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]

    def tokens(self) -> list[int]:
        return [node.token for node in self.path()[1:]]

    def record(self) -> TokenRecord:
        """How this token came to be chosen."""
        assert self.parent is not None
        following = self.parent.next
        assert following is not None
        log_probability = following.log_probabilities[following.tokens.index(self.token)]
        if following.source != "head1":
            return TokenRecord(self.token, following.step, following.source, math.exp(log_probability), None)
        if self.drafted is None:
            return TokenRecord(self.token, following.step, "head1", None, log_probability)
        drafted = self.drafted
        return TokenRecord(self.token, following.step, drafted.source, drafted.probability, log_probability)


class _Candidate(NamedTuple):
    """A hypothesis in the beam; `truncated` as in `DecodingResult`, `num_kept` of its tokens are the text."""

    node: _Node
    score: float
    ended: bool = False
    num_kept: int = 0
    truncated: Truncation | None = None


class _Line(NamedTuple):
    """A row of the next call.

    source: the row of the cache that it goes on from, as far as `path`; feed: the nodes to feed behind that, of which
    the first `num_needed` are no draft.
    """

    source: int
    path: list[_Node]
    feed: list[_Node]
    num_needed: int


@dataclass(slots=True)
class _Search:
    """One utterance."""

    key: int
    prompt_length: int
    guards: Guards
    size: int
    num_wanted: int
    root: _Node
    beam: list[_Candidate] = field(init=False)
    lines: list[list[_Node]] = field(init=False)  # the nodes that each of its cache rows holds, from the root
    num_calls: int = 0
    done: bool = False

    def __post_init__(self) -> None:
        self.beam = [_Candidate(self.root, 0.0)]
        self.lines = [[self.root]]

    @property
    def num_lines(self) -> int:
        return len(self.lines)

    def advance(self, end_tokens: frozenset[int]) -> None:
        """Search on as far as the beam's next tokens are known; `done` tells whether the search ends."""
        while not all(candidate.ended for candidate in self.beam[: self.num_wanted]):
            if any(candidate.node.next is None for candidate in self.beam if not candidate.ended):
                return
            self.beam = [self._judged(candidate, end_tokens) for candidate in _followed(self.beam, self.size)]
        self.done = True

    def _judged(self, candidate: _Candidate, end_tokens: frozenset[int]) -> _Candidate:
        """`candidate`, ended if its last token or a guard ends it."""
        if candidate.ended:
            return candidate
        tokens = candidate.node.tokens()
        if tokens[-1] in end_tokens:
            return candidate._replace(ended=True, num_kept=len(tokens) - 1)
        cut = self.guards.cut(tokens)
        if cut is None:
            return candidate
        num_kept, truncated = cut
        return candidate._replace(ended=True, num_kept=num_kept, truncated=truncated)

    def wanted(self, end_tokens: frozenset[int]) -> list[_Node]:
        """Nodes to be read: those that the beam waits for, then those that it comes to if these cost nothing."""
        found: dict[_Node, None] = {}
        beam = self.beam
        while len(found) < LINES_PER_HYPOTHESIS * self.size:
            found |= dict.fromkeys(each.node for each in beam if not each.ended and each.node.next is None)
            if all(candidate.ended or candidate.node.next is None for candidate in beam):
                break
            beam = [
                candidate._replace(ended=candidate.ended or self._ends(candidate.node, end_tokens))
                for candidate in _followed(beam, self.size)
            ]
        return list(islice(found, LINES_PER_HYPOTHESIS * self.size))

    def _ends(self, node: _Node, end_tokens: frozenset[int]) -> bool:
        return node.token in end_tokens or node.depth >= self.guards.max_tokens

    def best_path(self) -> list[_Node]:
        """From the root along the best hypothesis, and on along the likeliest tokens as far as calls have read."""
        return list(_known_path(self.beam[0].node))

    def lines_for(self, feeds: Sequence[tuple[_Node, list[_Node]]], best: Sequence[_Node], first: int) -> list[_Line]:
        """A line for each node to read and its draft; and one that keeps what is held of `best`, if no other does.

        Args:
            best: the search's `best_path`.
            first: the cache's row of this utterance's first line.
        """
        lines = []
        for node, draft in feeds:
            path = node.path()
            source, num_held = self._holding(path)
            needed = path[num_held:]
            lines.append(_Line(first + source, path[:num_held], [*needed, *draft], len(needed)))
        source, num_held = self._holding(best)
        if all(_num_common([*line.path, *line.feed], best) < num_held for line in lines):
            lines.append(_Line(first + source, list(best[:num_held]), [], 0))
        return lines

    def _holding(self, path: Sequence[_Node]) -> tuple[int, int]:
        """The line that holds most of `path`, and how many of its nodes."""
        held = [_num_common(line, path) for line in self.lines]
        return held.index(max(held)), max(held)

    def result(self) -> DecodingResult:
        best = self.beam[0]
        hypotheses = [
            Hypothesis(candidate.node.tokens()[: candidate.num_kept], candidate.score, candidate.truncated)
            for candidate in self.beam[: self.num_wanted]
        ]
        return DecodingResult(
            tokens=hypotheses[0].tokens,
            num_calls=self.num_calls,
            trace=[node.record() for node in best.node.path()[1:]],
            truncated=best.truncated,
            hypotheses=hypotheses,
        )


def _followed(beam: Iterable[_Candidate], size: int) -> list[_Candidate]:
    """The `size` best of what follows: hypotheses that have ended or cannot go on stay, the others go on by a token."""
    scored: list[tuple[float, _Candidate, int | None]] = []
    for candidate in beam:
        following = candidate.node.next
        if candidate.ended or following is None:
            scored.append((candidate.score, candidate, None))
            continue
        for token, log_probability in zip(following.tokens, following.log_probabilities, strict=True):
            scored.append((candidate.score + log_probability, candidate, token))
    scored.sort(key=lambda entry: -entry[0])  # stable: of equals, the one of the better hypothesis, likelier token
    return [
        candidate if token is None else _Candidate(candidate.node.child(token), score)
        for score, candidate, token in scored[:size]
    ]


def _known_path(node: _Node) -> Iterator[_Node]:
    """From the root to `node`, and on along the likeliest tokens as far as calls have read."""
    yield from node.path()
    while node.next is not None and node.next.tokens[0] in node.children:
        node = node.children[node.next.tokens[0]]
        if node.next is None:
            return
        yield node


def _as_the_best(node: _Node, best: Sequence[_Node], spell: Spelling) -> list[DraftToken]:
    """How the `best_path` of a search goes on behind `node`; nothing if it is `node`'s own."""
    told = best[1:]
    rejoining = Rejoining([other.token for other in told], spell)
    rejoining.follow(node.tokens())
    return [
        DraftToken(record.token, math.exp(record.log_probability or 0.0), "beam")
        for record in (other.record() for other in told[rejoining.place :])
    ]


def _num_common(one: Sequence[_Node], other: Sequence[_Node]) -> int:
    """Nodes that two paths from the root share."""
    num = min(len(one), len(other))
    while one[num - 1] is not other[num - 1]:
        num -= 1
    return num


class BeamLoop(DecodingLoop):
    """A `DecodingLoop` whose rows are utterances with several hypotheses each; see the module's description.

    Args, Raises: as of `DecodingLoop`; the options' strategy is ``beam``, and `spell` gives the characters of a token,
    by which hypotheses are aligned.
    """

    def __init__(
        self, decoder: Decoder, options: DecodingOptions, *, costs: CallCosts = FREE, spell: Spelling = as_one
    ):
        super().__init__(decoder, options, costs=costs)
        self.spell = spell
        assert options.beam_size_used is not None
        self.size = options.beam_size_used
        self.num_guesses = options.num_heads_used(decoder.num_heads) - 1
        self._drafting = self.num_guesses > 0

    def _new_row(self, key: int, prompt_length: int, guards: Guards, drafter: Drafter) -> _Search:  # type: ignore[override]
        root = _Node(None, -1, 0, drafter=drafter)
        return _Search(key, prompt_length, guards, self.size, self.options.nbest or 1, root)

    def _advance(self, rows: list[_Search], cache: RaggedCache, prompts: Prompts | None) -> None:  # type: ignore[override]
        """One call for the lines of all `rows`, and the search as far as that takes it."""
        if prompts is None:
            lines = self._lines(rows)
            of_rows = [(row, line) for row, each in zip(rows, lines, strict=True) for line in each]
            sources = [line.source for _, line in of_rows]
            cache.select(sources, [row.prompt_length + len(line.path) - 1 for row, line in of_rows])
            num_known = [0] * len(of_rows)
        else:
            lines = [
                [_Line(n, [row.root], self._draft_nodes(row, row.root, (), [row.root]), 0)]
                for n, row in enumerate(rows)
            ]
            num_known = prompts.lengths_B.tolist()
        lines = self._worthwhile_lines(lines, max(num_known))
        fed = [line.feed for each in lines for line in each]
        prompt_lengths = [row.prompt_length for row, each in zip(rows, lines, strict=True) for _ in each]
        tokens = [[node.token for node in nodes] for nodes in fed]
        hidden_BWD = self._call(tokens, text_places(cache, prompt_lengths), cache, prompts)
        cache.commit([known + len(nodes) for known, nodes in zip(num_known, fed, strict=True)])
        if prompts is not None:
            fed = [[row.root, *nodes] for row, nodes in zip(rows, fed, strict=True)]
        steps = [row.num_calls for row, each in zip(rows, lines, strict=True) for _ in each]
        self._read_nodes(fed, steps, hidden_BWD, [max(0, known - 1) for known in num_known])
        num_before = sum(row.beam[0].node.depth for row in rows)
        for row, each in zip(rows, lines, strict=True):
            row.num_calls += 1
            row.lines = [[*line.path, *line.feed] for line in each]
            row.advance(self.decoder.end_tokens)
        if prompts is None:
            num_found = sum(row.beam[0].node.depth for row in rows) - num_before
            self._observe(hidden_BWD.shape[1], num_found / len(rows))

    def _lines(self, rows: Sequence[_Search]) -> list[list[_Line]]:
        """What the next call feeds for each row."""
        wanted = [row.wanted(self.decoder.end_tokens) for row in rows]
        guesses = iter(self._guesses([node for nodes in wanted for node in nodes]))
        lines, first = [], 0
        for row, nodes in zip(rows, wanted, strict=True):
            best = row.best_path()
            feeds = [(node, self._draft_nodes(row, node, next(guesses), best)) for node in nodes]
            lines.append(row.lines_for(feeds, best, first))
            first += row.num_lines
        return lines

    def _worthwhile_lines(self, lines: list[list[_Line]], num_known: int) -> list[list[_Line]]:
        """The lines with their drafts as far as these are worth making a call of this width wider."""
        if self._costs is FREE:
            return lines
        drafts = [
            [node.drafted for node in line.feed[line.num_needed :] if node.drafted] for each in lines for line in each
        ]
        width = max(num_known, *(line.num_needed for each in lines for line in each))
        kept = iter(self._worthwhile(drafts, width))
        return [[line._replace(feed=line.feed[: line.num_needed + len(next(kept))]) for line in each] for each in lines]

    def _guesses(self, nodes: Sequence[_Node]) -> list[list[DraftToken]]:
        """What heads 2..K say behind each of `nodes`, as read where its parent was."""
        if not self.num_guesses or self.options.threshold is not None:
            return [[] for _ in nodes]
        hidden_BD = torch.stack([node.parent.hidden for node in nodes])  # type: ignore[union-attr, misc]
        first_tokens_B = torch.tensor([node.token for node in nodes], device=self.decoder.device)
        logits_BGV = self.decoder.draft_logits(hidden_BD, first_tokens_B, self.num_guesses, exact=False)
        best_BG, log_probs_BG = best_tokens(logits_BGV)
        tokens_BG = drafted_ids(self.decoder, best_BG)
        return [
            by_heads(tokens, map(math.exp, log_probs))
            for tokens, log_probs in zip(tokens_BG.tolist(), log_probs_BG.tolist(), strict=True)
        ]

    def _draft_nodes(
        self, row: _Search, node: _Node, guesses: Sequence[DraftToken], best: Sequence[_Node]
    ) -> list[_Node]:
        """How `node` may go on: as the best hypothesis does, or where that is no help, as the draft source says."""
        if self.options.threshold is not None:
            return []
        draft = _as_the_best(node, best, self.spell) or self._drafter(node).propose(node.tokens(), guesses)
        nodes: list[_Node] = []
        for drafted in draft[: max(0, row.guards.max_tokens - 1 - node.depth)]:
            if drafted.token in self.decoder.end_tokens:
                break
            node = node.child(drafted.token)
            node.drafted = node.drafted or drafted
            nodes.append(node)
        return nodes

    def _drafter(self, node: _Node) -> Drafter:
        """The draft source at `node`: a copy of the one at its last ancestor that has one."""
        if node.drafter is None:
            ancestor = node
            while ancestor.drafter is None:
                assert ancestor.parent is not None
                ancestor = ancestor.parent
            node.drafter = ancestor.drafter.copy()
        return node.drafter

    def _read_nodes(
        self, nodes: Sequence[Sequence[_Node]], steps: Sequence[int], hidden_BWD: Tensor, starts: Sequence[int]
    ) -> None:
        """Put what a call says into the nodes that it fed.

        Args:
            nodes: of each line. steps: number of the call, for each line's row.
            hidden_BWD: hidden states of everything fed. starts: where each line's first node stands in them.
        """
        R = max(map(len, nodes))
        rows_B1 = torch.arange(len(nodes), device=hidden_BWD.device)[:, None]
        index_BR = torch.tensor(starts, device=hidden_BWD.device)[:, None] + torch.arange(R, device=hidden_BWD.device)
        hidden_BRD = hidden_BWD[rows_B1, index_BR.clamp_(max=hidden_BWD.shape[1] - 1)]
        tokens_BRN, log_probs_BRN = self._likeliest(self.decoder.logits(hidden_BRD))
        for line, step, tokens, log_probs, hidden_RD in zip(
            nodes, steps, tokens_BRN.tolist(), log_probs_BRN.tolist(), hidden_BRD, strict=True
        ):
            for node, best, values, hidden in zip(line, tokens, log_probs, hidden_RD, strict=False):
                if node.next is None:
                    node.next, node.hidden = _Next(best, values, step), hidden
        if self.options.threshold is not None and self.num_guesses:
            self._trust([line[-1] for line in nodes if line])

    def _likeliest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The N likeliest ids (..., N) of logits (..., V), and their natural-log probabilities (..., N)."""
        scores = as_scores(logits)
        tokens = top(scores, min(self.size, logits.shape[-1]))
        return tokens, scores.gather(-1, tokens) - scores.logsumexp(-1, keepdim=True)

    def _trust(self, nodes: Sequence[_Node]) -> None:
        """Let heads 2..K say what follows behind the likeliest tokens of `nodes`, as far as they are sure."""
        threshold = self.options.threshold
        assert threshold is not None
        hidden_BD = torch.stack([node.hidden for node in nodes])  # type: ignore[misc]
        first_tokens_B = torch.tensor([node.next.tokens[0] for node in nodes], device=self.decoder.device)  # type: ignore[union-attr]
        tokens_BGN, log_probs_BGN = self._likeliest(
            self.decoder.draft_logits(hidden_BD, first_tokens_B, self.num_guesses)
        )
        tokens_BGN = drafted_ids(self.decoder, tokens_BGN)
        for node, tokens, log_probs in zip(nodes, tokens_BGN.tolist(), log_probs_BGN.tolist(), strict=True):
            for k, (best, values) in enumerate(zip(tokens, log_probs, strict=True), 2):
                assert node.next is not None
                if node.next.tokens[0] in self.decoder.end_tokens or math.exp(values[0]) < threshold:
                    break
                step = node.next.step
                node = node.child(node.next.tokens[0])
                node.next = node.next or _Next(best, values, step, f"head{k}")
