"""The trainer: stages of text, CTC, joint and heads-only training on one CPU, one GPU or several processes.

Every update is a function of (configuration, seed, update number): a run that is killed and resumed gives the
weights of an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.tensorboard import SummaryWriter

from leapasr.config import Stage, TrainingConfig
from leapasr.data.augmentation import NO_AUGMENTATION
from leapasr.data.batches import Batch, Source, SpeechBatches, plan_epoch
from leapasr.data.misreadings import MisreadBatches, TextBatch
from leapasr.decoding.ctc import greedy_ctc
from leapasr.model.processing import SpeechLlamaProcessor
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration
from leapasr.training.losses import ctc_loss, mtp_loss
from leapasr.training.optimizer import MasterAdamW

TRAINED_PREFIXES = {
    "text": ("decoder.",),
    "ctc": ("encoder.", "adapter.", "ctc_head."),
    "joint": ("",),
    "heads": ("mtp_heads.",),
}


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


@dataclass
class StepLosses:
    """Loss of an update and the figures logged beside it."""

    total: Tensor
    figures: dict[str, Tensor]


class StageTask(torch.nn.Module):
    """The forward pass and loss of one stage, as one module (so that several processes can wrap it)."""

    def __init__(self, model: SpeechLlamaForConditionalGeneration, stage: Stage):
        super().__init__()
        self.model, self.stage = model, stage
        self.weights = stage.weights(model.num_heads)

    def forward(self, batch: Batch | TextBatch) -> StepLosses:
        model, task = self.model, self.stage.task
        figures: dict[str, Tensor] = {}
        total = batch.text_ids.new_zeros((), dtype=torch.float32)
        head_logits = None
        if task == "text":
            table = model.get_input_embeddings()
            read_BLD = table(batch.read_ids) * batch.read_weights[..., None].to(table.weight.dtype)
            head_logits = model.read_text(read_BLD, batch.read_lengths, batch.text_ids, num_heads=1)
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and task != "heads"):
                encoding = model.encode(batch.input_features.to(model.dtype), batch.feature_lengths)
            if task != "heads":
                ctc = ctc_loss(
                    encoding.ctc_logits_BTV,
                    encoding.ctc_lengths_B,
                    batch.text_ids,
                    batch.text_lengths,
                    blank=model.config.blank_token_id,
                )
                figures["ctc"] = ctc.detach()
                total = total + (1.0 if task == "ctc" else self.stage.ctc_weight) * ctc
            if task != "ctc":
                head_logits = model.read_text(encoding.embeddings_BLD, encoding.lengths_B, batch.text_ids)
        if head_logits is not None:
            loss, losses, accuracies = mtp_loss(
                head_logits,
                batch.text_ids,
                batch.text_lengths,
                weights=self.weights[: len(head_logits)],
                end_token_id=model.config.eos_token_id,
            )
            total = total + loss
            for head, (ce, accuracy) in enumerate(zip(losses, accuracies, strict=True), 1):
                figures[f"ce_{head}"], figures[f"accuracy_{head}"] = ce.detach(), accuracy
        return StepLosses(total, figures)


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write `state` beside `path`, flush it to disk, and rename it over `path`: the old file survives any failure."""
    pending = path.with_suffix(".pending")
    try:
        with pending.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(pending, path)
    except BaseException:
        pending.unlink(missing_ok=True)
        raise


def compile_layers(model: SpeechLlamaForConditionalGeneration) -> None:
    """Compile every transformer layer in place, for any shape: fuses the elementwise work that dominates a CPU step."""
    for layer in (*model.encoder.encoder.layers, *model.adapter.layers, *model.decoder.model.layers):
        layer.compile(dynamic=True)


def learning_rate(stage: Stage, update: int) -> float:
    """Learning rate of update number `update` (from 0): linear warm-up, then linear decay to `final_lr`."""
    if update < stage.warmup:
        return stage.learning_rate * (update + 1) / stage.warmup
    done = (update - stage.warmup) / max(1, stage.updates - stage.warmup)
    return stage.learning_rate * (1 - (1 - stage.final_lr) * min(1.0, done))


