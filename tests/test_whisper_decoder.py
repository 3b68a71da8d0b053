"""Whisper's decoder rewritten as a LLaMA, beside transformers' own Whisper with the same random weights."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaMLP

import leapasr
from leapasr import config
from leapasr.config import ModelPreset
from leapasr.decoding import DecodingOptions, Prompts, SpeechLlamaDecoder, decode
from leapasr.decoding.drafts import Reading, build_drafter
from leapasr.decoding.reference import beam_reference, decode_reference
from leapasr.evaluation.peers import generate
from leapasr.model.building import build_model, build_processor
from leapasr.model.checkpoints import CheckpointError, load_whisper, whisper_tokenizer
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration
from leapasr.model.text_trees import TextTrees
from leapasr.model.whisper_decoder import WhisperDecoder
from leapasr.training.run import prepare, train
from leapasr.training.tokenizer import BEGIN, END, PAD, frequent_tokens
from leapasr.training.trainer import OF_CTC

SAMPLES = Path(leapasr.__file__).parent / "samples"
NUM_PAIRS = 340  # byte-pair tokens of the test's Whisper
KEPT = 310
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
TEXTS = ["the cat sat on the mat", "Where is the dog, then?", "It's a long, long way to go."] * 3
FIELDS = {
    "encoder_stacking": 1, "decoder_stacking": 1, "adapter_size": 16, "adapter_layers": 1,
    "adapter_attention_heads": 2, "adapter_ffn_size": 32, "ctc_lookahead": 3, "num_heads": 4,
}  # fmt: skip


def byte_pairs():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_PAIRS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([f" {text}" for text in TEXTS for _ in range(9)] + [chr(n) * 5 for n in range(99)],
                                  trainer)  # fmt: skip
    return tokenizer


def make_whisper(folder, **fields):
    """A Whisper with random weights on disk; its norms have gains and offsets far from one and zero."""
    tokenizer = byte_pairs()
    num_pairs = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    shape = {"num_mel_bins": 8, "max_source_positions": 24, "max_target_positions": 20} | fields
    whisper_config = WhisperConfig(
        vocab_size=num_pairs + len(SPECIAL), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=40, pad_token_id=num_pairs,
        bos_token_id=num_pairs, eos_token_id=num_pairs, decoder_start_token_id=num_pairs + 1, **shape,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(whisper_config)
    for name, parameter in model.named_parameters():
        if "embed_positions" not in name:
            scale = 0.3 if parameter.ndim == 1 else (1 if "embed" in name else 3) / parameter.shape[1] ** 0.5
            parameter.data = scale * torch.randn(parameter.shape) + (parameter.ndim == 1 and "norm.weight" in name)
    table = model.get_input_embeddings().weight  # tied rows keep their mean in the rewriting, and a real one has none
    table.data -= table.data.mean(1, keepdim=True)
    model.save_pretrained(folder)
    return model.double().eval()


@pytest.fixture(scope="module", params=["English", "multilingual"])
def whisper(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return make_whisper(folder), folder, request.param


@pytest.fixture(params=[0, 3], ids=["", "draft layers"])
def built(request, whisper, monkeypatch):
    """The same as a Speech-LLaMA, double precision, and the tokens with which Whisper begins."""
    _, folder, kind = whisper
    if kind == "multilingual":
        monkeypatch.setattr("leapasr.model.building.MULTILINGUAL_VOCABULARY", 1)
    preset = ModelPreset(str(folder), WhisperDecoder(), fields=FIELDS | {"draft_layers": request.param})
    model = build_model(preset, frequent_tokens(whisper_tokenizer(folder), TEXTS, KEPT), seed=1)
    nn.init.normal_(model.mtp_heads.expansion.weight, std=0.1)
    if model.draft_layers is not None:  # copies, so far
        for name, parameter in model.draft_layers.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.data *= 1.5
        nn.init.normal_(model.speech_projection.ctc_projection.weight)
    names = SPECIAL[1:] if kind == "multilingual" else [SPECIAL[1], SPECIAL[-1]]
    ids = whisper_tokenizer(folder).get_vocab()
    return model.double().eval().requires_grad_(False), [ids[name] for name in names]


@pytest.fixture
def theirs_of(whisper):
    """Whisper's id of each kept token (KEPT,)."""
    ids = whisper_tokenizer(whisper[1]).get_vocab()
    kept = frequent_tokens(whisper_tokenizer(whisper[1]), TEXTS, KEPT)
    return torch.tensor([ids[token] for token in kept.convert_ids_to_tokens(list(range(KEPT)))])


