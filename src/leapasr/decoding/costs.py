"""What a wider decoder call costs on this machine, and how much of a draft is worth that.

A drafted token is worth the chance that it stands times the seconds that a token takes otherwise; a part of that even
if one before it falls, since the call then says what belongs there (docs/performance.md). It costs what
widening the call by one costs, for all rows at once. The seconds of calls of a few sizes are measured once for each
machine and model, and kept in a file, and so are the `Ways` of computing that are fastest there.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, TypeVar

import torch

from leapasr.decoding.cache import RaggedCache
from leapasr.decoding.graphs import Fed, Graphs, as_it_is
from leapasr.decoding.interface import Decoder, Prompts, Ways
from leapasr.decoding.packing import PACKINGS
from leapasr.decoding.reading import Reading
from leapasr.decoding.strategies import LEADING, Verification
from leapasr.model.argmax import argmax

NUM_ROWS, WIDTHS = (1, 8, 32), (1, 8, 32, 128)
SLOTS = 128  # in the cache when a call is timed
CARRIED = 0.5  # of a drafted token's worth is left behind a mistake: the call that finds it corrects the rest
MAX_TOKENS = 256  # in a call that is timed: wider ones cost what a straight line says
REPETITIONS = 5  # of which the quickest counts: others may have been disturbed
PATIENCE = 0.1  # seconds after which a call is not repeated
CAPTURED_WIDTHS = (1, 5, 5, 1)  # of steps that have to say the same captured and not
SAME = 0.05  # natural logs by which they may differ
STEADY_ROWS, STEADY_WIDTHS = (1, 3), (50, 1, 5, 14)  # of calls that have to give what calls for one input give

Found = TypeVar("Found", Ways, "CallCosts")


@dataclass(frozen=True)
class CallCosts:
    """Seconds of a decoder call, by its rows and then by its width, both rising."""

    num_rows: tuple[int, ...]
    widths: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, fields: dict[str, Any]) -> CallCosts:
        """From what `vars` gives, by way of JSON."""
        return cls(tuple(fields["num_rows"]), tuple(fields["widths"]), tuple(map(tuple, fields["seconds"])))

    def __call__(self, num_rows: int, width: int) -> float:
        """Seconds of a call: straight lines between what was measured, the last of them on beyond it."""
        return _on_lines(self.num_rows, [_on_lines(self.widths, row, width) for row in self.seconds], num_rows)


FREE = CallCosts((1, 2), (1, 2), ((0.0, 0.0), (0.0, 0.0)))  # as if width cost nothing: the fewest calls


def _on_lines(places: Sequence[int], values: Sequence[float], place: int) -> float:
    right = min(max(bisect_left(places, place), 1), len(places) - 1)
    share = (place - places[right - 1]) / (places[right] - places[right - 1])
    return values[right - 1] + (values[right] - values[right - 1]) * share


def num_worth_drafting(
    probabilities: Sequence[Sequence[float]], costs: CallCosts, *, width: int, seconds_per_token: float
) -> int:
    """Drafted tokens a row that the next call should carry at most.

    Args:
        probabilities: of each row's draft, token by token, that it stands if those before it do.
        costs: of calls.
        width: of the call without drafts.
        seconds_per_token: what a token costs that is not drafted.
    """
    survivals = [list(accumulate((p + (1 - p) * CARRIED for p in row), mul)) for row in probabilities]
    best, best_worth, worth = 0, 0.0, 0.0
    without = costs(len(probabilities), width)
    for place in range(max(map(len, survivals), default=0)):
        worth += seconds_per_token * sum(row[place] for row in survivals if place < len(row))
        gain = worth - (costs(len(probabilities), width + place + 1) - without)
        if gain >= best_worth:
            best, best_worth = place + 1, gain
    return best


@torch.inference_mode()
def measure_costs(decoder: Decoder) -> CallCosts:
    """Time calls of `decoder` and what its heads say: the quickest of a few of each size, and none below a smaller."""
    table: list[tuple[float, ...]] = []
    graphs = _own_graphs(decoder)
    for num_rows in NUM_ROWS:
        cache = _held(decoder, num_rows)
        row: list[float] = []
        for index, width in enumerate(WIDTHS):
            if num_rows * width > MAX_TOKENS:
                seconds = _on_lines(WIDTHS[:index], row, width)
            else:
                seconds = _quickest(decoder, graphs, cache, width)
            row.append(max([seconds, *row[-1:], *(above[index] for above in table[-1:])]))
        table.append(tuple(row))
    return CallCosts(NUM_ROWS, WIDTHS, tuple(table))


def _own_graphs(decoder: Decoder) -> Graphs | None:
    """For steps that are captured at once, in a room that no loop holds; None where steps are not captured."""
    return None if decoder.graphs is None else Graphs(decoder, decoder.graphs.new_capture, wait=0)


def _quickest(decoder: Decoder, graphs: Graphs | None, cache: RaggedCache, width: int) -> float:
    _seconds(decoder, graphs, cache, width)  # kernels are built, room is made, a step is captured
    seconds: list[float] = []
    while len(seconds) < REPETITIONS and sum(seconds) < PATIENCE:
        seconds.append(_seconds(decoder, graphs, cache, width))
    return min(seconds)


def _empty_cache(decoder: Decoder, num_rows: int) -> RaggedCache:
    return decoder.new_cache(Prompts(torch.empty(num_rows, 0, 0), torch.zeros(num_rows, dtype=torch.long)))


def _held(decoder: Decoder, num_rows: int) -> RaggedCache:
    """A cache that holds `SLOTS` of each row, all alike."""
    cache = _empty_cache(decoder, 1)
    _call(decoder, cache, _zeros(decoder, cache, SLOTS))
    cache.commit([SLOTS])
    cache.select([0] * num_rows)
    return cache


def _zeros(decoder: Decoder, cache: RaggedCache, width: int) -> torch.Tensor:
    """Token ids (B, W) that will do where only time counts."""
    return torch.zeros(len(cache.lengths), width, dtype=torch.long, device=decoder.device)


def _call(decoder: Decoder, cache: RaggedCache, tokens_BW: torch.Tensor) -> torch.Tensor:
    positions_BW, mask_B1WS = cache.plan(tokens_BW.shape[1], decoder.dtype)
    return decoder.call(decoder.embed(tokens_BW, positions_BW), positions_BW, mask_B1WS, cache)


def _steps(decoder: Decoder, graphs: Graphs, cache: RaggedCache, width: int) -> list[Reading] | None:
    """What a captured step of this width says, of which one token is known; None if it is not captured."""
    strategy = Verification(num_guesses=min(LEADING, decoder.num_heads - 1))
    rows = [
        Fed(held, held, 1, [token % decoder.vocab_size for token in range(held, held + width)])
        for held in cache.lengths
    ]
    return graphs.run(strategy, rows, cache)


def _seconds(decoder: Decoder, graphs: Graphs | None, cache: RaggedCache, width: int) -> float:
    start = time.perf_counter()
    if graphs is not None and _steps(decoder, graphs, cache, width) is not None:
        return time.perf_counter() - start
    start = time.perf_counter()
    hidden_BWD = _call(decoder, cache, _zeros(decoder, cache, width))
    best_BW = argmax(decoder.logits(hidden_BWD, exact=False))
    best_BW.tolist()
    if decoder.num_heads > 1:
        num_guesses = min(LEADING, decoder.num_heads - 1)
        argmax(decoder.draft_logits(hidden_BWD[:, -1], best_BW[:, -1], num_guesses, exact=False)).tolist()
    return time.perf_counter() - start


@torch.inference_mode()
def fastest_ways(decoder: Decoder) -> Ways:
    """The ways in which calls of one row are fastest: the packing first. `decoder` is left in some of them.

    Rounded products only where the decoder may round, and where calls are `steady` then; captured steps only where
    it may capture, and where they say what they say otherwise.
    """

    @lru_cache  # the packing that is found is one of the ways that are compared then
    def seconds(ways: Ways) -> float:
        decoder.prepare(ways)
        graphs, cache = _own_graphs(decoder), _held(decoder, 1)  # what they are like depends on the ways
        return sum(_quickest(decoder, graphs, cache, width) for width in WIDTHS[:-1])

    packing = min((None, *PACKINGS), key=lambda packing: seconds(Ways(packing)))
    ways = min((Ways(packing), Ways(packing, rough=True)), key=seconds)
    captured = Ways(captured=True)
    if decoder.may_capture and can_capture(decoder) and seconds(captured) < seconds(ways):
        ways = captured
    rounded = Ways(packing, rough=True, rounded=True)
    # timed last, it is what the decoder works in when it is asked whether it is steady
    return rounded if decoder.may_round and seconds(rounded) < seconds(ways) and steady(decoder) else ways


@torch.inference_mode()
def can_capture(decoder: Decoder) -> bool:
    """Whether steps can be captured, and say then what the same operations say one by one; `decoder` captures then."""
    decoder.prepare(Ways(captured=True))
    graphs = _own_graphs(decoder)
    assert graphs is not None
    captured, plain = _said(decoder, graphs), _said(decoder, Graphs(decoder, lambda: as_it_is, wait=0))
    return len(captured) == len(plain) and all(
        abs(one - other) <= SAME
        for reading, expected in zip(captured, plain, strict=True)
        for one, other in zip(reading.log_probabilities, expected.log_probabilities, strict=True)
    )


def _said(decoder: Decoder, graphs: Graphs) -> list[Reading]:
    """What steps of several widths say, one behind the other, up to the first that cannot be captured."""
    cache, said = _held(decoder, 1), list[Reading]()
    for width in CAPTURED_WIDTHS:
        reading = _steps(decoder, graphs, cache, width)
        if reading is None:
            break
        said += reading
        cache.commit([width])
    return said


@torch.inference_mode()
def steady(decoder: Decoder) -> bool:
    """Whether an input gets, bit for bit, the same of calls with many inputs and with one; tried on random ones."""
    generator = torch.Generator().manual_seed(0)
    num_rows = max(STEADY_ROWS)
    tokens_BW = torch.randint(decoder.vocab_size, (num_rows, sum(STEADY_WIDTHS)), generator=generator)
    tokens_BW = tokens_BW.to(decoder.device)

    def read(rows: int, widths: Sequence[int]) -> torch.Tensor:
        cache, parts = _empty_cache(decoder, rows), []
        for part_BW in tokens_BW[:rows].split(list(widths), 1):
            parts.append(_call(decoder, cache, part_BW))
            cache.commit([part_BW.shape[1]] * rows)
        return torch.cat(parts, 1)[:1]

    one_by_one = read(1, [1] * sum(STEADY_WIDTHS))
    return all(torch.equal(read(rows, STEADY_WIDTHS), one_by_one) for rows in STEADY_ROWS)


def find_ways(decoder: Decoder, description: str, spend: Callable[[float], None] = lambda seconds: None) -> Ways:
    """Let `decoder` work in the ways that are fastest here, which are found once for each machine and model.

    Args:
        description: tells the model's shape from others.
        spend: called with the seconds that finding took, if it was not done before.
    """
    facts = (*_facts(decoder, description), decoder.may_round, decoder.may_capture)
    ways = _remembered("ways", facts, lambda: fastest_ways(decoder), lambda fields: Ways(**fields), spend)
    decoder.prepare(ways)
    return ways


def find_costs(
    decoder: Decoder, description: str, ways: Ways, spend: Callable[[float], None] = lambda seconds: None
) -> CallCosts:
    """What calls of `decoder`, which works in these `ways`, cost on the cores that this thread has.

    From the file of an earlier measurement on this machine, else measured now.

    Args:
        description, spend: as of `find_ways`.
    """
    facts = (*_facts(decoder, description), NUM_ROWS, WIDTHS, LEADING, ways, torch.get_num_threads())
    return _remembered("calls", facts, lambda: measure_costs(decoder), CallCosts.of, spend)


def _facts(decoder: Decoder, description: str) -> tuple:
    """What every measurement depends on."""
    device = decoder.device
    processor = f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()} {os.cpu_count()}"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else processor
    return description, str(decoder.dtype), str(device), where, torch.__version__


def _remembered(
    name: str,
    facts: tuple,
    measure: Callable[[], Found],
    build: Callable[[dict], Found],
    spend: Callable[[float], None],
) -> Found:
    """What was measured where all these `facts` held, in the file that it is kept in; else measured, and kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leapasr"
    path = folder / f"{name}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.json"
    try:
        return build(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    start = time.perf_counter()
    found = measure()
    spend(time.perf_counter() - start)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pending = path.with_suffix(f".{os.getpid()}")
        pending.write_text(json.dumps(vars(found)))
        os.replace(pending, path)
    except OSError:  # nowhere to keep it: it is measured again next time
        pass
    return found
