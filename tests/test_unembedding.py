"""Rough logits: the likeliest token is the very one of exact logits, however close others come."""

import pytest
import torch
from test_decoding import MAX_TOKENS, make_prompts
from torch import nn

from leapasr.decoding import DecodingOptions, SpeechLlamaDecoder, decode
from leapasr.decoding.interface import Ways
from leapasr.decoding.unembedding import NUM_CANDIDATES, RoughUnembedding
from leapasr.model.argmax import BLOCK, top

D, V = 64, 500


def build(dtype=torch.float32, *, bias=True, spread=1.0):
    """An unembedding whose rows differ by `spread` of their size."""
    generator = torch.Generator().manual_seed(1)
    unembedding = nn.Linear(D, V, bias=bias, dtype=dtype).requires_grad_(False)
    common = torch.randn(1, D, generator=generator, dtype=dtype)
    unembedding.weight.copy_(common + spread * torch.randn(V, D, generator=generator, dtype=dtype))
    if bias:
        unembedding.bias.copy_(spread * torch.randn(V, generator=generator, dtype=dtype))
    return unembedding


def states(*shape, dtype=torch.float32):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(2), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3, 1e-4])  # from clear winners to many within rounding
def test_the_likeliest_is_exact(dtype, bias, spread):
    unembedding, hidden = build(dtype, bias=bias, spread=spread), states(40, 5, dtype=dtype)
    rough = RoughUnembedding(unembedding)
    exact, found = unembedding(hidden), rough.logits(hidden)
    assert found.dtype == dtype
    assert torch.equal(found.argmax(-1), exact.argmax(-1))
    assert torch.allclose(found.amax(-1), exact.amax(-1), rtol=1e-4)
    if spread <= 1e-2:
        assert (rough.rough(hidden).argmax(-1) != exact.argmax(-1)).any()  # it was close


@pytest.mark.parametrize("vocabulary", [1, 9, 8 * BLOCK, 9 * BLOCK, 9 * BLOCK + 1, 5003])
@pytest.mark.parametrize("number", [1, 3, 8])
def test_the_top_of_a_vocabulary_is_found(vocabulary, number):
    number = min(number, vocabulary)
    logits = torch.rand(40, 2, vocabulary, generator=torch.Generator().manual_seed(3))
    assert torch.equal(top(logits, number), logits.topk(number).indices)
    rounded = (9 * logits).round()  # of equals any will do
    assert torch.equal(rounded.gather(-1, top(rounded, number)), rounded.topk(number).values)


def test_what_is_not_likely_is_rough():
    unembedding, hidden = build(), states(30)
    rough = RoughUnembedding(unembedding)
    exact, found = unembedding(hidden), rough.logits(hidden)
    same = torch.isclose(found, exact, rtol=1e-5, atol=1e-5).sum(-1)
    assert (same >= NUM_CANDIDATES).all()
    assert (same < V).all()
    assert (found - exact).abs().max() < 0.1 * exact.abs().max()


def test_no_logit_is_further_off_than_is_said():
    for spread in (1.0, 1e-2):
        unembedding, hidden = build(spread=spread), states(200) * torch.logspace(-2, 2, 200)[:, None]
        rough = RoughUnembedding(unembedding)
        logits = rough.rough(hidden)
        error = (logits - unembedding(hidden)).abs().amax(-1)
        assert (error <= rough.error(hidden)).all()


def test_a_vocabulary_smaller_than_the_candidates():
    unembedding = nn.Linear(D, 3).requires_grad_(False)
    hidden = states(20)
    assert torch.allclose(RoughUnembedding(unembedding).logits(hidden), unembedding(hidden), atol=1e-5)


@pytest.mark.parametrize("strategy", ["autoregressive", "verify", "threshold", "relaxed", "beam"])
@pytest.mark.parametrize("head_type", ["latent", "sequential"])
def test_rough_logits_change_no_token(build_tiny_model, strategy, head_type):
    fields = {"threshold": {"threshold": 0.02}, "relaxed": {"ratio": 0.3}, "beam": {"nbest": 4}}.get(strategy, {})
    drafts = None if strategy in ("autoregressive", "threshold") else "mtp"
    options = DecodingOptions(strategy=strategy, max_repeats=4, drafts=drafts, **fields)
    prompts, results = make_prompts(5), []
    for rough in (False, True):
        decoder = SpeechLlamaDecoder(build_tiny_model(head_type=head_type))
        decoder.prepare(Ways(rough=rough))
        results.append(decode(decoder, prompts, options, max_tokens=[MAX_TOKENS] * 5))
    for exact, other in zip(*results, strict=True):
        assert other.tokens == exact.tokens
        assert [each.tokens for each in other.hypotheses] == [each.tokens for each in exact.hypotheses]
        assert [each.score for each in other.hypotheses] == [each.score for each in exact.hypotheses]
