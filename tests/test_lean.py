"""What makes decoder calls short changes nothing: lean layers, packed weights, ids of the likeliest."""

import copy
import weakref

import psutil
import pytest
import torch
from test_decoding import MAX_TOKENS, make_prompts, scripted
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from leapasr.decoding import DecodingOptions, SpeechLlamaDecoder, decode
from leapasr.decoding.cache import RaggedCache
from leapasr.decoding.causal_lm import CausalLMDecoder
from leapasr.decoding.costs import steady
from leapasr.decoding.interface import Ways
from leapasr.decoding.lean import TABLE_SIZE, LeanLayers, _steady_attention
from leapasr.decoding.packing import LEFT_FREE, PACKINGS, Packer, pack, rounded
from leapasr.model.argmax import argmax
from leapasr.model.draft_layers import leave_out_feed_forward, read_hidden
from leapasr.model.low_rank import add_low_rank
from leapasr.model.retrofitting import set_heads

D = 32


def build_llama(seed=4, **fields):
    torch.manual_seed(seed)
    sizes = {"hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    config = LlamaConfig(vocab_size=64, initializer_range=0.3, eos_token_id=2, **{**sizes, **fields})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():  # norms and biases are nothing special otherwise
        if name.endswith(("norm.weight", "bias")):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def assert_reads_the_same(body, draft_layers, lean):
    """Three calls of uneven rows, of which only a part is committed, through both."""
    caches = RaggedCache(3), RaggedCache(3)
    for width, commit in ((6, [6, 2, 4]), (1, [1, 1, 1]), (5, [0, 5, 3]), (4, [4, 4, 4])):
        embeddings_BWD = torch.randn(3, width, D)
        found, expected = [], []
        for cache, hidden in zip(caches, (expected, found), strict=True):
            positions_BW, mask_B1WS = cache.plan(width, torch.float32)
            if hidden is found:
                hidden.append(lean(embeddings_BWD, positions_BW, mask_B1WS, cache, drafting=True))
            else:
                inputs = {"position_ids": positions_BW, "attention_mask": mask_B1WS, "past_key_values": cache}
                hidden.append(read_hidden(body, draft_layers, embeddings_BWD, **inputs, use_cache=True))
            cache.commit(commit)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        assert found[0].shape[-1] == (D if draft_layers is None else 2 * D)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_key_value_heads": 2},
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        {"head_dim": 12, "rms_norm_eps": 0.1},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}},
    ],
)
def test_lean_layers_are_transformers_layers(fields):
    body = build_llama(**fields).model
    assert LeanLayers.fit(body, None)
    assert_reads_the_same(body, None, LeanLayers(body, None))


def test_layers_without_feed_forward():
    body = build_llama().model
    leave_out_feed_forward(body.layers[:2])
    assert LeanLayers.fit(body, None)
    assert_reads_the_same(body, None, LeanLayers(body, None))


@pytest.mark.parametrize("num_draft_layers", [1, 2])  # of 2: they branch off before the decoder's first
def test_draft_layers(build_tiny_model, num_draft_layers):
    model = copy.deepcopy(build_tiny_model(dtype=torch.float32))
    set_heads(model, draft_layers=num_draft_layers, seed=1)
    for parameter in model.draft_layers.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    body = model.decoder.model
    lean = LeanLayers(body, model.draft_layers)
    assert LeanLayers.fit(body, model.draft_layers)
    assert_reads_the_same(body, model.draft_layers, lean)
    embeddings_BWD, positions_BW = torch.randn(1, 4, D), torch.arange(4)[None]
    mask_B1WS = torch.zeros(1, 1, 4, 4)
    both, alone = (lean(embeddings_BWD, positions_BW, mask_B1WS, None, drafting=each) for each in (True, False))
    assert torch.equal(both[..., :D], alone)


