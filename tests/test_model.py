import copy
from dataclasses import replace

import pytest
import torch
from conftest import BOS, EOS, PAD, VOCAB_SIZE, tiny_config
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ParakeetEncoder,
    ParakeetEncoderConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    WhisperConfig,
    WhisperModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from leapasr.config import ModelPreset
from leapasr.decoding import DecodingOptions, Prompts, SpeechLlamaDecoder, decode
from leapasr.model.building import build_model, build_processor, padding_token
from leapasr.model.checkpoints import CheckpointError
from leapasr.model.configuration import HEAD_TYPES, SpeechLlamaConfig
from leapasr.model.encoders import ParakeetSpeechEncoder, WhisperSpeechEncoder, average_pairs, build_encoder
from leapasr.model.low_rank import add_low_rank, freeze_adapted, has_low_rank
from leapasr.model.mtp_heads import build_heads
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration, join_rows
from leapasr.training.tokenizer import train_tokenizer

TEXTS = ["the cat sat on the mat", "Where is the dog, then?", "It's a long, long way to go."] * 3
ADAPTER = {"adapter_size": 16, "adapter_layers": 1, "adapter_attention_heads": 2, "adapter_ffn_size": 32}
WHISPER = {
    "num_mel_bins": 8, "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "max_source_positions": 64,
    "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
PARAKEET = {
    "num_mel_bins": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "subsampling_conv_channels": 4, "max_position_embeddings": 128,
}  # fmt: skip
LM = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
DECODERS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=100)


def saved_decoder(folder, name, tokenizer, **fields):
    config_class, model_class = DECODERS[name]
    torch.manual_seed(3)
    special = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    model = model_class(config_class(**{"vocab_size": len(tokenizer)} | LM | special | fields))
    nn.init.normal_(model.lm_head.weight, 0, 0.3)
    model.save_pretrained(folder)
    return model


