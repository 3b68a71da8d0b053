"""Speech encoders behind one interface: features and lengths in, frames and lengths out.

Shapes: B rows, F mel bins, T frames, D encoder width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ParakeetEncoder, ParakeetEncoderConfig, PreTrainedConfig, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

FEATURE_RATE = 100  # log-mel frames a second, of every encoder here


def padding_mask(lengths_B: Tensor, size: int) -> Tensor:
    """True where a frame is real: bool (B, size)."""
    return torch.arange(size, device=lengths_B.device)[None] < lengths_B[:, None]


def attention_bias(valid_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask (B, 1, 1, T) that hides padding from bidirectional attention."""
    bias = torch.zeros(valid_BT.shape, dtype=dtype, device=valid_BT.device)
    return bias.masked_fill(~valid_BT, torch.finfo(dtype).min)[:, None, None, :]


def average_pairs(frames_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Average neighbouring frames in pairs: (B, T, D) → (B, ceil(T / 2), D); padding does not count."""
    valid_BT = padding_mask(lengths_B, frames_BTD.shape[1]).to(frames_BTD.dtype)
    missing = frames_BTD.shape[1] % 2
    sums = nn.functional.pad(frames_BTD * valid_BT[..., None], (0, 0, 0, missing)).unflatten(1, (-1, 2)).sum(2)
    counts = nn.functional.pad(valid_BT, (0, missing)).unflatten(1, (-1, 2)).sum(2)
    return sums / counts.clamp(min=1)[..., None], (lengths_B + 1) // 2


class WhisperSpeechEncoder(nn.Module):
    """Whisper's encoder, run on the utterance's own length instead of on 30 seconds of padding.

    On an input of exactly 30 seconds it computes what transformers' `WhisperEncoder` computes, unless
    `pooling_layer` is given: behind that many layers frames are averaged in pairs, and the layers above run at
    25 frames a second, at half the cost. Rows of a batch do not see each other's padding. The first
    `num_frozen_layers` layers (and the convolutions before them) run without gradient.

    Raises:
        ValueError: there is no layer `pooling_layer`.
    """

    def __init__(self, config: WhisperConfig, pooling_layer: int | None = None):
        super().__init__()
        if pooling_layer is not None and not 0 <= pooling_layer <= config.encoder_layers:
            raise ValueError(
                f"encoder_pooling_layer {pooling_layer}: the encoder has {config.encoder_layers} layers, give a number "
                f"from 0 to {config.encoder_layers}, or None"
            )
        self.encoder = WhisperEncoder(config)
        self.pooling_layer = pooling_layer
        self.num_frozen_layers = 0

    @property
    def output_size(self) -> int:
        return self.encoder.config.d_model

    @property
    def frame_rate(self) -> float:
        return FEATURE_RATE / (2 if self.pooling_layer is None else 4)

    @property
    def max_feature_frames(self) -> int:
        return self.encoder.config.max_source_positions * 2

    def freeze_layers(self, num_layers: int) -> None:
        """Run the convolutions and the first `num_layers` layers without gradient; 0 frees everything."""
        layers = self.encoder.layers
        if not 0 <= num_layers <= len(layers):
            raise ValueError(f"cannot freeze {num_layers} layers: the encoder has {len(layers)}")
        self.num_frozen_layers = num_layers
        self.encoder.requires_grad_(True)
        self.encoder.embed_positions.requires_grad_(False)
        if num_layers:
            for module in (self.encoder.conv1, self.encoder.conv2, *layers[:num_layers]):
                module.requires_grad_(False)
        if num_layers == len(layers):
            self.encoder.requires_grad_(False)

    def forward(self, features_BTF: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            features_BTF: log-mel features (B, T, F), 100 frames a second.
            lengths_B: valid frames of each row, int64 (B,).

        Returns:
            frames (B, ceil(T / 2), D), half as many with pooling, and their lengths (B,).

        Raises:
            ValueError: T is longer than the encoder's positions.
        """
        encoder = self.encoder
        if features_BTF.shape[1] > self.max_feature_frames:
            raise ValueError(
                f"audio of {features_BTF.shape[1] / FEATURE_RATE:.1f} s is longer than this encoder's "
                f"{self.max_feature_frames / FEATURE_RATE:.1f} s: cut it first"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.num_frozen_layers == 0):
            valid_BT = padding_mask(lengths_B, features_BTF.shape[1])
            x = (features_BTF * valid_BT[..., None]).transpose(1, 2)
            x = nn.functional.gelu(encoder.conv1(x)) * valid_BT[:, None]
            x = nn.functional.gelu(encoder.conv2(x)).transpose(1, 2)
            lengths_B = (lengths_B + 1) // 2
            x = x + encoder.embed_positions.weight[: x.shape[1]]
            x, lengths_B = self._run_layers(x, lengths_B, range(self.num_frozen_layers))
        x, lengths_B = self._run_layers(x, lengths_B, range(self.num_frozen_layers, len(encoder.layers)))
        if self.pooling_layer == len(encoder.layers):
            x, lengths_B = average_pairs(x, lengths_B)
        return encoder.layer_norm(x), lengths_B

    def _run_layers(self, x_BTD: Tensor, lengths_B: Tensor, indices: range) -> tuple[Tensor, Tensor]:
        """Run the layers `indices` on frames (B, T, D), pooling where it is due."""
        bias = attention_bias(padding_mask(lengths_B, x_BTD.shape[1]), x_BTD.dtype)
        for index in indices:
            if index == self.pooling_layer:
                x_BTD, lengths_B = average_pairs(x_BTD, lengths_B)
                bias = attention_bias(padding_mask(lengths_B, x_BTD.shape[1]), x_BTD.dtype)
            x_BTD = self.encoder.layers[index](x_BTD, bias)
        return x_BTD, lengths_B


class ParakeetSpeechEncoder(nn.Module):
    """FastConformer (`ParakeetEncoder`), 12.5 frames a second, for training from scratch."""

    def __init__(self, config: ParakeetEncoderConfig):
        super().__init__()
        self.encoder = ParakeetEncoder(config)

    @property
    def output_size(self) -> int:
        return self.encoder.config.hidden_size

    @property
    def frame_rate(self) -> float:
        return FEATURE_RATE / self.encoder.config.subsampling_factor

    @property
    def max_feature_frames(self) -> int:
        return self.encoder.config.max_position_embeddings * self.encoder.config.subsampling_factor

    def freeze_layers(self, num_layers: int) -> None:
        """Freeze the whole encoder (`num_layers` = its number of layers) or nothing (0)."""
        if num_layers not in (0, len(self.encoder.layers)):
            raise ValueError(
                f"ParakeetEncoder is frozen whole ({len(self.encoder.layers)}) or not at all (0), got {num_layers}"
            )
        self.encoder.requires_grad_(num_layers == 0)

    def forward(self, features_BTF: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, T, F) and lengths (B,) to frames (B, ceil(T / 8), D) and lengths (B,)."""
        mask_BT = padding_mask(lengths_B, features_BTF.shape[1])
        output = self.encoder(features_BTF * mask_BT[..., None], attention_mask=mask_BT.long())
        return output.last_hidden_state, output.attention_mask.sum(-1)


SpeechEncoder = WhisperSpeechEncoder | ParakeetSpeechEncoder
ENCODERS: dict[str, Callable[[Any], SpeechEncoder]] = {
    "whisper": WhisperSpeechEncoder,
    "parakeet_encoder": ParakeetSpeechEncoder,
}


def build_encoder(config: PreTrainedConfig, *, pooling_layer: int | None = None) -> SpeechEncoder:
    """The encoder of `config`, with random weights.

    Raises:
        ValueError: no encoder of this type is known, or it cannot pool at `pooling_layer`.
    """
    if config.model_type not in ENCODERS:
        raise ValueError(f"encoder type {config.model_type!r} is not supported: choose one of {', '.join(ENCODERS)}")
    if pooling_layer is None:
        return ENCODERS[config.model_type](config)
    if not isinstance(config, WhisperConfig):
        raise ValueError(f"encoder_pooling_layer is for Whisper's encoder, not for {config.model_type!r}: leave it out")
    return WhisperSpeechEncoder(config, pooling_layer)
