"""Speech LLMs of transformers, tiny and with random weights, in the decoding loop beside their own `generate`."""

import copy
import random

import pytest
import torch
from test_decoding import ScriptedDrafter, outcomes
from transformers import (
    GraniteSpeechConfig,
    GraniteSpeechForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen3ASRConfig,
    Qwen3ASRForConditionalGeneration,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from leapasr.decoding import DecodingLoop, DecodingOptions, decode
from leapasr.decoding.reference import decode_reference, full_forward
from leapasr.decoding.speech_llms import SpeechLLMDecoder
from leapasr.model.mtp_heads import new_heads

V, AUDIO, EOS, MOST = 64, 60, 2, 24
AUTOREGRESSIVE = DecodingOptions(strategy="autoregressive", max_repeats=None)
VERIFY = DecodingOptions(max_repeats=None)
TEXT = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": EOS, "bos_token_id": 1,
    "pad_token_id": 0, "head_dim": 8,
}  # fmt: skip
WHISPER_LIKE = {
    "num_mel_bins": 8, "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "max_source_positions": 16,
}  # fmt: skip
KINDS = ("right", "wrong", "random", "end inside", "empty")


def granite():
    config = GraniteSpeechConfig(
        text_config={"model_type": "granite", **TEXT},
        encoder_config={
            "input_dim": 8, "num_layers": 1, "hidden_dim": 16, "num_heads": 2, "dim_head": 8, "output_dim": 6,
            "context_size": 8, "max_pos_emb": 16, "conv_kernel_size": 3,
        },
        projector_config={
            "model_type": "blip_2_qformer", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32, "encoder_hidden_size": 16,
        },
        audio_token_index=AUDIO, downsample_rate=2, window_size=4, has_lora_adapter=False, tie_word_embeddings=False,
    )  # fmt: skip
    # windows of 4 frames become 2 embeddings each
    return GraniteSpeechForConditionalGeneration, config, (16, 8), 8, {}


