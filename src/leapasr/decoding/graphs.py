"""Steps of fixed shapes on a GPU: captured once, and launched as one.

A decoder call of a few tokens is some hundreds of short operations, and a GPU is through with each before Python has
asked for the next. A CUDA graph is such a sequence with the addresses that it reads and writes, launched at once. So
the numbers of rows, of inputs and of slots in sight are rounded up to a few; all that differs from step to step lies in
one tensor; and the cache of the loop that steps lies in a room that keeps its place.

Shapes: B rows, W inputs, S slots, R = W positions read by head 1, J = W − 1 drafted tokens, H key-value heads, D width
of a head.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from leapasr.decoding.cache import RaggedCache
from leapasr.decoding.interface import Decoder
from leapasr.decoding.reading import Reading, joined, look, readings
from leapasr.decoding.strategies import Strategy

SLOTS = 128  # numbers of slots in sight are multiples of these
ROOM = 4  # times that: those of the room
WARM_UP = 2  # runs before a capture, in which libraries choose their kernels and take their memory
WAIT = 2  # times that a step of some shape is made without before it is captured, which takes longer than to make it
MOST_STEPS = 512  # that are kept; further shapes are made without

Launch = Callable[[], object]
Capture = Callable[[Callable[[], Tensor]], tuple[Launch, Tensor]]

_capturing = threading.Lock()  # a process captures one thing at a time


class Fed(NamedTuple):
    """What a step feeds of one row.

    Attributes:
        held: slots that its cache holds; the first input goes behind them.
        place: of the first input in its text; begin-of-text lies at 0.
        num_known: inputs before its draft, one at least.
        tokens: ids of these, and of the draft.
    """

    held: int
    place: int
    num_known: int
    tokens: Sequence[int]


class _Step(NamedTuple):
    """A captured step: what it reads, where it leaves its tables of `widths` (`reading.joined`), and how it is run."""

    inputs_BC: Tensor
    table: Tensor
    widths: list[int]
    launch: Launch


class CaptureError(RuntimeError):
    """Operations cannot be captured; why."""


class CudaGraphs:
    """Captures what a function asks of `device`; what it gave is then given anew by each launch, at the same address.

    The function must read and write tensors that keep their places, and neither wait for the device nor ask it. What is
    captured shares its memory, so that one launch has to be read before the next.

    Raises:
        CaptureError: (when called) it cannot be captured.
    """

    def __init__(self, device: torch.device):
        self._device = device
        with torch.cuda.device(device):
            self._stream, self._memory = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Launch, Tensor]:
        with _capturing, torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            self._stream.wait_stream(torch.cuda.current_stream())
            reason: RuntimeError | None = None
            try:
                with torch.cuda.stream(self._stream):  # left even if the capture's own end fails
                    for _ in range(WARM_UP):
                        function()
                    # other threads may use the device meanwhile
                    with torch.cuda.graph(
                        graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
                    ):
                        try:
                            result = function()
                        except RuntimeError as error:
                            reason = error  # the capture's end will only say that something went wrong before
                            raise
            except RuntimeError as error:
                raise CaptureError(str(reason or error).strip().partition("\n")[0]) from error
            finally:
                torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay, result


def as_it_is(function: Callable[[], Tensor]) -> tuple[Launch, Tensor]:
    """No capture: each launch calls `function` again. What captured steps are held to."""
    result = function()
    return lambda: result.copy_(function()), result


class Graphs:
    """Steps of one decoder, captured when they are needed time and again.

    One cache at a time lies in the room: that of the loop that came first, until it ends. Memory of the room, the
    largest that was needed so far, is kept for the next one.

    Args:
        decoder: whose calls neither wait for the device nor depend on anything but their inputs and the cache. It keeps
            these graphs, which do not keep it.
        new_capture: gives a `CudaGraphs`, or what stands for it, for each room.
        wait: times that a step of some shape is left to others before it is captured.
    """

    def __init__(self, decoder: Decoder, new_capture: Callable[[], Capture], *, wait: int = WAIT):
        self._decoder: Decoder = weakref.proxy(decoder)
        self.new_capture, self._wait = new_capture, wait
        self._steps: dict[tuple[Strategy, int, int, int], _Step] = {}
        self._num_wanted: Counter[tuple[Strategy, int, int, int]] = Counter()
        self._room: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer, (B, H, S, D)
        self._holder: Callable[[], RaggedCache | None] = lambda: None
        self._can_capture = True
        self._lock = threading.Lock()

    def run(self, strategy: Strategy, rows: Sequence[Fed], cache: RaggedCache) -> list[Reading] | None:
        """One step: what the call says of each row; `cache` is written, not committed.

        Returns:
            None where the step is to be made without: it is not worth capturing, cannot be captured (a warning has said
            so), or the room is another cache's.
        """
        with self._lock:
            if self._holder() not in (None, cache):
                return None
            num_rows = 2 ** (len(rows) - 1).bit_length()
            width = rounded_up(max(len(row.tokens) for row in rows))
            num_slots = -(-(max(row.held for row in rows) + width) // SLOTS) * SLOTS
            key = strategy, num_rows, width, num_slots
            self._num_wanted[key] += 1
            if not self._is_worth_capturing(key):
                return None
            lines = [*rows, *[NOTHING] * (num_rows - len(rows))]
            inputs_BC = torch.tensor([_inputs(line, width) for line in lines])
            try:
                self._make_room(cache, num_rows, num_slots)
                cache.settle(self._room, width)
                self._holder = weakref.ref(cache)
                step = self._steps.get(key)
                if step is None:
                    step = self._captured(strategy, inputs_BC.to(self._decoder.device), num_slots)
                    self._steps[key] = step
            except (CaptureError, torch.OutOfMemoryError) as error:
                self._can_capture = False
                reason = str(error).partition("\n")[0]
                warnings.warn(
                    f"decoder calls cannot be captured as CUDA graphs here, and take longer without: {reason}",
                    stacklevel=2,
                )
                return None
            step.inputs_BC.copy_(inputs_BC)
            step.launch()
            return readings(step.table.cpu(), step.widths)[: len(rows)]

    def _is_worth_capturing(self, key: tuple[Strategy, int, int, int]) -> bool:
        if key in self._steps:
            return True
        return self._can_capture and self._num_wanted[key] > self._wait and len(self._steps) < MOST_STEPS

    def _make_room(self, cache: RaggedCache, num_rows: int, num_slots: int) -> None:
        """Room for all layers of `cache`; what was captured is of no use where it has to be another."""
        fits = len(cache.layers) <= len(self._room) and all(
            num_rows <= keys.shape[0] and num_slots <= keys.shape[2] for keys, _ in self._room
        )
        if fits:
            return
        num_slots = -(-num_slots // (ROOM * SLOTS)) * ROOM * SLOTS
        for keys, _ in self._room:
            num_rows, num_slots = max(num_rows, keys.shape[0]), max(num_slots, keys.shape[2])
        self._steps.clear()
        self._capture: Capture = self.new_capture()  # with memory of its own: that of graphs that are gone may be gone

        def empty(states: Tensor) -> Tensor:  # zeros, for what was never written passes through a mask, too
            return states.new_zeros(num_rows, states.shape[1], num_slots, states.shape[3])

        layers = [(layer.keys, layer.values) for layer in cache.layers]
        self._room = [(empty(keys), empty(values)) for keys, values in layers + self._room[len(layers) :]]

    def _captured(self, strategy: Strategy, inputs_BC: Tensor, num_slots: int) -> _Step:
        cache = RaggedCache.of(
            [
                (keys[: len(inputs_BC), :, :num_slots], values[: len(inputs_BC), :, :num_slots])
                for keys, values in self._room
            ]
        )
        widths: list[int] = []
        decoder = self._decoder

        def step() -> Tensor:
            tables = take_step(decoder, strategy, inputs_BC, cache)
            widths[:] = [table.shape[1] for table in tables]
            return joined(tables)

        launch, table = self._capture(step)
        return _Step(inputs_BC, table, widths, launch)


NOTHING = Fed(held=0, place=1, num_known=1, tokens=())  # of a line that no row has


def rounded_up(width: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, …"""
    power = 2 ** (width - 1).bit_length()
    return power * 3 // 4 if power >= 4 and width <= power * 3 // 4 else power


