"""What recorded drafts would take with a decoder of another size: its weights are random, its calls are real.

A trace says how many tokens each decoder call of an utterance verified, and how many came of it. A replay runs the
same loop on a decoder that takes as long as a real one of its size, and steers what it says so that every call verifies
and emits what the trace says. It shows the wall-clock that measured drafts give at sizes that were not trained; it is
no measurement of a model, and every figure is to be called a replay.

A token of a replayed text is the number of tokens that are still to come, the last one is 0, end-of-text: so what
comes next follows from the token before, in whatever row it stands. Its embedding carries it in its first dimension,
past the decoder, to the logits.

Shapes: B rows, L prompt positions, W step width, D width, V vocabulary.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from leapasr.chunks import by_length
from leapasr.decoding import DecodingOptions, DecodingResult, Prompts
from leapasr.decoding.batch import build_loop
from leapasr.decoding.causal_lm import CausalLMDecoder
from leapasr.decoding.costs import FREE, can_capture
from leapasr.decoding.drafts import Drafter, MTPDrafter
from leapasr.decoding.interface import Ways
from leapasr.decoding.rewriting import Verdict
from leapasr.decoding.trace import DraftToken
from leapasr.evaluation.bench import Utterances, num_uncounted
from leapasr.evaluation.peers import left_padded
from leapasr.model.mtp_heads import LatentHeads, MTPHeads
from leapasr.running import timed
from leapasr.transcriber import AUTO, MIXED, Transcriber, device_of, dtype_of

PROMPT_RATE = 12.5  # speech embeddings a second
NUM_HEADS = 8
END, WRONG = 0, 300  # a token that is not the one to come is this much larger
MOST_TOKENS = 256  # whole numbers up to this are exact in bfloat16
BANDWIDTH_BYTES = 2**29
UNCAPTURED = ", not captured"
RECORDED = {
    "verify mtp": DecodingOptions(strategy="verify", drafts="mtp"),
    "verify both full": DecodingOptions(strategy="verify", draft_length="full"),
}
SIZES = {
    "125m": LlamaConfig(vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                        num_attention_heads=12),
    "1b": LlamaConfig(vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                      num_attention_heads=32, num_key_value_heads=8),
    "8b": LlamaConfig(vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
                      num_attention_heads=32, num_key_value_heads=8),
}  # fmt: skip


@dataclass(frozen=True)
class RecordedText:
    """How an utterance was decoded: for each call, the tokens that it verified and those that it emitted."""

    strategy: str
    seconds: float
    steps: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        """End-of-text included."""
        return sum(emitted for _, emitted in self.steps)


@dataclass
class _Recorder:
    """A `Drafter` that notes how much of another one's proposals was verified."""

    inner: Drafter
    num_verified: list[int] = field(default_factory=list)

    def propose(self, emitted: Sequence[int], guesses: Sequence[DraftToken]) -> Sequence[DraftToken]:
        return self.inner.propose(emitted, guesses)

    def review(self, verdicts: Sequence[Verdict], num_accepted: int, further: Sequence[DraftToken]) -> None:
        self.num_verified.append(len(verdicts))
        self.inner.review(verdicts, num_accepted, further)

    def copy(self) -> Drafter:
        raise NotImplementedError("beams are not recorded")


def record(
    transcriber: Transcriber,
    utterances: Utterances,
    strategies: Mapping[str, DecodingOptions] = RECORDED,
    *,
    batch_size: int = 8,
) -> list[RecordedText]:
    """Decode utterances with each of `strategies`, which verify; those that a guard cut short are left out."""
    recorded = []
    end_token = min(transcriber.decoder.end_tokens)
    for chunks in by_length(transcriber.cut(enumerate(utterances.samples)), batch_size):
        batch = transcriber.encode(chunks)
        for name, options in strategies.items():
            drafters = transcriber.drafters(batch, options) or [MTPDrafter(end_token=end_token) for _ in chunks]
            recorders = [_Recorder(drafter) for drafter in drafters]
            loop = build_loop(transcriber.decoder, options, rules=transcriber.rules)
            keys = loop.add(batch.prompts, max_tokens=batch.max_tokens, drafters=recorders)
            results: dict[int, DecodingResult] = {}
            while loop:
                results |= loop.step()
            for key, recorder, chunk in zip(keys, recorders, chunks, strict=True):
                if results[key].truncated is None:
                    emitted = Counter(token.step for token in results[key].trace)
                    steps = tuple((verified, emitted[step]) for step, verified in enumerate(recorder.num_verified))
                    recorded.append(RecordedText(name, chunk.seconds, steps))
    return recorded


