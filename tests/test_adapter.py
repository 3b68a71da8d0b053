import pytest
import torch
from conftest import BOS, PAD, VOCAB_SIZE, tiny_config

from leapasr.decoding.ctc import greedy_ctc
from leapasr.model.adapter import (
    LOOKAHEAD_SIZE,
    Adapter,
    SpeechProjection,
    neighbouring_readings,
    stack_frames,
)
from leapasr.model.ctc_head import BLOCK_SIZE, CTCScores, SharedCTCHead


def readings_around(ids, offsets, blank, everywhere=False):
    """For each frame the frames at which the tokens around its own begin, None where there is none: read as a person
    would. With `everywhere` a blank's own token is the last one before it."""
    runs, run_of_frame = [], []
    for frame, token in enumerate(ids):
        if token != blank and (frame == 0 or ids[frame - 1] != token):
            runs.append(frame)
        run_of_frame.append(len(runs) - 1)
    return [
        [
            runs[run + offset] if (everywhere or token != blank) and 0 <= run + offset < len(runs) else None
            for offset in offsets
        ]
        for run, token in zip(run_of_frame, ids, strict=True)
    ]


def projection(config, dtype=torch.float64):
    torch.manual_seed(0)
    return SpeechProjection(config, config.adapter_size).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("everywhere", [False, True])
def test_neighbouring_readings_against_a_loop(everywhere):
    generator = torch.Generator().manual_seed(0)
    offsets = [0, -1, 1, 2, 5]
    for size in (1, 2, 3, 40):
        for vocabulary in (2, 3, 6):  # with few tokens, runs and repetitions across blanks are common
            ids = torch.randint(0, vocabulary, (50, size), generator=generator)
            for blank in range(vocabulary):
                found, exists = neighbouring_readings(ids, offsets, blank=blank, everywhere=everywhere)
                for row, places, there in zip(ids.tolist(), found.tolist(), exists.tolist(), strict=True):
                    expected = readings_around(row, offsets, blank, everywhere)
                    assert there == [[place is not None for place in frame] for frame in expected]
                    assert places == [[place or 0 for place in frame] for frame in expected]


