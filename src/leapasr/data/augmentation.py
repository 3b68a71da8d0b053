"""Augmentation of training audio: speed, noise, reverberation on samples; SpecAugment on features.

Every random choice comes from the generator passed in, so that a batch is the same whenever it is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import soxr
from scipy.signal import fftconvolve
from torch import Tensor

from leapasr.audio import SAMPLE_RATE


@dataclass(frozen=True)
class Augmentation:
    """What is done to training audio. Probabilities are per utterance; 0 switches a part off.

    speed: probability, per batch, of another speed for all of it (drawn per utterance, speeds would undo the sorting
        of utterances by length, and a sixth of every batch would be padding).
    speed_range: factors of speed (and pitch), drawn evenly.
    noise: probability of coloured noise at a signal-to-noise ratio from `snr_db`.
    reverberation: probability of a synthetic room, decay time drawn from `decay_seconds`.
    num_time_masks, max_time_mask (seconds), num_feature_masks, max_feature_mask (mel bins): SpecAugment.
    """

    speed: float = 0.7
    speed_range: tuple[float, float] = (0.85, 1.15)
    noise: float = 0.3
    snr_db: tuple[float, float] = (5.0, 30.0)
    reverberation: float = 0.15
    decay_seconds: tuple[float, float] = (0.1, 0.5)
    num_time_masks: int = 4
    max_time_mask: float = 0.3
    num_feature_masks: int = 2
    max_feature_mask: int = 18

    def draw_speed(self, rng: np.random.Generator) -> float:
        """The speed of a batch; 1 is as recorded."""
        return rng.uniform(*self.speed_range) if rng.random() < self.speed else 1.0

    def waveform(self, samples: np.ndarray, rng: np.random.Generator, *, speed: float = 1.0) -> np.ndarray:
        """Augmented float32 samples (num_samples',) at 16 kHz."""
        if speed != 1:
            samples = change_speed(samples, speed)
        if rng.random() < self.reverberation:
            samples = reverberate(samples, rng.uniform(*self.decay_seconds), rng)
        if rng.random() < self.noise:
            samples = add_noise(samples, rng.uniform(*self.snr_db), rng)
        return samples

    def features(self, features_TF: Tensor, rng: np.random.Generator) -> Tensor:
        """SpecAugment (arXiv 1904.08779): masked stretches of time and bands take the utterance's mean."""
        T, F = features_TF.shape
        masked, mean = features_TF.clone(), features_TF.mean()
        for _ in range(self.num_time_masks):
            width = int(rng.uniform(0, min(self.max_time_mask * 100, T / 10)))
            start = int(rng.integers(0, T - width + 1))
            masked[start : start + width] = mean
        for _ in range(self.num_feature_masks):
            width = int(rng.integers(0, min(self.max_feature_mask, F) + 1))
            start = int(rng.integers(0, F - width + 1))
            masked[:, start : start + width] = mean
        return masked


NO_AUGMENTATION = Augmentation(speed=0, noise=0, reverberation=0, num_time_masks=0, num_feature_masks=0)


def change_speed(samples: np.ndarray, factor: float) -> np.ndarray:
    """Play `factor` times as fast (pitch moves along), by resampling."""
    return soxr.resample(samples, SAMPLE_RATE * factor, SAMPLE_RATE, quality="LQ").astype(np.float32)


def reverberate(samples: np.ndarray, decay_seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Convolve with a synthetic room: direct sound and exponentially decaying noise (−60 dB after `decay_seconds`)."""
    size = int(decay_seconds * SAMPLE_RATE)
    tail = rng.standard_normal(size) * 10 ** (-3 * np.arange(size) / size)
    tail *= rng.uniform(0.2, 0.8) / np.sqrt((tail**2).sum())
    tail[0] = 1.0
    return fftconvolve(samples, tail.astype(np.float32))[: len(samples)].astype(np.float32)


def add_noise(samples: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Add noise of a random colour (white to brown) at `snr_db` decibels."""
    spectrum = np.fft.rfft(rng.standard_normal(len(samples)))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1) ** rng.uniform(0, 1)
    noise = np.fft.irfft(spectrum, len(samples))
    power, noise_power = np.mean(samples**2) + 1e-10, np.mean(noise**2) + 1e-10
    return (samples + noise * np.sqrt(power / noise_power / 10 ** (snr_db / 10))).astype(np.float32)