def inputs(model, *, num_rows=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    bins = model.config.encoder_config.num_mel_bins
    features = torch.randn(num_rows, 90, bins, generator=generator, dtype=torch.float64).to(dtype)
    lengths = torch.tensor([90, 61, 35, 8])[:num_rows]
    return features, lengths, torch.randint(4, model.config.vocab_size, (num_rows, 7), generator=generator)


def scattered(model, seed=5):
    """Every weight moved at random: nothing equal, nothing zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def logits_of(model, batch):
    with torch.no_grad():
        output = model(*batch)
    return torch.stack(output.head_logits), output.encoding.ctc.logits_BTV


def bit_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_every_head_saves_and_loads_bit_identical(tmp_path, head_type, num_heads):
    torch.manual_seed(0)
    model = scattered(SpeechLlamaForConditionalGeneration(tiny_config(head_type=head_type, num_heads=num_heads)))
    batch = inputs(model)
    heads, ctc = logits_of(model.eval(), batch)
    assert heads.shape == (num_heads, 2, 8, VOCAB_SIZE)
    assert ctc.shape == (2, 23, VOCAB_SIZE)
    model.save_pretrained(tmp_path)
    loaded = SpeechLlamaForConditionalGeneration.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config.weight_storage == "float"
    assert bit_equal(model.state_dict(), loaded.state_dict())
    for mine, theirs in zip((heads, ctc), logits_of(loaded, batch), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("num_heads", [2, 4])
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_heads_start_as_copies_of_head_1(head_type, num_heads):
    torch.manual_seed(0)
    model = SpeechLlamaForConditionalGeneration(tiny_config(head_type=head_type, num_heads=num_heads)).double()
    heads, _ = logits_of(model.eval(), inputs(model, dtype=torch.float64))
    for head in heads[1:]:
        torch.testing.assert_close(head, heads[0])


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_drafts_are_what_training_computes_for_greedy_tokens(head_type):
    torch.manual_seed(0)
    config = tiny_config(head_type=head_type)
    heads = scattered(build_heads(config)).double()
    lm_head, embed = nn.Linear(32, VOCAB_SIZE, bias=False).double(), nn.Embedding(VOCAB_SIZE, 32).double()
    hidden_BD = torch.randn(3, 32, dtype=torch.float64)
    with torch.no_grad():
        first_B = lm_head(hidden_BD).argmax(-1)
        drafted = heads.draft_logits(hidden_BD, first_B, lm_head, embed, 3)
        greedy = torch.cat([first_B[:, None], drafted.argmax(-1)], 1)  # y[u+1..u+4]
        # the heads look at position 0 from the same state; the other positions only carry the teacher's tokens
        hidden_BLD = torch.cat([hidden_BD[:, None], torch.randn(3, 3, 32, dtype=torch.float64)], 1)
        taught = heads.training_logits(hidden_BLD, embed(greedy), lm_head)
        assert len(taught) == 3
        torch.testing.assert_close(torch.stack([logits[:, 0] for logits in taught], 1), drafted)
        fewer = heads.draft_logits(hidden_BD, first_B, lm_head, embed, 2)
        torch.testing.assert_close(fewer, drafted[:, :2])
        asked = [(hidden_BD, first_B, 3), (hidden_BD[:0], first_B[:0], 1), (hidden_BD[1:], first_B[1:], 2)]
        each = heads.draft_logits_each(asked, lm_head, embed)
        for found, expected in zip(each, (drafted, drafted[:0, :1], drafted[1:, :2]), strict=True):
            torch.testing.assert_close(found, expected)
        if head_type == "sequential":
            other = heads.training_logits(hidden_BLD, embed((greedy + 1) % VOCAB_SIZE), lm_head)
            assert not torch.allclose(other[0][:, 0], drafted[:, 0])


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_a_text_shorter_than_the_heads_reach(head_type):
    """Regression: sequential heads failed on texts shorter than K − 3 tokens."""
    torch.manual_seed(0)
    model = scattered(SpeechLlamaForConditionalGeneration(tiny_config(head_type=head_type, num_heads=8))).eval()
    features, lengths, text = inputs(model)
    short, _ = logits_of(model, (features, lengths, text[:, :1]))
    long, _ = logits_of(model, (features, lengths, text))
    assert short.shape == (8, 2, 2, VOCAB_SIZE)
    torch.testing.assert_close(short[:2, :, 0], long[:2, :, 0])  # head 2 at begin-of-text sees the one token


def test_a_position_sees_neither_later_tokens_nor_other_rows():
    torch.manual_seed(0)
    model = scattered(SpeechLlamaForConditionalGeneration(tiny_config(head_type="sequential", ctc_positions=True)))
    model = model.double().eval()
    features, lengths, text = inputs(model, num_rows=4, dtype=torch.float64)
    heads, ctc = logits_of(model, (features, lengths, text))
    changed = text.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB_SIZE  # y[6]
    other, _ = logits_of(model, (features, lengths, changed))
    for k in range(4):  # head k + 1 at u sees y[..u+k]
        assert torch.equal(heads[k, :, : 6 - k], other[k, :, : 6 - k])
        assert not torch.allclose(heads[k, :, 6 - k], other[k, :, 6 - k])
    for row, length in enumerate(lengths.tolist()):
        alone, ctc_alone = logits_of(
            model, (features[row : row + 1, :length], lengths[row : row + 1], text[row : row + 1])
        )
        torch.testing.assert_close(heads[:, row], alone[:, 0])
        torch.testing.assert_close(ctc[row, : ctc_alone.shape[1]], ctc_alone[0])


def test_join_rows_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(4, 5, 3, generator=generator), torch.randn(4, 4, 3, generator=generator)
    first_lengths, second_lengths = torch.tensor([5, 0, 3, 1]), torch.tensor([1, 4, 0, 2])
    for lengths in (None, second_lengths):
        joined, index = join_rows(first, first_lengths, second, lengths)
        valid = [4] * 4 if lengths is None else lengths.tolist()
        rows = [
            torch.cat([first[i, :n], second[i, :m]]) for i, (n, m) in enumerate(zip([5, 0, 3, 1], valid, strict=True))
        ]
        assert joined.shape == (4, max(map(len, rows)), 3)
        both = torch.cat([first, second], 1)
        for i, row in enumerate(rows):
            assert torch.equal(joined[i, : len(row)], row)
            assert torch.equal(both[i, index[i]], joined[i])


def test_whisper_encoder_is_transformers_own_at_full_length():
    torch.manual_seed(0)
    theirs = scattered(WhisperEncoder(WhisperConfig(**WHISPER | {"max_source_positions": 1500}))).double().eval()
    ours = WhisperSpeechEncoder(theirs.config).double().eval()
    ours.encoder.load_state_dict(theirs.state_dict())
    features = torch.randn(2, 3000, 8, dtype=torch.float64)
    with torch.no_grad():
        frames, lengths = ours(features, torch.tensor([3000, 3000]))
        torch.testing.assert_close(frames, theirs(features.transpose(1, 2)).last_hidden_state)
    assert lengths.tolist() == [1500, 1500]
    with pytest.raises(ValueError, match=r"30\.1 s is longer than this encoder's 30\.0 s"):
        ours(torch.zeros(1, 3010, 8, dtype=torch.float64), torch.tensor([3010]))


@pytest.mark.parametrize(
    "encoder",
    [
        pytest.param(lambda: WhisperSpeechEncoder(WhisperConfig(**WHISPER)), id="whisper"),
        *(
            pytest.param(
                lambda layer=layer: WhisperSpeechEncoder(WhisperConfig(**WHISPER), layer), id=f"pooling-{layer}"
            )
            for layer in (0, 1, 2)
        ),
        pytest.param(lambda: ParakeetSpeechEncoder(ParakeetEncoderConfig(**PARAKEET)), id="parakeet"),
    ],
)
def test_encoder_rows_equal_alone(encoder):
    torch.manual_seed(0)
    encoder = scattered(encoder()).double().eval()
    bins = encoder.encoder.config.num_mel_bins
    lengths = torch.tensor([101, 64, 37, 17])
    features = torch.randn(4, 101, bins, dtype=torch.float64)  # what lies behind a row's end is not zero
    with torch.no_grad():
        frames, frame_lengths = encoder(features, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone, (alone_length,) = encoder(features[row : row + 1, :length], lengths[row : row + 1])
            assert alone_length == frame_lengths[row] == alone.shape[1]
            torch.testing.assert_close(frames[row, :alone_length], alone[0])


@pytest.mark.parametrize("ctc_positions", [False, True])
def test_without_gradients_a_row_is_encoded_by_itself_and_as_with_them(ctc_positions):
    torch.manual_seed(3)
    model = scattered(SpeechLlamaForConditionalGeneration(tiny_config(ctc_positions=ctc_positions))).double().eval()
    features, _, _ = inputs(model, num_rows=4, dtype=torch.float64)
    features = torch.cat([features, features[:, :30]], 1)  # what lies behind a row's end is not zero
    lengths = torch.tensor([61, 35, 120, 8])
    together = model.encode(features, lengths)
    with torch.no_grad():
        apart = model.encode(features, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = model.encode(features[row : row + 1, :length], lengths[row : row + 1])
            T, L = int(alone.ctc_lengths_B), int(alone.lengths_B)
            assert (apart.ctc_lengths_B[row], apart.lengths_B[row]) == (T, L)
            for name in ("frames_BTD", "best_BT"):
                assert torch.equal(getattr(alone.ctc, name)[0, :T], getattr(apart.ctc, name)[row, :T])
            assert torch.equal(alone.embeddings_BLD[0, :L], apart.embeddings_BLD[row, :L])
            torch.testing.assert_close(together.ctc.logits_BTV[row, :T], apart.ctc.logits_BTV[row, :T])
            torch.testing.assert_close(together.embeddings_BLD[row, :L], apart.embeddings_BLD[row, :L])
            assert torch.equal(together.positions_BL[row, :L], apart.positions_BL[row, :L])
    assert torch.equal(together.ctc_lengths_B, apart.ctc_lengths_B)


@pytest.mark.parametrize("fields", [{}, {"ctc_positions": True}, {"draft_layers": 1}, None], ids=str)
def test_without_ctc_the_decoder_is_given_the_same(fields):
    torch.manual_seed(3)
    config = tiny_config(**fields or {"ctc_lookahead": 0})
    config.ctc_in_prompt = fields is not None
    model = scattered(SpeechLlamaForConditionalGeneration(config)).eval()
    features, lengths, _ = inputs(model, num_rows=4)
    for gradients in (torch.no_grad, torch.enable_grad):
        with gradients():
            wanted, found = model.encode(features, lengths), model.encode(features, lengths, with_ctc=False)
        assert (found.ctc is not None) == config.ctc_in_prompt  # a prompt may depend on it
        for name in ("ctc_lengths_B", "embeddings_BLD", "lengths_B", "positions_BL"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name


def test_average_pairs_against_a_loop():
    frames = torch.randn(3, 7, 4, dtype=torch.float64)
    averaged, lengths = average_pairs(frames, torch.tensor([7, 4, 1]))
    assert averaged.shape == (3, 4, 4)
    assert lengths.tolist() == [4, 2, 1]
    for row, length in enumerate([7, 4, 1]):
        for pair in range(4):
            of_pair = frames[row, 2 * pair : min(2 * pair + 2, length)]
            wanted = of_pair.mean(0) if len(of_pair) else torch.zeros(4, dtype=torch.float64)
            assert torch.allclose(averaged[row, pair], wanted)


@pytest.mark.parametrize("num_frozen", [0, 1, 2])
@pytest.mark.parametrize("pooling_layer", [0, 1, 2])
def test_pooling_averages_frames_behind_its_layer(pooling_layer, num_frozen):
    """Against the layers of transformers' encoder, called one by one on one utterance without padding."""
    torch.manual_seed(0)
    encoder = WhisperSpeechEncoder(WhisperConfig(**WHISPER), pooling_layer).double().eval()
    encoder.freeze_layers(num_frozen)
    features = torch.randn(1, 40, 8, dtype=torch.float64)
    frames, lengths = encoder(features, torch.tensor([40]))

    own = encoder.encoder
    x = nn.functional.gelu(own.conv2(nn.functional.gelu(own.conv1(features.transpose(1, 2))))).transpose(1, 2)
    x = x + own.embed_positions.weight[:20]
    for layer in own.layers[:pooling_layer]:
        x = layer(x, None)
    x = (x[:, 0::2] + x[:, 1::2]) / 2
    for layer in own.layers[pooling_layer:]:
        x = layer(x, None)
    assert torch.allclose(frames, own.layer_norm(x), atol=1e-12)
    assert lengths.tolist() == [10]
    assert encoder.frame_rate == 25


def test_pooling_that_cannot_be():
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=f"encoder_pooling_layer {layer}: the encoder has 2 layers"):
            build_encoder(WhisperConfig(**WHISPER), pooling_layer=layer)
    with pytest.raises(ValueError, match="is for Whisper's encoder, not for 'parakeet_encoder'"):
        build_encoder(ParakeetEncoderConfig(**PARAKEET), pooling_layer=1)


