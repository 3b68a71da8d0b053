"""Steps that are captured and launched as one say what the same operations say one by one; and all of it on a device.

The device is a pretended one (`pretend_device`): a launch does the recorded operations again, on the same memory.
"""

import copy
import gc
import importlib.resources
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_decoding import (
    AUTOREGRESSIVE,
    HEAD_TYPES,
    MAX_TOKENS,
    VERIFY,
    V,
    course,
    make_prompts,
    outcome,
    scripted,
    take,
)
from test_replay import SMALL, TEXTS

import leapasr
from leapasr.decoding import DecodingLoop, DecodingOptions, SpeechLlamaDecoder, build_loop, decode
from leapasr.decoding import costs as costs_module
from leapasr.decoding import graphs as graphs_module
from leapasr.decoding.cache import RaggedCache
from leapasr.decoding.costs import can_capture, fastest_ways, find_ways, measure_costs
from leapasr.decoding.graphs import CaptureError, Fed, Graphs, as_it_is, rounded_up
from leapasr.decoding.interface import Ways
from leapasr.decoding.reference import decode_reference
from leapasr.decoding.strategies import Verification
from leapasr.evaluation import replay as replays
from leapasr.running import timed

pretend = pytest.importorskip("pretend_device", reason="this torch lets no device be pretended", exc_type=ImportError)

STRATEGIES = {
    "autoregressive": AUTOREGRESSIVE,
    "verify": VERIFY,
    "verify heads": replace(VERIFY, drafts="mtp"),
    "threshold": DecodingOptions(strategy="threshold", threshold=0.02, max_repeats=4),
    "relaxed": DecodingOptions(strategy="relaxed", ratio=0.2, top=3, max_repeats=4),
}
NUM_ROWS = 5


@pytest.fixture(autouse=True)
def few_slots(monkeypatch):
    monkeypatch.setattr(graphs_module, "SLOTS", 16)


@pytest.fixture
def on_device(build_tiny_model):
    """Builds a decoder on the device."""

    def build(**fields) -> SpeechLlamaDecoder:
        return SpeechLlamaDecoder(copy.deepcopy(build_tiny_model(**fields)).to(pretend.NAME))

    return build


@pytest.fixture
def plain(build_tiny_model) -> SpeechLlamaDecoder:
    """The same decoder on the CPU."""
    return SpeechLlamaDecoder(build_tiny_model())


def autoregressive(decoder, prompts):
    """What each row is to become."""
    bounds = [MAX_TOKENS] * len(prompts.lengths_B)
    return decode_reference(decoder, prompts, AUTOREGRESSIVE, max_tokens=bounds)


def captured(decoder) -> Graphs:
    """Steps that are captured as soon as they are needed."""
    return Graphs(decoder, lambda: pretend.record, wait=0)


class Captures:
    """`pretend.record`, which is counted."""

    def __init__(self):
        self.number = 0

    def __call__(self, function):
        self.number += 1
        return pretend.record(function)


def moved(prompts):
    return replace(
        prompts, **{name: value.to(pretend.NAME) for name, value in vars(prompts).items() if value is not None}
    )


def run(decoder, prompts, options, references, *, kind="mixed"):
    drafters = scripted(references, kind, 6) if options.strategy in ("verify", "relaxed") else None
    return decode(decoder, prompts, options, max_tokens=[MAX_TOKENS] * len(references), drafters=drafters)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("fields", [{"head_type": kind} for kind in HEAD_TYPES] + [{"draft_layers": 1}], ids=str)
def test_captured_steps_say_what_operations_say_one_by_one(build_tiny_model, on_device, name, fields):
    prompts, options = make_prompts(NUM_ROWS), STRATEGIES[name]
    plain = SpeechLlamaDecoder(build_tiny_model(**fields))
    references = autoregressive(plain, prompts)
    expected = run(plain, prompts, options, references)
    decoder = on_device(**fields)
    for graphs in (None, Graphs(decoder, lambda: as_it_is, wait=0), captured(decoder)):
        decoder.graphs = graphs
        for _ in range(2):  # the second time with what was captured the first
            results = run(decoder, moved(prompts), options, references)
            assert list(map(course, results)) == list(map(course, expected))
            for result, other in zip(results, expected, strict=True):
                assert result.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-4, nan_ok=True)