def test_what_lean_layers_do_not_fit(build_tiny_model):
    sizes = {"hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    other = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=64, intermediate_size=48, **sizes))
    assert not LeanLayers.fit(other.model, None)
    adapted = copy.deepcopy(build_tiny_model())
    add_low_rank(adapted.decoder, rank=2)
    assert not LeanLayers.fit(adapted.decoder.base_model, None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products(dtype, packing, bias):
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(72, 200, bias=bias).to(dtype).requires_grad_(False)
    packed = pack(linear, packing)
    for shape in [(1,), (2,), (3, 5), (1, 40), (7, 31), (300,), (0,), (2, 0)]:
        x = torch.randn(*shape, 72, generator=generator).to(dtype)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(packed(x), linear(x), **tolerance)
        if len(shape) > 1 and x.numel():
            torch.testing.assert_close(packed(x.transpose(0, 1)), linear(x.transpose(0, 1)), **tolerance)


@pytest.mark.parametrize("packing", PACKINGS)
def test_what_cannot_be_packed_stays(packing):
    linear = nn.Linear(8, 8, dtype=torch.float64)
    assert pack(linear, packing) is linear
    elsewhere = nn.Linear(8, 8, device="meta")
    assert pack(elsewhere, packing) is elsewhere


def test_copies_that_would_fill_the_memory_are_not_made(monkeypatch):
    linear, memory = nn.Linear(8, 8), psutil.virtual_memory()
    enough = LEFT_FREE + linear.weight.nbytes
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=enough))
    assert pack(linear, "onednn") is not linear
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=enough - 1))
    assert pack(linear, "onednn") is linear


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this PyTorch has no MKL")
@pytest.mark.parametrize("wrong_for", [1, 24])
def test_packed_weights_that_are_wrong_are_not_used(monkeypatch, wrong_for):
    real = torch.ops.mkl._mkl_linear

    def wrong(x, packed, weight, bias, num_rows):
        return real(x, packed, weight, bias, num_rows) + (0.01 if num_rows == wrong_for else 0.0)

    linear = nn.Linear(8, 8)
    assert pack(linear, "mkl") is not linear
    monkeypatch.setattr(torch.ops.mkl, "_mkl_linear", wrong)
    assert pack(linear, "mkl") is linear


@pytest.mark.parametrize("strategy", ["autoregressive", "verify", "threshold", "beam"])
@pytest.mark.parametrize("ways", [*map(Ways, PACKINGS), Ways("mkl", rough=True), Ways("onednn", rough=True)])
def test_packed_decoders_write_the_same(build_tiny_model, strategy, ways):
    fields = {"threshold": {"threshold": 0.02}, "beam": {"nbest": 4}}.get(strategy, {})
    drafts = None if strategy in ("autoregressive", "threshold") else "mtp"
    options = DecodingOptions(strategy=strategy, max_repeats=4, drafts=drafts, **fields)
    prompts, results = make_prompts(5, dtype=torch.float32), []
    for each in (Ways(), ways):
        decoder = SpeechLlamaDecoder(build_tiny_model(dtype=torch.float32))
        decoder.prepare(each)
        results.append(decode(decoder, prompts, options, max_tokens=[MAX_TOKENS] * 5))
    for plain, other in zip(*results, strict=True):
        assert other.tokens == plain.tokens


rounds = pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(),
    reason="this CPU has no AMX",
)


@rounds
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [64, 432, 1536])
def test_a_row_of_a_rounded_product_is_the_same_whatever_is_beside_it(size, bias):
    generator = torch.Generator().manual_seed(2)
    linears = [nn.Linear(size, num, bias=bias).requires_grad_(False) for num in (200, 72)]
    x = torch.randn(2, 50, size, generator=generator)
    product, (first, second) = rounded(linears), Packer(rounded=True).products(*linears)(x)
    found = product(x)
    assert torch.equal(torch.cat([first, second], -1), found)
    for num_rows in (1, 2, 31, 33, 77):
        rows = x.view(-1, size)[:num_rows]
        assert torch.equal(product(rows), found.view(-1, 272)[:num_rows])
    exact = torch.cat([linear.bfloat16()(x.bfloat16()).float() for linear in linears], -1)
    torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.02)


def build_rounding(build_tiny_model):
    model = copy.deepcopy(build_tiny_model(dtype=torch.float32))
    model.set_speech_dtype(torch.bfloat16)
    return SpeechLlamaDecoder(model)


