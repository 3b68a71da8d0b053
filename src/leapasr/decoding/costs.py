"""What a wider decoder call costs on this machine, and how much of a draft is worth that.

A drafted token is worth the chance that it stands times the seconds that a token takes otherwise. It costs what
widening the call by one costs, for all rows at once. The seconds of calls of a few sizes are measured once for each
machine and model, and kept in a file, and so is whether rough logits (`RoughUnembedding`) are faster there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path

import torch

from leapasr.decoding.cache import RaggedCache
from leapasr.decoding.interface import Decoder, Prompts

NUM_ROWS, WIDTHS = (1, 8, 32), (1, 8, 32, 128)
SLOTS = 128  # in the cache when a call is timed
NUM_MISTAKES = 8  # of a draft, at which head 2 is asked
REPETITIONS = 5  # of which the quickest counts: others may have been disturbed


@dataclass(frozen=True)
class CallCosts:
    """Seconds of a decoder call, by its rows and then by its width, both rising."""

    num_rows: tuple[int, ...]
    widths: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

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
    survivals = [list(accumulate(row, mul)) for row in probabilities]
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
    for num_rows in NUM_ROWS:
        cache = decoder.new_cache(Prompts(torch.empty(num_rows, 0, 0), torch.zeros(num_rows, dtype=torch.long)))
        _seconds(decoder, cache, SLOTS)
        cache.commit([SLOTS] * num_rows)
        row: list[float] = []
        for index, width in enumerate(WIDTHS):
            _seconds(decoder, cache, width)  # kernels are built, room is made
            quickest = min(_seconds(decoder, cache, width) for _ in range(REPETITIONS))
            row.append(max([quickest, *row[-1:], *(above[index] for above in table[-1:])]))
        table.append(tuple(row))
    return CallCosts(NUM_ROWS, WIDTHS, tuple(table))


def _seconds(decoder: Decoder, cache: RaggedCache, width: int) -> float:
    tokens_BW = torch.zeros(len(cache.lengths), width, dtype=torch.long, device=decoder.device)
    start = time.perf_counter()
    positions_BW, mask_B1WS = cache.plan(width, decoder.dtype)
    hidden_BWD = decoder.call(decoder.embed(tokens_BW, tokens_BW), positions_BW, mask_B1WS, cache)
    best_BW = decoder.logits(hidden_BWD, exact=False).argmax(-1)
    best_BW.tolist()
    if decoder.num_heads > 1:  # behind what stands all heads are asked, and head 2 at mistakes
        decoder.draft_logits(hidden_BWD[:, -1], best_BW[:, -1], decoder.num_heads - 1, exact=False).argmax(-1).tolist()
        mistakes = hidden_BWD[:, :1].expand(-1, NUM_MISTAKES, -1).flatten(0, 1), best_BW[:, 0].repeat(NUM_MISTAKES)
        decoder.draft_logits(*mistakes, 1, exact=False).argmax(-1).tolist()
    return time.perf_counter() - start


def roughness_pays(decoder: Decoder) -> bool:
    """Whether calls of one row are faster with logits that are exact only where they must be."""
    cache = decoder.new_cache(Prompts(torch.empty(1, 0, 0), torch.zeros(1, dtype=torch.long)))
    seconds = {True: 0.0, False: 0.0}
    with torch.inference_mode():
        for width in WIDTHS[:-1]:
            quickest = dict.fromkeys(seconds, math.inf)
            for _ in range(REPETITIONS):
                for rough in seconds:
                    decoder.be_rough(rough)
                    quickest[rough] = min(quickest[rough], _seconds(decoder, cache, width))
            seconds = {rough: seconds[rough] + quickest[rough] for rough in seconds}
    return seconds[True] < seconds[False]


def tune(decoder: Decoder, description: str) -> CallCosts:
    """Let `decoder` have rough logits if that is faster here, and tell what its calls then cost.

    From the file of an earlier measurement on this machine, else measured now.

    Args:
        description: tells the model's shape from others.
    """
    device = decoder.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor()} {os.cpu_count()}"
    facts = (description, str(decoder.dtype), str(device), where, torch.get_num_threads(), torch.__version__)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leapasr"
    path = folder / f"calls-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.json"
    try:
        fields = json.loads(path.read_text())
        costs = CallCosts(tuple(fields["num_rows"]), tuple(fields["widths"]), tuple(map(tuple, fields["seconds"])))
        decoder.be_rough(bool(fields["rough"]))
        return costs
    except (OSError, ValueError, KeyError, TypeError):
        rough = roughness_pays(decoder)
    decoder.be_rough(rough)
    costs = measure_costs(decoder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pending = path.with_suffix(f".{os.getpid()}")
        pending.write_text(json.dumps({**vars(costs), "rough": rough}))
        os.replace(pending, path)
    except OSError:  # nowhere to keep it: it is measured again next time
        pass
    return costs