def test_what_was_captured_is_used_again(on_device, plain):
    decoder, prompts = on_device(), make_prompts(NUM_ROWS)
    references = autoregressive(plain, prompts)
    captures = Captures()
    decoder.graphs = Graphs(decoder, lambda: captures, wait=0)
    run(decoder, moved(prompts), AUTOREGRESSIVE, references)
    num_calls = max(result.num_calls for result in references)
    assert 0 < captures.number < num_calls - 1  # the prefill is not captured
    first = captures.number
    run(decoder, moved(prompts), AUTOREGRESSIVE, references)
    assert captures.number == first
    run(decoder, moved(prompts), replace(AUTOREGRESSIVE, max_repeats=3), references)  # an equal strategy
    assert captures.number == first
    run(decoder, moved(prompts), VERIFY, references)
    assert captures.number > first


def test_what_was_captured_is_let_go_with_a_room_that_is_too_small(on_device, plain):
    decoder, prompts = on_device(), make_prompts(NUM_ROWS)
    references = autoregressive(plain, prompts)
    decoder.graphs = captured(decoder)
    for rows in ([0], range(NUM_ROWS), [1]):
        results = run(decoder, moved(take(prompts, rows)), AUTOREGRESSIVE, [references[row] for row in rows])
        assert list(map(outcome, results)) == [outcome(references[row]) for row in rows]


def test_strategies_that_judge_otherwise_have_steps_of_their_own(on_device, plain):
    decoder, prompts = on_device(), make_prompts(NUM_ROWS)
    references = autoregressive(plain, prompts)
    decoder.graphs, found = captured(decoder), []
    for ratio in (0.0, 1.0):
        options = DecodingOptions(strategy="relaxed", ratio=ratio, top=V, max_repeats=4)
        expected = run(plain, prompts, options, references)
        found.append(list(map(course, run(decoder, moved(prompts), options, references))))
        assert found[-1] == list(map(course, expected))
    assert found[0] != found[1]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_captured_step_goes_to_the_device_once_and_back_once(on_device, plain, name):
    decoder, prompts = on_device(), make_prompts(1)
    references = autoregressive(plain, prompts)
    decoder.graphs = captured(decoder)
    run(decoder, moved(prompts), STRATEGIES[name], references)
    loop = build_loop(decoder, STRATEGIES[name])
    drafters = scripted(references, "mixed", 6) if STRATEGIES[name].strategy in ("verify", "relaxed") else None
    loop.add(moved(prompts), max_tokens=[MAX_TOKENS], drafters=drafters)
    loop.step()
    num_steps = 0
    while loop:
        pretend.transfers.clear()
        loop.step()
        num_steps += 1
        assert len(pretend.transfers) == 2, pretend.transfers
    assert num_steps >= 3


def test_rows_join_and_leave(on_device, build_tiny_model):
    """What lies in the room moves when rows join, and closes up when they leave."""
    plain, decoder, prompts = SpeechLlamaDecoder(build_tiny_model()), on_device(), make_prompts(12)
    bounds = [MAX_TOKENS - 2 * row for row in range(12)]
    references = decode_reference(plain, prompts, AUTOREGRESSIVE, max_tokens=bounds)
    decoder.graphs = captured(decoder)
    loop, results = DecodingLoop(decoder, VERIFY), {}
    launched, run_captured = [], decoder.graphs.run
    decoder.graphs.run = lambda *given: launched.append(run_captured(*given)) or launched[-1]
    for first, last in ((0, 2), (2, 7), (7, 8), (8, 12)):
        rows = range(first, last)
        loop.add(
            moved(take(prompts, rows)),
            max_tokens=[bounds[row] for row in rows],
            drafters=scripted([references[row] for row in rows], "mixed"),
        )
        for _ in range(4):
            results |= loop.step()
    loop.drop([3])
    while loop:
        results |= loop.step()
    assert results.keys() >= set(range(12)) - {3}
    for key, result in results.items():
        assert outcome(result) == outcome(references[key])
    assert {len(each) for each in launched} > {1, 2, 7}