@rounds
def test_a_rounding_decoder_is_steady():
    sizes = {"hidden_size": 64, "intermediate_size": 640, "num_key_value_heads": 2, "hidden_act": "gelu"}
    decoder = CausalLMDecoder(build_llama(**sizes), may_round=True)
    assert not steady(decoder)  # in float32 it is not
    decoder.prepare(Ways("onednn", rough=True, rounded=True))
    assert steady(decoder)
    plain = decoder._lean._layers[0].o
    decoder._lean._layers[0].o = lambda x: plain(x) * (1 + 0.01 * (x.shape[1] > 1))
    assert not steady(decoder)


@rounds
def test_attention_is_the_same_however_many_look():
    generator = torch.Generator().manual_seed(6)
    for num_slots in (112, 208, 512, 640):
        q, k, v = (torch.randn(2, 6, size, 72, generator=generator) for size in (100, num_slots, num_slots))
        mask_B1WS = torch.zeros(2, 1, 100, num_slots, dtype=torch.bfloat16)
        mask_B1WS.masked_fill_(torch.ones(100, num_slots).triu(num_slots - 99).bool(), torch.finfo(torch.bfloat16).min)
        k, v = k.bfloat16(), v.bfloat16()
        found = _steady_attention(q, k, v, mask_B1WS, enable_gqa=False)
        for first, width in [*((first, 1) for first in range(100)), (3, 2), (10, 40), (50, 13)]:
            places = slice(first, first + width)
            alone = _steady_attention(q[:, :, places], k, v, mask_B1WS[:, :, places], enable_gqa=False)
            assert torch.equal(alone, found[:, :, places]), (num_slots, first, width)
        exact = nn.functional.scaled_dot_product_attention(q, k.float(), v.float(), mask_B1WS.float())
        torch.testing.assert_close(found.float(), exact, rtol=0.03, atol=0.01)


@rounds
@pytest.mark.parametrize("rope", [{}, {"rope_type": "linear", "factor": 4.0}, {"rope_type": "dynamic", "factor": 4.0}])
def test_turns_from_tables(rope):
    llama = build_llama(rope_parameters={"rope_type": "default", "rope_theta": 100.0, **rope})
    decoder = CausalLMDecoder(llama, may_round=True)
    assert decoder.may_round == (rope.get("rope_type") != "dynamic")  # whose turns depend on the longest text so far
    if decoder.may_round:
        decoder.prepare(Ways(rounded=True))
        for positions in ([[3, 0]], [[5, TABLE_SIZE - 1], [TABLE_SIZE, 3 * TABLE_SIZE + 7]], [[2, 9]]):
            positions_BW = torch.tensor(positions)
            found = decoder._lean._turns(torch.zeros(1), positions_BW)
            for ours, theirs in zip(found, llama.model.rotary_emb(torch.zeros(1), positions_BW), strict=True):
                torch.testing.assert_close(ours, theirs)


@rounds
@pytest.mark.parametrize(("factor", "is_turning"), [(1e9, False), (1e6, True), (4.0, True)])
def test_positions_that_turn_nothing_are_left_out(factor, is_turning):
    """Of a LLaMA that was a Whisper: its positions are learnt, and what turns is made as good as still."""
    rope = {"rope_type": "linear", "factor": factor, "rope_theta": 100.0}
    body = build_llama(rope_parameters=rope, hidden_size=64, max_position_embeddings=2000).model
    lean = LeanLayers(body, None, Packer(rounded=True))
    assert lean._is_turning == is_turning
    assert LeanLayers(body, None)._is_turning
    embeddings_BWD = torch.randn(2, 12, 64)
    positions_BW = 160 * torch.arange(12).expand(2, 12)
    mask_B1WS = torch.zeros(1, 1, 12, 12).masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -1e30)
    found = lean(embeddings_BWD, positions_BW, mask_B1WS, None, drafting=False)
    expected = body(inputs_embeds=embeddings_BWD, position_ids=positions_BW, attention_mask=mask_B1WS).last_hidden_state
    assert (found - expected).norm() < 0.03 * expected.norm()


