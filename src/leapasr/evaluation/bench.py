"""How long systems take for the same audio, side by side: leapasr, transformers' `generate`, faster-whisper.

Every system does the whole job, from samples to text, and takes its turn in each round, after one that does not count.
What the figures mean: `BenchRow`.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leapasr.audio import SAMPLE_RATE, AudioError
from leapasr.data.manifests import read_manifest
from leapasr.decoding import Decoder
from leapasr.decoding.graphs import WAIT
from leapasr.evaluation.evaluate import reference_of, samples_of
from leapasr.evaluation.scoring import count_errors
from leapasr.evaluation.systems import AUTOREGRESSIVE, GENERATE, GreedyCTC, Leapasr, Run, System
from leapasr.running import timed
from leapasr.text import NORMALIZER
from leapasr.transcriber import Transcriber
from leapasr.workers import num_workers, share_out


@dataclass(frozen=True)
class BenchRow:
    """Figures of one system at one batch size; seconds are medians over rounds, for all utterances.

    Attributes:
        system, drafts, batch_size, device, dtype, num_threads: what ran and how.
        num_utterances, audio_seconds: what it ran on.
        encoder_seconds: features and encoder; decoder_seconds: the decoder and all around it. None of faster-whisper.
        seconds, seconds_low, seconds_high: samples to text; median and range.
        overhead: share of `decoder_seconds` spent outside the decoder's own forward passes and its heads, from a run
            that is not among the timed ones; None of others than leapasr. Captured steps (`leapasr.decoding.graphs`)
            are inside as a whole, what goes to the GPU and comes back included.
        rtfx: audio seconds ÷ `seconds`.
        decoder_calls: summed over rows. tokens_per_call: emitted tokens, end-of-text included, ÷ calls.
        wer: word error rate, a fraction of one.
        speedup_vs_generate, speedup_vs_autoregressive: of `decoder_seconds`, theirs ÷ this one's, same batch size; if
            `generate` was timed in two dtypes, of the quicker one.
        total_speedup_vs_generate: of `seconds`.
        same_tokens_as_generate: share of utterances with the same tokens as `generate` on the decoder as it is.
        peak_memory_mb: of the process on a CPU, of torch on a GPU; None where it cannot be told.
    """

    system: str
    drafts: str | None
    batch_size: int
    device: str
    dtype: str
    num_threads: int
    num_utterances: int
    audio_seconds: float
    encoder_seconds: float | None
    decoder_seconds: float | None
    seconds: float
    seconds_low: float
    seconds_high: float
    overhead: float | None
    rtfx: float
    decoder_calls: int | None
    tokens_per_call: float | None
    wer: float
    speedup_vs_generate: float | None
    speedup_vs_autoregressive: float | None
    total_speedup_vs_generate: float | None
    same_tokens_as_generate: float | None
    peak_memory_mb: float | None

    @property
    def label(self) -> str:
        """``leapasr/verify both``"""
        return f"{self.system} {self.drafts}" if self.drafts else self.system


@dataclass
class _Entry:
    """One system at one batch size, round by round."""

    runs: list[Run] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    overhead: float | None = None
    peak_memory_mb: float | None = None


@dataclass(frozen=True)
class Utterances:
    """What is timed: 16 kHz samples of each utterance, what is said in it; and a message for each that was left out."""

    samples: list[np.ndarray]
    references: list[str]
    problems: list[str]


def read_utterances(manifests: Sequence[Path], *, use: str | None = None, limit: int | None = None) -> Utterances:
    """All utterances of `manifests` with this `use`, `limit` of each.

    Raises:
        ValueError: a manifest has none.
    """
    found = Utterances([], [], [])
    for path in manifests:
        manifest = read_manifest(path, use=use, limit=limit)
        found.problems.extend(f"{path}: {problem}" for problem in manifest.problems)
        for cut in manifest.cuts:
            try:
                found.samples.append(samples_of(cut))
            except AudioError as error:
                found.problems.append(f"{path}: {error}")
            else:
                found.references.append(reference_of(cut))
    if not found.samples:
        raise ValueError(f"no utterance has audio that can be read: {'; '.join(found.problems[:3])}")
    return found


def sizes_of(text: str) -> list[int]:
    """Batch sizes from ``1,8,32``, rising.

    Raises:
        ValueError: it is no list of numbers from 1 on.
    """
    try:
        sizes = sorted({int(size) for size in text.split(",")})
    except ValueError:
        sizes = [0]
    if sizes[0] < 1:
        raise ValueError(f"batch sizes are whole numbers from 1 on, by commas, such as 1,8,32; got {text!r}")
    return sizes


def folders_of(peers: Sequence[str]) -> dict[str, str]:
    """Folders by name from ``NAME=FOLDER``.

    Raises:
        ValueError: one is of another form.
    """
    for peer in peers:
        if "=" not in peer.strip("="):
            raise ValueError(f"a peer is NAME=FOLDER, such as tiny.en=whisper-tiny.en-ct2; got {peer!r}")
    return dict(peer.split("=", 1) for peer in peers)  # type: ignore[misc]


def num_uncounted(decoder: Decoder) -> int:
    """Rounds after which nothing is made for the first time: steps are captured when they are needed time and again."""
    return 1 if decoder.graphs is None else WAIT + 1


def bench(
    transcriber: Transcriber,
    systems: Sequence[System],
    utterances: Utterances,
    *,
    batch_sizes: Sequence[int],
    rounds: int,
    progress: Callable[[float], None] | None = None,
) -> list[BenchRow]:
    """Time `systems` side by side: a row for each batch size and system.

    Args:
        transcriber: what those of `systems` that are ours run on.
        systems: `generate` among them (`build_systems`).
        rounds: turns of each system that count; `num_uncounted` go before them.
        progress: called with 1 after each turn of each system, `num_turns` times.

    Raises:
        ValueError: a number is less than 1.
    """
    if rounds < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"rounds and batch sizes must be at least 1, got {rounds} and {list(batch_sizes)}")
    for number in {num_workers(transcriber.model.device, min(size, len(utterances.samples))) for size in batch_sizes}:
        # costs on so many cores as each worker has are measured now, so that no turn is longer for it
        list(share_out(lambda jobs: (transcriber.costs for _ in jobs), range(number), number))
    entries: dict[tuple[int, int], _Entry] = {}
    uncounted = num_uncounted(transcriber.decoder)
    for turn in range(uncounted + rounds):
        for batch_size in batch_sizes:
            for index, system in enumerate(systems):
                if batch_size > 1 and not system.batched:
                    continue
                entry = entries.setdefault((batch_size, index), _Entry())
                if turn >= uncounted:
                    with timed(transcriber.model.device) as timer:
                        entry.runs.append(system.run(utterances.samples, batch_size))
                    entry.seconds.append(timer.seconds)
                else:
                    _observe(entry, system, transcriber, utterances.samples, batch_size)
                if progress and turn + 1 >= uncounted:
                    progress(1)
    return _rows(transcriber, systems, entries, utterances)


def num_turns(systems: Sequence[System], batch_sizes: Sequence[int], rounds: int) -> int:
    """How often `bench` calls its progress."""
    return (rounds + 1) * sum(system.batched or size == 1 for system in systems for size in batch_sizes)


def _observe(
    entry: _Entry, system: System, transcriber: Transcriber, samples: Sequence[np.ndarray], batch_size: int
) -> None:
    """A turn that does not count: kernels are built, and memory and the forward passes' share are measured."""
    with _peak_memory(transcriber.model.device, system.process) as peak, _forward_seconds(transcriber) as forward:
        run = system.run(samples, batch_size)
    entry.peak_memory_mb = peak()
    if isinstance(system, Leapasr) and run.decoder_seconds:
        number = num_workers(transcriber.model.device, min(batch_size, len(samples)))  # each has its own time
        entry.overhead = 1 - sum(forward) / number / run.decoder_seconds