@pytest.mark.parametrize("kind", ["whisper", "parakeet"])
def test_freezing_encoder_layers(kind):
    if kind == "whisper":
        encoder = WhisperSpeechEncoder(WhisperConfig(**WHISPER))
        encoder.freeze_layers(1)
        features = torch.randn(1, 20, 8)
        encoder(features, torch.tensor([20]))[0].sum().backward()
        with_gradient = {n for n, p in encoder.encoder.named_parameters() if p.grad is not None}
        assert with_gradient
        assert all(name.startswith(("layers.1.", "layer_norm.")) for name in with_gradient)
    else:
        encoder = ParakeetSpeechEncoder(ParakeetEncoderConfig(**PARAKEET))
    encoder.freeze_layers(2)
    assert not any(p.requires_grad for p in encoder.parameters())
    encoder.freeze_layers(0)
    assert {n for n, p in encoder.named_parameters() if not p.requires_grad} <= {"encoder.embed_positions.weight"}
    with pytest.raises(ValueError, match=r"got 3|cannot freeze 3"):
        encoder.freeze_layers(3)


def test_a_parakeet_model_builds_trains_saves_and_loads(tmp_path, tokenizer):
    decoder = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **LM)
    preset = ModelPreset(ParakeetEncoderConfig(**PARAKEET), decoder, fields=ADAPTER | {"encoder_stacking": 1})
    model = scattered(build_model(preset, tokenizer, seed=1)).eval()
    batch = inputs(model)
    heads, ctc = logits_of(model, batch)
    assert ctc.shape[:2] == (2, 12)
    model.save_pretrained(tmp_path)
    loaded = SpeechLlamaForConditionalGeneration.from_pretrained(tmp_path)
    assert bit_equal(model.state_dict(), loaded.state_dict())
    assert torch.equal(logits_of(loaded, batch)[0], heads)
    processor = build_processor(preset, tokenizer)
    assert processor.features(torch.zeros(16000).numpy()).shape[1] == 16
    encoder = ParakeetEncoder(ParakeetEncoderConfig(**PARAKEET))
    scattered(encoder).save_pretrained(tmp_path / "encoder")
    model = build_model(replace(preset, encoder=str(tmp_path / "encoder")), tokenizer, seed=1)
    assert bit_equal(encoder.state_dict(), model.encoder.encoder.state_dict())


