import random
from itertools import pairwise

import pytest
import torch
from transformers import WhisperFeatureExtractor

from leapasr.data.misreadings import MisreadBatches, alike_tokens, misread, misread_tokens, misread_word
from leapasr.model.processing import SpeechLlamaProcessor
from leapasr.training.tokenizer import train_tokenizer

TEXT = "the cat sat on a mat and the dog, which ran to the house, slept there quietly"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def processor():
    tokenizer = train_tokenizer([TEXT], vocab_size=90)
    return SpeechLlamaProcessor(WhisperFeatureExtractor(feature_size=8), tokenizer)


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(300)]


def test_a_rate_of_zero_changes_nothing(texts):
    rng = random.Random(0)
    assert [misread(text, 0.0, rng) for text in texts] == texts


def test_the_rate_is_the_share_of_words_that_change():
    words = ["quietly"] * 20_000
    rng = random.Random(0)
    read = misread(" ".join(words), 0.3, rng).split()
    assert 0.6 < sum(word == "quietly" for word in read) / len(words) < 0.71
    joined = sum("quietly" in word and len(word) > len("quietly") for word in read)
    assert joined > 100  # some words are joined to their neighbour
    assert len(set(read)) > 100
    assert misread("quietly there", 1.0, random.Random(1)) == misread("quietly there", 1.0, random.Random(1))


def test_a_misread_word_sounds_alike():
    rng = random.Random(0)
    read = {misread_word("phase", rng) for _ in range(500)}
    assert "fase" in read
    assert all(2 <= len(word) <= 9 for word in read)
    assert misread_word("WHW", rng) == "WHW"  # nothing in it sounds like anything else


def test_alike_tokens_begin_or_end_with_one_another(processor):
    tokenizer = processor.tokenizer
    alike = alike_tokens(tokenizer)
    the = tokenizer.convert_tokens_to_ids("▁the")
    assert {"▁", "▁t", "e"} <= set(tokenizer.convert_ids_to_tokens(alike[the]))
    assert the not in alike[the]
    assert not set(alike[the]) & set(tokenizer.all_special_ids)
    assert all(a in alike[b] for a in range(len(tokenizer)) for b in alike[a])


def test_misread_tokens_are_lost_doubled_or_alike():
    tokens, alike = list(range(30_000)), [[-1, -2]] * 30_000
    rng = random.Random(0)
    assert misread_tokens(tokens, 0.0, alike, rng) == tokens
    read = misread_tokens(tokens, 0.2, alike, rng)
    kept, slips = {token for token in read if token >= 0}, 30_000 * 0.2
    assert [token for token in dict.fromkeys(read) if token >= 0] == sorted(kept)  # the order stays
    assert 0.9 < (30_000 - len(kept)) / (0.7 * slips) < 1.1  # replaced or lost
    assert 0.9 < sum(token < 0 for token in read) / (0.65 * slips) < 1.1  # put before it or in its place
    assert 0.8 < sum(a == b >= 0 for a, b in pairwise(read)) / (0.05 * slips) < 1.2
    assert set(misread_tokens([0] * 100, 1.0, [[]], rng)) <= {0}  # nothing is alike: lost or doubled


def test_a_batch_is_blanks_runs_and_the_misread_text(processor, texts):
    batches = MisreadBatches(texts, processor, batch_tokens=400, seed=1, epoch=0)
    blank = processor.tokenizer.pad_token_id
    seen, num_runs, num_exact = [], 0, 0
    for index in range(len(batches)):
        batch = batches[index]
        assert batch.read_ids.shape == batch.read_weights.shape
        for ids, length in zip(batch.text_ids, batch.text_lengths.tolist(), strict=True):
            seen.append(processor.decode_text(ids[:length].tolist()))
            assert ids[length:].eq(blank).all()
            assert not ids[:length].eq(blank).any()
        for ids, weights, length in zip(batch.read_ids, batch.read_weights, batch.read_lengths.tolist(), strict=True):
            assert ids[0] == ids[length - 1] == blank
            assert ids[length:].eq(blank).all()
            assert torch.equal(weights > 0, ids != blank)
            assert ((weights[ids != blank] >= 0.5) & (weights <= 1)[ids != blank]).all()
            num_runs += sum(a == b != blank for a, b in pairwise(ids.tolist()))
            read = [b for a, b in pairwise(ids[:length].tolist()) if b not in (a, blank)]
            num_exact += processor.decode_text(read) in texts
    assert sorted(seen) == sorted(texts)
    assert num_runs > 100
    assert 3 < num_exact < len(texts) / 2


def test_unread_batches_hold_every_text_and_nothing_before_it(processor, texts):
    batches = MisreadBatches(texts, processor, batch_tokens=400, seed=1, epoch=0, unread=True)
    seen = []
    for batch in map(batches.__getitem__, range(len(batches))):
        assert batch.read_ids.shape == batch.read_weights.shape == (len(batch.text_ids), 0)
        assert batch.read_lengths.eq(0).all()
        pairs = zip(batch.text_ids, batch.text_lengths.tolist(), strict=True)
        seen += [processor.decode_text(ids[:length].tolist()) for ids, length in pairs]
    assert sorted(seen) == sorted(texts)


def test_shapes_are_few_and_padding_is_bounded(processor, texts):
    shapes, num_tokens, size = set(), 0, 0
    for epoch in range(3):
        batches = MisreadBatches(texts, processor, batch_tokens=400, seed=1, epoch=epoch)
        for index in range(len(batches)):
            batch = batches[index]
            shapes |= {batch.text_ids.shape[1], batch.read_ids.shape[1]}
            num_tokens += int(batch.text_lengths.sum())
            size += batch.text_ids.numel()
    assert shapes <= {16, 32, 48, 64, 96, 128, 192, 256, 384}
    assert num_tokens > size / 3


def test_a_batch_depends_on_seed_epoch_and_index_alone(processor, texts):
    def made(index, **options):
        batch = MisreadBatches(texts, processor, batch_tokens=400, **{"seed": 1, "epoch": 0} | options)[index]
        return batch.read_ids, batch.read_weights, batch.text_ids

    alone = [
        MisreadBatches([TEXT], processor, batch_tokens=400, seed=1, epoch=epoch)[0].read_weights for epoch in (0, 1)
    ]
    assert alone[0].shape != alone[1].shape or not torch.equal(*alone)  # one text is read otherwise each time
    one = made(3)
    made(2)
    assert all(torch.equal(a, b) for a, b in zip(one, made(3), strict=True))
    for other in (made(4), made(3, seed=2), made(3, epoch=1)):
        assert one[0].shape != other[0].shape or not torch.equal(one[0], other[0])