def test_neighbouring_readings_name_the_tokens_that_ctc_reads():
    ids = torch.randint(0, 4, (1, 60), generator=torch.Generator().manual_seed(3))
    logits = torch.nn.functional.one_hot(ids, 4).float()
    (read,) = greedy_ctc(CTCScores.of(logits), torch.tensor([60]), blank=0)
    around, exists = neighbouring_readings(ids, [-1, 1], blank=0)
    begins = [t for t in range(60) if ids[0, t] != 0 and (t == 0 or ids[0, t] != ids[0, t - 1])]
    assert [int(ids[0, around[0, t, 0]]) for t in begins[1:]] == read[:-1]
    assert [int(ids[0, around[0, t, 1]]) for t in begins[:-1]] == read[1:]
    assert not exists[0, begins[0], 0]
    assert not exists[0, begins[-1], 1]


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_stacking_joins_neighbours_and_counts_padding_as_zeros(factor):
    frames = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([7, 4, 1])
    stacked, stacked_lengths = stack_frames(frames, lengths, factor)
    assert stacked.shape == (3, -(-7 // factor), 2 * factor)
    assert stacked_lengths.tolist() == [-(-n // factor) for n in (7, 4, 1)]
    for row, length in enumerate(lengths.tolist()):
        for t in range(stacked.shape[1]):
            for i in range(factor):
                at = t * factor + i
                expected = frames[row, at] if at < length else torch.zeros(2)
                assert torch.equal(stacked[row, t, 2 * i : 2 * i + 2], expected)


def test_rows_do_not_see_padding():
    config = tiny_config(ctc_lookahead=2, ctc_positions=True)
    torch.manual_seed(1)
    adapter, project = Adapter(config, 16).double().eval().requires_grad_(False), projection(config)
    embeddings = torch.randn(VOCAB_SIZE, 32, dtype=torch.float64)
    head = torch.randn(16, VOCAB_SIZE, dtype=torch.float64)
    frames = torch.randn(4, 31, 16, dtype=torch.float64)  # what lies behind a row's end is not zero
    lengths = torch.tensor([31, 20, 7, 1])

    def speech(frames, lengths):
        adapted, adapted_lengths = adapter(frames, lengths)
        ctc_logits = adapted @ head
        return project(adapted, adapted_lengths, CTCScores.of(ctc_logits), embeddings)

    together, together_lengths, together_positions = speech(frames, lengths)
    assert together_lengths.tolist() == [8, 5, 2, 1]
    for row, length in enumerate(lengths.tolist()):
        alone, (size,), positions = speech(frames[row : row + 1, :length], lengths[row : row + 1])
        assert torch.equal(together_positions[row, :size], positions[0])
        assert size == together_lengths[row] == alone.shape[1]
        torch.testing.assert_close(together[row, :size], alone[0])


@pytest.mark.parametrize("stacking", [1, 2, 3])
def test_what_ctc_reads_against_a_loop(stacking):
    config = tiny_config(ctc_lookahead=2)
    config.decoder_stacking = stacking
    project = projection(config)
    generator = torch.Generator().manual_seed(2)
    embeddings = torch.randn(VOCAB_SIZE, 32, generator=generator, dtype=torch.float64)
    logits = torch.randn(3, 11, VOCAB_SIZE, generator=generator, dtype=torch.float64) * 2
    logits[..., 5:] -= 4  # few tokens: repetitions
    logits[..., PAD] += 1  # and blanks
    lengths = torch.tensor([11, 6, 1])
    ctc = CTCScores.of(logits)
    read = project.read_ctc(ctc, project.best_tokens(ctc, lengths), lengths, embeddings)
    assert read.shape == (3, -(-11 // stacking), 32)
    for row, length in enumerate(lengths.tolist()):
        posterior = logits[row, :length].float().softmax(-1).double()
        best = posterior.argmax(-1).tolist()
        assert length == 1 or {PAD} < set(best)
        expected = [sum(posterior[t, v] * embeddings[v] for v in range(VOCAB_SIZE) if v != PAD) for t in range(length)]
        around = readings_around(best, [-1, 1, 2], PAD)
        together = []
        for t in range(length):
            before, *behind = around[t]
            following = [
                torch.zeros(LOOKAHEAD_SIZE) if place is None else project.following.weight @ expected[place]
                for place in behind
            ]
            together.append(
                expected[t]
                + (0 if before is None else project.previous.weight @ expected[before])
                + project.following_projection.weight @ torch.cat(following).double()
            )
        for u in range(read.shape[1]):
            parts = together[u * stacking : (u + 1) * stacking]
            torch.testing.assert_close(read[row, u], sum(parts, start=torch.zeros(32, dtype=torch.float64)))


def test_in_a_memory_every_frame_has_what_ctc_reads_around_it():
    config = tiny_config(ctc_lookahead=2, draft_layers=1)
    config.speech_as_memory = True
    project = projection(config)
    generator = torch.Generator().manual_seed(2)
    embeddings = torch.randn(VOCAB_SIZE, 32, generator=generator, dtype=torch.float64)
    logits = torch.randn(2, 9, VOCAB_SIZE, generator=generator, dtype=torch.float64)
    logits[..., 4:] -= 9
    logits[0, 0, PAD], lengths = 9, torch.tensor([9, 4])
    frames = torch.randn(2, 9, 16, generator=generator, dtype=torch.float64)
    config.decoder_stacking = project.stacking = 1
    project.projection = torch.nn.Linear(16, 32).double()
    both, _, _ = project(frames, lengths, CTCScores.of(logits), embeddings)
    for row, length in enumerate(lengths.tolist()):
        best = logits[row, :length].argmax(-1).tolist()
        assert torch.allclose(both[row, :length, :32], project.projection(frames[row, :length]))
        for t, around in enumerate(readings_around(best, [0, -1, 1, 2], PAD, everywhere=True)):
            own, before, *behind = (
                torch.zeros(32).double()
                if place is None
                else torch.nn.functional.rms_norm(embeddings[best[place]], (32,))
                for place in around
            )
            following = torch.cat([project.following(each) for each in behind])
            read = own + project.previous(before) + project.following_projection(following)
            expected = both[row, t, :32] + project.ctc_projection(read)
            torch.testing.assert_close(both[row, t, 32:], expected)


def test_only_ctc_in_prompt_reads_and_the_ctc_head_learns_from_its_own_loss_alone():
    config = tiny_config()
    generator = torch.Generator().manual_seed(4)
    frames = torch.randn(1, 6, 16, generator=generator)
    logits = torch.randn(1, 6, VOCAB_SIZE, generator=generator).requires_grad_()
    embeddings = torch.randn(VOCAB_SIZE, 32, generator=generator).requires_grad_()
    lengths = torch.tensor([6])
    with_reading, _, _ = projection(config, torch.float32)(frames, lengths, CTCScores.of(logits), embeddings)
    with_reading.sum().backward()
    assert logits.grad is None
    assert embeddings.grad.abs().sum(1)[BOS] > 0
    assert embeddings.grad[PAD].eq(0).all()  # the blank reads as nothing

    config.ctc_in_prompt, config.ctc_lookahead, config.ctc_positions = False, 0, False
    without = projection(config, torch.float32)
    assert [name for name, _ in without.named_parameters()] == ["projection.weight", "projection.bias"]
    plain, _, _ = without(frames, lengths, None, embeddings)
    assert torch.equal(plain, without.projection(frames.view(1, 3, 32)))
    assert not torch.allclose(plain, with_reading)
    assert without.read_tokens(embeddings, torch.zeros(1, VOCAB_SIZE)) is embeddings


@pytest.mark.parametrize("stacking", [1, 2, 3])
def test_positions_count_the_tokens_that_ctc_has_begun(stacking):
    config = tiny_config(ctc_positions=True)
    config.decoder_stacking = stacking
    ids = torch.randint(0, 4, (3, 13), generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([13, 8, 2])
    inputs = (
        torch.zeros(3, 13, 16, dtype=torch.float64),
        lengths,
        CTCScores.of(torch.nn.functional.one_hot(ids, VOCAB_SIZE).double()),
        torch.zeros(VOCAB_SIZE, 32, dtype=torch.float64),
    )
    _, places, positions = projection(config)(*inputs)
    for row, length in enumerate(lengths.tolist()):
        for place in range(int(places[row])):
            heard = ids[row : row + 1, : min(length, (place + 1) * stacking)]
            logits = torch.nn.functional.one_hot(heard, 4).float()
            (begun,) = greedy_ctc(CTCScores.of(logits), torch.tensor([heard.shape[1]]), blank=0)
            assert positions[row, place] == places[row] + max(0, len(begun) - 1)
    config.ctc_positions = False
    _, _, plain = projection(config)(*inputs)
    assert plain.tolist() == [list(range(-(-13 // stacking)))] * 3


def shared_ctc_head(config) -> SharedCTCHead:
    size = config.decoder_config.hidden_size
    return SharedCTCHead(config.adapter_size, size, blank_token_id=config.blank_token_id)


def test_a_shared_ctc_head_reads_tokens_through_the_unembedding_and_the_blank_by_itself():
    config = tiny_config()
    torch.manual_seed(0)
    head = shared_ctc_head(config).double()
    unembedding_VD = torch.randn(config.vocab_size, config.decoder_config.hidden_size, dtype=torch.float64)
    frames = torch.randn(2, 5, config.adapter_size, dtype=torch.float64, requires_grad=True)
    logits = head(frames, unembedding_VD)
    expected = head.projection(frames) @ unembedding_VD.T
    blank = config.blank_token_id
    tokens = [token for token in range(config.vocab_size) if token != blank]
    torch.testing.assert_close(logits[..., tokens], expected[..., tokens])
    torch.testing.assert_close(logits[..., blank], head.blank(frames)[..., 0])
    (gradient,) = torch.autograd.grad(logits[..., blank].sum(), frames)
    torch.testing.assert_close(gradient, head.blank.weight.expand_as(frames))


def test_a_shared_ctc_head_begins_with_what_the_decoders_norm_gives():
    config = tiny_config()
    head = shared_ctc_head(config)
    norm = torch.nn.RMSNorm(config.decoder_config.hidden_size)
    norm.weight.data.uniform_(0.5, 2)
    head.reset_from(norm)
    frames = torch.randn(3, config.adapter_size)
    projected = head.projection(frames) - head.projection.bias
    torch.testing.assert_close(projected[:, : config.adapter_size], frames * norm.weight[: config.adapter_size])


@pytest.mark.parametrize("size", [None, 1, 3, 7, 16, 100])
def test_logits_by_blocks_are_those_of_all_tokens(size):
    config = tiny_config()
    torch.manual_seed(4)
    head = shared_ctc_head(config).double().requires_grad_(False)
    unembedding = torch.randn(VOCAB_SIZE, config.decoder_config.hidden_size, dtype=torch.float64)
    frames = torch.randn(2, 9, config.adapter_size, dtype=torch.float64)
    blocks = sorted(head.blocks(frames, unembedding, size), key=lambda block: block[0])
    assert [first for first, _ in blocks] == list(range(0, VOCAB_SIZE, size or VOCAB_SIZE))
    torch.testing.assert_close(torch.cat([logits for _, logits in blocks], -1), head(frames, unembedding))


@pytest.mark.parametrize("size", [2, 5, VOCAB_SIZE, BLOCK_SIZE])
def test_what_is_read_by_blocks_against_all_logits(size, monkeypatch):
    """Equal logits lie in several blocks and in one: the first of them counts, as in `argmax`."""
    monkeypatch.setattr("leapasr.model.ctc_head.BLOCK_SIZE", size)
    generator = torch.Generator().manual_seed(5)
    logits = torch.randint(-3, 3, (3, 50, VOCAB_SIZE), generator=generator).double()
    spoken = torch.rand(3, 50, generator=generator) < 0.3

    def blocks(some, width):
        return reversed(list(zip(range(0, VOCAB_SIZE, width), some.split(width, -1), strict=True)))

    with torch.no_grad():
        ctc = CTCScores(logits, blocks)
        assert torch.equal(ctc.best_BT, logits.argmax(-1))
        expected = logits.softmax(-1).gather(-1, logits.argmax(-1)[..., None])[..., 0][spoken]
        torch.testing.assert_close(ctc.probabilities(spoken), expected)
        assert ctc.probabilities(torch.zeros_like(spoken)).shape == (0,)


def test_gradients_reach_the_head_through_all_logits():
    config = tiny_config()
    head = shared_ctc_head(config)
    frames = torch.randn(2, 9, config.adapter_size)
    unembedding = torch.randn(VOCAB_SIZE, config.decoder_config.hidden_size)
    ctc = CTCScores(frames, lambda some, size: head.blocks(some, unembedding, size))
    assert torch.equal(ctc.best_BT, head(frames, unembedding).argmax(-1))
    assert ctc.logits_BTV is ctc.logits_BTV
    ctc.logits_BTV.pow(2).mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())
