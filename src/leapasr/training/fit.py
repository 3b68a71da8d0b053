"""Fitting heads to a model that somebody already has, by self-distillation (`distillation`).

Every update is a function of (configuration, seed, update number): a run that is killed and resumed gives the heads of
an uninterrupted one.

Shapes: B rows, T frames, M tokens, U places, D width, C tokens that heads guess, P pieces and the blank.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from leapasr.config import Stage
from leapasr.decoding.ctc import greedy_ctc
from leapasr.evaluation.scoring import count_errors
from leapasr.model.ctc_head import CTCScores
from leapasr.model.fitted_heads import FittedHeads, FittedHeadsConfig, rows_of_pieces
from leapasr.model.pieces import BLANK, Pieces
from leapasr.model.precision import PRECISIONS, advice_against, cast
from leapasr.model.whisper import fingerprint
from leapasr.text import NORMALIZER
from leapasr.training.distillation import Distillation, Lesson, find_recordings, seconds_of
from leapasr.training.losses import IGNORED, ctc_loss, mtp_loss
from leapasr.training.optimizer import MasterAdamW
from leapasr.training.trainer import TrainingError, learning_rate, save_atomically
from leapasr.whisper_transcriber import WhisperOptions, WhisperTranscriber, load_whisper

DEV_SHARE, MIN_DEV, MAX_DEV = 0.02, 2, 64  # of the lessons: not learnt from, but what the log's dev figures are of
SORTED_BATCHES = 32  # lessons of so many batches are sorted by length, for little padding

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
CTCReading = tuple[CTCScores, Tensor]  # of (B, T') frames, and their lengths (B,)


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How heads are fitted.

    Attributes:
        num_heads: K, head 1 included. head_type: of heads 2..K.
        adapter_size, adapter_layers: of what lies between the encoder and the CTC head.
        draft_vocabulary: heads guess so many tokens: those that the model wrote most often in fitting, and, where these
            are fewer, those with the lowest ids, which byte-level BPE found the most frequent (FR-Spec: Zhao et al.,
            arXiv 2502.14856).
        num_pieces: CTC reads as many pieces of tokens (`model.pieces`).
        updates: of all heads. batch_seconds: audio in an update, with padding.
        learning_rate: the peak, behind `warmup` updates; then it falls linearly.
        dropout: of the encoder's frames. mask_seconds: one stretch of them in each two seconds is blotted out, up to so
            long (as SpecAugment does with features: Park et al., arXiv 1904.08779).
        precision: of products, those of the frozen encoder too: ``bf16`` (trained weights are kept in float32 beside)
            or ``fp32``.
        seed: of new weights and the order of lessons.

    Raises:
        ValueError: a number is out of range.
    """

    num_heads: int = 5
    head_type: str = "sequential"
    adapter_size: int = 256
    adapter_layers: int = 2
    draft_vocabulary: int = 4096
    num_pieces: int = 512
    updates: int = 3000
    batch_seconds: float = 120.0
    learning_rate: float = 1e-3
    warmup: int = 100
    dropout: float = 0.1
    mask_seconds: float = 0.4
    precision: str = "bf16"
    seed: int = 1
    eval_every: int = 250
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        for name in ("adapter_layers", "draft_vocabulary", "updates", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mask_seconds < 0:
            raise ValueError(f"mask_seconds must not be negative, got {self.mask_seconds}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def check(self, begin: FittedHeadsConfig) -> None:
        """Raises ValueError unless heads of the configuration `begin` can be fitted further with this one."""
        for name in ("num_heads", "head_type", "adapter_size", "adapter_layers"):
            if (asked := getattr(self, name)) != (there := getattr(begin, name)):
                raise ValueError(f"{name} is {asked}, and {there} in the heads to begin with: give {there}")

    @property
    def stage(self) -> Stage:
        """What the learning rate's course is told by."""
        return Stage(
            "fit", "joint", self.updates, self.batch_seconds, self.learning_rate, warmup=min(self.warmup, self.updates)
        )


def fit(
    model: str,
    audio: Sequence[Path],
    output: Path,
    config: FitConfig,
    *,
    init: Path | None = None,
    cache: Path | None = None,
    language: str | None = None,
    device: torch.device | str = "cpu",
    progress: Progress,
    complain: Callable[[str], None],
) -> Path:
    """Fit heads to the Whisper `model` and save them in `output`; the same call goes on where it was interrupted.

    Args:
        model: hub name or folder. audio: manifests, and folders of audio files; transcripts are not read.
        init: folder of heads of this model to begin with, of the shape that `config` names; they go on guessing the
            tokens that they guessed.
        cache: where lessons are kept, for fits of several kinds; None: in `output`.
        language: of all audio; None takes what manifests say, and else lets the model detect it.
        progress: gives, for a description and a total, a context with what is told of each step.
        complain: is told what cannot be used, and whether another precision is faster.

    Returns:
        `output`.

    Raises:
        ValueError: there is nothing to learn from, or the model, the configuration or `init` cannot be used.
        TrainingError: a loss is not finite.
        OSError: the disk is full.
    """
    transcriber = load_whisper(
        model, device=torch.device(device), dtype=torch.float32, options=WhisperOptions(language=language), bare=True
    )
    weights = fingerprint(transcriber.model)
    begin = None
    if init is not None:
        begin = FittedHeads.load(init)
        begin.check(weights, name=model)
        config.check(begin.config)
    recordings, problems = find_recordings(audio)
    for problem in problems:
        complain(problem)
    if advice := advice_against(config.precision, transcriber.model.device):
        complain(advice)
    lessons = Distillation(
        (cache or output / "lessons") / f"{weights[:16]}{'' if language is None else '-' + language}"
    )
    missing = lessons.missing(recordings)
    with progress("listening", len(recordings)) as advance:
        advance(len(recordings) - len(missing))
        transcriber.model.model.encoder.to(config.dtype)
        lessons.compute(transcriber, missing, advance=advance, complain=complain)
    names = lessons.lessons(recordings)
    if len(names) < 2 * MIN_DEV:
        raise ValueError(f"{len(names)} stretches of speech to learn from: give at least {2 * MIN_DEV}, better hours")
    fitting = Fitting(transcriber, lessons, names, config, output, begin)
    fitting.describe(model, weights, [str(path) for path in audio])
    fitting.run(progress)
    return output


def blotted(frames_BTD: Tensor, longest_seconds: float) -> Tensor:
    """Encoder frames (B, T, D) with zeros in one stretch for each two seconds, anywhere, evenly up to so long."""
    B, T, _ = frames_BTD.shape
    num_stretches, longest = round(seconds_of(T) / 2), longest_seconds / seconds_of(1)
    starts_BN1 = torch.rand(B, num_stretches, 1, device=frames_BTD.device) * T
    behind_BNT = torch.arange(T, device=frames_BTD.device) - starts_BN1
    within_BNT = (behind_BNT >= 0) & (behind_BNT < longest * torch.rand_like(starts_BN1))
    return frames_BTD.masked_fill(within_BNT.any(1)[..., None], 0)


class Fitting:
    """Heads in training.

    Args:
        transcriber: the frozen model. lessons, names: what to learn from.
        output: folder of the checkpoint, the log, and in the end of the heads.
        begin: heads to begin with; None: new ones.
    """

    def __init__(
        self, transcriber: WhisperTranscriber, lessons: Distillation, names: Sequence[str], config: FitConfig,
        output: Path, begin: FittedHeads | None = None,
    ):  # fmt: skip
        self.lessons, self.config, self.output, self.begin = lessons, config, output, begin
        self.processor, self.device = transcriber.processor, transcriber.model.device
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(config.seed)).tolist()
        num_dev = min(MAX_DEV, max(MIN_DEV, round(DEV_SHARE * len(names))))
        self.dev, self.train = [names[n] for n in order[:num_dev]], [names[n] for n in order[num_dev:]]
        self.tokens = self._draft_tokens(transcriber, names) if begin is None else begin.tokens.tolist()
        self.end = self.tokens.index(min(transcriber.decoder.end_tokens))
        self._places = torch.full((transcriber.decoder.vocab_size,), IGNORED).scatter(
            0, torch.tensor(self.tokens), torch.arange(len(self.tokens))
        )
        self.pieces = Pieces(self.processor.tokenizer, config.num_pieces)
        if begin is not None and len(self.pieces.ids) != begin.config.num_pieces:
            raise ValueError(
                f"num_pieces {config.num_pieces} makes {len(self.pieces.ids)} pieces, and the heads to begin with read "
                f"{begin.config.num_pieces}"
            )
        model = transcriber.model
        self.dtype = config.dtype
        self.unembedding_VD = model.proj_out.weight.detach().to(self.dtype)
        self.unembedding_CD = self.unembedding_VD[self.tokens]
        self.unembedding_PD = rows_of_pieces(self.unembedding_VD, self.pieces)
        self.lm_head, self.norm = model.proj_out, model.model.decoder.layer_norm
        self.encoder_size = model.config.d_model
        self.update = 0

    def _draft_tokens(self, transcriber: WhisperTranscriber, names: Sequence[str]) -> list[int]:
        """Ids that heads guess, rising."""
        end, never = min(transcriber.decoder.end_tokens), transcriber.model.generation_config.suppress_tokens or ()
        counts = Counter(token for name in names for token in self.lessons.tokens(name).tolist())
        known = {*range(end), *counts} - set(never)
        by_worth = sorted(known, key=lambda token: (-counts[token], token))
        return sorted({end, *by_worth[: self.config.draft_vocabulary]})

    def describe(self, model: str, weights: str, audio: Sequence[str]) -> None:
        """Build heads for the model of this name and fingerprint, fitted on `audio`."""
        config, before = self.config, None if self.begin is None else self.begin.config
        torch.manual_seed(config.seed)
        fitted_on = tuple(f"{Path(path).parent.name}/{Path(path).name}" for path in audio)
        heads = FittedHeads(
            FittedHeadsConfig(
                base_model=before.base_model if before else Path(model).name if Path(model).is_dir() else model,
                base_weights=weights,
                hidden_size=self.encoder_size,
                encoder_size=self.encoder_size,
                num_tokens=len(self.tokens),
                num_pieces=len(self.pieces.ids),
                num_heads=config.num_heads,
                head_type=config.head_type,
                adapter_size=config.adapter_size,
                adapter_layers=config.adapter_layers,
                adapter_ffn_size=4 * config.adapter_size,
                fitted_on=tuple(dict.fromkeys([*before.fitted_on, *fitted_on])) if before else fitted_on,
                fitted_hours=round(sum(seconds_of(self.lessons.num_frames(name)) for name in self.train) / 3600, 2),
                updates=config.updates + (before.updates if before else 0),
            ),
            self.tokens,
        )
        if self.begin is None:
            heads.reset_from(self.lm_head, self.norm)
        else:
            heads.load_state_dict(self.begin.state_dict())
        self.heads = heads.to(self.device)
        self.optimizer = MasterAdamW(self.heads.named_parameters(), averaging=0.999)
        cast(self.heads, self.dtype)

    def run(self, progress: Progress) -> None:
        """Train, and save the heads."""
        self._resume()
        saved_at = time.monotonic()
        batches = self._batches()
        with progress("fitting", self.config.updates) as advance, (self.output / "metrics.jsonl").open("a") as log:
            advance(self.update)
            while self.update < self.config.updates:
                torch.manual_seed(self.config.seed + self.update)
                loss, figures, _ = self.loss(next(batches), training=True)
                loss.backward()
                norm = self.optimizer.step(learning_rate(self.config.stage, self.update), self.config.stage.max_norm)
                if not math.isfinite(norm):
                    raise TrainingError(
                        f"update {self.update}: loss {loss.item():.4g}, gradient norm {norm}; lower the learning rate "
                        f"({self.config.learning_rate:g}) and start again"
                    )
                self.update += 1
                advance(1)
                if self.update % self.config.eval_every == 0 or self.update == self.config.updates:
                    with self.optimizer.averaged():
                        figures |= {f"dev_{name}": value for name, value in self.evaluate().items()}
                    values = {name: round(float(value), 4) for name, value in figures.items()}
                    log.write(json.dumps({"update": self.update, "time": time.time(), **values}) + "\n")
                    log.flush()
                if time.monotonic() - saved_at > 60 * self.config.checkpoint_minutes:
                    self._save()
                    saved_at = time.monotonic()
        cast(self.heads, torch.float32)
        with self.optimizer.averaged():
            self.heads.save(self.output)
        self.checkpoint.unlink(missing_ok=True)

    def loss(self, names: Sequence[str], *, training: bool) -> tuple[Tensor, dict[str, Any], CTCReading]:
        """Loss of all heads on lessons, figures for the log (cross-entropies, heads' accuracies), and what CTC says."""
        batch = [self.lessons.lesson(name) for name in names]
        texts = [self._places[lesson.tokens] for lesson in batch]  # those that no head guesses are ignored
        text_BM = pad_sequence(texts, batch_first=True, padding_value=self.end).to(self.device)
        lengths_B = torch.tensor([len(text) for text in texts], device=self.device)
        ctc_scores, ctc_lengths_B = self._read(batch, training=training)
        spelt = [self._in_pieces(lesson.tokens) for lesson in batch]
        spelt_BM = pad_sequence(spelt, batch_first=True).to(self.device)
        spelt_lengths_B = torch.tensor([len(text) for text in spelt], device=self.device)
        ctc = ctc_loss(ctc_scores.logits_BTV, ctc_lengths_B, spelt_BM, spelt_lengths_B, blank=BLANK)
        states_BUD = pad_sequence([lesson.states for lesson in batch], batch_first=True).to(self.device, self.dtype)
        # at the last place head 1 says end-of-text, and no head has anything to learn
        next_BU = pad_sequence([F.pad(lesson.tokens, (0, 1)) for lesson in batch], batch_first=True).to(self.device)
        next_BUD = F.embedding(next_BU, self.unembedding_VD)
        further = self.heads.mtp_heads.training_logits(states_BUD, next_BUD, self._unembed)  # type: ignore[arg-type]
        unused_BUC = further[0].new_zeros(further[0].shape)  # head 1 is the model's own
        weights = (0.0, *(0.8 ** (k - 2) for k in range(2, self.config.num_heads + 1)))
        mtp, losses, accuracies = mtp_loss(
            [unused_BUC, *further], text_BM, lengths_B, weights=weights, end_token_id=self.end
        )
        figures: dict[str, Any] = {"ctc": ctc.detach()}
        for k, (ce, accuracy) in enumerate(zip(losses[1:], accuracies[1:], strict=True), 2):
            figures |= {f"ce_{k}": ce.detach(), f"accuracy_{k}": accuracy}
        return ctc + mtp, figures, (ctc_scores, ctc_lengths_B)

    def _read(self, batch: Sequence[Lesson], *, training: bool) -> CTCReading:
        frames_BTD = pad_sequence([lesson.frames for lesson in batch], batch_first=True).to(self.device, self.dtype)
        lengths_B = torch.tensor([len(lesson.frames) for lesson in batch], device=self.device)
        if training:
            frames_BTD = blotted(F.dropout(frames_BTD, self.config.dropout), self.config.mask_seconds)
        return self.heads.ctc_scores(frames_BTD, lengths_B, self.unembedding_PD)

    def _in_pieces(self, tokens: Tensor) -> Tensor:
        """What CTC is to read (M',)."""
        return torch.tensor([place for token in tokens.tolist() for place in self.pieces.split(token)]).long()

    def _unembed(self, states: Tensor) -> Tensor:
        return F.linear(states, self.unembedding_CD)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean figures on the lessons that nothing is learnt from, and the word errors of what CTC reads there.

        These are counted against what the model wrote, if that has any word.
        """
        sums: dict[str, float] = {}
        read: list[str] = []
        written: list[str] = []
        batches = list(self._cut(self.dev))
        for names in batches:
            _, figures, ctc = self.loss(names, training=False)
            sums = {name: sums.get(name, 0.0) + float(value) / len(batches) for name, value in figures.items()}
            for row in greedy_ctc(*ctc, blank=BLANK):
                read.append(self.processor.decode_text(self.pieces.join(row, [1.0] * len(row))[0]))
            written += [self.processor.decode_text(self.lessons.tokens(name).tolist()) for name in names]
        if not any(map(NORMALIZER, written)):
            return sums
        return {**sums, "ctc_wer": count_errors(written, read, NORMALIZER).rate}

    def _batches(self) -> Iterator[list[str]]:
        """Batches from the one of number `update` on, epoch after epoch."""
        num_before, epoch = 0, 0
        while True:
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            names = [self.train[n] for n in torch.randperm(len(self.train), generator=generator).tolist()]
            plan = list(self._cut(names))
            order = torch.randperm(len(plan), generator=generator).tolist()
            for number, place in enumerate(order, num_before):
                if number >= self.update:
                    yield plan[place]
            num_before, epoch = num_before + len(plan), epoch + 1

    def _cut(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Batches of at most `batch_seconds` with padding; of near lessons those of like length."""
        most = self.config.batch_seconds
        mean = sum(seconds_of(self.lessons.num_frames(name)) for name in names) / max(1, len(names))
        size = max(1, round(SORTED_BATCHES * most / mean)) if mean else 1
        for first in range(0, len(names), size):
            batch: list[str] = []
            for name in sorted(names[first : first + size], key=self.lessons.num_frames):
                if batch and (len(batch) + 1) * seconds_of(self.lessons.num_frames(name)) > most:
                    yield batch
                    batch = []
                batch.append(name)
            yield batch

    @property
    def checkpoint(self) -> Path:
        return self.output / "checkpoint.pt"

    def _save(self) -> None:
        state = {"config": asdict(self.config), "tokens": self.tokens, "update": self.update}
        save_atomically({**state, "optimizer": self.optimizer.state_dict()}, self.checkpoint)

    def _resume(self) -> None:
        """Go on from the checkpoint, if there is one.

        Raises:
            ValueError: it is of another fit.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if state["config"] != asdict(self.config) or state["tokens"] != self.tokens:
            raise ValueError(
                f"{self.checkpoint} is of a fit with other settings or audio: give those, another output folder, or "
                "delete it"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.update = state["update"]
