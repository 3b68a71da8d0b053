import math

import pytest
import torch
from torch.nn import functional as F

from leapasr.training.losses import IGNORED, ctc_loss, mtp_loss, shifted_labels, with_slips

EOS, VOCAB_SIZE = 2, 13


def batch(lengths, *, seed=0):
    """Texts of `lengths` whose padding is an ordinary token: a loss that reads it goes wrong."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, VOCAB_SIZE, (len(lengths), max(lengths)), generator=generator)
    return text, torch.tensor(lengths)


def random_logits(text, num_heads):
    generator = torch.Generator().manual_seed(7)
    B, M = text.shape
    return [torch.randn(B, M + 1, VOCAB_SIZE, generator=generator, dtype=torch.float64) for _ in range(num_heads)]


def slow_labels(text, length, head):
    """Label of every position of one row: the token `head` places ahead, end-of-text included, nothing behind it."""
    whole = [*text[:length].tolist(), EOS]
    return [whole[u + head - 1] if u + head - 1 < len(whole) else IGNORED for u in range(len(text) + 1)]


def test_labels_written_out():
    text, lengths = torch.tensor([[5, 6, 7, 8], [9, 9, 4, 4], [3, 3, 3, 3]]), torch.tensor([4, 2, 0])
    x = IGNORED
    for head, labels in {
        1: [[5, 6, 7, 8, EOS], [9, 9, EOS, x, x], [EOS, x, x, x, x]],
        2: [[6, 7, 8, EOS, x], [9, EOS, x, x, x], [x, x, x, x, x]],
        3: [[7, 8, EOS, x, x], [EOS, x, x, x, x], [x, x, x, x, x]],
        5: [[EOS, x, x, x, x], [x, x, x, x, x], [x, x, x, x, x]],
        6: [[x] * 5] * 3,
        9: [[x] * 5] * 3,
    }.items():
        assert shifted_labels(text, lengths, head=head, end_token_id=EOS).tolist() == labels, head


@pytest.mark.parametrize("head", range(1, 12))
def test_labels_of_every_head_at_every_length(head):
    text, lengths = batch(list(range(9)))
    labels = shifted_labels(text, lengths, head=head, end_token_id=EOS)
    assert labels.shape == (9, 9)
    for row, length in enumerate(lengths.tolist()):
        assert labels[row].tolist() == slow_labels(text[row], length, head)
        # a head that looks `head` tokens ahead has one label fewer for each token it skips, and ends on end-of-text
        taught = labels[row][labels[row] != IGNORED]
        assert len(taught) == max(0, length + 2 - head)
        assert not len(taught) or taught[-1] == EOS


@pytest.mark.parametrize("lengths", [[6, 3, 0, 1], [0, 0], [1]])
def test_mtp_loss_against_a_loop(lengths):
    text, lengths_B = batch(lengths)
    head_logits = random_logits(text, 5)
    weights = (1.0, 0.5, 0.25, 2.0, 0.125)
    total, losses, accuracies = mtp_loss(head_logits, text, lengths_B, weights=weights, end_token_id=EOS)
    expected_total = 0.0
    for head, logits in enumerate(head_logits, 1):
        surprises, hits = [], []
        for row, length in enumerate(lengths):
            for u, label in enumerate(slow_labels(text[row], length, head)):
                if label != IGNORED:
                    scores = logits[row, u].tolist()
                    surprises.append(math.log(sum(map(math.exp, scores))) - scores[label])
                    hits.append(scores.index(max(scores)) == label)
        expected = sum(surprises) / len(surprises) if surprises else 0.0
        assert losses[head - 1].item() == pytest.approx(expected, rel=1e-5)
        assert accuracies[head - 1].item() == pytest.approx(sum(hits) / max(1, len(hits)))
        expected_total += weights[head - 1] * expected
    assert total.item() == pytest.approx(expected_total, rel=1e-5)


def test_padding_and_later_positions_carry_no_gradient():
    text, lengths = batch([6, 3, 0])
    head_logits = [logits.requires_grad_() for logits in random_logits(text, 4)]
    total, *_ = mtp_loss(head_logits, text, lengths, weights=(1, 1, 1, 1), end_token_id=EOS)
    total.backward()
    for head, logits in enumerate(head_logits, 1):
        taught = logits.grad.abs().sum(-1) > 0
        for row, length in enumerate([6, 3, 0]):
            assert taught[row].tolist() == [u + head <= length + 1 for u in range(7)]
    changed = text.clone()
    changed[1, 3:], changed[2] = 4, 5
    again, *_ = mtp_loss(head_logits, changed, lengths, weights=(1, 1, 1, 1), end_token_id=EOS)
    assert again.item() == total.item()


def test_a_text_that_no_head_but_the_first_reaches_still_has_a_gradient():
    text, lengths = batch([0])
    text = torch.full((1, 1), 5)
    head_logits = [logits.requires_grad_() for logits in random_logits(text, 4)]
    total, losses, accuracies = mtp_loss(head_logits, text, lengths, weights=(1, 1, 1, 1), end_token_id=EOS)
    assert total == losses[0] > 0
    assert [loss.item() for loss in losses[1:]] == [accuracy.item() for accuracy in accuracies[1:]] == [0, 0, 0]
    total.backward()
    assert all(logits.grad.eq(0).all() for logits in head_logits[1:])


def ctc_batch(text_lengths, frame_lengths):
    generator = torch.Generator().manual_seed(1)
    text, _ = batch(text_lengths)
    logits = torch.randn(len(text_lengths), max(frame_lengths), VOCAB_SIZE, generator=generator) * 2
    return logits.requires_grad_(), torch.tensor(frame_lengths), text, torch.tensor(text_lengths)


def rows(logits, frames, text, lengths):
    """torch's own CTC loss of every row by itself, without padding."""
    for row, num_frames, ids, length in zip(logits, frames, text, lengths, strict=True):
        log_probs = row[:num_frames, None].log_softmax(-1)
        yield F.ctc_loss(log_probs, ids[None, :length], [num_frames], [length], blank=0, reduction="sum")