def test_the_room_is_one_loops_until_it_ends(on_device, plain):
    decoder, prompts = on_device(), make_prompts(6)
    references = autoregressive(plain, prompts)
    captures = Captures()
    decoder.graphs = Graphs(decoder, lambda: captures, wait=0)
    loops, results = [DecodingLoop(decoder, AUTOREGRESSIVE) for _ in range(2)], [{}, {}]
    for loop, rows in zip(loops, (range(3), range(3, 6)), strict=True):
        loop.add(moved(take(prompts, rows)), max_tokens=[MAX_TOKENS] * 3)
    while any(loops):
        for loop, found in zip(loops, results, strict=True):
            if loop:
                found |= loop.step()
    for found, expected in zip(results, (references[:3], references[3:]), strict=True):
        assert [outcome(found[key]) for key in range(3)] == list(map(outcome, expected))
    assert captures.number < sum(result.num_calls for result in references[:3])


def test_a_loop_without_room_makes_its_steps_without(on_device):
    decoder = on_device()
    decoder.graphs = captured(decoder)
    caches = [costs_module._held(decoder, 1) for _ in range(2)]
    strategy, fed = Verification(num_guesses=0), [Fed(costs_module.SLOTS, 5, 1, [7])]
    assert decoder.graphs.run(strategy, fed, caches[0]) is not None
    assert decoder.graphs.run(strategy, fed, caches[1]) is None
    del caches[0]
    assert decoder.graphs.run(strategy, fed, caches[0]) is not None
    del caches
    assert decoder.graphs._holder() is None


def test_a_step_is_captured_when_it_has_been_needed_before(on_device, monkeypatch):
    decoder, captures = on_device(), Captures()
    graphs = Graphs(decoder, lambda: captures)
    cache = costs_module._held(decoder, 1)

    def step(width):
        fed = [Fed(costs_module.SLOTS, 5, 1, [7] * width)]
        return graphs.run(Verification(num_guesses=0), fed, cache) is not None, captures.number

    assert [step(1) for _ in range(4)] == [(False, 0), (False, 0), (True, 1), (True, 1)]
    assert [step(4) for _ in range(3)] == [(False, 1), (False, 1), (True, 2)]
    monkeypatch.setattr(graphs_module, "MOST_STEPS", 2)
    assert [step(2) for _ in range(4)] == [(False, 2)] * 4
    assert step(4) == (True, 2)


def test_a_capture_that_fails_is_the_last_and_loses_nothing(on_device, plain):
    decoder, prompts = on_device(), make_prompts(NUM_ROWS)
    references = autoregressive(plain, prompts)
    num_captured = 0

    def some(function):
        nonlocal num_captured
        num_captured += 1
        if num_captured == 3:
            raise CaptureError("out of memory")
        return pretend.record(function)

    decoder.graphs = Graphs(decoder, lambda: some, wait=0)
    with pytest.warns(UserWarning, match="cannot be captured as CUDA graphs here.*: out of memory$") as warned:
        results = run(decoder, moved(prompts), VERIFY, references)
    assert list(map(outcome, results)) == list(map(outcome, references))
    assert (num_captured, len(warned)) == (3, 1)
    assert list(map(outcome, run(decoder, moved(prompts), VERIFY, references))) == list(map(outcome, references))
    assert num_captured == 3


def test_a_decoder_is_let_go_with_its_graphs(on_device):
    decoder = on_device()
    decoder.graphs = captured(decoder)
    costs_module._steps(decoder, decoder.graphs, costs_module._held(decoder, 1), 3)
    seen = weakref.ref(decoder)
    gc.disable()
    try:
        del decoder
        assert seen() is None
    finally:
        gc.enable()


def test_nothing_of_an_earlier_row_is_in_sight():
    """Not even what cannot be masked: 0 · NaN."""
    room = [(torch.full((2, 1, 8, 4), torch.nan), torch.full((2, 1, 8, 4), torch.nan))]
    cache = RaggedCache(1)
    cache.plan(3, torch.float32)
    cache.update(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), 0)
    cache.commit([3])
    cache.settle(room, 1)
    for states in (*room[0], cache.layers[0].keys):
        assert states[0, 0].sum(-1).tolist() == [4.0] * 3 + [0.0] * 5
    assert cache.layers[0].keys.data_ptr() == room[0][0].data_ptr()
    room[0][0][0, 0, 5] = 7.0  # of a draft
    cache.settle(room, 1)  # is not moved again
    assert room[0][0][0, 0, 5].tolist() == [7.0] * 4


