"""The adapter: encoder frames → adapter frames (25 a second) → CTC and speech embeddings (12.5 a second).

Shapes: B rows, T frames, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from leapasr.model.configuration import SpeechLlamaConfig
from leapasr.model.encoders import attention_bias, padding_mask


def stack_frames(frames_BTD: Tensor, lengths_B: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Join `factor` neighbouring frames: (B, T, D) → (B, ceil(T / factor), D · factor); padding counts as zeros."""
    frames_BTD = frames_BTD * padding_mask(lengths_B, frames_BTD.shape[1])[..., None]
    missing = -frames_BTD.shape[1] % factor
    frames_BTD = nn.functional.pad(frames_BTD, (0, 0, 0, missing))
    B, T, D = frames_BTD.shape
    return frames_BTD.reshape(B, T // factor, D * factor), (lengths_B + factor - 1) // factor


class Adapter(nn.Module):
    """Frame stacking, a projection, and bidirectional transformer layers (transformers' `WhisperEncoderLayer`)."""

    def __init__(self, config: SpeechLlamaConfig, encoder_size: int):
        super().__init__()
        self.stacking = config.encoder_stacking
        self.projection = nn.Linear(encoder_size * config.encoder_stacking, config.adapter_size)
        layer_config = WhisperConfig(
            d_model=config.adapter_size,
            encoder_attention_heads=config.adapter_attention_heads,
            encoder_ffn_dim=config.adapter_ffn_size,
            dropout=0.0,
            attention_dropout=0.0,
        )
        layer_config._attn_implementation = "sdpa"
        self.layers = nn.ModuleList([WhisperEncoderLayer(layer_config) for _ in range(config.adapter_layers)])
        self.norm = nn.LayerNorm(config.adapter_size)

    def forward(self, frames_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder frames (B, T, D) to adapter frames (B, ceil(T / stacking), adapter_size) and lengths (B,)."""
        x, lengths_B = stack_frames(frames_BTD, lengths_B, self.stacking)
        x = self.projection(x)
        bias = attention_bias(padding_mask(lengths_B, x.shape[1]), x.dtype)
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x), lengths_B


class SpeechProjection(nn.Module):
    """Adapter frames to speech embeddings in the decoder's width.

    With `ctc_in_prompt` each embedding also carries what CTC reads there: the token embedding expected under
    the CTC posterior, blank left out, as in self-conditioned CTC (Nozaki and Komatsu, arXiv 2104.02724) and
    CTC-compressed prompts (Wu et al., arXiv 2307.03917). The posterior is detached: the CTC head learns from
    the CTC loss alone.
    """

    def __init__(self, config: SpeechLlamaConfig):
        super().__init__()
        self.stacking = config.decoder_stacking
        self.ctc_in_prompt = config.ctc_in_prompt
        self.blank = config.blank_token_id
        self.projection = nn.Linear(config.adapter_size * self.stacking, config.decoder_config.hidden_size)

    def forward(
        self, frames_BTD: Tensor, lengths_B: Tensor, ctc_logits_BTV: Tensor, token_embeddings_VD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns speech embeddings (B, ceil(T / stacking), D) and their lengths (B,)."""
        stacked, stacked_lengths_B = stack_frames(frames_BTD, lengths_B, self.stacking)
        embeddings = self.projection(stacked)
        if self.ctc_in_prompt:
            embeddings = embeddings + self.read_ctc(ctc_logits_BTV, lengths_B, token_embeddings_VD)
        return embeddings, stacked_lengths_B

    def read_ctc(self, ctc_logits_BTV: Tensor, lengths_B: Tensor, token_embeddings_VD: Tensor) -> Tensor:
        """Expected token embedding of every stacked frame, summed over its frames."""
        posterior = torch.softmax(ctc_logits_BTV.detach().float(), -1)
        posterior[..., self.blank] = 0
        expected = posterior.to(token_embeddings_VD.dtype) @ token_embeddings_VD
        stacked, _ = stack_frames(expected, lengths_B, self.stacking)
        B, T, _ = stacked.shape
        return stacked.view(B, T, self.stacking, -1).sum(2)
