"""Whisper's decoder rewritten as a LLaMA: the same function, in the weights of another architecture.

Whisper's decoder looks at its own text and, through cross-attention, at the encoder's frames; a LLaMA has one kind of
attention. So each layer of Whisper becomes two of the LLaMA: one whose text sees text alone, and which is nothing but
attention, and one whose text sees the frames alone and whose feed-forward part is Whisper's. The frames are keys and
values in the LLaMA's cache (`SpeechLlamaConfig.speech_as_memory`). What is written comes out the same up to rounding
(tested against transformers), and everything that is there for a LLaMA (heads, drafts, verification, training) is there
for it.

How the two differ, and where the difference goes:

* LayerNorm takes the mean away, RMSNorm does not: what layers write into the residual stream is centred, and what
  reads from it is centred too. Gains of norms are folded into the matrices behind them, offsets into their biases.
  Token embeddings are tied to the unembedding and keep their mean, which in Whisper is next to nothing: it makes them
  0.2% longer.
* The residual stream has further dimensions. One of them marks frames. A dimension of every attention head turns the
  mark into a score of ±`GATE`, which shows text either only text or only frames.
* Frames have the same length in every row: they are the encoder's last LayerNorm before its gain and offset, which
  go into the matrices that read them. So their RMSNorm divides by a constant.
* Rotary positions are scaled down to nothing; text has learnt positions (`SpeechLlamaConfig.text_positions`).
* The feed-forward part has a gate: Whisper's first matrix is the gate's (with GELU), the other one gives ones.

The dimensions that are left and the other matrices of the gates begin as zeros, and are room for training.

Shapes: D Whisper's width, R width of the residual stream, F width of the feed-forward part, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, WhisperConfig

EPSILON = 1e-5  # of Whisper's norms
GATE = 200.0  # score that opens or closes a kind of place: far more than any score of content
_NEVER = -1e4  # a logit of what is not written: begin-of-text, and what Whisper does not have


@dataclass(frozen=True)
class WhisperDecoder:
    """Whisper's own decoder as the decoder of a Speech-LLaMA.

    head_room: dimensions that every attention head has beyond Whisper's, even; the residual stream grows by as many
        for each head.
    """

    head_room: int = 8

    def __post_init__(self) -> None:
        if self.head_room < 2 or self.head_room % 2:
            raise ValueError(f"head_room must be even and at least 2, got {self.head_room}")

    def hidden_size(self, whisper: WhisperConfig) -> int:
        """R: width of the residual stream."""
        return whisper.d_model + whisper.decoder_attention_heads * self.head_room

    def mark(self, whisper: WhisperConfig) -> int:
        """The dimension of the residual stream that marks frames."""
        return whisper.d_model


def llama_config(whisper: WhisperConfig, preset: WhisperDecoder, *, vocab_size: int) -> LlamaConfig:
    """Configuration of the LLaMA that `as_llama` fills; special tokens are left to whoever knows the tokenizer."""
    size = preset.hidden_size(whisper)
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size,
        intermediate_size=whisper.decoder_ffn_dim,
        num_hidden_layers=2 * whisper.decoder_layers,
        num_attention_heads=whisper.decoder_attention_heads,
        num_key_value_heads=whisper.decoder_attention_heads,
        hidden_act=whisper.activation_function,
        rms_norm_eps=EPSILON * whisper.d_model / size,
        attention_bias=True,
        mlp_bias=True,
        max_position_embeddings=whisper.max_source_positions + whisper.max_target_positions + 1,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 1e9},
        tie_word_embeddings=True,
    )


def as_llama(
    whisper: WhisperConfig,
    state: dict[str, Tensor],
    preset: WhisperDecoder,
    *,
    tokens: Sequence[int],
    forced: Sequence[int],
) -> dict[str, Tensor]:
    """Weights of a `SpeechLlamaForConditionalGeneration` that writes what Whisper writes.

    Args:
        whisper, state: of `load_whisper`.
        tokens: for each token of the Speech-LLaMA the token of Whisper that it is, −1 for one that Whisper lacks.
        forced: the tokens with which Whisper begins (start of transcript, language, task, no timestamps); the last is
            begin-of-text, those before it become places of the prompt.

    Returns:
        weights of ``decoder``, ``speech_projection.projection``, ``soft_prompt`` and ``text_positions``, by their
        names in the model.
    """
    return _Rewriting(whisper, state, preset).weights(tokens, forced)


class _Rewriting:
    def __init__(self, whisper: WhisperConfig, state: dict[str, Tensor], preset: WhisperDecoder):
        self.whisper = whisper
        self.state = {name: value.double() for name, value in state.items()}
        self.D, self.R = whisper.d_model, preset.hidden_size(whisper)
        self.num_heads = whisper.decoder_attention_heads
        self.head_size = self.D // self.num_heads
        self.wide_head = self.head_size + preset.head_room
        self.gain = math.sqrt(self.D / self.R)  # of RMSNorm, on content of text: then it equals LayerNorm
        # a frame's content is as long as the root of D, and so is its mark
        self.mark, self.mark_value = preset.mark(whisper), math.sqrt(self.D)
        self.frame_rms = math.sqrt(2 * self.D / self.R + EPSILON * self.D / self.R)

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of one of Whisper's modules; zeros for a bias that it lacks."""
        weight = self.state[f"{name}.weight"]
        return weight, self.state.get(f"{name}.bias", weight.new_zeros(len(weight)))

    def widened(self, rows: Tensor) -> Tensor:
        """(..., D) to (..., R): further dimensions of zeros."""
        return torch.nn.functional.pad(rows, (0, self.R - self.D))

    def reading(self, rows: Tensor) -> Tensor:
        """Rows (..., D) that read what lies in the residual stream, its mean left out, as (..., R)."""
        return self.widened(centred(rows))

    def writing(self, columns: Tensor) -> Tensor:
        """Columns (D, ...) that write into the residual stream without a mean, as (R, ...)."""
        return self.widened(centred(columns.movedim(0, -1))).movedim(-1, 0)

    def norm_weight(self) -> Tensor:
        """Of an RMSNorm: content of text as LayerNorm leaves it, the mark of a frame as one."""
        weight = torch.full((self.R,), self.gain, dtype=torch.float64)
        weight[self.mark] = self.frame_rms / self.mark_value
        return weight

    def weights(self, tokens: Sequence[int], forced: Sequence[int]) -> dict[str, Tensor]:
        embeddings, positions = self.state["decoder.embed_tokens.weight"], self.state["decoder.embed_positions.weight"]
        index = torch.tensor(tokens)
        known = index >= 0
        rows = torch.where(known[:, None], embeddings[index.clamp(min=0)], 0.0)
        last_gain, last_offset = self.of("decoder.layer_norm")
        encoder_gain, encoder_offset = self.of("encoder.layer_norm")
        begin = embeddings[list(forced[:-1])] + centred(positions[: len(forced) - 1])
        frames_bias = self.widened(-encoder_offset / encoder_gain)
        frames_bias[self.mark] = self.mark_value
        found = {
            "decoder.model.embed_tokens.weight": self.widened(rows),
            "decoder.lm_head.weight": self.widened(rows),
            "decoder.lm_head.bias": torch.where(known & (index != forced[-1]), rows @ last_offset, _NEVER),
            "decoder.model.norm.weight": self.widened(last_gain) * self.gain,
            "text_positions.weight": self.widened(centred(positions[len(forced) - 1 :])),
            "soft_prompt.weight": self.widened(begin),
            "speech_projection.projection.weight": self.widened(torch.diag(1 / encoder_gain)).T,
            "speech_projection.projection.bias": frames_bias,
        }
        for layer in range(self.whisper.decoder_layers):
            theirs = f"decoder.layers.{layer}"
            for place, part in ((2 * layer, self.text_layer(theirs)), (2 * layer + 1, self.frame_layer(theirs))):
                for name, value in part.items():
                    found[f"decoder.model.layers.{place}.{name}"] = value
        return {name: value.float().contiguous() for name, value in found.items()}

    def text_layer(self, theirs: str) -> dict[str, Tensor]:
        """Self-attention alone."""
        gain, offset = self.of(f"{theirs}.self_attn_layer_norm")
        query = self.query(f"{theirs}.self_attn", gain, offset)
        key, value = (self.reading(self.of(f"{theirs}.self_attn.{part}_proj")[0] * gain) for part in "kv")
        return query | self.keys_and_values(f"{theirs}.self_attn", key, value, offset, frames=-1)

    def frame_layer(self, theirs: str) -> dict[str, Tensor]:
        """Cross-attention, and Whisper's feed-forward part."""
        query = self.query(f"{theirs}.encoder_attn", *self.of(f"{theirs}.encoder_attn_layer_norm"))
        gain, offset = self.of("encoder.layer_norm")
        gain = gain * self.frame_rms / self.gain
        key, value = (self.widened(self.of(f"{theirs}.encoder_attn.{part}_proj")[0] * gain) for part in "kv")
        first, first_bias = self.of(f"{theirs}.fc1")
        second, second_bias = self.of(f"{theirs}.fc2")
        gain, before = self.of(f"{theirs}.final_layer_norm")
        F = len(first)
        return {
            **query,
            **self.keys_and_values(f"{theirs}.encoder_attn", key, value, offset, frames=1),
            "post_attention_layernorm.weight": self.norm_weight(),
            "mlp.gate_proj.weight": self.reading(first * gain),
            "mlp.gate_proj.bias": first_bias + first @ before,
            "mlp.up_proj.weight": torch.zeros(F, self.R),
            "mlp.up_proj.bias": torch.ones(F),
            "mlp.down_proj.weight": self.writing(second),
            "mlp.down_proj.bias": self.writing(second_bias),
        }

    def query(self, theirs: str, gain: Tensor, offset: Tensor) -> dict[str, Tensor]:
        """Queries of an attention, behind a LayerNorm of this gain and offset; every one asks for its kind of place."""
        weight, bias = self.of(f"{theirs}.q_proj")
        rescale = math.sqrt(self.wide_head / self.head_size)  # LLaMA divides by the root of its wider heads
        wide_bias = self.heads((bias + weight @ offset)[:, None] * rescale)[..., 0]
        wide_bias[:, self.head_size] = self.loud
        return {
            "input_layernorm.weight": self.norm_weight(),
            "self_attn.q_proj.weight": self.heads(self.reading(weight * gain) * rescale).flatten(0, 1),
            "self_attn.q_proj.bias": wide_bias.flatten(),
        }

    def keys_and_values(
        self, theirs: str, key: Tensor, value: Tensor, offset: Tensor, *, frames: int
    ) -> dict[str, Tensor]:
        """Keys, values and output of an attention.

        Args:
            key, value: what reads the places, (D, R). Whisper's keys have no bias, and an offset common to all keys
                changes nothing.
            offset: of the LayerNorm before them.
            frames: 1 if frames are to be seen, and nothing else; −1 if they are not.
        """
        keys = self.heads(key)
        keys[:, self.head_size, self.mark] = frames * self.loud
        weight, bias = self.of(f"{theirs}.v_proj")
        output, output_bias = self.of(f"{theirs}.out_proj")
        wide_output = self.heads(self.writing(output).T).flatten(0, 1).T
        return {
            "self_attn.k_proj.weight": keys.flatten(0, 1),
            "self_attn.k_proj.bias": torch.zeros(self.R),
            "self_attn.v_proj.weight": self.heads(value).flatten(0, 1),
            "self_attn.v_proj.bias": self.heads((bias + weight @ offset)[:, None]).flatten(),
            "self_attn.o_proj.weight": wide_output,
            "self_attn.o_proj.bias": self.writing(output_bias),
        }

    @property
    def loud(self) -> float:
        """Its square, divided by the root of a head's width, is `GATE`."""
        return math.sqrt(GATE * math.sqrt(self.wide_head))

    def heads(self, rows: Tensor) -> Tensor:
        """Rows (D, ·) of a projection as (heads, wider heads, ·)."""
        by_head = rows.unflatten(0, (self.num_heads, self.head_size))
        return torch.nn.functional.pad(by_head, (0, 0, 0, self.wide_head - self.head_size))


def centred(rows: Tensor) -> Tensor:
    """Rows (..., D) without their mean."""
    return rows - rows.mean(-1, keepdim=True)