def test_layers_that_hold_a_memory_alone_settle_as_well():
    room = [(torch.zeros(1, 1, 200, 4), torch.zeros(1, 1, 200, 4)) for _ in range(2)]
    cache = RaggedCache(1)
    for width, layers in ((10, (0, 1)), (100, (0,))):  # the text is read by the first layer alone
        cache.plan(width, torch.float32)
        for layer in layers:
            cache.update(torch.ones(1, 1, width, 4), torch.ones(1, 1, width, 4), layer)
        cache.commit([width])
    assert cache.layers[1].keys.shape[2] < 110
    cache.settle(room, 1)
    assert [int(keys.sum()) for keys, _ in room] == [4 * 110, 4 * 10]


class FakeCuda:
    """What `CudaGraphs` asks of torch.cuda, in the order in which it does."""

    def __init__(self, failing=()):
        self.said, self.failing = [], failing

    def within(self, name):
        @contextmanager
        def manager(*args, **given):
            self.said.append((f"begin {name}", given))
            try:
                yield
            finally:
                self.said.append((f"end {name}", {}))
                if f"end {name}" in self.failing:
                    raise RuntimeError(f"{name} has ended because of an earlier error")

        return manager

    def as_module(self):
        stream = SimpleNamespace(wait_stream=lambda other: self.said.append(("wait", {})))
        return SimpleNamespace(
            device=self.within("device"),
            stream=self.within("stream"),
            graph=self.within("graph"),
            Stream=lambda: stream,
            current_stream=lambda: stream,
            graph_pool_handle=object,
            CUDAGraph=lambda: SimpleNamespace(replay="replay"),
        )


def test_cuda_captures_on_a_stream_of_its_own_after_a_warm_up(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake.as_module())
    graphs = graphs_module.CudaGraphs(torch.device("cuda:1"))
    fake.said.clear()

    def function():
        assert graphs_module._capturing.locked()
        fake.said.append(("function", {}))
        return 7

    launch, result = graphs(function)
    assert (launch, result) == ("replay", 7)
    assert [name for name, _ in fake.said] == [
        "begin device", "wait", "begin stream", *["function"] * graphs_module.WARM_UP,
        "begin graph", "function", "end graph", "end stream", "wait", "end device",
    ]  # fmt: skip
    given = dict(fake.said)["begin graph"]
    assert given == {"pool": graphs._memory, "stream": graphs._stream, "capture_error_mode": "thread_local"}


def test_what_ended_a_capture_is_said_and_its_stream_is_left(monkeypatch):
    fake = FakeCuda(failing=["end graph"])
    monkeypatch.setattr(torch, "cuda", fake.as_module())
    graphs, num_run = graphs_module.CudaGraphs(torch.device("cuda")), 0

    def function():
        nonlocal num_run
        num_run += 1
        if num_run > graphs_module.WARM_UP:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    fake.said.clear()
    with pytest.raises(CaptureError, match=r"^operation not permitted when stream is capturing$"):
        graphs(function)
    assert [name for name, _ in fake.said][-4:] == ["end graph", "end stream", "wait", "end device"]
    assert not graphs_module._capturing.locked()


def test_the_reason_is_the_captures_own_whatever_else_is_being_handled(monkeypatch):
    monkeypatch.setattr(torch, "cuda", FakeCuda().as_module())
    graphs = graphs_module.CudaGraphs(torch.device("cuda"))

    def function():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    try:
        raise FileNotFoundError("ways.json")
    except FileNotFoundError:
        with pytest.raises(CaptureError, match=r"^CUDA out of memory"):
            graphs(function)


def test_a_gpu_is_waited_for_by_its_stream_alone(monkeypatch):
    """All of it may not be waited for while another thread captures."""
    waited = []
    stream = SimpleNamespace(synchronize=lambda: waited.append("stream"))
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(current_stream=lambda device: stream))
    with timed(torch.device("cuda")):
        assert waited == ["stream"]
    assert waited == ["stream"] * 2


