"""A frozen encoder's frames, computed once and kept on disk: training then begins behind the encoder.

Shapes: B rows, T frames, D encoder width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lhotse.cut import Cut
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from leapasr.data.augmentation import NO_AUGMENTATION
from leapasr.data.batches import FEATURE_MULTIPLE, Source, SpeechBatches, pad_tokens, plan_epoch
from leapasr.model.processing import SpeechLlamaProcessor
from leapasr.model.storage import replace_files

SHARD_SECONDS = 1800.0  # of audio: what is computed again after an interruption, and held in memory until written
FRAME_MULTIPLE = FEATURE_MULTIPLE // 2  # few different shapes, as in `SpeechBatches`


@dataclass
class FrameBatch:
    """Training inputs behind the encoder: frames (B, T, D) with lengths (B,); the rest as in `Batch`."""

    ids: list[str]
    frames: Tensor
    frame_lengths: Tensor
    text_ids: Tensor
    text_lengths: Tensor
    audio_seconds: float


def fingerprint(encoder: nn.Module, processor: SpeechLlamaProcessor) -> str:
    """16 hexadecimal digits for all that frames depend on beside the audio.

    That is the encoder's weights, where it pools, the dtype that it computes in, and the settings of the features.
    """
    settings = processor.feature_extractor.to_dict().items()
    numbers: dict[str, float | None] = {name: value for name, value in settings if isinstance(value, int | float)}
    numbers["pooling_layer"] = getattr(encoder, "pooling_layer", None)  # None is nowhere, 0 before the first layer
    digest = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode())
    for name, value in encoder.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def audio_key(cut: Cut) -> str:
    """The name of a cut's frames: a digest of its recording, channel, start and duration.

    A cut's id would not do (two corpora may share it); its text does not count. A file that was overwritten is not
    noticed.
    """
    fields = {name: value for name, value in cut.to_dict().items() if name not in ("id", "supervisions", "custom")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:24]


class EncoderCache:
    """Frames of cuts in `folder`, as safetensors shards.

    Frames of each encoder lie in a folder of their own below it, named by `fingerprint`: those of other weights are
    never read. A shard appears when it is whole, so that an interrupted run goes on with what it has.

    Raises:
        ValueError: a shard is damaged.
    """

    def __init__(self, folder: Path, encoder: nn.Module, processor: SpeechLlamaProcessor):
        self.folder = folder / fingerprint(encoder, processor)
        self.encoder, self.processor = encoder, processor
        self.shards: dict[str, Path] = {}
        self.refresh()

    def refresh(self) -> None:
        """Find the shards that other processes have written."""
        for path in set(self.folder.glob("*.safetensors")) - set(self.shards.values()):
            try:
                with safe_open(path, "pt") as shard:
                    self.shards |= dict.fromkeys(shard.keys(), path)
            except SafetensorError as error:
                raise ValueError(
                    f"{path} is damaged ({error}); delete it, and its frames are computed again"
                ) from error

    def missing(self, cuts: Sequence[Cut]) -> list[Cut]:
        """Those of `cuts` whose frames are not there, each audio once."""
        by_key = {audio_key(cut): cut for cut in cuts}
        return [cut for key, cut in by_key.items() if key not in self.shards]

    @torch.no_grad()
    def compute(
        self, cuts: Sequence[Cut], *, batch_seconds: float, num_workers: int, advance: Callable[[int], None]
    ) -> None:
        """Compute and write the frames of `cuts`, in the encoder's dtype.

        Args:
            batch_seconds: audio computed at once, with padding.
            num_workers: processes that load audio.
            advance: is told how many cuts were computed, after every batch.

        Raises:
            OSError: a shard cannot be written; those that are whole stay.
        """
        if not cuts:
            return
        weight = next(self.encoder.parameters())
        plan = plan_epoch([Source(cuts)], batch_seconds=batch_seconds, seed=0, epoch=0)
        batches = SpeechBatches(plan, self.processor, NO_AUGMENTATION, seed=0, epoch=0)
        pending: dict[str, Tensor] = {}
        seconds = 0.0
        for planned, batch in zip(plan, DataLoader(batches, batch_size=None, num_workers=num_workers), strict=True):
            features = batch.input_features.to(weight.device, weight.dtype)
            frames_BTD, lengths_B = self.encoder(features, batch.feature_lengths.to(weight.device))
            for cut, frames, length in zip(planned, frames_BTD.cpu(), lengths_B.tolist(), strict=True):
                pending[audio_key(cut)] = frames[:length].clone()
            seconds += batch.audio_seconds
            if seconds > SHARD_SECONDS:
                self._write(pending)
                pending, seconds = {}, 0.0
            advance(len(planned))
        if pending:
            self._write(pending)

    def _write(self, frames: dict[str, Tensor]) -> None:
        name = f"{next(iter(frames))}.safetensors"
        try:
            replace_files(self.folder, lambda folder: save_file(frames, folder / name))
        except SafetensorError as error:
            raise OSError(f"cannot write {self.folder / name}: {error}") from error
        self.shards |= dict.fromkeys(frames, self.folder / name)

    def frames(self, cut: Cut) -> Tensor:
        """Encoder frames (T, D) of a cut that is there."""
        key = audio_key(cut)
        with safe_open(self.shards[key], "pt") as shard:
            return shard.get_tensor(key)


class FrameBatches(Dataset):
    """The planned batches of an epoch, out of a cache; item i is batch i."""

    def __init__(self, plan: Sequence[Sequence[Cut]], processor: SpeechLlamaProcessor, cache: EncoderCache):
        self.plan, self.processor, self.cache = plan, processor, cache

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> FrameBatch:
        cuts = self.plan[index]
        frames, frame_lengths = self.processor.pad([self.cache.frames(cut) for cut in cuts], FRAME_MULTIPLE)
        texts = [self.processor.encode_text(cut.supervisions[0].text) for cut in cuts]
        text_ids, text_lengths = pad_tokens(texts, self.processor.tokenizer.pad_token_id)
        seconds = sum(cut.duration for cut in cuts)
        return FrameBatch([cut.id for cut in cuts], frames, frame_lengths, text_ids, text_lengths, seconds)
