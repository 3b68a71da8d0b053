import numpy as np
import pytest
import torch

from leapasr.audio import SAMPLE_RATE
from leapasr.data.augmentation import NO_AUGMENTATION, Augmentation, add_noise, change_speed, reverberate


def tone(hertz=440.0, seconds=1.0):
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE)).astype(np.float32)


def peak_hertz(samples):
    return np.abs(np.fft.rfft(samples)).argmax() * SAMPLE_RATE / len(samples)


@pytest.mark.parametrize("factor", [0.85, 1.0, 1.15])
def test_speed_moves_duration_and_pitch(factor):
    faster = change_speed(tone(), factor)
    assert faster.dtype == np.float32
    assert len(faster) == pytest.approx(SAMPLE_RATE / factor, abs=2)
    assert peak_hertz(faster) == pytest.approx(440 * factor, rel=0.01)


@pytest.mark.parametrize("snr_db", [0.0, 20.0])
def test_noise_has_the_wanted_power(snr_db):
    clean = tone()
    noise = add_noise(clean, snr_db, np.random.default_rng(0)) - clean
    assert 10 * np.log10(np.mean(clean**2) / np.mean(noise**2)) == pytest.approx(snr_db, abs=0.1)


def test_a_room_keeps_the_direct_sound_and_decays():
    click = np.zeros(SAMPLE_RATE, dtype=np.float32)
    click[1000] = 1.0
    heard = reverberate(click, 0.4, np.random.default_rng(0))
    assert heard.shape == click.shape
    assert np.abs(heard[:1000]).max() < 1e-6  # nothing before the sound
    assert heard[1000] == pytest.approx(1, abs=1e-5)

    def power(start, stop):
        return np.mean(heard[1000 + int(start * SAMPLE_RATE) : 1000 + int(stop * SAMPLE_RATE)] ** 2)

    assert np.abs(heard[1000 + int(0.4 * SAMPLE_RATE) + 1 :]).max() < 1e-6
    # 60 dB in 0.4 s: 30 dB from the first to the third tenth of a second
    assert 10 * np.log10(power(0.01, 0.11) / power(0.21, 0.31)) == pytest.approx(30, abs=1.5)


def test_spec_augment_masks_stretches_and_bands_with_the_mean():
    features = torch.randn(200, 80, generator=torch.Generator().manual_seed(0))
    augmentation = Augmentation(num_time_masks=2, max_time_mask=0.1, num_feature_masks=1, max_feature_mask=9)
    masked_frames, masked_bins = [], []
    for seed in range(50):
        masked = augmentation.features(features, np.random.default_rng(seed))
        changed = masked != features
        assert masked[changed].eq(features.mean()).all()
        frames, bins = changed.all(1), changed.all(0)
        assert torch.equal(changed, frames[:, None] | bins[None])  # whole frames and whole bins, nothing else
        masked_frames.append(int(frames.sum()))
        masked_bins.append(int(bins.sum()))
    assert 10 < max(masked_frames) <= 2 * 10
    assert max(masked_bins) == 9
    assert min(masked_bins) == 0


def test_features_of_few_bins_and_few_frames():
    """Regression: a mask wider than the features had no place to begin."""
    for shape in ((200, 8), (1, 80), (3, 1)):
        for seed in range(30):
            assert Augmentation().features(torch.randn(shape), np.random.default_rng(seed)).shape == shape


def test_no_augmentation_changes_nothing():
    rng = np.random.default_rng(0)
    samples, features = tone(), torch.randn(50, 80)
    assert np.array_equal(NO_AUGMENTATION.waveform(samples, rng, speed=NO_AUGMENTATION.draw_speed(rng)), samples)
    assert torch.equal(NO_AUGMENTATION.features(features, rng), features)


def test_the_generator_alone_decides():
    samples = tone()
    made = [Augmentation(noise=0.9).waveform(samples, np.random.default_rng(seed)) for seed in range(20)]
    again = [Augmentation(noise=0.9).waveform(samples, np.random.default_rng(seed)) for seed in range(20)]
    assert all(np.array_equal(a, b) for a, b in zip(made, again, strict=True))
    assert all(m.dtype == np.float32 for m in made)
    assert len({m.tobytes() for m in made}) > 10


def test_speeds_are_drawn_as_often_as_they_say():
    rng = np.random.default_rng(0)
    speeds = [Augmentation(speed=0.25, speed_range=(0.8, 1.2)).draw_speed(rng) for _ in range(400)]
    assert 70 < sum(speed != 1 for speed in speeds) < 130
    assert 0.8 <= min(speeds) < 0.85
    assert 1.15 < max(speeds) <= 1.2


@pytest.mark.parametrize("part", ["noise", "reverberation"])
def test_each_part_happens_as_often_as_it_says(part):
    samples = tone(seconds=0.05)
    off = {"noise": 0, "reverberation": 0}
    rng = np.random.default_rng(0)
    augmentation = Augmentation(**off | {part: 0.25})
    changed = sum(not np.array_equal(augmentation.waveform(samples, rng), samples) for _ in range(400))
    assert 70 < changed < 130