def test_each_room_has_a_capture_of_its_own(on_device):
    decoder, made = on_device(), []

    def new_capture():
        made.append(Captures())
        return made[-1]

    graphs = Graphs(decoder, new_capture, wait=0)
    for num_rows, number in ((2, 1), (1, 1), (5, 2), (3, 2), (8, 2), (9, 3)):
        assert costs_module._steps(decoder, graphs, costs_module._held(decoder, num_rows), 3) is not None
        assert len(made) == number
    assert [each.number for each in made] == [2, 2, 1]


def test_a_room_that_does_not_fit_is_done_without(on_device, plain, monkeypatch):
    decoder, prompts = on_device(), make_prompts(NUM_ROWS)
    references = autoregressive(plain, prompts)
    decoder.graphs = captured(decoder)

    def refuse(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(decoder.graphs, "_make_room", refuse)
    with pytest.warns(UserWarning, match="take longer without: out of memory"):
        results = run(decoder, moved(prompts), VERIFY, references)
    assert list(map(outcome, results)) == list(map(outcome, references))


def test_ways_are_found_anew_where_steps_can_be_captured(capturing, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(costs_module, "fastest_ways", lambda decoder: Ways(captured=decoder.may_capture))
    capturing.may_capture, spent = False, []
    assert not find_ways(capturing, "tiny", spent.append).captured
    capturing.may_capture = True
    assert find_ways(capturing, "tiny", spent.append).captured
    assert find_ways(capturing, "tiny", spent.append).captured
    assert len(spent) == 2


@pytest.mark.parametrize(
    ("width", "expected"),
    [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (8, 8), (9, 12), (13, 16), (17, 24), (33, 48)],
)
def test_widths_are_rounded_up(width, expected):
    assert rounded_up(width) == expected


# What is found out when a model is loaded.


@pytest.fixture
def as_a_gpu(monkeypatch):
    """The device can be captured."""
    monkeypatch.setattr("leapasr.decoding.causal_lm.CAPTURING", (pretend.NAME,))
    monkeypatch.setattr("leapasr.decoding.causal_lm.CudaGraphs", lambda device: pretend.record)
    monkeypatch.setattr("leapasr.decoding.causal_lm.Graphs", partial(Graphs, wait=0))


@pytest.fixture
def capturing(as_a_gpu, on_device):
    return on_device()


def test_other_devices_and_other_architectures_are_not_captured(as_a_gpu, build_tiny_model, on_device):
    assert on_device().may_capture
    assert not SpeechLlamaDecoder(build_tiny_model()).may_capture
    model = copy.deepcopy(build_tiny_model()).to(pretend.NAME)
    model.decoder.model.rotary_emb.rope_type = "dynamic"  # its turns depend on the longest position so far
    assert not SpeechLlamaDecoder(model).may_capture


@pytest.mark.parametrize("is_faster", [True, False])
def test_steps_are_captured_where_that_is_faster(capturing, monkeypatch, is_faster):
    def seconds(decoder, graphs, cache, width):
        return 1.0 if (decoder.graphs is not None) == is_faster else 2.0

    monkeypatch.setattr(costs_module, "_seconds", seconds)
    assert fastest_ways(capturing) == Ways(captured=is_faster)


def test_what_cannot_be_captured_is_not_and_a_warning_says_so(capturing, monkeypatch):
    def refuse(function):
        raise CaptureError("operation not permitted when stream is capturing")

    monkeypatch.setattr("leapasr.decoding.causal_lm.CudaGraphs", lambda device: refuse)
    with pytest.warns(
        UserWarning, match="cannot be captured as CUDA graphs here.*not permitted when stream is capturing$"
    ):
        assert not fastest_ways(capturing).captured


def test_steps_that_say_something_else_captured_are_not_used(capturing, monkeypatch):
    def stale(function):
        launch, result = pretend.record(function)
        return (lambda: None), result  # as if what the graph reads were not what the next step is about

    assert can_capture(capturing)
    monkeypatch.setattr("leapasr.decoding.causal_lm.CudaGraphs", lambda device: stale)
    assert not can_capture(capturing)


def test_costs_are_those_of_captured_steps(capturing, monkeypatch):
    capturing.prepare(Ways(captured=True))
    holder = costs_module._held(capturing, 1)  # of a loop that is under way, and keeps the decoder's own room
    assert costs_module._steps(capturing, capturing.graphs, holder, 1) is not None
    ran, run_captured = [], Graphs.run

    def note(self, strategy, rows, cache):
        ran.append(rows)
        said = run_captured(self, strategy, rows, cache)
        assert said is not None
        return said

    monkeypatch.setattr(Graphs, "run", note)
    measure_costs(capturing)
    assert {len(rows) for rows in ran} == set(costs_module.NUM_ROWS)
    assert {len(row.tokens) for rows in ran for row in rows} == set(costs_module.WIDTHS)


# All of it on a device.


@pytest.fixture(scope="module")
def samples(babble):
    return [babble(seconds, seed) for seed, seconds in enumerate((1.5, 0.7, 2.2))]


@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize("name", [*STRATEGIES, "beam"])
def test_audio_to_text_on_a_device(as_a_gpu, tiny_model_folder, samples, name, is_captured, monkeypatch):
    options = STRATEGIES.get(name, DecodingOptions(strategy="beam", beam_size=3, max_repeats=4))
    expected = leapasr.load(tiny_model_folder, device="cpu", dtype="float32").transcribe(samples, options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transcriber = leapasr.load(tiny_model_folder, device=pretend.NAME, dtype="float32")
        ways = Ways(captured=is_captured)
        monkeypatch.setattr("leapasr.transcriber.find_ways", lambda decoder, *_: decoder.prepare(ways))
        monkeypatch.setattr("leapasr.transcriber.find_costs", lambda *_: costs_module.FREE)
        results = transcriber.transcribe(samples, options, word_times=True)
    assert [result.text for result in results] == [other.text for other in expected]
    assert np.mean([len(result.text) for result in results]) > 0


def test_the_shipped_model_on_a_device(as_a_gpu, monkeypatch):
    sample = importlib.resources.files("leapasr") / "samples" / "austen-0930.flac"
    expected = leapasr.load(device="cpu", dtype="float32").transcribe(str(sample))
    monkeypatch.setattr("leapasr.transcriber.find_ways", lambda decoder, *_: decoder.prepare(Ways(captured=True)))
    monkeypatch.setattr("leapasr.transcriber.find_costs", lambda *_: costs_module.FREE)
    result = leapasr.load(device=pretend.NAME, dtype="float32").transcribe(str(sample))
    assert result.text == expected.text
    assert 1 < result.decoder_calls < result.num_tokens / 3
    sure, also_sure = ([each.log_probability for each in of.segments[0].trace] for of in (result, expected))
    assert sure == pytest.approx(also_sure, abs=1e-3)


def test_a_replay_runs_captured_and_not(as_a_gpu, monkeypatch):
    """And captures nothing in rounds that count."""
    monkeypatch.setitem(replays.SIZES, "small", SMALL)
    captures, during = Captures(), []
    monkeypatch.setattr("leapasr.decoding.causal_lm.CudaGraphs", lambda device: captures)
    monkeypatch.setattr("leapasr.decoding.causal_lm.Graphs", Graphs)
    rows = replays.replay(
        TEXTS, size="small", batch_sizes=[1, 2], rounds=2, device=pretend.NAME,
        progress=lambda share: during.append(captures.number),
    )  # fmt: skip
    names = ["verify both full", "autoregressive"]
    expected = [*names, *(f"{name}, not captured" for name in names), "generate"]
    assert [row.system for row in rows[:5]] == [f"replay/{name}" for name in expected]
    assert rows[0].decoder_calls == rows[2].decoder_calls == sum(len(text.steps) for text in TEXTS)
    assert [row.speedup_vs_autoregressive for row in rows if "autoregressive" in row.system] == [1.0] * 4
    num_counted = 2 * 2 * len(expected)
    assert len(during) == num_counted + (graphs_module.WAIT + 1) * 2 * len(expected)
    assert during[0] < during[-num_counted] == during[-1]


def test_the_device_is_as_strict_as_a_gpu():
    there, here = torch.ones(3, device=pretend.NAME), torch.ones(3)
    with pytest.raises(RuntimeError, match="two devices"):
        there + here
    with pytest.raises(TypeError, match="none of NumPy's"):
        there.numpy()
    for asking in (
        lambda: there[there > 0],
        lambda: there.sum() * there.cpu().sum(),
        lambda: there * here.to(pretend.NAME),
    ):
        with pytest.raises(RuntimeError, match="while operations are recorded"):
            pretend.record(asking)