def features(num_rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, 48, 8, generator=generator, dtype=torch.float64), torch.full((num_rows,), 48)


@torch.no_grad()
def test_it_writes_what_whisper_writes(whisper, built, theirs_of):
    theirs, _, _ = whisper
    model, forced = built
    audio, lengths = features(3)
    text = torch.randint(KEPT, (3, 11), generator=torch.Generator().manual_seed(1))
    begun = torch.cat([torch.tensor([forced] * 3), theirs_of[text]], 1)
    wanted = theirs(audio.transpose(1, 2), decoder_input_ids=begun).logits[:, len(forced) - 1 :][..., theirs_of]
    encoding = model.encode(audio, lengths)
    found = model.read_text(*encoding.prefix, text)[0]
    assert wanted.std() > 0.5
    assert torch.allclose(found[..., :KEPT], wanted, atol=1e-4)
    end = theirs(audio.transpose(1, 2), decoder_input_ids=begun).logits[:, len(forced) - 1 :, -len(SPECIAL)]
    assert torch.allclose(found[..., model.config.eos_token_id], end, atol=1e-4)
    others = [model.config.bos_token_id, model.config.pad_token_id]
    assert found[..., others].max() < found[..., :KEPT].min()


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["autoregressive", "verify"])
def test_decoding_is_whispers_own_greedy_decoding(whisper, built, theirs_of, strategy):
    theirs, folder, _ = whisper
    model, forced = built
    ids = whisper_tokenizer(folder).get_vocab()
    audio, lengths = features(5, seed=2)
    options = DecodingOptions(strategy=strategy, drafts="mtp" if strategy == "verify" else None, max_repeats=None)
    prompts = Prompts(*model.prompt(model.encode(audio, lengths)))
    found = decode(SpeechLlamaDecoder(model), prompts, options)
    never = sorted({*ids.values()} - {*theirs_of.tolist(), ids[SPECIAL[0]]})
    for row, result in enumerate(found):
        wanted = list(forced)
        while len(wanted) - len(forced) < len(result.tokens) + 1 and ids[SPECIAL[0]] not in wanted:
            logits = theirs(audio[row : row + 1].transpose(1, 2), decoder_input_ids=torch.tensor([wanted])).logits
            logits[..., never] = -torch.inf
            wanted.append(int(logits[0, -1].argmax()))
            if len(wanted) == 20:
                break
        tokens = [token for token in wanted[len(forced) :] if token != ids[SPECIAL[0]]]
        assert theirs_of[result.tokens].tolist() == tokens[: len(result.tokens)]
        assert len(result.tokens) >= min(len(tokens), model.config.text_positions - 1)


def test_transformers_generate_writes_the_same(built):
    model, _ = built
    audio, _ = features(4, seed=5)
    prompts = Prompts(*model.prompt(model.encode(audio, torch.tensor([48, 31, 12, 40]))))
    options = DecodingOptions(strategy="autoregressive", max_repeats=None)
    written = generate(model, prompts, max_tokens=model.config.text_positions - 1)
    for row, result in enumerate(decode(SpeechLlamaDecoder(model), prompts, options)):
        alone = generate(model, prompts.row(row), max_tokens=model.config.text_positions - 1)
        for tokens in (*alone, written[row]):
            assert result.tokens == [token for token in tokens if token != model.config.eos_token_id]


@torch.no_grad()
def test_no_text_is_longer_than_its_positions(built):
    model, _ = built
    prompts = Prompts(*model.prompt(model.encode(*features(4))))
    decoder = SpeechLlamaDecoder(model)
    options = DecodingOptions(strategy="autoregressive", max_repeats=None)
    for result in decode(decoder, prompts, options):
        assert len(result.tokens) < model.config.text_positions
        assert len(result.tokens) < model.config.text_positions - 1 or result.truncated == "length"