def _inputs(row: Fed, width: int) -> list[int]:
    """A row as `take_step` reads it: 4 numbers, then its tokens, padded to `width`."""
    num_drafted = len(row.tokens) - row.num_known
    return [row.held, row.place, row.num_known, num_drafted, *row.tokens, *[0] * (width - len(row.tokens))]


def take_step(decoder: Decoder, strategy: Strategy, inputs_BC: Tensor, cache: RaggedCache) -> list[Tensor]:
    """What a call says (`reading.look`) of rows of which the device alone knows how far they are.

    Args:
        inputs_BC: int64 (B, 4 + W), `_inputs` of each row.
        cache: all of whose slots are in sight.
    """
    held_B1, place_B1, num_known_B1, num_drafted_B1 = inputs_BC[:, :4].split(1, 1)
    tokens_BW = inputs_BC[:, 4:]
    B, W = tokens_BW.shape
    places_W = torch.arange(W, device=inputs_BC.device)
    embeddings_BWD = decoder.embed(tokens_BW, place_B1 + places_W)
    positions_BW, mask_B1WS = cache.plan_at(held_B1, W, decoder.dtype)
    hidden_BWH = decoder.call(embeddings_BWD, positions_BW, mask_B1WS, cache, drafting=strategy.num_guesses > 0)
    read_BR = (num_known_B1 - 1 + places_W).clamp(max=W - 1)
    hidden_BRH = hidden_BWH[torch.arange(B, device=inputs_BC.device)[:, None], read_BR]
    draft_BJ = tokens_BW.gather(1, read_BR)[:, 1:]
    draft_BJ = torch.where(places_W[:-1] < num_drafted_B1, draft_BJ, -1)
    return look(decoder, strategy, hidden_BRH, draft_BJ)