@contextmanager
def _forward_seconds(transcriber: Transcriber) -> Iterator[list[float]]:
    """Seconds of each forward pass of the decoder, and of each evaluation of heads; of captured steps, both in one."""
    seconds: list[float] = []
    decoder: Any = transcriber.decoder
    under_way = threading.local()  # a captured step asks for forward passes itself, and may not be waited for then

    def watched(function: Callable) -> Callable:
        def run(*args: Any, **given: Any) -> Any:
            if getattr(under_way, "is_timed", False):
                return function(*args, **given)
            under_way.is_timed = True
            try:
                with timed(decoder.device) as timer:
                    result = function(*args, **given)
            finally:
                under_way.is_timed = False
            seconds.append(timer.seconds)
            return result

        return run

    parts = [(decoder, name) for name in ("call", "logits", "draft_logits_each")]
    if decoder.graphs is not None:
        parts.append((decoder.graphs, "run"))
    for part, name in parts:
        setattr(part, name, watched(getattr(part, name)))
    try:
        yield seconds
    finally:
        for part, name in parts:
            delattr(part, name)


@contextmanager
def _peak_memory(device: torch.device, process: int | str) -> Iterator[Callable[[], float | None]]:
    """A function that gives the most memory, in MB, that a process of this id has taken since."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) / 1e6
        return
    try:
        Path(f"/proc/{process}/clear_refs").write_text("5")  # the peak is now what is taken now
    except OSError:
        yield lambda: None
        return
    yield lambda: peak_resident_mb(process)


def peak_resident_mb(process: int | str = "self") -> float | None:
    """The most memory, in MB, that a process of this id has taken on Linux; None where it is not told, or has ended."""
    status = Path(f"/proc/{process}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024 / 1e6 if "VmHWM" in fields else None


def _rows(
    transcriber: Transcriber,
    systems: Sequence[System],
    entries: dict[tuple[int, int], _Entry],
    utterances: Utterances,
) -> list[BenchRow]:
    audio_seconds = sum(map(len, utterances.samples)) / SAMPLE_RATE
    named = {(size, systems[index].name): entry for (size, index), entry in entries.items()}
    rows = []
    for (size, index), entry in entries.items():
        run, system = entry.runs[-1], systems[index]
        seconds = statistics.median(entry.seconds)
        exact, autoregressive = named[size, GENERATE], named.get((size, AUTOREGRESSIVE))
        generated = min(
            (each for (of, name), each in named.items() if of == size and name.startswith(GENERATE)),
            key=lambda each: _median(each, "decoder_seconds") or math.nan,
        )
        num_tokens = None if run.tokens is None else sum(map(len, run.tokens)) + len(run.tokens)
        same = None
        if run.tokens is not None:
            theirs = exact.runs[-1].tokens
            assert theirs is not None
            same = sum(a == b for a, b in zip(run.tokens, theirs, strict=True)) / len(theirs)
        is_decoder = run.decoder_seconds is not None and not isinstance(system, GreedyCTC)
        rows.append(
            BenchRow(
                system=system.name,
                drafts=system.drafts,
                batch_size=size,
                device=str(transcriber.model.device),
                dtype="int8" if run.tokens is None else transcriber.dtype,
                num_threads=torch.get_num_threads(),
                num_utterances=len(utterances.samples),
                audio_seconds=audio_seconds,
                encoder_seconds=_median(entry, "encoder_seconds"),
                decoder_seconds=_median(entry, "decoder_seconds"),
                seconds=seconds,
                seconds_low=min(entry.seconds),
                seconds_high=max(entry.seconds),
                overhead=entry.overhead,
                rtfx=audio_seconds / seconds,
                decoder_calls=run.num_calls,
                tokens_per_call=num_tokens / run.num_calls if num_tokens and run.num_calls else None,
                wer=count_errors(utterances.references, run.texts, NORMALIZER).rate,
                speedup_vs_generate=_ratio(generated, entry) if is_decoder else None,
                speedup_vs_autoregressive=_ratio(autoregressive, entry) if is_decoder and autoregressive else None,
                total_speedup_vs_generate=statistics.median(generated.seconds) / seconds,
                same_tokens_as_generate=same,
                peak_memory_mb=entry.peak_memory_mb,
            )
        )
    return rows


def _median(entry: _Entry, name: str) -> float | None:
    values = [getattr(run, name) for run in entry.runs]
    return None if values[0] is None else statistics.median(values)


def _ratio(other: _Entry, entry: _Entry) -> float | None:
    mine = _median(entry, "decoder_seconds")
    return (_median(other, "decoder_seconds") or math.nan) / mine if mine else None
