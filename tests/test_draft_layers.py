"""Draft layers: what heads 2..K read through layers of their own, in training and, piece by piece, in decoding."""

import copy

import pytest
import torch
from conftest import tiny_config
from transformers import Qwen3Config

from leapasr.decoding import DecodingOptions, Prompts, SpeechLlamaDecoder, decode
from leapasr.decoding.reference import decode_reference
from leapasr.model.configuration import SpeechLlamaConfig
from leapasr.model.retrofitting import set_heads
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration

OPTIONS = DecodingOptions(strategy="verify", drafts="mtp", max_tokens=24)


def disturb(model, seed: int = 3) -> None:
    """Lead the draft layers away from the decoder's."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.draft_layers.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += (0.1 * noise).to(parameter.dtype)


@pytest.fixture
def model(build_tiny_model):
    """The tiny random model with a draft layer that is not the decoder's any more; heads agree with head 1 at times."""
    model = copy.deepcopy(build_tiny_model())
    model.mtp_heads.reset_from(model.get_output_embeddings())
    set_heads(model, draft_layers=1, seed=1)
    disturb(model)
    return model.requires_grad_(False)


def speech(model, num_rows: int = 8):
    generator = torch.Generator().manual_seed(5)
    audio = torch.randn(num_rows, 100, 8, generator=generator, dtype=torch.float64)
    encoding = model.encode(audio, torch.randint(30, 101, (num_rows,), generator=generator))
    return encoding, Prompts(*model.prompt(encoding))


@pytest.mark.parametrize("draft_layers", [1, 2])
@pytest.mark.parametrize("head_type", ["projection", "latent", "residual", "sequential"])
def test_they_begin_as_the_decoders(build_tiny_model, head_type, draft_layers):
    before = build_tiny_model(head_type=head_type)
    model = copy.deepcopy(before)
    set_heads(model, draft_layers=draft_layers, seed=1)
    text = torch.randint(48, (2, 6))
    audio, lengths = torch.randn(2, 60, 8, dtype=torch.float64), torch.tensor([60, 41])
    wanted, found = (each(audio, lengths, text).head_logits for each in (before, model))
    for one, other in zip(wanted, found, strict=True):
        assert torch.equal(one, other)
    disturb(model)
    disturbed = model(audio, lengths, text).head_logits
    assert torch.equal(disturbed[0], wanted[0])
    for one, other in zip(wanted[1:], disturbed[1:], strict=True):
        assert not torch.allclose(one, other)


@torch.no_grad()
class GuessesAlone:
    """Drafts what the heads say behind the text itself, and hears nothing of what becomes of it."""

    def propose(self, emitted, guesses):
        return guesses

    def review(self, verdicts, num_accepted, further):
        pass


def test_decoding_drafts_what_training_predicts(model):
    """Every rejected draft is what its head says, teacher forced, at the place where it was drafted."""
    encoding, prompts = speech(model)
    decoder = SpeechLlamaDecoder(model)
    results = decode(decoder, prompts, OPTIONS, drafters=[GuessesAlone() for _ in prompts.lengths_B])
    assert [r.tokens for r in results] == [r.tokens for r in decode_reference(decoder, prompts, OPTIONS)]
    assert any(result.num_calls < len(result.trace) - 1 for result in results)  # some drafts stood
    num_rejected = 0
    for row, result in enumerate(results):
        text = torch.tensor([[record.token for record in result.trace]])
        prefix = tuple(part[row : row + 1] for part in encoding.prefix)
        logits = [each.softmax(-1)[0] for each in model.read_text(*prefix, text)]
        for place, record in enumerate(result.trace):
            if record.rejected is None:
                continue
            num_rejected += 1
            head = int(record.rejected.source.removeprefix("head"))
            said_V = logits[head - 1][place - head + 1]
            assert int(said_V.argmax()) == record.rejected.token
            assert float(said_V.max()) == pytest.approx(record.rejected.probability, abs=1e-6)
    assert num_rejected > 20


def test_any_llama_like_decoder_has_them():
    decoder = Qwen3Config(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    fields = {"adapter_size": 16, "adapter_layers": 1, "adapter_attention_heads": 2, "adapter_ffn_size": 32}
    torch.manual_seed(0)
    config = SpeechLlamaConfig(tiny_config().encoder_config, decoder, draft_layers=2, **fields)
    model = SpeechLlamaForConditionalGeneration(config).double().eval().requires_grad_(False)
    assert model.draft_layers.branching == 1
    _, prompts = speech(model, num_rows=2)
    decoder = SpeechLlamaDecoder(model)
    wanted = decode_reference(decoder, prompts, OPTIONS)
    assert [r.tokens for r in decode(decoder, prompts, OPTIONS)] == [r.tokens for r in wanted]


def test_they_are_saved_and_loaded(model, tmp_path):
    for weights in ("float", "int8"):
        model.save_pretrained(tmp_path / weights, weights=weights)
        again = SpeechLlamaForConditionalGeneration.from_pretrained(tmp_path / weights).double()
        assert again.config.draft_layers == 1
        for name, value in model.draft_layers.state_dict().items():
            assert torch.allclose(
                again.draft_layers.state_dict()[name], value, atol=1e-6 if weights == "float" else 0.1
            )


def test_they_come_and_go(model):
    trained = model.draft_layers
    set_heads(model, num_heads=3, seed=1)
    assert model.draft_layers is trained
    set_heads(model, draft_layers=2, seed=1)
    assert model.draft_layers.branching == 0
    set_heads(model, num_heads=1, seed=1)
    assert (model.draft_layers, model.mtp_heads, model.config.draft_layers) == (None, None, 0)


@pytest.mark.parametrize("fields", [{"draft_layers": 3}, {"draft_layers": -1}, {"draft_layers": 1, "num_heads": 1}])
def test_numbers_that_cannot_be(fields):
    with pytest.raises(ValueError, match=r"draft_layers must be from 0 to the decoder's 2 layers.*got"):
        tiny_config(**fields)


def test_who_asks_no_further_head_does_without_them(model, monkeypatch):
    _, prompts = speech(model)
    calls = []
    inner = model.draft_layers.forward
    monkeypatch.setattr(model.draft_layers, "forward", lambda *args, **given: calls.append(1) or inner(*args, **given))
    for strategy, drafts in (("autoregressive", None), ("verify", "mtp"), ("beam", "mtp")):
        options = DecodingOptions(strategy=strategy, drafts=drafts, max_tokens=24)
        decode(SpeechLlamaDecoder(model), prompts, options)
        assert bool(calls) == (strategy != "autoregressive")
        calls.clear()
    decode(SpeechLlamaDecoder(model), prompts, DecodingOptions(strategy="beam", drafts="mtp", num_heads=1))
    assert not calls
