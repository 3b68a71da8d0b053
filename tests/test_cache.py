"""RaggedCache: a cached forward equals a full forward, whatever was written, dropped, moved or grown in between.

Shapes: B rows, L positions, W step width, D width.
"""

import math

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from leapasr.decoding import Prompts, SpeechLlamaDecoder
from leapasr.decoding.cache import RaggedCache
from leapasr.decoding.reference import full_forward

LENGTHS = (11, 7, 4)


@pytest.fixture(params=[2, 4], ids=["grouped-query", "multi-head"])
def decoder(request, build_tiny_model):
    return SpeechLlamaDecoder(build_tiny_model(num_key_value_heads=request.param))


@pytest.fixture
def rows():
    """Inputs of rows of uneven length, each (L, D)."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(length, 32, generator=generator, dtype=torch.float64) for length in LENGTHS]


def full(decoder, x_LD):
    """Hidden states (L, D) of one forward pass."""
    return full_forward(decoder, Prompts(x_LD[None], torch.tensor([len(x_LD)])), x_LD[:0])


def feed(decoder, cache, pieces, num_committed=None):
    """One call that feeds each row its piece (W, D); returns each row's hidden states."""
    embeddings_BWD = pad_sequence(pieces, batch_first=True, padding_value=50.0)
    positions_BW, mask_B1WS = cache.plan(embeddings_BWD.shape[1], decoder.dtype)
    hidden_BWD = decoder.call(embeddings_BWD, positions_BW, mask_B1WS, cache)
    cache.commit([len(piece) for piece in pieces] if num_committed is None else num_committed)
    return [hidden_WD[: len(piece)] for hidden_WD, piece in zip(hidden_BWD, pieces, strict=True)]


def junk(num_rows, width):
    return [torch.randn(width, 32, dtype=torch.float64) for _ in range(num_rows)]


