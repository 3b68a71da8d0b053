"""From cuts to training batches: planning by duration, loading, augmentation, padding.

An epoch's batches are planned from (seed, epoch) alone and a batch's random choices from (seed, epoch, index)
alone. A run that stops and resumes therefore sees exactly what an uninterrupted one sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import DynamicBucketingSampler
from torch import Tensor
from torch.utils.data import Dataset

from leapasr.audio import resample
from leapasr.data.augmentation import Augmentation
from leapasr.model.processing import SpeechLlamaProcessor

FEATURE_MULTIPLE, TEXT_MULTIPLE = 50, 16  # few different shapes: kernels are built once for each


@dataclass
class Batch:
    """Training inputs: features (B, T, F) with lengths (B,), token ids (B, M) with lengths (B,), seconds of audio."""

    ids: list[str]
    input_features: Tensor
    feature_lengths: Tensor
    text_ids: Tensor
    text_lengths: Tensor
    audio_seconds: float


@dataclass(frozen=True)
class Source:
    """Cuts and how often an epoch holds them: 2.0 twice, 0.3 a random 30% (another one each epoch)."""

    cuts: Sequence[Cut]
    weight: float = 1.0

    def draw(self, rng: np.random.Generator) -> list[Cut]:
        whole, rest = divmod(self.weight, 1)
        chosen = list(self.cuts) * int(whole)
        if rest:
            chosen += [self.cuts[i] for i in rng.permutation(len(self.cuts))[: round(rest * len(self.cuts))]]
        return chosen


def plan_epoch(sources: Sequence[Source], *, batch_seconds: float, seed: int, epoch: int) -> list[list[Cut]]:
    """The batches of one epoch, shuffled, each of cuts of like duration that last at most `batch_seconds` together."""
    rng = np.random.default_rng((seed, epoch))
    cuts = [cut for source in sources for cut in source.draw(rng)]
    cuts = [cuts[i] for i in rng.permutation(len(cuts))]
    if not cuts:
        raise ValueError("no training data: every source is empty or has weight 0")
    if len(cuts) == 1:  # the sampler wants two at least
        return [cuts]
    unique = CutSet.from_cuts(cut.with_id(f"{cut.id}#{n}") for n, cut in enumerate(cuts))
    sampler = DynamicBucketingSampler(
        unique,
        max_duration=batch_seconds,
        num_buckets=min(100, max(2, len(cuts) // 50)),
        shuffle=True,
        seed=int(rng.integers(2**31)),
        buffer_size=len(cuts) + 1,
        num_cuts_for_bins_estimate=len(cuts),
        world_size=1,  # the whole plan, in every process: it would take its own share of it
        rank=0,
    )
    return [list(batch) for batch in sampler]


class SpeechBatches(Dataset):
    """The planned batches of an epoch; item i is batch i, made on demand."""

    def __init__(
        self,
        plan: Sequence[Sequence[Cut]],
        processor: SpeechLlamaProcessor,
        augmentation: Augmentation,
        *,
        seed: int,
        epoch: int,
    ):
        self.plan, self.processor, self.augmentation = plan, processor, augmentation
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng((self.seed, self.epoch, index))
        speed = self.augmentation.draw_speed(rng)
        ids, features, texts, seconds = [], [], [], 0.0
        for cut in self.plan[index]:
            samples = resample(cut.load_audio().mean(0), cut.sampling_rate)
            samples = self.augmentation.waveform(samples, rng, speed=speed)
            ids.append(cut.id)
            seconds += cut.duration
            features.append(self.augmentation.features(self.processor.features(samples), rng))
            texts.append(self.processor.encode_text(cut.supervisions[0].text))
        padded, feature_lengths = self.processor.pad(features, FEATURE_MULTIPLE)
        text_ids, text_lengths = pad_tokens(texts, self.processor.tokenizer.pad_token_id)
        return Batch(ids, padded, feature_lengths, text_ids, text_lengths, seconds)


def pad_tokens(texts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token lists to ids (B, M), right-padded to a multiple of `TEXT_MULTIPLE`, and lengths (B,)."""
    lengths_B = torch.tensor([len(ids) for ids in texts])
    longest = -(-int(lengths_B.max()) // TEXT_MULTIPLE) * TEXT_MULTIPLE
    padded = torch.full((len(texts), longest), pad_token_id)
    for row, ids in zip(padded, texts, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return padded, lengths_B