def write_trace(texts: Sequence[RecordedText], path: Path) -> None:
    """Write a JSON line a text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(text)) + "\n" for text in texts))


def read_trace(path: Path) -> list[RecordedText]:
    """What `write_trace` wrote.

    Raises:
        ValueError: the file is another one, or a text is longer than can be replayed. OSError: it cannot be read.
    """
    texts = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            fields = json.loads(line)
            steps = tuple((int(verified), int(emitted)) for verified, emitted in fields["steps"])
            text = RecordedText(str(fields["strategy"]), float(fields["seconds"]), steps)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no trace of `leapasr bench --trace` ({error})") from error
        if not steps or any(verified < 0 or not 1 <= emitted <= verified + 1 for verified, emitted in steps):
            raise ValueError(
                f"{path}, line {number}: each call emits one token at least, and one more than it verifies"
            )
        if text.num_tokens > MOST_TOKENS:
            raise ValueError(f"{path}, line {number}: {text.num_tokens} tokens, and {MOST_TOKENS} can be replayed")
        texts.append(text)
    if not texts:
        raise ValueError(f"{path} holds no text")
    return texts


class ReplayDecoder(CausalLMDecoder):
    """A decoder of random weights whose head 1 counts down: behind token n it writes n − 1."""

    def __init__(self, causal_lm: PreTrainedModel, mtp_heads: MTPHeads | None):
        super().__init__(causal_lm, mtp_heads)
        self.causal_lm: Any = causal_lm

    def embed(self, tokens_BW: Tensor, places_BW: Tensor) -> Tensor:
        embeddings_BWD = super().embed(tokens_BW, places_BW).clone()
        embeddings_BWD[..., 0] = tokens_BW
        return embeddings_BWD

    def call(self, embeddings_BWD: Tensor, *args: Any, **given: Any) -> Tensor:
        """Hidden states, and behind them the token of each place (B, W, D + 1)."""
        return torch.cat([super().call(embeddings_BWD, *args, **given), embeddings_BWD[..., :1]], -1)

    def logits(self, hidden: Tensor, *, exact: bool = True) -> Tensor:
        logits = super().logits(hidden[..., :-1], exact=exact)
        next_tokens = (hidden[..., -1:].long() - 1).clamp(min=END)
        return logits.scatter_(-1, next_tokens, torch.finfo(logits.dtype).max / 2)

    def draft_logits_each(self, asked: Sequence[tuple[Tensor, Tensor, int]], *, exact: bool = True) -> list[Tensor]:
        asked = [(hidden[..., :-1], first_tokens, num_drafts) for hidden, first_tokens, num_drafts in asked]
        return super().draft_logits_each(asked, exact=exact)


class ReplayDrafter:
    """Proposes as many tokens as the trace says, of which as many are right."""

    def __init__(self, text: RecordedText):
        self.num_tokens, self._steps = text.num_tokens, iter(text.steps)

    def propose(self, emitted: Sequence[int], guesses: Sequence[DraftToken]) -> Sequence[DraftToken]:
        verified, num_emitted = next(self._steps)
        first = self.num_tokens - len(emitted) - 1  # the next token: so many come behind it
        right = range(first, first - (num_emitted - 1), -1)
        return [*(DraftToken(token, 1.0, "ctc") for token in right),
                *[DraftToken(first + WRONG, 1.0, "ctc")] * (verified - len(right))]  # fmt: skip

    def review(self, verdicts: Sequence[Verdict], num_accepted: int, further: Sequence[DraftToken]) -> None:
        pass

    def copy(self) -> Drafter:
        raise NotImplementedError("beams are not replayed")


def build_decoder(config: LlamaConfig, *, device: torch.device, dtype: torch.dtype, seed: int = 0) -> ReplayDecoder:
    """A decoder of this size with random weights, and K latent heads."""
    torch.manual_seed(seed)
    config.pad_token_id = config.eos_token_id = END
    config.max_position_embeddings = 4096
    with device:
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        heads = LatentHeads(NUM_HEADS, config.hidden_size).to(dtype).eval()
        heads.reset_from(causal_lm.get_output_embeddings())
    return ReplayDecoder(causal_lm, heads)


def prompts_of(texts: Sequence[RecordedText], decoder: ReplayDecoder) -> Prompts:
    """Random speech embeddings, right-padded, as many as the utterances' audio would have."""
    lengths = [1 + round(text.seconds * PROMPT_RATE) for text in texts]
    width = decoder.embed_tokens.embedding_dim
    embeddings_BLD = torch.randn(len(texts), max(lengths), width, dtype=decoder.dtype, device=decoder.device)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        embeddings_BLD[row, length - 1, 0] = text.num_tokens  # begin-of-text: all are to come
    return Prompts(embeddings_BLD, torch.tensor(lengths, device=decoder.device))