def qwen3_asr():
    audio = {key: value for key, value in WHISPER_LIKE.items() if key != "max_source_positions"}
    config = Qwen3ASRConfig(
        audio_config={**audio, "n_window": 50, "n_window_infer": 100, "output_dim": 32, "downsample_hidden_size": 8},
        text_config={"model_type": "qwen3", **TEXT}, audio_token_id=AUDIO, pad_token_id=0, eos_token_id=EOS,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3ASRForConditionalGeneration, config, (8, 100), 13, {"input_features_mask": torch.ones(1, 100).long()}


def voxtral():
    audio = {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_mel_bins": 8, "max_source_positions": 16, "head_dim": 8,
    }  # fmt: skip
    config = VoxtralConfig(audio_config=audio, text_config={"model_type": "llama", **TEXT}, audio_token_id=AUDIO)
    return VoxtralForConditionalGeneration, config, (8, 32), 4, {}


def qwen2_audio():
    config = Qwen2AudioConfig(
        audio_config=WHISPER_LIKE, text_config={"model_type": "qwen2", **TEXT}, audio_token_index=AUDIO
    )
    return Qwen2AudioForConditionalGeneration, config, (8, 32), 8, {"feature_attention_mask": torch.ones(1, 32).long()}


MODELS = {"granite_speech": granite, "qwen3_asr": qwen3_asr, "voxtral": voxtral, "qwen2_audio": qwen2_audio}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """A model, and a function that gives inputs of so many rows, padded on the left."""
    kind, config, shape, num_audio, further = MODELS[request.param]()
    torch.manual_seed(0)
    model = kind(config).double().eval().requires_grad_(False)  # a random model often hesitates between two tokens
    generator = torch.Generator().manual_seed(1)
    for parameter in model.get_decoder().parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5, generator=generator)
    model.get_input_embeddings().weight.normal_(0, 1, generator=generator)
    model.get_output_embeddings().weight.normal_(0, 0.3, generator=generator)
    model.get_output_embeddings().weight[EOS] *= 1.5
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, 0

    def inputs(num_rows: int) -> dict[str, torch.Tensor]:
        chance, audio = random.Random(2), torch.Generator().manual_seed(3)
        rows = [
            [1, *[AUDIO] * num_audio, *[chance.randrange(3, 50) for _ in range(chance.randrange(1, 5))]]
            for _ in range(num_rows)
        ]
        size = max(map(len, rows))
        features = torch.randn(num_rows, *shape, generator=audio, dtype=torch.float64)
        return {
            "input_ids": torch.tensor([[0] * (size - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (size - len(row)) + [1] * len(row) for row in rows]),
            "input_features": features,
            **{name: value.expand(num_rows, -1) for name, value in further.items()},
        }

    return model, inputs


def decoder_of(model) -> SpeechLLMDecoder:
    torch.manual_seed(4)
    return SpeechLLMDecoder(model, new_heads("residual", 4, 32, V).to(model.dtype).requires_grad_(False))


def generated(model, inputs) -> list[list[int]]:
    written = model.generate(**inputs, do_sample=False, max_new_tokens=MOST)
    rows = written[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_rows", range(1, 8))
def test_greedy_decoding_writes_what_generate_writes(case, num_rows, dtype):
    model, inputs = case
    model = copy.deepcopy(model).to(dtype)
    decoder = decoder_of(model)
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs(num_rows).items()}
    prompts, expected = decoder.prompts(**given), generated(model, given)
    for options in (AUTOREGRESSIVE, VERIFY):
        results = decode(decoder, prompts, options, max_tokens=[MOST] * num_rows)
        assert [result.tokens for result in results] == expected
    if num_rows == 7:
        assert len({tuple(row) for row in expected}) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_verification_is_exact_whatever_the_drafts(case, kind):
    model, inputs = case
    decoder = decoder_of(model)
    prompts = decoder.prompts(**inputs(5))
    references = decode_reference(decoder, prompts, AUTOREGRESSIVE, max_tokens=[MOST] * 5)
    assert outcomes(decode(decoder, prompts, AUTOREGRESSIVE, max_tokens=[MOST] * 5)) == outcomes(references)
    chance = random.Random(0)
    corrupted = {
        "right": lambda token, j: token,
        "wrong": lambda token, j: (token + 1) % V,
        "random": lambda token, j: chance.randrange(V),
        "end inside": lambda token, j: EOS if j == 1 else token,
        "empty": lambda token, j: token,
    }[kind]
    scripts = [[record.token for record in result.trace] for result in references]
    drafters = [ScriptedDrafter(script, 0 if kind == "empty" else 4, corrupted) for script in scripts]
    assert outcomes(decode(decoder, prompts, VERIFY, drafters=drafters, max_tokens=[MOST] * 5)) == outcomes(references)
    threshold = DecodingOptions(strategy="threshold", threshold=1.0, max_repeats=None)
    assert outcomes(decode(decoder, prompts, threshold, max_tokens=[MOST] * 5)) == outcomes(references)


def test_a_row_gets_what_it_gets_alone_and_may_join_late(case):
    model, inputs = case
    decoder = decoder_of(model)
    prompts = decoder.prompts(**inputs(5))
    alone = [decode(decoder, prompts.row(row), VERIFY, max_tokens=[MOST])[0] for row in range(5)]
    loop = DecodingLoop(decoder, VERIFY)
    keys = loop.add(prompts.select([0, 1, 2]), max_tokens=[MOST] * 3)
    results = loop.step() | loop.step()
    keys += loop.add(prompts.select([4, 3]), max_tokens=[MOST] * 2)
    while loop:
        results |= loop.step()
    assert outcomes(results[key] for key in keys) == outcomes(alone[row] for row in (0, 1, 2, 4, 3))


def test_a_cached_forward_pass_equals_a_full_one_at_every_split_point(case):
    model, inputs = case
    decoder = decoder_of(model)
    prompt = decoder.prompts(**inputs(1)).row(0)
    embeddings = prompt.embeddings_BLD
    full, size = full_forward(decoder, prompt, embeddings[0, :0]), embeddings.shape[1]
    for split in range(1, size):
        cache = decoder.new_cache(prompt)
        first = decoder.call(embeddings[:, :split], *cache.plan(split, decoder.dtype), cache)
        cache.commit([split])
        second = decoder.call(embeddings[:, split:], *cache.plan(size - split, decoder.dtype), cache)
        torch.testing.assert_close(torch.cat([first, second], 1)[0], full, rtol=1e-4, atol=1e-5)


def test_head_1_is_the_models_own_bit_for_bit(case):
    model, inputs = case
    decoder, given = decoder_of(model), inputs(1)
    hidden = decoder.call(
        decoder.prompts(**given).embeddings_BLD,
        *decoder.new_cache(decoder.prompts(**given)).plan(given["input_ids"].shape[1], decoder.dtype),
        None,
    )
    assert torch.equal(decoder.logits(hidden), model.get_output_embeddings()(hidden))
    torch.testing.assert_close(decoder.logits(hidden)[0], model(**given).logits[0], rtol=1e-4, atol=1e-5)


def test_other_models_are_refused():
    config = WhisperConfig(
        vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="'whisper' is no speech LLM"):
        SpeechLLMDecoder(WhisperForConditionalGeneration(config))