@pytest.mark.parametrize("head_type", ["projection", "latent"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_a_pretrained_decoder_reads_as_before(tmp_path, tokenizer, name, head_type):
    decoder = saved_decoder(tmp_path / "lm", name, tokenizer, tie_word_embeddings=name == "qwen2").eval()
    preset = ModelPreset(WhisperConfig(**WHISPER), str(tmp_path / "lm"), fields=ADAPTER | {"head_type": head_type})
    model = build_model(preset, tokenizer, seed=1).eval()
    assert type(model.decoder) is type(decoder)
    assert (model.config.blank_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, 2)
    text = torch.randint(4, len(tokenizer), (2, 6))
    no_prefix = torch.zeros(2, 0, 32), torch.zeros(2, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)
    with torch.no_grad():
        head_1, head_2, *_ = model.read_text(*no_prefix, text)
        begun = torch.cat([torch.ones(2, 1, dtype=torch.long), text], 1)
        torch.testing.assert_close(head_1, decoder(begun).logits)
    torch.testing.assert_close(head_2, head_1)  # copies of the pretrained head 1, not of random weights
    model.save_pretrained(tmp_path / "model")
    loaded = SpeechLlamaForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert bit_equal(model.state_dict(), loaded.state_dict())


def test_a_pretrained_whisper_encoder_from_a_transformers_folder(tmp_path, tokenizer):
    whisper = scattered(WhisperModel(WhisperConfig(**WHISPER)))
    whisper.save_pretrained(tmp_path)
    decoder = LlamaConfig(vocab_size=len(tokenizer), **LM)
    preset = ModelPreset(str(tmp_path), decoder, fields=ADAPTER)
    model = build_model(preset, tokenizer, seed=1)
    assert bit_equal(model.encoder.encoder.state_dict(), whisper.encoder.state_dict())
    assert build_processor(preset, tokenizer).feature_extractor.feature_size == 8
    again = build_model(preset, tokenizer, seed=1)
    assert bit_equal(model.state_dict(), again.state_dict())
    other = build_model(preset, tokenizer, seed=2)
    assert not torch.equal(model.ctc_head.weight, other.ctc_head.weight)


def test_building_says_what_does_not_fit(tmp_path, tokenizer):
    whisper, llama = WhisperConfig(**WHISPER), LlamaConfig(vocab_size=len(tokenizer), **LM)
    saved_decoder(tmp_path, "llama", tokenizer, vocab_size=90)
    for decoder in (str(tmp_path), LlamaConfig(vocab_size=90, **LM)):
        with pytest.raises(ValueError, match="vocabulary has 90 tokens, the tokenizer's 100"):
            build_model(ModelPreset(whisper, decoder), tokenizer, seed=1)
    with pytest.raises(ValueError, match="lora_rank 4 adapts a pretrained decoder"):
        build_model(ModelPreset(whisper, llama, fields=ADAPTER, lora_rank=4), tokenizer, seed=1)
    with pytest.raises(ValueError, match="unknown head_type 'medusa'"):
        build_model(ModelPreset(whisper, llama, fields=ADAPTER | {"head_type": "medusa"}), tokenizer, seed=1)
    with pytest.raises(CheckpointError, match="is a 'llama'; supported encoders: whisper, parakeet_encoder"):
        build_model(ModelPreset(str(tmp_path), llama), tokenizer, seed=1)
    assert llama.pad_token_id is None  # the preset's own configuration is left alone


def test_the_padding_token_is_one_that_no_text_contains(tokenizer):
    backend = tokenizer.backend_tokenizer

    def made(**special):
        return PreTrainedTokenizerFast(tokenizer_object=backend, **special)

    assert padding_token(tokenizer) == "<pad>"
    assert padding_token(made(unk_token="<unk>", eos_token="</s>", bos_token="<s>")) == "<unk>"
    assert padding_token(made(eos_token="</s>", bos_token="<s>")) == "</s>"
    with pytest.raises(ValueError, match=r"set tokenizer\.pad_token"):
        padding_token(made(bos_token="<s>"))
    preset = ModelPreset(WhisperConfig(**WHISPER), LlamaConfig(vocab_size=100, **LM), fields=ADAPTER)
    without = made(unk_token="<unk>", eos_token="</s>")
    model, processor = build_model(preset, without, seed=1), build_processor(preset, without)
    assert model.config.blank_token_id == processor.tokenizer.pad_token_id == 3
    assert model.config.bos_token_id == 1  # the configuration's, as the tokenizer has none
    assert without.pad_token is None
    with pytest.raises(ValueError, match="neither the tokenizer nor the decoder says which token ends a text"):
        build_model(
            replace(preset, decoder=LlamaConfig(vocab_size=100, eos_token_id=None, **LM)),
            made(unk_token="<unk>", bos_token="<s>"),
            seed=1,
        )


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_low_rank_adapters_train_alone_and_are_merged_when_saved(tmp_path, tokenizer, name):
    decoder = saved_decoder(tmp_path / "lm", name, tokenizer)
    preset = ModelPreset(WhisperConfig(**WHISPER), str(tmp_path / "lm"), fields=ADAPTER)
    plain = build_model(preset, tokenizer, seed=1).eval()
    model = build_model(replace(preset, lora_rank=2), tokenizer, seed=1).eval()
    assert has_low_rank(model)
    assert not has_low_rank(plain)
    batch = inputs(model)
    for mine, theirs in zip(logits_of(model, batch), logits_of(plain, batch), strict=True):
        assert torch.equal(mine, theirs)  # adapters start at zero

    model.requires_grad_(True)
    freeze_adapted(model.decoder)
    model(*batch).head_logits[0].square().sum().backward()
    moved = {n for n, p in model.named_parameters() if n.startswith("decoder.") and p.grad is not None}
    assert len(moved) == 2 * 7 * 2  # two matrices on seven layers of two blocks
    assert all(".lora_" in parameter for parameter in moved)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".lora_" in parameter_name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(7))
    trained = logits_of(model, batch)
    assert not torch.allclose(trained[0], logits_of(plain, batch)[0])
    model.save_pretrained(tmp_path / "merged")
    assert has_low_rank(model)  # saving changed nothing
    merged = SpeechLlamaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert merged.state_dict().keys() == plain.state_dict().keys()
    for mine, theirs in zip(logits_of(merged, batch), trained, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    norm = "decoder.model.norm.weight"
    assert torch.equal(merged.state_dict()[norm], decoder.state_dict()[norm.removeprefix("decoder.")])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        add_low_rank(copy.deepcopy(decoder), rank=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 0}, "at least 1 .* got 0"),
        ({"weight_storage": "int4"}, "unknown weight_storage 'int4'"),
        ({"ctc_lookahead": -1}, "ctc_lookahead must be 0 or more.* got -1"),
        ({"ctc_lookahead": 1, "ctc_in_prompt": False}, "0 without ctc_in_prompt, got 1"),
        ({"ctc_positions": True, "ctc_in_prompt": False}, "ctc_positions needs ctc_in_prompt"),
        ({"encoder_stacking": 0}, "stacking must be at least 1, got 0 and 2"),
        ({"adapter_size": 20, "adapter_attention_heads": 3}, "20 is not a multiple of .* 3"),
        ({"decoder_config": {"model_type": "nothing"}}, "unknown model type 'nothing'"),
    ],
)
def test_configurations_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        SpeechLlamaConfig(**fields)