@dataclass(frozen=True)
class ReplayRow:
    """A replay of one strategy: no measurement of a model, but of what recorded drafts take at a decoder's size.

    Attributes:
        size, num_parameters: of the decoder, heads 2..K aside. system: ``replay/autoregressive``, ...
        decoder_seconds, decoder_seconds_low, decoder_seconds_high: median over rounds and range, for all utterances.
        decoder_calls: summed over rows. tokens_per_call: end-of-text included.
        call_ms: milliseconds of a call of the batch, prefills included, all around it included.
        floor_ms: reading the weights, and the cache at its mean length, once, at `bandwidth` bytes a second.
        speedup_vs_generate, speedup_vs_autoregressive: their decoder seconds ÷ this one's; steps of autoregressive
            decoding are captured where this one's are.
    """

    size: str
    num_parameters: int
    system: str
    batch_size: int
    device: str
    dtype: str
    num_utterances: int
    decoder_seconds: float
    decoder_seconds_low: float
    decoder_seconds_high: float
    decoder_calls: int | None
    tokens_per_call: float | None
    call_ms: float | None
    floor_ms: float
    bandwidth: float
    speedup_vs_generate: float
    speedup_vs_autoregressive: float


def measured_bandwidth(device: torch.device) -> float:
    """Bytes a second that memory gives and takes: the quickest of a few copies."""
    data = torch.empty(BANDWIDTH_BYTES, dtype=torch.uint8, device=device).zero_()
    copy = torch.empty_like(data)
    quickest = float("inf")
    for _ in range(5):
        with timed(device) as timer:
            copy.copy_(data)
        quickest = min(quickest, timer.seconds)
    return 2 * BANDWIDTH_BYTES / quickest


@dataclass
class _System:
    """What is timed: gives calls of the batch and calls summed over rows, or None where they are not counted."""

    name: str
    run: Callable[[Sequence[RecordedText], Prompts], tuple[int, int] | None]
    texts: list[RecordedText]
    seconds: dict[int, list[float]] = field(default_factory=dict)
    calls: dict[int, tuple[int, int] | None] = field(default_factory=dict)


def _systems(decoder: ReplayDecoder, texts: Sequence[RecordedText], how: str = "") -> Iterator[_System]:
    """Each strategy of a trace, and autoregressive decoding; `how` the decoder works is added to their names."""

    def decoding(options: DecodingOptions, *, scheduled: bool) -> Callable:
        def run(texts: Sequence[RecordedText], prompts: Prompts) -> tuple[int, int]:
            loop = build_loop(decoder, options, costs=FREE)
            loop.add(prompts, drafters=[ReplayDrafter(text) for text in texts] if scheduled else None)
            num_steps = 0
            results: dict[int, DecodingResult] = {}
            while loop:
                results |= loop.step()
                num_steps += 1
            assert [len(results[key].trace) for key in sorted(results)] == [text.num_tokens for text in texts]
            return num_steps, sum(result.num_calls for result in results.values())

        return run

    by_strategy: dict[str, list[RecordedText]] = {}
    for text in texts:
        by_strategy.setdefault(text.strategy, []).append(text)
    for name, of_one in by_strategy.items():
        both = name.startswith("verify both")
        options = DecodingOptions(strategy="verify", drafts="both" if both else "mtp", max_repeats=None,
                                  draft_length="full" if both else None)  # fmt: skip
        yield _System(f"replay/{name}{how}", decoding(options, scheduled=True), of_one)
    plain = DecodingOptions(strategy="autoregressive", max_repeats=None)
    some = next(iter(by_strategy.values()))
    yield _System(f"replay/autoregressive{how}", decoding(plain, scheduled=False), some)


def _generate(decoder: ReplayDecoder, texts: Sequence[RecordedText]) -> _System:
    """transformers' own, of the texts of the first strategy."""

    def generate(texts: Sequence[RecordedText], prompts: Prompts) -> None:
        longest = max(text.num_tokens for text in texts)
        with torch.inference_mode():
            decoder.causal_lm.generate(
                **left_padded(prompts), max_new_tokens=longest, min_new_tokens=longest, do_sample=False
            )

    return _System("replay/generate", generate, [text for text in texts if text.strategy == texts[0].strategy])


