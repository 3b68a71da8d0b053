"""RaggedCache: keys and values of rows that stand at different positions.

A slot is a position. A call writes its W inputs at each row's own next positions, whatever was there; `commit` says
how many of them stay. What is not committed needs no rollback: it lies behind the row's length, where the causal
mask hides it from every later input until it is overwritten (gpt-fast's rollback, per row as in moshi's ring cache).

Shapes: B rows, H key-value heads, S slots, W step width, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

LEAST_ROOM = 64  # slots that a cache grows by
FEW_ROWS = 8  # that a CPU writes faster one by one


@dataclass(slots=True)
class _Write:
    """Where the call under way writes; shared by all layers.

    Attributes:
        positions_BW: slot of each input.
        width: W. starts: the first slot of each row; nothing where the device alone knows them.
        end: slots in sight, at least up to the furthest slot written.
    """

    positions_BW: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    width: int = 0
    starts: Sequence[int] = ()
    end: int = 0


class RaggedLayer(CacheLayerMixin):
    """One decoder layer's keys and values, (B, H, S, D); S grows by need."""

    keys: Tensor  # type: ignore[assignment]  # None only before the first call
    values: Tensor  # type: ignore[assignment]

    def __init__(self, write: _Write, dtype: torch.dtype | None):
        super().__init__()
        self.write, self.dtype = write, dtype

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        dtype = self.dtype or key_states.dtype
        self.keys, self.values = key_states[:, :, :0].to(dtype), value_states[:, :, :0].to(dtype)
        self.is_initialized = True

    def reserve(self, num_slots: int, num_written: int = 0) -> None:
        """Make room for `num_slots` slots; new ones are zero, since 0 · NaN would pass through a mask.

        But not the first `num_written`, into which the caller writes.
        """
        if num_slots > self.keys.shape[2]:
            self.keys = _grown(self.keys, num_slots, num_written)
            self.values = _grown(self.values, num_slots, num_written)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write (B, H, W, D) keys and values at the planned positions; returns all slots in sight (B, H, S', D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        positions_BW, starts, end = self.write.positions_BW, self.write.starts, self.write.end
        width = key_states.shape[2]
        if end > self.keys.shape[2]:
            self.reserve(end + max(end // 8, LEAST_ROOM), min(starts) + width)
        if starts and min(starts) == max(starts):
            self.keys[:, :, starts[0] : starts[0] + width] = key_states
            self.values[:, :, starts[0] : starts[0] + width] = value_states
        elif starts and len(starts) <= FEW_ROWS and self.keys.device.type == "cpu":
            for row, start in enumerate(starts):
                self.keys[row, :, start : start + width] = key_states[row]
                self.values[row, :, start : start + width] = value_states[row]
        else:
            rows_B1 = torch.arange(len(positions_BW), device=positions_BW.device)[:, None]
            self.keys[rows_B1, :, positions_BW] = key_states.transpose(1, 2).to(self.keys.dtype)
            self.values[rows_B1, :, positions_BW] = value_states.transpose(1, 2).to(self.values.dtype)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.write.end

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.write.end, 0

    def get_max_length(self) -> int:
        return -1  # transformers' word for "no maximum"


class RaggedCache(Cache):
    """A transformers cache with a write position per row.

    A call is `plan` → the decoder's forward pass, which writes → `commit`.

    Args:
        num_rows: B.
        device: where positions and masks go.
        memory: what the decoder keeps for each row beside its slots, and writes once; nothing is copied of it when
            rows leave, join or are reordered.
        dtype: of keys and values; None: that in which they come.
        multiple: slots in sight are a multiple of so many, for sums over them to be cut alike in calls of any width.

    Attributes:
        lengths: committed slots of each row.
    """

    layers: list[RaggedLayer]  # type: ignore[assignment]

    def __init__(
        self,
        num_rows: int,
        *,
        device: torch.device | str = "cpu",
        memory: Sequence[Any] | None = None,
        dtype: torch.dtype | None = None,
        multiple: int = 1,
    ):
        self.lengths = [0] * num_rows
        self.memory: list[Any] = [None] * num_rows if memory is None else list(memory)
        assert len(self.memory) == num_rows, f"{len(self.memory)} memories for {num_rows} rows"
        self.device, self._multiple = device, multiple
        self._write = _Write()
        super().__init__(layer_class_to_replicate=partial(RaggedLayer, self._write, dtype))  # type: ignore[arg-type]

    def plan(self, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Open a call of `width` inputs per row, each row at its own length.

        Returns:
            positions int64 (B, W) of the inputs, and the additive mask (B, 1, W, S') in `dtype` over the slots in
            sight: slot s is visible to the input at position p if s <= p.
        """
        self._write.starts = self.lengths
        self._write.end = -(-(max(self.lengths) + width) // self._multiple) * self._multiple
        return self._opened(torch.tensor(self.lengths, device=self.device)[:, None], width, dtype)

    def plan_at(self, lengths_B1: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`plan` where the device alone knows rows' lengths, int64 (B, 1); all slots that there are are in sight."""
        self._write.starts, self._write.end = (), self.layers[0].keys.shape[2]
        return self._opened(lengths_B1, width, dtype)

    def _opened(self, lengths_B1: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        positions_BW = lengths_B1 + torch.arange(width, device=self.device)
        self._write.positions_BW, self._write.width = positions_BW, width
        hidden_BWS = torch.arange(self._write.end, device=self.device) > positions_BW[..., None]
        mask_BWS = torch.zeros(hidden_BWS.shape, dtype=dtype, device=self.device)
        return positions_BW, mask_BWS.masked_fill_(hidden_BWS, torch.finfo(dtype).min)[:, None]

    @classmethod
    def of(cls, layers: Sequence[tuple[Tensor, Tensor]]) -> RaggedCache:
        """A cache whose rows' slots are these keys and values of each layer (B, H, S, D), which stay where they are."""
        cache = cls(len(layers[0][0]), device=layers[0][0].device)
        for keys, values in layers:
            layer = RaggedLayer(cache._write, keys.dtype)
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            cache.layers.append(layer)
        return cache

    def settle(self, room: Sequence[tuple[Tensor, Tensor]], width: int) -> None:
        """Lie in the first rows of `room`, keys and values of each layer; a call of `width` inputs will write there.

        What lies there already is not moved. Behind what is moved there are zeros, whatever others have left there.
        """
        num_rows = len(self.lengths)
        for layer, (keys, values) in zip(self.layers, room, strict=False):
            if layer.keys.data_ptr() != keys.data_ptr():
                num_held = min(max(self.lengths), layer.keys.shape[2])  # fewer where a layer is not asked for text
                for to, held in ((keys, layer.keys), (values, layer.values)):
                    to[:num_rows, :, :num_held] = held[:, :, :num_held]
                    to[:num_rows, :, num_held:] = 0
                layer.keys, layer.values = keys[:num_rows], values[:num_rows]
        self._write.width = width

    def commit(self, num_committed: Sequence[int]) -> None:
        """Keep the first `num_committed[b]` inputs of the last call in row b."""
        width = self._write.width
        assert all(0 <= num <= width for num in num_committed), f"{num_committed} of {width} inputs committed"
        self.lengths = [length + num for length, num in zip(self.lengths, num_committed, strict=True)]

    def select(self, rows: Sequence[int], lengths: Sequence[int] | None = None) -> None:
        """Make row i what row `rows[i]` was, or its first `lengths[i]` slots: drops, reorders and repeats rows."""
        moved = [place for place, row in enumerate(rows) if row != place]
        if all(rows[place] >= len(rows) for place in moved):  # from behind into gaps: the others stay where they are
            for layer in self.layers:
                for place in moved:
                    layer.keys[place], layer.values[place] = layer.keys[rows[place]], layer.values[rows[place]]
                layer.keys, layer.values = layer.keys[: len(rows)], layer.values[: len(rows)]
        else:
            index = torch.tensor(rows, device=self.device)
            for layer in self.layers:
                layer.keys, layer.values = layer.keys.index_select(0, index), layer.values.index_select(0, index)
        self.memory = [self.memory[row] for row in rows]
        held = [self.lengths[row] for row in rows]
        self.lengths = held if lengths is None else list(lengths)
        assert all(length <= most for length, most in zip(self.lengths, held, strict=True)), (lengths, held)

    def join(self, other: RaggedCache) -> None:
        """Put the rows of `other`, which has run through the same decoder, behind the rows of this cache.

        `other` is empty then: what it held is let go layer by layer, so that there are never two of all of it
        beside a room that it may lie in.
        """
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.keys, mine.values = _joined(mine.keys, theirs.keys), _joined(mine.values, theirs.values)
            theirs.keys = theirs.values = mine.keys.new_empty(0, *mine.keys.shape[1:])
        self.lengths += other.lengths
        self.memory += other.memory
        other.lengths, other.memory = [], []


def _grown(states_BHSD: Tensor, num_slots: int, num_written: int) -> Tensor:
    B, H, S, D = states_BHSD.shape
    grown = states_BHSD.new_empty(B, H, num_slots, D)
    grown[:, :, :S] = states_BHSD
    grown[:, :, max(S, num_written) :] = 0
    return grown


def _joined(first_BHSD: Tensor, second_BHSD: Tensor) -> Tensor:
    """Rows of both, one behind the other; where they have fewer slots, zeros are behind them."""
    num_slots = max(first_BHSD.shape[2], second_BHSD.shape[2])
    num_first, H, _, D = first_BHSD.shape
    joined = first_BHSD.new_empty(num_first + len(second_BHSD), H, num_slots, D)
    for part, rows in ((first_BHSD, joined[:num_first]), (second_BHSD, joined[num_first:])):
        rows[:, :, : part.shape[2]] = part
        rows[:, :, part.shape[2] :] = 0
    return joined