def test_the_prompt_is_the_speech_then_begin_of_text():
    torch.manual_seed(0)
    model = SpeechLlamaForConditionalGeneration(tiny_config(ctc_positions=True)).eval()
    features, lengths, _ = inputs(model)
    with torch.no_grad():
        encoding = model.encode(features, lengths)
        prompt, prompt_lengths, positions, memory, memory_lengths = model.prompt(encoding)
        assert memory is memory_lengths is None
    assert prompt_lengths.tolist() == [n + 1 for n in encoding.lengths_B.tolist()] == [13, 9]
    begin = model.get_input_embeddings().weight[BOS]
    for row, length in enumerate(prompt_lengths.tolist()):
        assert torch.equal(prompt[row, : length - 1], encoding.embeddings_BLD[row, : length - 1])
        assert torch.equal(prompt[row, length - 1], begin)
        assert torch.equal(positions[row, : length - 1], encoding.positions_BL[row, : length - 1])
        assert positions[row, length - 1 :].tolist() == list(range(length - 1, prompt.shape[1]))
    assert (model.config.blank_token_id, model.config.eos_token_id) == (PAD, EOS)
    assert model.ctc_frame_rate == 25


@pytest.mark.parametrize("ctc_positions", [False, True])
def test_decoding_reads_what_training_reads(ctc_positions):
    """Tokens decoded step by step are those that the teacher-forced pass over them finds likeliest."""
    torch.manual_seed(3)
    model = SpeechLlamaForConditionalGeneration(tiny_config(ctc_positions=ctc_positions, num_heads=8))
    model = scattered(model).double().eval()
    features, lengths, _ = inputs(model)
    with torch.no_grad():
        encoding = model.encode(features.double(), lengths)
        assert len(encoding.positions_BL[0].unique()) > 3
        options = DecodingOptions(max_tokens=12, max_repeats=None)
        decoded = decode(SpeechLlamaDecoder(model), Prompts(*model.prompt(encoding)), options)
        text = torch.zeros(len(decoded), 12, dtype=torch.long)
        for row, result in zip(text, decoded, strict=True):
            row[: len(result.tokens)] = torch.tensor(result.tokens)
        head_1, *_ = model.read_text(*encoding.prefix, text)
    for logits, result in zip(head_1, decoded, strict=True):
        assert len(result.tokens) > 3
        assert logits.argmax(-1)[: len(result.tokens)].tolist() == result.tokens