def replay(
    texts: Sequence[RecordedText],
    *,
    size: str,
    batch_sizes: Sequence[int],
    rounds: int,
    device: str | None = None,
    dtype: str = "float32",
    progress: Callable[[float], None] | None = None,
) -> list[ReplayRow]:
    """Time a trace's strategies, autoregressive decoding and transformers' `generate` on a decoder of `size`.

    Where steps can be captured (`leapasr.decoding.graphs`), ours run so, and once more without.

    Args:
        size: one of `SIZES`.
        device, dtype: by their names, as in `load`.
        progress: called with the share that each turn of each system is of all.

    Raises:
        ValueError: there is no such size, device or dtype, or a number is less than 1.
    """
    if dtype in (MIXED, AUTO):
        raise ValueError(f"dtype {dtype!r} is for a model with a speech side, and a replay has none: choose another")
    if size not in SIZES:
        raise ValueError(f"decoder size {size!r}: choose one of {', '.join(SIZES)}")
    if rounds < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"rounds and batch sizes must be at least 1, got {rounds} and {list(batch_sizes)}")
    place = device_of(device)
    decoder = build_decoder(SIZES[size], device=place, dtype=dtype_of(dtype))
    decoder.prepare(Ways(packing="onednn"))
    captured = ReplayDecoder(decoder.causal_lm, decoder.mtp_heads)
    if captured.may_capture and can_capture(captured):
        systems = [*_systems(captured, texts), *_systems(decoder, texts, UNCAPTURED)]
    else:
        systems = list(_systems(decoder, texts))
    systems.append(_generate(decoder, texts))
    uncounted = num_uncounted(captured)
    turns = [(round_, batch_size, system) for round_ in range(uncounted + rounds) for batch_size in batch_sizes
             for system in systems]  # fmt: skip
    for round_, batch_size, system in turns:
        in_order = sorted(system.texts, key=lambda text: text.seconds)
        batches = [in_order[start : start + batch_size] for start in range(0, len(in_order), batch_size)]
        inputs = [(batch, prompts_of(batch, decoder)) for batch in batches]
        with timed(place) as timer:
            counted = [system.run(batch, prompts) for batch, prompts in inputs]
        if round_ >= uncounted:
            system.seconds.setdefault(batch_size, []).append(timer.seconds)
        calls = [each for each in counted if each is not None]
        system.calls[batch_size] = (sum(num for num, _ in calls), sum(num for _, num in calls)) if calls else None
        if progress:
            progress(1 / len(turns))
    return _rows(systems, decoder, size, batch_sizes)


def _rows(systems: Sequence[_System], decoder: ReplayDecoder, size: str, batch_sizes: Sequence[int]) -> list[ReplayRow]:
    bandwidth, config = measured_bandwidth(decoder.device), decoder.causal_lm.config
    weights = [*decoder.body.layers.parameters(), *decoder.lm_head.parameters()]
    num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    slot_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * decoder.dtype.itemsize
    rows = []
    for batch_size in batch_sizes:
        median = {system.name: statistics.median(system.seconds[batch_size]) for system in systems}
        for system in systems:
            calls, of_all = system.calls[batch_size], sum(text.num_tokens for text in system.texts)
            slots = statistics.mean(text.seconds * PROMPT_RATE + text.num_tokens / 2 for text in system.texts)
            seconds, how = median[system.name], UNCAPTURED if system.name.endswith(UNCAPTURED) else ""
            rows.append(
                ReplayRow(
                    size=size,
                    num_parameters=sum(weight.numel() for weight in decoder.causal_lm.parameters()),
                    system=system.name,
                    batch_size=batch_size,
                    device=str(decoder.device),
                    dtype=str(decoder.dtype).removeprefix("torch."),
                    num_utterances=len(system.texts),
                    decoder_seconds=seconds,
                    decoder_seconds_low=min(system.seconds[batch_size]),
                    decoder_seconds_high=max(system.seconds[batch_size]),
                    decoder_calls=calls and calls[1],
                    tokens_per_call=calls and of_all / calls[1],
                    call_ms=calls and 1000 * seconds / calls[0],
                    floor_ms=1000 * (num_bytes + batch_size * slots * slot_bytes) / bandwidth,
                    bandwidth=bandwidth,
                    speedup_vs_generate=median["replay/generate"] / seconds,
                    speedup_vs_autoregressive=median[f"replay/autoregressive{how}"] / seconds,
                )
            )
    return rows


def replay_table(rows: Sequence[ReplayRow]) -> Table:
    """A row a system and batch size, for people to read."""
    table = Table(
        "replay", "batch", "decoder s (range)", "vs generate", "vs autoregressive", "tokens per call", "ms a call",
        "floor ms", title=f"Replays: {rows[0].size}, random weights, {rows[0].num_parameters / 1e6:.0f}M parameters",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.system.removeprefix("replay/"),
            str(row.batch_size),
            f"{row.decoder_seconds:.2f} ({row.decoder_seconds_low:.2f} to {row.decoder_seconds_high:.2f})",
            f"{row.speedup_vs_generate:.2f}x",
            f"{row.speedup_vs_autoregressive:.2f}x",
            "" if row.tokens_per_call is None else f"{row.tokens_per_call:.2f}",
            "" if row.call_ms is None else f"{row.call_ms:.2f}",
            f"{row.floor_ms:.2f}",
        )
    return table