class Trainer:
    """Trains `model` through the stages of `config`.

    Args:
        model: the model, float32; it is trained in place.
        processor: features and tokenizer of the model.
        sources: training cuts with weights.
        texts: tidied passages for ``text`` stages.
        dev: dev cuts, for CTC and head figures.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: SpeechLlamaForConditionalGeneration,
        processor: SpeechLlamaProcessor,
        *,
        sources: list[Source],
        texts: list[str],
        dev: list,
    ):
        self.config, self.processor = config, processor
        self.sources, self.texts, self.dev = sources, texts, dev
        self.accelerator = Accelerator()
        self.model = model.to(self.accelerator.device)
        if config.compile:
            compile_layers(self.model)
        self.checkpoint = config.output / "checkpoint.pt"
        self.stage_index = self.update = 0
        self._resumed: dict[str, Any] | None = None

    def run(self) -> Path:
        """Train through all stages, resuming where a checkpoint is; returns the folder of the final model.

        Raises:
            TrainingError: the loss is not finite, or there is no data for a stage.
        """
        self.config.output.mkdir(parents=True, exist_ok=True)
        self._resume()
        for index, stage in enumerate(self.config.stages):
            if index < self.stage_index:
                continue
            self._run_stage(stage)
            self.stage_index, self.update = index + 1, 0
        final = self.config.output / "model"
        return final

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location=self.accelerator.device, weights_only=True)
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise TrainingError(
                f"{self.checkpoint} is of another architecture: {str(error).splitlines()[1].strip()}; "
                "train into another --output folder"
            ) from error
        self.stage_index, self.update, self._resumed = state["stage"], state["update"], state

    def _save(self, optimizer: MasterAdamW) -> None:
        if self.accelerator.is_main_process:
            state = {"model": self.model.state_dict(), "optimizer": optimizer.state_dict()}
            save_atomically(state | {"stage": self.stage_index, "update": self.update}, self.checkpoint)

    def _datasets(self, stage: Stage, epoch: int) -> Dataset:
        if stage.task == "text":
            if not self.texts:
                raise TrainingError(f"stage {stage.name!r} needs text: give --text FILE")
            options = {"batch_tokens": int(stage.batch), "seed": self.config.seed, "epoch": epoch}
            return MisreadBatches(self.texts, self.processor, **options)
        plan = plan_epoch(self.sources, batch_seconds=stage.batch, seed=self.config.seed, epoch=epoch)
        return SpeechBatches(plan, self.processor, stage.augmentation, seed=self.config.seed, epoch=epoch)

    def _batches(self, stage: Stage) -> Iterator[Any]:
        """The stage's batches from update `self.update` on; process r of w takes every w-th."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        to_skip, epoch = self.update * world, 0
        while True:
            dataset = self._datasets(stage, epoch)
            size = len(dataset) - len(dataset) % world
            if not size:
                raise TrainingError(f"stage {stage.name!r}: {len(dataset)} batches are too few for {world} processes")
            if to_skip < size:
                yield from DataLoader(
                    Subset(dataset, range(to_skip + rank, size, world)),
                    batch_size=None,
                    num_workers=self.config.num_workers,
                    prefetch_factor=8 if self.config.num_workers else None,
                    worker_init_fn=_one_thread,
                )
            to_skip, epoch = max(0, to_skip - size), epoch + 1

    def _run_stage(self, stage: Stage) -> None:
        model, device = self.model, self.accelerator.device
        prefixes = TRAINED_PREFIXES[stage.task]
        model.requires_grad_(True)
        layers = model.config.encoder_config.num_hidden_layers
        frozen = layers if stage.frozen_encoder_layers is None else stage.frozen_encoder_layers
        model.encoder.freeze_layers(frozen)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name.startswith(prefixes))
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        optimizer = MasterAdamW(
            [(n, p) for n, p in model.named_parameters() if p.requires_grad],
            lr_scale=stage.lr_scale,
            averaging=stage.averaging,
        )
        model.to(dtype)
        if self._resumed is not None:
            optimizer.load_state_dict(self._resumed["optimizer"])
            self._resumed = None
        task = self.accelerator.prepare_model(StageTask(model, stage))
        writer = SummaryWriter(self.config.output / "tensorboard") if self.accelerator.is_main_process else None
        log = (self.config.output / "metrics.jsonl").open("a")
        saved_at = window_start = time.monotonic()
        window_seconds, window_updates = 0.0, 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        progress = Progress(*columns, disable=not self.accelerator.is_main_process)
        bar = progress.add_task(stage.name, total=stage.updates, completed=self.update)
        batches = self._batches(stage)
        with progress:
            while self.update < stage.updates:
                set_seed(self.config.seed + self.update)
                batch = _to_device(next(batches), device)
                task.train()
                losses = task(batch)
                self.accelerator.backward(losses.total)
                norm = optimizer.step(learning_rate(stage, self.update), stage.max_norm)
                if not math.isfinite(norm):
                    raise TrainingError(
                        f"stage {stage.name!r}, update {self.update}: loss {losses.total.item():.4g}, gradient norm "
                        f"{norm}. Lower the learning rate ({stage.learning_rate:g}) and start again from "
                        f"{self.checkpoint}, which holds the last good weights. Batch: {_batch_ids(batch)}"
                    )
                self.update += 1
                window_seconds += batch.audio_seconds
                window_updates += 1
                progress.advance(bar)
                evaluate = self.update % self.config.eval_every == 0 or self.update == stage.updates
                if self.update % 25 == 0 or evaluate:
                    elapsed = time.monotonic() - window_start
                    figures = {key: float(value) for key, value in losses.figures.items()}
                    figures |= {"loss": float(losses.total.detach()), "grad_norm": norm}
                    figures |= {
                        "audio_per_second": window_seconds / elapsed,
                        "updates_per_second": window_updates / elapsed,
                    }
                    if evaluate:
                        with optimizer.averaged():
                            figures |= {f"dev_{k}": v for k, v in self.evaluate(stage).items()}
                    self._log(writer, log, stage, figures)
                    progress.update(bar, description=f"{stage.name} {figures['audio_per_second']:.0f} s/s")
                    window_start, window_seconds, window_updates = time.monotonic(), 0.0, 0
                if time.monotonic() - saved_at > 60 * self.config.checkpoint_minutes:
                    self._save(optimizer)
                    saved_at = time.monotonic()
        with torch.no_grad(), optimizer.averaged():
            averages = dict(
                zip((n for n, p in model.named_parameters() if p.requires_grad), optimizer.averages, strict=True)
            )
            averages = {name: value.clone() for name, value in averages.items()}
        model.to(torch.float32)
        model.load_state_dict(averages, strict=False)
        if self.accelerator.is_main_process:
            for folder in (self.config.output / stage.name, self.config.output / "model"):
                model.save_pretrained(folder)
                self.processor.save_pretrained(folder)

    def _log(self, writer, log, stage: Stage, figures: dict[str, float]) -> None:
        if writer is None:
            return
        log.write(json.dumps({"stage": stage.name, "update": self.update, "time": time.time(), **figures}) + "\n")
        log.flush()
        for key, value in figures.items():
            writer.add_scalar(f"{stage.name}/{key}", value, self.update)

    @torch.no_grad()
    def evaluate(self, stage: Stage) -> dict[str, float]:
        """Mean dev figures of the stage's task; for audio tasks also the word error rate of greedy CTC."""
        self.model.eval()
        task = StageTask(self.model, stage)
        seed = self.config.seed
        if stage.task == "text":
            dataset: Dataset = MisreadBatches(self.texts[-2000:], self.processor, batch_tokens=3000, seed=seed, epoch=0)
            batches = [dataset[i] for i in range(min(10, len(dataset)))]
        elif self.dev:
            plan = plan_epoch([Source(self.dev)], batch_seconds=160, seed=seed, epoch=0)
            batches = list(SpeechBatches(plan, self.processor, NO_AUGMENTATION, seed=seed, epoch=0))
        else:
            return {}
        sums: dict[str, float] = {}
        pairs: list[tuple[str, str]] = []
        for batch in batches:
            batch = _to_device(batch, self.accelerator.device)
            for key, value in task(batch).figures.items():
                sums[key] = sums.get(key, 0.0) + float(value) / len(batches)
            if stage.task in ("ctc", "joint"):
                pairs += self._ctc_transcripts(batch)
        if pairs:
            sums["ctc_wer"] = _plain_wer(pairs)
        return sums

    def _ctc_transcripts(self, batch: Batch) -> list[tuple[str, str]]:
        encoding = self.model.encode(batch.input_features.to(self.model.dtype), batch.feature_lengths)
        read = greedy_ctc(encoding.ctc_logits_BTV, encoding.ctc_lengths_B, blank=self.model.config.blank_token_id)
        return [
            (self.processor.decode_text(text[:text_length]), self.processor.decode_text(ids))
            for ids, text, text_length in zip(read, batch.text_ids.tolist(), batch.text_lengths.tolist(), strict=True)
        ]


def _plain_wer(pairs: list[tuple[str, str]]) -> float:
    import jiwer

    from leapasr.text import plain

    references, hypotheses = [plain(r) for r, _ in pairs], [plain(h) for _, h in pairs]
    return float(jiwer.wer(references, hypotheses))


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def _to_device(batch: Any, device: torch.device) -> Any:
    moved = {k: v.to(device, non_blocking=True) for k, v in vars(batch).items() if isinstance(v, Tensor)}
    return type(batch)(**(vars(batch) | moved))


def _batch_ids(batch: Any) -> str:
    return ", ".join(getattr(batch, "ids", ["text"])[:8])