@rounds
@pytest.mark.parametrize("kind", ["right", "random", "mixed"])
def test_rounded_verification_writes_what_rounded_autoregressive_decoding_writes(build_tiny_model, kind):
    decoder, prompts = build_rounding(build_tiny_model), make_prompts(12, dtype=torch.float32)
    bounds = [MAX_TOKENS] * 12
    autoregressive = DecodingOptions(strategy="autoregressive", max_repeats=4)
    exact = decode(decoder, prompts, autoregressive, max_tokens=bounds)
    decoder.prepare(Ways("onednn", rough=True, rounded=True))
    expected = decode(decoder, prompts, autoregressive, max_tokens=bounds)
    sureness = [[record.log_probability for record in each[0].trace] for each in (exact, expected)]
    assert sureness[0] != sureness[1]  # it is another computation
    verify = DecodingOptions(strategy="verify", drafts="mtp", max_repeats=4)
    results = decode(decoder, prompts, verify, max_tokens=bounds, drafters=scripted(expected, kind, 7))
    assert [each.tokens for each in results] == [each.tokens for each in expected]


@rounds
def test_who_may_round(build_tiny_model):
    for model in (build_tiny_model(dtype=torch.float32), build_tiny_model()):
        decoder = SpeechLlamaDecoder(model)
        assert not decoder.may_round
        with pytest.raises(AssertionError):
            decoder.prepare(Ways(rounded=True))
    assert CausalLMDecoder(build_llama(), may_round=True).may_round
    assert not CausalLMDecoder(build_llama().bfloat16(), may_round=True).may_round


@rounds
def test_no_rounding_without_room(monkeypatch):
    llama, memory = build_llama(), psutil.virtual_memory()
    num_bytes = sum(each.nbytes for each in llama.parameters()) // 2
    for missing in (0, 1):
        room = memory._replace(available=LEFT_FREE + num_bytes - missing)
        monkeypatch.setattr(psutil, "virtual_memory", lambda room=room: room)
        assert CausalLMDecoder(llama, may_round=True).may_round == (not missing)


def test_copies_of_earlier_ways_are_let_go_before_new_ones_are_made(build_tiny_model, monkeypatch):
    decoder = SpeechLlamaDecoder(build_tiny_model(dtype=torch.float32))
    decoder.prepare(Ways("onednn", rough=True))
    earlier = [weakref.ref(each) for each in (decoder._lean, decoder._rough)]
    real, held = Packer.product, []

    def product(packer, linear):
        held.extend(each() is not None for each in earlier)
        return real(packer, linear)

    monkeypatch.setattr(Packer, "product", product)
    decoder.prepare(Ways("mkl", rough=True))
    assert held
    assert not any(held)


def test_ways_can_be_taken_back(build_tiny_model):
    decoder = CausalLMDecoder(build_llama())
    hidden = torch.randn(2, 5, D)
    before = decoder.logits(hidden, exact=False)
    decoder.prepare(Ways("onednn", rough=True))
    assert not torch.equal(decoder.logits(hidden, exact=False), before)
    decoder.prepare(Ways())
    assert torch.equal(decoder.logits(hidden, exact=False), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_argmax_is_the_first_of_the_likeliest(dtype):
    logits = torch.randn(3, 30, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1, 2, [70, 30, 400]] = 9.0
    logits[1, 3] = -logits[1, 3].abs() - 1
    logits[1, 4] = -logits[1, 4].abs() - 1
    logits[1, 4, 20], logits[1, 4, 90] = -0.0, 0.0
    logits[1, 5, 60] = torch.inf
    logits[1, 6, 80] = torch.nan
    assert argmax(logits)[1, 2] == 30
    assert torch.equal(argmax(logits), logits.argmax(-1))
    assert torch.equal(argmax(logits.transpose(0, 1)), logits.transpose(0, 1).argmax(-1))
    assert argmax(logits[:0]).shape == (0, 30)
    assert argmax(logits).dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_argmax_above_what_is_known(dtype):
    """Where nothing is larger the answer does not matter; where something is it must be right."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 200, 30, generator=generator).to(dtype) - 1.5
    above = torch.randn(4, 200, generator=generator).to(dtype)
    is_larger = logits.amax(-1) > above
    assert 100 < is_larger.sum() < 700
    assert (is_larger & (logits.amax(-1) < 0)).any()
    assert torch.equal(argmax(logits, above=above)[is_larger], logits.argmax(-1)[is_larger])
