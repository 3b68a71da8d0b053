import hashlib
import json

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaConfig, WhisperConfig
from transformers.models.whisper.modeling_whisper import sinusoids

from leapasr.model.checkpoints import CheckpointError
from leapasr.model.configuration import SpeechLlamaConfig
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration
from leapasr.model.storage import POSITIONS, WEIGHTS_FILE, own_names, quantise, widen


def build(*, tied=False, head_type="residual"):
    """Matrices above and below the size from which they are quantised; whisper's own sinusoids."""
    encoder = WhisperConfig(num_mel_bins=8, d_model=64, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=96)
    decoder = LlamaConfig(
        vocab_size=150, hidden_size=32, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SpeechLlamaForConditionalGeneration(
        SpeechLlamaConfig(encoder, decoder, adapter_size=72, adapter_layers=1, head_type=head_type)
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name != POSITIONS:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


def load(folder, **options):
    return SpeechLlamaForConditionalGeneration.from_pretrained(folder, **options)


def digest(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def bit_equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("shape", [(64, 65), (3, 5, 7), (1, 1)])
def test_quantising_is_within_half_a_step_of_each_row(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix[0] *= 1000
    matrix[-1] *= 1e-6
    quantised, scale = quantise(matrix)
    assert quantised.dtype == torch.int8
    assert quantised.shape == shape
    assert scale.shape == shape[:1]
    largest = matrix.flatten(1).abs().amax(1)
    assert (quantised.flatten(1).abs().amax(1) == 127).all()
    assert (scale >= largest / 127 * (1 - 1e-6)).all()
    assert (scale <= largest / 127 * (1 + 1e-4)).all()
    error = (widen(quantised, scale) - matrix).flatten(1).abs().amax(1)
    assert (error <= scale / 2 * (1 + 1e-6)).all()
    if matrix[0].numel() > 1:
        assert (error > scale / 8).all()  # a bound that is used


def test_quantising_again_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3000, 9, generator=generator) * torch.logspace(-20, 20, 3000)[:, None]
    matrix[7] = 0
    quantised, scale = quantise(matrix)
    again, scale_again = quantise(widen(quantised, scale))
    assert torch.equal(quantised, again)
    assert torch.equal(scale, scale_again)
    assert widen(quantised, scale)[7].eq(0).all()


@pytest.mark.parametrize("tied", [False, True])
def test_floats_are_bit_identical(tmp_path, tied):
    model = build(tied=tied)
    model.save_pretrained(tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert bit_equal(model, loaded)
    assert (loaded.decoder.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert ("decoder.lm_head.weight" in load_file(tmp_path / "a" / WEIGHTS_FILE)) != tied
    loaded.save_pretrained(tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert len({file.stat().st_mode for file in (tmp_path / "a").iterdir()}) == 1  # whoever may read one may read all


@pytest.mark.parametrize("tied", [False, True])
def test_8_bits_round_trip(tmp_path, tied):
    model = build(tied=tied)
    model.save_pretrained(tmp_path / "a", weights="int8")
    assert model.config.weight_storage == "float"  # the model in memory is as it was
    loaded = load(tmp_path / "a")
    assert loaded.config.weight_storage == "int8"
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    loaded.save_pretrained(tmp_path / "b", weights="int8")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert bit_equal(loaded, load(tmp_path / "b"))

    stored = load_file(tmp_path / "a" / WEIGHTS_FILE)
    quantised = {name for name, value in stored.items() if value.dtype == torch.int8}
    mine, theirs = model.state_dict(), loaded.state_dict()
    for name in own_names(model):
        if name in quantised:
            assert mine[name].numel() > 4096
            bound = stored[name + "_scale"].view(-1, *[1] * (mine[name].ndim - 1)) / 2 * (1 + 1e-6)
            assert ((mine[name] - theirs[name]).abs() <= bound).all()
            assert not torch.equal(mine[name], theirs[name])
        else:
            assert mine[name].ndim == 1 or mine[name].numel() <= 4096 or name == POSITIONS
            assert torch.equal(mine[name], theirs[name])
    assert {"encoder.encoder.conv2.weight", "decoder.model.embed_tokens.weight"} <= quantised
    assert ("decoder.lm_head.weight" in quantised) != tied
    sizes = []
    for weights in ("float", "int8"):
        model.save_pretrained(tmp_path / weights, weights=weights)
        sizes.append((tmp_path / weights / WEIGHTS_FILE).stat().st_size)
    assert sizes[1] < 0.35 * sizes[0]


def test_whispers_positions_are_left_out_only_if_they_are_the_sinusoids(tmp_path):
    model = build()
    positions = model.state_dict()[POSITIONS]
    assert torch.equal(positions, sinusoids(1500, 64))
    model.save_pretrained(tmp_path, weights="int8")
    assert POSITIONS not in load_file(tmp_path / WEIGHTS_FILE)
    assert torch.equal(load(tmp_path).state_dict()[POSITIONS], positions)
    positions.copy_(positions.half())  # as of a checkpoint in float16
    model.save_pretrained(tmp_path, weights="int8")
    assert load_file(tmp_path / WEIGHTS_FILE)[POSITIONS].dtype == torch.float16
    assert torch.equal(load(tmp_path).state_dict()[POSITIONS], positions)


def test_loading_in_another_dtype_and_as_transformers_users_do(tmp_path):
    model = build()
    model.save_pretrained(tmp_path, weights="int8")
    assert load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    loaded, report = load(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    AutoModel.register(SpeechLlamaConfig, SpeechLlamaForConditionalGeneration, exist_ok=True)
    by_class = AutoModel.from_pretrained(tmp_path, config=SpeechLlamaConfig.from_pretrained(tmp_path))
    assert bit_equal(by_class, loaded)
    half = model.to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    assert load(tmp_path / "half").dtype == torch.bfloat16
    assert bit_equal(half, load(tmp_path / "half"))
    half.save_pretrained(tmp_path / "half", weights="int8")
    assert load(tmp_path / "half").dtype == torch.float32


def test_unknown_storage_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown weights 'int4': choose 'float' or 'int8'"):
        build().save_pretrained(tmp_path, weights="int4")


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_a_cut_short_file_is_reported(tmp_path, weights):
    build().save_pretrained(tmp_path, weights=weights)
    path = tmp_path / WEIGHTS_FILE
    data = path.read_bytes()
    for size in (0, 4, 8, 100, 5000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=rf"{WEIGHTS_FILE} is damaged or cut short"):
            load(tmp_path)
    path.write_bytes(data)
    load(tmp_path)


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_missing_and_strange_weights_are_reported(tmp_path, weights):
    build().save_pretrained(tmp_path, weights=weights)
    path = tmp_path / WEIGHTS_FILE
    stored = load_file(path)
    save_file({k: v for k, v in stored.items() if k not in ("ctc_head.bias", "adapter.norm.bias")}, path)
    with pytest.raises(CheckpointError, match=r"lacks 2 of the model's weights \(adapter\.norm\.bias"):
        load(tmp_path)
    save_file(stored | {"strange.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"another architecture .* 1 weights .* \(strange\.weight"):
        load(tmp_path)
    if weights == "int8":
        save_file({k: v for k, v in stored.items() if k != "ctc_head.weight_scale"}, path)
        with pytest.raises(CheckpointError, match=r"ctc_head\.weight is stored in 8 bits, but its scales"):
            load(tmp_path)


def test_another_architecture_is_reported(tmp_path):
    build().save_pretrained(tmp_path / "one")
    SpeechLlamaForConditionalGeneration(tiny_config()).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / WEIGHTS_FILE).replace(tmp_path / "one" / WEIGHTS_FILE)
    with pytest.raises(
        CheckpointError, match=r"another architecture than its config\.json: .* has shape \(.*\), not \("
    ):
        load(tmp_path / "one")
    build().decoder.save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="is a model of type 'llama', not 'speech_llama'"):
        load(tmp_path / "llama")
    with pytest.raises(OSError, match="nowhere"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_a_full_disk_leaves_the_old_model(tmp_path, full_disk, weights):
    folder = tmp_path / "model"
    model = build()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    before = digest(folder)

    model.get_input_embeddings().weight.data.zero_()
    for place in (folder, tmp_path / "new"):
        with full_disk(20_000), pytest.raises(OSError, match=r"cannot write .*safetensors: .*File too large"):
            model.save_pretrained(place, weights=weights)
    assert digest(folder) == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]  # nothing half written is left
    model.save_pretrained(folder, weights=weights)
    assert json.loads((folder / "config.json").read_text())["weight_storage"] == weights
    assert (folder / "tokenizer.json").exists()  # what else lies in the folder stays
    assert load(folder).get_input_embeddings().weight.eq(0).all()