@torch.no_grad()
def test_whatever_the_drafts_and_the_company_the_references_tokens(built):
    model, _ = built
    decoder = SpeechLlamaDecoder(model)
    audio, lengths = features(6, seed=3)
    lengths = torch.tensor([48, 20, 33, 48, 7, 41])
    prompts = Prompts(*model.prompt(model.encode(audio, lengths)))
    options = DecodingOptions(strategy="verify", drafts="mtp")
    wanted = [result.tokens for result in decode_reference(decoder, prompts, options)]
    assert len({tuple(tokens) for tokens in wanted}) > 3
    assert [result.tokens for result in decode(decoder, prompts, options)] == wanted
    for shift in (0, 1):  # what another row says is a wrong draft
        readings = [Reading(tokens, [0.9] * len(tokens)) for tokens in wanted[shift:] + wanted[:shift]]
        both = replace(options, drafts="both")
        drafters = [build_drafter(both, reading, end_token=model.config.eos_token_id) for reading in readings]
        assert [result.tokens for result in decode(decoder, prompts, both, drafters=drafters)] == wanted
    beam = DecodingOptions(strategy="beam", beam_size=3, nbest=3)
    searched = beam_reference(decoder, prompts, beam)
    for result, hypotheses in zip(decode(decoder, prompts, beam), searched, strict=True):
        assert [each.tokens for each in result.hypotheses] == [each.tokens for each in hypotheses]


@torch.no_grad()
@pytest.mark.parametrize("speech_dtype", [torch.float64, torch.bfloat16])
def test_padding_is_not_remembered(built, speech_dtype):
    model = copy.deepcopy(built[0])
    if speech_dtype != torch.float64:
        model.set_speech_dtype(speech_dtype)
    audio, _ = features(4, seed=8)
    _, _, _, memory_BMD, lengths_B = model.prompt(model.encode(audio, torch.tensor([48, 20, 33, 9])))
    assert len(set(lengths_B.tolist())) == 4
    padded, packed = DynamicCache(), DynamicCache()
    model.remember(memory_BMD, padded)
    model.remember(memory_BMD, packed, lengths_B)
    for ours, theirs in zip(packed.layers, padded.layers, strict=True):
        for name in ("keys", "values"):
            found, wanted = getattr(ours, name), getattr(theirs, name)
            for row, length in enumerate(lengths_B.tolist()):
                tolerance = {} if speech_dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
                torch.testing.assert_close(found[row, :, :length], wanted[row, :, :length], **tolerance)
                assert not found[row, :, length:].any()
    assert padded.layers[0].values[3, :, int(lengths_B[3]) :].any()  # or there would be nothing to leave out


@torch.no_grad()
def test_what_is_remembered_in_bfloat16_is_what_is_remembered(built):
    model = copy.deepcopy(built[0])
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.5 * torch.randn_like(parameter)
    audio, _ = features(4, seed=8)
    _, _, _, memory_BMD, lengths_B = model.prompt(model.encode(audio, torch.tensor([48, 20, 33, 9])))
    exact, rounded, kept = DynamicCache(), DynamicCache(), DynamicCache()
    model.remember(memory_BMD, exact, lengths_B)
    model.set_speech_dtype(torch.bfloat16)
    model.remember(memory_BMD, rounded, lengths_B)
    model.remember(memory_BMD, kept, lengths_B, dtype=torch.bfloat16)
    assert len(exact.layers) == len(rounded.layers)
    for ours, theirs, short in zip(rounded.layers, exact.layers, kept.layers, strict=True):
        for name in ("keys", "values"):
            found, wanted = getattr(ours, name), getattr(theirs, name)
            assert (found.dtype, getattr(short, name).dtype) == (wanted.dtype, torch.bfloat16)
            assert 0 < (found - wanted).norm() < 0.01 * wanted.norm()


@torch.no_grad()
def test_in_training_a_row_gets_what_it_gets_alone(built):
    model, _ = built
    (audio, _), lengths = features(3, seed=6), torch.tensor([48, 20, 33])
    text = torch.randint(KEPT, (3, 9), generator=torch.Generator().manual_seed(2))
    together = model(audio, lengths, text).head_logits
    for row, length in enumerate(lengths.tolist()):
        alone = model(audio[row : row + 1, :length], lengths[row : row + 1], text[row : row + 1]).head_logits
        for logits_BUV, logits_1UV in zip(together, alone, strict=True):
            assert torch.allclose(logits_BUV[row], logits_1UV[0], atol=1e-9)


@torch.no_grad()
def test_texts_side_by_side_are_read_as_each_alone(built):
    model, _ = built
    encoding = model.encode(*features(3))
    texts = torch.randint(KEPT, (3, 4, 9), generator=torch.Generator().manual_seed(3))
    texts[:, 1, :4] = texts[:, 0, :4]
    trees = TextTrees.of(texts, torch.full((3, 4), 9), begin_token_id=model.config.bos_token_id)
    together = trees.along(model.read_texts(*encoding.prefix, trees), texts=slice(None))
    for n in range(4):
        logits = model.head_logits(together[:, n], texts[:, n])
        for ours, alone in zip(logits, model.read_text(*encoding.prefix, texts[:, n]), strict=True):
            assert torch.allclose(ours, alone, atol=1e-9)