def test_ctc_loss_is_the_rows_sum_per_token():
    logits, frames, text, lengths = ctc_batch([5, 3, 0, 1], [20, 11, 4, 30])
    loss = ctc_loss(logits, frames, text, lengths, blank=0)
    assert loss.item() == pytest.approx(sum(row.item() for row in rows(logits, frames, text, lengths)) / 9, rel=1e-5)
    loss.backward()
    behind = torch.arange(30)[None] >= frames[:, None]
    assert logits.grad[behind].eq(0).all()
    assert logits.grad[~behind].abs().sum(-1).gt(0).all()
    changed = logits.detach().masked_fill(behind[..., None], 9.0)
    assert ctc_loss(changed, frames, text, lengths, blank=0).item() == loss.item()
    assert ctc_loss(logits, frames, text, lengths, blank=1).item() != loss.item()


def test_a_text_too_long_for_its_frames_gives_no_gradient():
    logits, frames, text, lengths = ctc_batch([5, 3], [4, 11])
    too_long, other = rows(logits, frames, text, lengths)
    assert too_long.item() == math.inf
    loss = ctc_loss(logits, frames, text, lengths, blank=0)
    assert loss.item() == pytest.approx(other.item() / 8, rel=1e-5)
    loss.backward()
    assert logits.grad[0].eq(0).all()
    assert logits.grad[1].abs().sum() > 0


def test_losses_are_computed_in_float32():
    text, lengths = batch([6, 3])
    head_logits = [logits.bfloat16() for logits in random_logits(text, 2)]
    total, losses, _ = mtp_loss(head_logits, text, lengths, weights=(1, 1), end_token_id=EOS)
    assert {total.dtype, *(loss.dtype for loss in losses)} == {torch.float32}
    wide, *_ = mtp_loss([x.float() for x in head_logits], text, lengths, weights=(1, 1), end_token_id=EOS)
    assert total.item() == wide.item()
    logits, *rest = ctc_batch([5, 3], [14, 11])
    assert ctc_loss(logits.bfloat16(), *rest, blank=0) == ctc_loss(logits.bfloat16().float(), *rest, blank=0)


def test_slips_repeat_the_token_before_or_are_any_token():
    torch.manual_seed(0)
    text = torch.randint(10, 1000, (200, 50))
    read = with_slips(text, 0.2, vocab_size=1000)
    slipped = read != text
    before = torch.cat([text[:, :1], text[:, :-1]], 1)
    assert slipped[:, 1:].float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert (read == before)[slipped].float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert read[slipped & (read != before)].unique().numel() > 300
    assert torch.equal(with_slips(text, 0.0, vocab_size=1000), text)
