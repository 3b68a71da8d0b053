"""The trainer: stages of text, CTC, joint, heads-only and MWER training on one CPU, one GPU or several processes.

Every update is a function of (configuration, seed, update number): a run that is killed and resumed gives the
weights of an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torch.utils.tensorboard import SummaryWriter

from leapasr.config import Stage, TrainingConfig
from leapasr.data.augmentation import NO_AUGMENTATION
from leapasr.data.batches import Batch, Source, SpeechBatches, plan_epoch
from leapasr.data.misreadings import MisreadBatches, TextBatch
from leapasr.decoding.ctc import greedy_ctc
from leapasr.model.low_rank import freeze_adapted
from leapasr.model.precision import PRECISIONS, cast
from leapasr.model.processing import SpeechLlamaProcessor
from leapasr.model.speech_llama import SpeechEncoding, SpeechLlamaForConditionalGeneration
from leapasr.training.encoder_cache import EncoderCache, FrameBatch, FrameBatches
from leapasr.training.losses import ctc_loss, mtp_loss, with_slips
from leapasr.training.mwer import hypothesize, read_lists
from leapasr.training.optimizer import MasterAdamW

READING = ("speech_projection.previous.", "speech_projection.following")
OF_CTC = ("speech_projection.ctc_projection.", *READING)
TRAINED_PREFIXES = {
    "language": ("decoder.",),
    "text": ("decoder.", "mtp_heads.", "draft_layers.", *READING),
    "ctc": ("encoder.", "adapter.", "ctc_head."),
    "joint": ("",),
    "mwer": ("",),
    "heads": ("mtp_heads.", "draft_layers."),
}


MAX_DEV_TEXTS = 2000
STAGE_SEEDS = 100_003  # between the seeds of two stages


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


@dataclass
class StepLosses:
    """Loss of an update and the figures logged beside it."""

    total: Tensor
    figures: dict[str, Tensor]


class StageTask(torch.nn.Module):
    """The forward pass and loss of one stage, as one module (so that several processes can wrap it)."""

    def __init__(self, model: SpeechLlamaForConditionalGeneration, processor: SpeechLlamaProcessor, stage: Stage):
        super().__init__()
        self.model, self.processor, self.stage = model, processor, stage
        self.weights = stage.weights(model.num_heads)
        self.ctc_weight = {"ctc": 1.0, "heads": 0.0}.get(stage.task, stage.ctc_weight)

    def encode(self, batch: Batch | FrameBatch) -> SpeechEncoding:
        """The speech side of the model on features, or behind the encoder on its cached frames.

        In training CTC is read only where something learns from it or depends on it.
        """
        with_ctc = bool(self.ctc_weight) or not torch.is_grad_enabled()
        if isinstance(batch, FrameBatch):
            frames = batch.frames.to(self.model.dtype)
            return self.model.encode_frames(frames, batch.frame_lengths, with_ctc=with_ctc)
        features = batch.input_features.to(self.model.dtype)
        return self.model.encode(features, batch.feature_lengths, with_ctc=with_ctc)

    def read(self, batch: Batch | FrameBatch | TextBatch) -> Tensor:
        """The tokens (B, M) that the decoder reads: in training with slips, in evaluation the right ones."""
        if not self.stage.slips or not torch.is_grad_enabled():
            return batch.text_ids
        return with_slips(batch.text_ids, self.stage.slips, vocab_size=self.model.config.vocab_size)

    def forward(self, batch: Batch | FrameBatch | TextBatch) -> StepLosses:
        model, task = self.model, self.stage.task
        figures: dict[str, Tensor] = {}
        total = batch.text_ids.new_zeros((), dtype=torch.float32)
        head_logits = None
        if isinstance(batch, TextBatch):
            table = model.get_input_embeddings()
            read_BLD = table(batch.read_ids) * batch.read_weights[..., None].to(table.weight.dtype)
            read_BLD = model.speech_projection.read_tokens(read_BLD, batch.read_ids)
            positions_BL = model.speech_projection.positions(batch.read_ids[..., None], batch.read_lengths)
            num_heads = 1 if task == "language" else None
            head_logits = model.read_text(
                read_BLD, batch.read_lengths, positions_BL, self.read(batch), num_heads=num_heads
            )
        else:
            encoding = self.encode(batch)
            if self.ctc_weight or (task != "heads" and not torch.is_grad_enabled()):
                assert encoding.ctc is not None
                ctc = ctc_loss(
                    encoding.ctc.logits_BTV,
                    encoding.ctc_lengths_B,
                    batch.text_ids,
                    batch.text_lengths,
                    blank=model.config.blank_token_id,
                )
                figures["ctc"] = ctc.detach()
                total = total + self.ctc_weight * ctc
            if task == "mwer":
                settings = self.stage.mwer
                found = hypothesize(
                    model, self.processor, encoding, batch, nbest=settings.nbest,
                    with_reference=settings.reference and torch.is_grad_enabled(),
                )  # fmt: skip
                head_logits, risk, of_lists = read_lists(
                    model, encoding, found, self.read(batch), batch.text_lengths, calls_weight=settings.calls_weight
                )
                total, figures = total + risk, figures | of_lists
            elif task != "ctc":
                head_logits = model.read_text(*encoding.prefix, self.read(batch))
        if head_logits is not None:
            loss, losses, accuracies = mtp_loss(
                head_logits,
                batch.text_ids,
                batch.text_lengths,
                weights=self.weights[: len(head_logits)],
                end_token_id=model.config.eos_token_id,
            )
            total = total + (self.stage.mwer.ce_weight if task == "mwer" else 1.0) * loss
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
    except BaseException as error:
        pending.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch hides what the system said
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(pending)) from error
        raise


def train_mode(model: torch.nn.Module) -> None:
    """Training mode for the parts that train; frozen ones stay as they are used: no dropout, no moving statistics."""
    for part in model.children():
        part.train(any(parameter.requires_grad for parameter in part.parameters()))


def compile_layers(model: SpeechLlamaForConditionalGeneration) -> None:
    """Compile every transformer layer in place, for any shape: fuses the elementwise work that dominates a CPU step."""
    layers = [*model.encoder.encoder.layers, *model.adapter.layers]
    if not model.config.speech_as_memory:  # beside a memory the decoder reads text alone, and takes little time
        layers += model.decoder.model.layers
    for layer in layers:
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
        texts: tidied passages for ``text`` stages; the last of them, a twentieth or 2,000, are for evaluation.
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
        self.sources, self.dev = sources, dev
        num_dev_texts = min(MAX_DEV_TEXTS, len(texts) // 20)
        self.texts = texts[: len(texts) - num_dev_texts]
        self.dev_texts = texts[len(texts) - num_dev_texts :] or texts
        self.accelerator = Accelerator()
        self.model = model.to(self.accelerator.device).requires_grad_(True)
        self.model.keep_reserved()
        if config.compile:
            compile_layers(self.model)
        self.checkpoint = config.output / "checkpoint.pt"
        self.stage_index = self.update = 0
        self._resumed: dict[str, Any] | None = None
        self._frozen: dict[str, Tensor] = {}  # what the running stage does not train, in float32
        self._cache: EncoderCache | None = None  # of the running stage

    def run(self) -> Path:
        """Train through all stages, resuming where a checkpoint is; returns the folder of the final model.

        Raises:
            TrainingError: the loss is not finite, there is no data for a stage, or the checkpoint is damaged or of
                another run.
        """
        self.config.output.mkdir(parents=True, exist_ok=True)
        self._resume()
        for index, stage in enumerate(self.config.stages):
            if index < self.stage_index:
                continue
            self._run_stage(stage)
            self.stage_index, self.update = index + 1, 0
            self._save(None)
        self.accelerator.wait_for_everyone()
        return self.config.output / "model"

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        try:
            # "cpu", since of several processes on a CPU each has a device that torch.load does not know ("cpu:0")
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise TrainingError(
                f"{self.checkpoint} is damaged or cut short; delete it to train from the start"
            ) from error
        names = [stage.name for stage in self.config.stages]
        if state.get("stages", names) != names:
            raise TrainingError(
                f"{self.checkpoint} is of a run of the stages {', '.join(state['stages'])}, not {', '.join(names)}; "
                "train into another --output folder"
            )
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise TrainingError(
                f"{self.checkpoint} is of another architecture: {str(error).splitlines()[1].strip()}; "
                "train into another --output folder"
            ) from error
        self.stage_index, self.update = state["stage"], state["update"]
        self._resumed = state.get("optimizer")

    def _save(self, optimizer: MasterAdamW | None) -> None:
        """Write the checkpoint, in the middle of a stage or (without `optimizer`) between two."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "model": self.model.state_dict() | self._frozen,
            "stages": [stage.name for stage in self.config.stages],
            "stage": self.stage_index,
            "update": self.update,
        }
        if optimizer is not None:
            state["optimizer"] = optimizer.state_dict()
        save_atomically(state, self.checkpoint)

    @property
    def stage_seed(self) -> int:
        """The seed of the running stage's data: no two stages hear the same batches with the same noise."""
        return self.config.seed + STAGE_SEEDS * self.stage_index

    def _dataset(self, stage: Stage, epoch: int) -> MisreadBatches | SpeechBatches | FrameBatches:
        if stage.reads_text:
            if not self.texts:
                raise TrainingError(f"stage {stage.name!r} needs text: give --text FILE")
            return self._text_batches(stage, self.texts, int(stage.batch), seed=self.stage_seed, epoch=epoch)
        plan = plan_epoch(self.sources, batch_seconds=stage.batch, seed=self.stage_seed, epoch=epoch)
        if self._cache is not None:
            return FrameBatches(plan, self.processor, self._cache)
        return SpeechBatches(plan, self.processor, stage.augmentation, seed=self.stage_seed, epoch=epoch)

    def _text_batches(self, stage: Stage, texts: list[str], batch_tokens: int, **place: int) -> MisreadBatches:
        unread = stage.task == "language"
        return MisreadBatches(texts, self.processor, batch_tokens=batch_tokens, unread=unread, **place)

    def _batches(self, stage: Stage) -> Iterator[Any]:
        """The stage's batches from update `self.update` on; process r of w takes every w-th."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        to_skip, epoch = self.update * world, 0
        while True:
            dataset = self._dataset(stage, epoch)
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

    def _begin_stage(self, stage: Stage) -> MasterAdamW:
        """Freeze what `stage` does not train, cast the model, and make its optimizer, as the checkpoint left it."""
        model = self.model
        model.requires_grad_(True)
        layers = model.config.encoder_config.num_hidden_layers
        model.encoder.freeze_layers(layers if stage.frozen_encoder_layers is None else stage.frozen_encoder_layers)
        freeze_adapted(model.decoder)
        trained = TRAINED_PREFIXES[stage.task]
        if stage.task == "heads" and model.config.drafts_remember_ctc:
            trained += OF_CTC
        # what no gradient reaches is not to decay, and processes would wait for its gradients
        has_memory = model.config.speech_as_memory
        unused: tuple[str, ...] = OF_CTC if has_memory and not model.config.drafts_remember_ctc else ()
        if stage.task in ("joint", "mwer") and not stage.ctc_weight:
            unused += ("ctc_head.", "adapter.") if has_memory else ("ctc_head.",)
        for name, parameter in model.named_parameters():
            used = not name.startswith(unused)
            parameter.requires_grad_(parameter.requires_grad and used and name.startswith(trained))
        optimizer = MasterAdamW(
            [(n, p) for n, p in model.named_parameters() if p.requires_grad],
            lr_scale=stage.lr_scale,
            averaging=stage.averaging,
        )
        self._frozen = _frozen_values(model)
        cast(model, PRECISIONS[self.config.precision])
        if self._resumed is not None:
            try:
                optimizer.load_state_dict(self._resumed)
            except (RuntimeError, ValueError) as error:
                raise TrainingError(
                    f"{self.checkpoint} was written while stage {stage.name!r} trained other weights ({error}); "
                    "train into another --output folder"
                ) from error
            self._resumed = None
        return optimizer

    def _encoder_cache(self, stage: Stage) -> EncoderCache | None:
        """The frames of the stage's cuts, those that were missing computed; None where the stage goes without."""
        if self.config.encoder_cache is None or not stage.encoder_is_frozen:
            return None
        accelerator = self.accelerator
        cache = EncoderCache(self.config.encoder_cache, self.model.encoder, self.processor)
        missing = cache.missing([cut for source in self.sources for cut in source.cuts])
        self.model.eval()
        with self._progress() as progress:
            bar = progress.add_task("encoder frames", total=len(missing))
            cache.compute(
                missing[accelerator.process_index :: accelerator.num_processes],
                batch_seconds=stage.batch,
                num_workers=self.config.num_workers,
                advance=lambda count: progress.advance(bar, count * accelerator.num_processes),
            )
        accelerator.wait_for_everyone()
        cache.refresh()
        return cache

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        return Progress(*columns, disable=not self.accelerator.is_main_process)

    def _end_stage(self, stage: Stage, optimizer: MasterAdamW) -> None:
        """Leave the averaged weights in the model, in float32, what was frozen untouched, and save it."""
        model = self.model
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        cast(model, torch.float32)
        model.load_state_dict(dict(zip(names, optimizer.averages, strict=True)) | self._frozen, strict=False)
        self._frozen = {}
        if self.accelerator.is_main_process:
            for folder in (self.config.output / stage.name, self.config.output / "model"):
                model.save_pretrained(folder)
                self.processor.save_pretrained(folder)

    def _run_stage(self, stage: Stage) -> None:
        optimizer = self._begin_stage(stage)
        self._cache = self._encoder_cache(stage)
        task = self.accelerator.prepare_model(StageTask(self.model, self.processor, stage))
        with ExitStack() as files:
            log = files.enter_context((self.config.output / "metrics.jsonl").open("a"))
            writer = None
            if self.accelerator.is_main_process:
                writer = files.enter_context(SummaryWriter(self.config.output / "tensorboard"))
            self._optimize(stage, task, optimizer, writer, log)
        self.accelerator.free_memory()  # what several processes keep to exchange the gradients of this stage
        self._end_stage(stage, optimizer)

    def _optimize(self, stage: Stage, task: torch.nn.Module, optimizer: MasterAdamW, writer, log) -> None:
        saved_at = window_start = time.monotonic()
        window_seconds, window_updates = 0.0, 0
        progress = self._progress()
        bar = progress.add_task(stage.name, total=stage.updates, completed=self.update)
        batches = self._batches(stage)
        with progress:
            while self.update < stage.updates:
                batch = _to_device(next(batches), self.accelerator.device)
                set_seed(self.config.seed + self.update)  # behind the batch: starting a loader takes a random number
                train_mode(self.model)
                losses = task(batch)
                self.accelerator.backward(losses.total)
                norm = optimizer.step(learning_rate(stage, self.update), stage.max_norm)
                if not math.isfinite(norm):
                    kept = f" from {self.checkpoint}, which holds good weights" if self.checkpoint.exists() else ""
                    raise TrainingError(
                        f"stage {stage.name!r}, update {self.update}: loss {losses.total.item():.4g}, gradient norm "
                        f"{norm}. Lower the learning rate ({stage.learning_rate:g}) and start again{kept}. "
                        f"Batch: {_batch_ids(batch)}"
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
        task = StageTask(self.model, self.processor, stage)
        seed = self.config.seed
        batches: list[Batch | TextBatch]
        if stage.reads_text:
            texts = self._text_batches(stage, self.dev_texts, 3000, seed=seed, epoch=0)
            batches = [texts[i] for i in range(min(10, len(texts)))]
        elif self.dev:
            plan = plan_epoch([Source(self.dev)], batch_seconds=160, seed=seed, epoch=0)
            speech = SpeechBatches(plan, self.processor, NO_AUGMENTATION, seed=seed, epoch=0)
            batches = [speech[i] for i in range(len(speech))]
        else:
            return {}
        sums: dict[str, float] = {}
        pairs: list[tuple[str, str]] = []
        for batch in batches:
            batch = _to_device(batch, self.accelerator.device)
            for key, value in task(batch).figures.items():
                sums[key] = sums.get(key, 0.0) + float(value) / len(batches)
            if stage.task in ("ctc", "joint", "mwer"):
                pairs += self._ctc_transcripts(batch)
        if pairs:
            sums["ctc_wer"] = _plain_wer(pairs)
        return sums

    def _ctc_transcripts(self, batch: Batch) -> list[tuple[str, str]]:
        encoding = self.model.encode(batch.input_features.to(self.model.dtype), batch.feature_lengths)
        assert encoding.ctc is not None
        read = greedy_ctc(encoding.ctc, encoding.ctc_lengths_B, blank=self.model.config.blank_token_id)
        return [
            (self.processor.decode_text(text[:text_length]), self.processor.decode_text(ids))
            for ids, text, text_length in zip(read, batch.text_ids.tolist(), batch.text_lengths.tolist(), strict=True)
        ]


def _plain_wer(pairs: list[tuple[str, str]]) -> float:
    import jiwer

    from leapasr.text import plain

    references, hypotheses = [plain(r) for r, _ in pairs], [plain(h) for _, h in pairs]
    return float(jiwer.wer(references, hypotheses))


def _frozen_values(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of the weights without gradient, and of the buffers of parts that hold no trained weight."""
    named = model.named_parameters(remove_duplicate=False)  # a tied weight by each of its names
    kept = {name: p.detach().clone() for name, p in named if not p.requires_grad}
    stored = model.state_dict()
    for part_name, part in model.named_children():
        if not any(parameter.requires_grad for parameter in part.parameters()):
            names = (f"{part_name}.{name}" for name, _ in part.named_buffers())
            kept |= {name: stored[name].clone() for name in names if name in stored}
    return kept


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def _to_device(batch: Any, device: torch.device) -> Any:
    moved = {k: v.to(device, non_blocking=True) for k, v in vars(batch).items() if isinstance(v, Tensor)}
    return type(batch)(**(vars(batch) | moved))


def _batch_ids(batch: Any) -> str:
    return ", ".join(getattr(batch, "ids", ["text"])[:8])