def test_saved_and_loaded_it_is_the_same(built, tmp_path):
    model, _ = built
    model.save_pretrained(tmp_path)
    again = SpeechLlamaForConditionalGeneration.from_pretrained(tmp_path).double()
    for name, value in model.state_dict().items():
        assert torch.allclose(again.state_dict()[name], value, atol=1e-6), name


@torch.no_grad()
def test_without_ctc_the_decoder_is_given_the_same(built):
    model, _ = built
    audio, lengths = features(3, seed=4)
    wanted, found = model.encode(audio, lengths), model.encode(audio, lengths, with_ctc=False)
    assert (found.ctc is None) == (model.draft_layers is None)  # draft layers remember what CTC reads
    for name in ("ctc_lengths_B", "embeddings_BLD", "lengths_B", "positions_BL"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@torch.no_grad()
def test_what_ctc_reads_reaches_the_draft_layers_alone(built):
    model, _ = built
    audio, lengths = features(1)
    text = torch.randint(KEPT, (1, 5))
    before = model(audio, lengths, text)
    nn.init.normal_(model.adapter.projection.weight)
    nn.init.normal_(model.speech_projection.ctc_projection.weight)
    after = model(audio, lengths, text)
    assert not torch.allclose(before.encoding.ctc.logits_BTV, after.encoding.ctc.logits_BTV)
    reaches = [not torch.equal(one, other) for one, other in zip(before.head_logits, after.head_logits, strict=True)]
    assert reaches == [False] + [model.draft_layers is not None] * 3


def test_training_leaves_the_mark_to_frames(built):
    """A text row that bore it would be taken for a frame."""
    model, _ = built
    model = copy.deepcopy(model).requires_grad_(True)
    model.keep_reserved()
    audio, lengths = features(2)
    output = model(audio, lengths, torch.randint(KEPT, (2, 5)))
    (sum(logits.pow(2).mean() for logits in output.head_logits) + output.encoding.ctc.logits_BTV.mean()).backward()
    (mark,) = model.config.reserved
    written = [
        model.text_positions.weight.grad.T, model.soft_prompt.weight.grad.T, model.get_input_embeddings().weight.grad.T,
        model.speech_projection.projection.weight.grad, model.speech_projection.projection.bias.grad,
    ]  # fmt: skip
    layers = [*model.decoder.model.layers]
    if model.draft_layers is not None:
        written.append(model.speech_projection.ctc_projection.weight.grad)
        layers += model.draft_layers.body.layers
    for layer in layers:
        written += [layer.self_attn.o_proj.weight.grad, layer.self_attn.o_proj.bias.grad]
        if isinstance(layer.mlp, LlamaMLP):
            written += [layer.mlp.down_proj.weight.grad, layer.mlp.down_proj.bias.grad]
    for gradient in written:
        assert not gradient[mark].any()
        assert gradient[mark - 1].any()


def test_the_preset_trains_it(tmp_path, monkeypatch):
    make_whisper(tmp_path, num_mel_bins=80, max_source_positions=1500, max_target_positions=448)
    preset, all_stages = config.tiny(str(tmp_path))
    small = replace(preset, vocab_size=KEPT + 3, fields=preset.fields | FIELDS | {"encoder_pooling_layer": 2})
    (tmp_path / "prose.txt").write_text("A good opinion of the family was lost by half past ten.\n" * 20)
    short = tuple(replace(stage, updates=2, warmup=1, batch=10) for stage in all_stages)
    monkeypatch.setitem(config.PRESETS, "tiny", lambda encoder: (small, short))
    lines = [
        {"id": path.stem, "audio": str(path), "duration": seconds, "text": "a good opinion"}
        for path, seconds in zip(sorted(SAMPLES.glob("*.flac")), (7.1, 5.3, 3.29), strict=True)
    ]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = train(
        "tiny", output=tmp_path / "training", manifests=[str(manifest)], encoder=str(tmp_path),
        text=[tmp_path / "prose.txt"], precision="fp32", compile=False, num_workers=0,
    )  # fmt: skip
    trained, before = (
        SpeechLlamaForConditionalGeneration.from_pretrained(path) for path in (folder, tmp_path / "training" / "ctc")
    )
    for name in (
        "decoder.model.layers.1.mlp.up_proj.weight",
        "mtp_heads.expansion.weight",
        "encoder.encoder.conv1.weight",
    ):
        assert not torch.equal(trained.state_dict()[name], before.state_dict()[name]), name
    assert trained.text_positions.num_embeddings == 447
    no_drafts = train(
        "mwer", output=tmp_path / "mwer", manifests=[str(manifest)], initial_model=folder, updates=1, draft_layers=0,
        precision="fp32", compile=False, num_workers=0,
    )  # fmt: skip
    after = SpeechLlamaForConditionalGeneration.from_pretrained(no_drafts).state_dict()
    for name, value in trained.state_dict().items():
        if name.startswith(OF_CTC):  # nothing reads it without draft layers: it is not to decay, either
            assert torch.equal(after[name], value), name
    assert not torch.equal(after["decoder.model.norm.weight"], trained.state_dict()["decoder.model.norm.weight"])
    without_ctc = replace(short[-1], task="joint", ctc_weight=0.0, frozen_encoder_layers=None)
    prepare(
        None, (without_ctc,), manifests={manifest: 1.0}, dev=(), text=(), output=tmp_path / "joint",
        initial_model=no_drafts, precision="fp32", compile=False, num_workers=0,
    ).run()  # fmt: skip
    model = SpeechLlamaForConditionalGeneration.from_pretrained(tmp_path / "joint" / "model")
    for name, value in model.state_dict().items():
        stays = name.startswith(("encoder.", *OF_CTC, "adapter.", "ctc_head."))
        assert torch.equal(value, after[name]) == stays, name


class TestTokenizer:
    @pytest.fixture(scope="class")
    def whole(self):
        tokenizer = byte_pairs()
        tokenizer.add_special_tokens(SPECIAL)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    @pytest.mark.parametrize("vocab_size", [256, 270, KEPT])
    def test_any_text_is_written_with_few_tokens(self, whole, vocab_size):
        few = frequent_tokens(whole, TEXTS, vocab_size)
        assert len(few) == vocab_size + 3
        assert (few.eos_token, few.bos_token, few.pad_token) == (END, BEGIN, PAD)
        for text in [*TEXTS, "¥ naïve 日本", "1984"]:
            ids = few(text, add_special_tokens=False).input_ids
            assert max(ids) < vocab_size
            assert few.decode(ids).strip() == text

    def test_what_texts_need_is_kept_first_and_written_as_whisper_writes_it(self, whole):
        used = {token for text in TEXTS for token in whole.tokenize(f" {text}")}
        few = frequent_tokens(whole, TEXTS, KEPT)
        assert used <= few.get_vocab().keys()
        for text in TEXTS:
            assert few.tokenize(text) == whole.tokenize(f" {text}")
        other = frequent_tokens(whole, [chr(n) * 5 for n in range(33, 99)], 280)
        assert not used <= other.get_vocab().keys()

    @pytest.mark.parametrize("vocab_size", [0, 255, 99999])
    def test_sizes_that_cannot_be(self, whole, vocab_size):
        with pytest.raises(ValueError, match=f"from 256 to .*{vocab_size}"):
            frequent_tokens(whole, TEXTS, vocab_size)


def test_folders_that_are_no_whisper(whisper, tmp_path):
    _, folder, _ = whisper
    preset = ModelPreset(str(folder), WhisperDecoder(), fields=FIELDS)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        whisper_tokenizer(tmp_path)
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"lacks.*notimestamps"):
        whisper_tokenizer(tmp_path)
    LlamaConfig(vocab_size=8).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a 'llama', not a Whisper model"):
        load_whisper(tmp_path)
    random = WhisperConfig(d_model=16, encoder_attention_heads=2, decoder_attention_heads=2)
    with pytest.raises(ValueError, match="name a Whisper"):
        build_model(replace(preset, encoder=random), frequent_tokens(whisper_tokenizer(folder), TEXTS, KEPT), seed=1)
    with pytest.raises(ValueError, match="head_room must be even"):
        WhisperDecoder(head_room=1)


def test_the_processor_is_whispers(whisper):
    _, folder, _ = whisper
    preset = ModelPreset(str(folder), WhisperDecoder(), fields=FIELDS)
    processor = build_processor(preset, frequent_tokens(whisper_tokenizer(folder), TEXTS, KEPT))
    assert processor.decode_text(processor.encode_text("the cat sat")) == "the cat sat"
    assert processor.feature_extractor.feature_size == 8
