import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from lhotse import MonoCut, SupervisionSegment
from transformers import WhisperFeatureExtractor

from leapasr.audio import SAMPLE_RATE
from leapasr.data.augmentation import NO_AUGMENTATION, Augmentation
from leapasr.data.batches import FEATURE_MULTIPLE, Source, SpeechBatches, pad_tokens, plan_epoch
from leapasr.data.manifests import read_manifest
from leapasr.model.processing import SpeechLlamaProcessor
from leapasr.training.tokenizer import train_tokenizer


def cuts(name, count, *, seed=0):
    durations = np.random.default_rng(seed).uniform(0.5, 20, count).round(2)
    return [
        MonoCut(f"{name}-{n}", 0, float(d), 0, supervisions=[SupervisionSegment(f"{name}-{n}", "r", 0, float(d))])
        for n, d in enumerate(durations)
    ]


def planned(sources, *, batch_seconds=60.0, seed=1, epoch=0):
    return plan_epoch(sources, batch_seconds=batch_seconds, seed=seed, epoch=epoch)


def original_ids(plan):
    return [cut.id.partition("#")[0] for batch in plan for cut in batch]


def test_an_epoch_holds_each_source_as_often_as_its_weight_says():
    twice, part, once = cuts("twice", 30), cuts("part", 50), cuts("once", 7)
    sources = [Source(twice, 2.0), Source(part, 0.3), Source(once)]
    parts = []
    for epoch in range(3):
        plan = planned(sources, epoch=epoch)
        counts = Counter(original_ids(plan))
        assert {counts[cut.id] for cut in twice} == {2}
        assert {counts[cut.id] for cut in once} == {1}
        parts.append({cut.id for cut in part if counts[cut.id]})
        assert len(parts[-1]) == 15
        assert sum(counts.values()) == 30 * 2 + 15 + 7
        ids = [cut.id for batch in plan for cut in batch]
        assert len(set(ids)) == len(ids)
    assert parts[0] != parts[1] != parts[2]  # another part each epoch


def test_weights_above_one_add_a_part():
    counts = Counter(original_ids(planned([Source(cuts("a", 40), 1.75)])))
    assert Counter(counts.values()) == {1: 10, 2: 30}


def test_batches_are_within_their_seconds_and_of_like_length():
    plan = planned([Source(cuts("a", 2000))], batch_seconds=60)
    seconds = [sum(cut.duration for cut in batch) for batch in plan]
    assert max(seconds) <= 60
    assert np.median(seconds) > 45
    padded = [len(batch) * max(cut.duration for cut in batch) for batch in plan]
    assert sum(seconds) / sum(padded) > 0.9
    lengths = [batch[0].duration for batch in plan]
    assert abs(np.corrcoef(lengths[:-1], lengths[1:])[0, 1]) < 0.3  # in no order


def test_a_plan_depends_on_seed_and_epoch_alone():
    sources = [Source(cuts("a", 100), 0.5), Source(cuts("b", 30))]
    ids = original_ids(planned(sources))
    np.random.seed(3)
    assert original_ids(planned(sources)) == ids
    assert original_ids(planned(sources, epoch=1)) != ids
    assert original_ids(planned(sources, seed=2)) != ids


def test_one_cut_and_none():
    (batch,) = planned([Source(cuts("a", 1))])
    assert batch[0].id == "a-0"
    for sources in ([], [Source([])], [Source(cuts("a", 3), 0.0)]):
        with pytest.raises(ValueError, match="no training data: every source is empty or has weight 0"):
            planned(sources)


def test_tokens_are_padded_to_few_lengths():
    ids, lengths = pad_tokens([[5, 6, 7], [8], list(range(3, 20))], 0)
    assert ids.shape == (3, 32)
    assert lengths.tolist() == [3, 1, 17]
    for row, expected in zip(ids.tolist(), ([5, 6, 7], [8], list(range(3, 20))), strict=True):
        assert row == expected + [0] * (32 - len(expected))
    assert pad_tokens([[4] * 16], 0)[0].shape == (1, 16)


@pytest.fixture(scope="module")
def processor():
    tokenizer = train_tokenizer(["the cat sat", "a dog ran"], vocab_size=80)
    return SpeechLlamaProcessor(WhisperFeatureExtractor(feature_size=8), tokenizer)


@pytest.fixture(scope="module")
def plan(babble, tmp_path_factory):
    """One batch of recordings of 16 and 44.1 kHz, mono and stereo."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = []
    for n, (seconds, rate, channels) in enumerate([(0.5, 44100, 1), (1.0, 16000, 1), (2.3, 16000, 2)]):
        sound = np.resize(babble(3.0, seed=n), int(seconds * rate))
        soundfile.write(folder / f"{n}.wav", np.stack([sound] * channels, 1), rate)
        text = ["the cat sat", "a dog ran", "the dog sat"][n]
        lines.append({"id": f"u{n}", "audio": f"{n}.wav", "duration": seconds, "text": text})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [read_manifest(path).cuts]


def test_a_batch_is_padded_features_and_texts(plan, processor):
    batch = SpeechBatches(plan, processor, NO_AUGMENTATION, seed=1, epoch=0)[0]
    assert batch.ids == ["u0", "u1", "u2"]
    assert batch.audio_seconds == pytest.approx(3.8, abs=0.01)
    assert batch.feature_lengths.tolist() == [50, 100, 230]
    assert batch.input_features.shape == (3, 250, 8)
    assert batch.input_features.shape[1] % FEATURE_MULTIPLE == 0
    for features, length in zip(batch.input_features, batch.feature_lengths.tolist(), strict=True):
        assert features[length:].eq(0).all()
    samples, _ = soundfile.read(plan[0][1].recording.sources[0].source, dtype="float32")
    assert torch.allclose(batch.input_features[1, :100], processor.features(samples), atol=1e-3)
    assert len(samples) == SAMPLE_RATE
    texts = [processor.decode_text(i[:n].tolist()) for i, n in zip(batch.text_ids, batch.text_lengths, strict=True)]
    assert texts == ["the cat sat", "a dog ran", "the dog sat"]


def test_all_of_a_batch_has_one_speed(plan, processor):
    """So that utterances of like duration stay so; half of the audio's speed doubles every length."""
    slow = Augmentation(speed=1.0, speed_range=(0.5, 0.5), noise=0, reverberation=0)
    batch = SpeechBatches(plan, processor, slow, seed=1, epoch=0)[0]
    assert batch.feature_lengths.tolist() == [100, 200, 460]
    mixed = SpeechBatches(plan, processor, replace(slow, speed_range=(0.5, 2.0)), seed=1, epoch=0)[0]
    speeds = torch.tensor([50, 100, 230]) / mixed.feature_lengths
    assert speeds.max() / speeds.min() < 1.05


def test_a_batch_depends_on_seed_epoch_and_index_alone(plan, processor):
    def made(index=0, **fields):
        batches = SpeechBatches(plan * 2, processor, Augmentation(speed=1.0), **{"seed": 1, "epoch": 0} | fields)
        return batches[index].input_features

    one = made()
    assert torch.equal(one, made())
    for other in (made(1), made(seed=2), made(epoch=1)):
        assert one.shape != other.shape or not torch.equal(one, other)