def assert_rows_close(actual, expected):
    for actual_LD, expected_LD in zip(actual, expected, strict=True):
        torch.testing.assert_close(actual_LD, expected_LD, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("split", range(1, max(LENGTHS)))
def test_two_calls_equal_a_full_forward_at_every_split(decoder, rows, split):
    splits = [max(1, min(split - row, len(x) - 1)) for row, x in enumerate(rows)]
    cache = RaggedCache(len(rows))
    first = feed(decoder, cache, [x[:at] for x, at in zip(rows, splits, strict=True)])
    second = feed(decoder, cache, [x[at:] for x, at in zip(rows, splits, strict=True)])
    assert cache.lengths == list(LENGTHS)
    cached = [torch.cat(parts) for parts in zip(first, second, strict=True)]
    assert_rows_close(cached, [full(decoder, x) for x in rows])


def test_one_at_a_time_equals_a_full_forward(decoder, rows):
    cache = RaggedCache(1)
    cached = [feed(decoder, cache, [rows[0][at : at + 1]])[0] for at in range(LENGTHS[0])]
    assert_rows_close([torch.cat(cached)], [full(decoder, rows[0])])


def test_what_is_not_committed_leaves_no_trace(decoder, rows):
    torch.manual_seed(0)
    cache = RaggedCache(len(rows))
    cached = [[] for _ in rows]
    at = [0] * len(rows)
    for width in (2, 1, 3, 2, 3):
        feed(decoder, cache, junk(len(rows), 5), num_committed=[0] * len(rows))
        pieces = [x[start : start + width] for x, start in zip(rows, at, strict=True)]
        # drafts behind the pieces, all rejected
        fed = [torch.cat([piece, *junk(1, row)]) for row, piece in enumerate(pieces)]
        hidden = feed(decoder, cache, fed, num_committed=[len(piece) for piece in pieces])
        for row, piece in enumerate(pieces):
            cached[row].append(hidden[row][: len(piece)])
            at[row] += len(piece)
    assert at == list(LENGTHS)
    assert_rows_close([torch.cat(parts) for parts in cached], [full(decoder, x) for x in rows])


def test_room_beyond_need_changes_nothing(decoder, rows):
    caches = [RaggedCache(len(rows)), RaggedCache(len(rows))]
    hidden = []
    for cache, num_slots in zip(caches, (0, 200), strict=True):
        feed(decoder, cache, [x[:2] for x in rows])
        for layer in cache.layers:
            layer.reserve(num_slots)
        hidden.append(feed(decoder, cache, [x[2:] for x in rows]))
    assert caches[0].layers[0].keys.shape[2] < 200 <= caches[1].layers[0].keys.shape[2]
    assert all(torch.equal(one, other) for one, other in zip(*hidden, strict=True))


@pytest.mark.parametrize(
    "order", [[2], [0, 2], [2, 1], [2, 0, 1], [1, 1, 0, 2]], ids=["one", "drop", "fill", "reorder", "repeat"]
)
def test_selected_rows_go_on_as_they_were(decoder, rows, order):
    cache = RaggedCache(len(rows))
    feed(decoder, cache, [x[:-2] for x in rows])
    cache.select(order)
    assert cache.lengths == [LENGTHS[row] - 2 for row in order]
    cached = feed(decoder, cache, [rows[row][-2:] for row in order])
    assert_rows_close(cached, [full(decoder, rows[row])[-2:] for row in order])


@pytest.mark.parametrize("longer_first", [True, False])
def test_joined_rows_go_on_as_they_were(decoder, rows, longer_first):
    rows = rows if longer_first else rows[::-1]
    cache, other = RaggedCache(1), RaggedCache(2)
    feed(decoder, cache, [x[:-2] for x in rows[:1]])
    feed(decoder, other, [x[:-2] for x in rows[1:]])
    cache.join(other)
    assert not other.lengths
    assert not any(len(layer.keys) + len(layer.values) for layer in other.layers)
    cached = feed(decoder, cache, [x[-2:] for x in rows])
    assert_rows_close(cached, [full(decoder, x)[-2:] for x in rows])


def test_no_more_is_committed_than_was_written(decoder, rows):
    with pytest.raises(AssertionError, match=r"\[3, 3, 3\] of 2 inputs"):
        feed(decoder, RaggedCache(len(rows)), [x[:2] for x in rows], num_committed=[3, 3, 3])


@pytest.mark.parametrize("multiple", [1, 16])
def test_slots_in_sight_are_a_multiple_and_kept_in_a_dtype(multiple):
    cache = RaggedCache(2, dtype=torch.bfloat16, multiple=multiple)
    for width, commit in ((5, [5, 2]), (13, [13, 13]), (1, [1, 1])):
        positions_BW, mask_B1WS = cache.plan(width, torch.float32)
        states = torch.randn(2, 3, width, 4)
        keys, values = cache.update(states, states + 1, 0)
        assert keys.shape[2] == mask_B1WS.shape[3] == cache.get_seq_length()
        assert keys.shape[2] % multiple == 0
        assert 0 <= keys.shape[2] - (max(cache.lengths) + width) < multiple
        for row in range(2):
            assert torch.equal(keys[row, :, positions_BW[row]], states[row].bfloat16())
            assert torch.equal(values[row, :, positions_BW[row]], (states[row] + 1).bfloat16())
        assert (mask_B1WS == 0).sum(-1).flatten().tolist() == (positions_BW + 1).flatten().tolist()
        cache.commit(commit)


@pytest.mark.parametrize("few_rows", [0, 8])
def test_slots_hold_what_was_written_last_and_zeros(few_rows, monkeypatch):
    """Rows are written one by one, or all at once; room that a cache grows by is never what lay in memory there."""
    monkeypatch.setattr("leapasr.decoding.cache.FEW_ROWS", few_rows)
    monkeypatch.setattr("leapasr.decoding.cache.LEAST_ROOM", 3)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda tensor, *size: tensor.new_full(size, math.nan))
    generator = torch.Generator().manual_seed(0)
    cache, expected = RaggedCache(3), torch.zeros(2, 3, 2, 99, 4)
    for width, committed in ((5, [5, 2, 4]), (7, [0, 7, 3]), (1, [1, 1, 1]), (4, [4, 2, 4]), (20, [20, 20, 20])):
        cache.plan(width, torch.float32)
        states = torch.randn(2, 3, 2, width, 4, generator=generator)
        for row, start in enumerate(cache.lengths):
            expected[:, row, :, start : start + width] = states[:, row]
        cache.update(*states, 0)
        found = torch.stack([cache.layers[0].keys, cache.layers[0].values])
        assert torch.equal(found, expected[:, :, :, : found.shape[3]])
        cache.commit(committed)
