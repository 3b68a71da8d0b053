"""The adapter: encoder frames → adapter frames (25 a second) → CTC and speech embeddings (12.5 a second).

Shapes: B rows, T frames, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from leapasr.model.configuration import SpeechLlamaConfig
from leapasr.model.ctc_head import CTCScores
from leapasr.model.encoders import attention_bias, padding_mask

LOOKAHEAD_SIZE = 128  # width in which the tokens that CTC reads next are joined


def stack_frames(frames_BTD: Tensor, lengths_B: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Join `factor` neighbouring frames: (B, T, D) → (B, ceil(T / factor), D · factor); padding counts as zeros."""
    frames_BTD = frames_BTD * padding_mask(lengths_B, frames_BTD.shape[1])[..., None]
    missing = -frames_BTD.shape[1] % factor
    frames_BTD = nn.functional.pad(frames_BTD, (0, 0, 0, missing))
    B, T, D = frames_BTD.shape
    return frames_BTD.reshape(B, T // factor, D * factor), (lengths_B + factor - 1) // factor


class AdapterShape(Protocol):
    """What `Adapter` reads of a configuration; as in `SpeechLlamaConfig`."""

    @property
    def encoder_stacking(self) -> int: ...
    @property
    def adapter_size(self) -> int: ...
    @property
    def adapter_layers(self) -> int: ...
    @property
    def adapter_attention_heads(self) -> int: ...
    @property
    def adapter_ffn_size(self) -> int: ...


class Adapter(nn.Module):
    """Frame stacking, a projection, and bidirectional transformer layers (transformers' `WhisperEncoderLayer`)."""

    def __init__(self, config: AdapterShape, encoder_size: int):
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
    CTC-compressed prompts (Wu et al., arXiv 2307.03917), and, through matrices of their own, what CTC read last
    before it and the `ctc_lookahead` tokens that it reads next. So a decoder that has just written a token finds
    with one look, at the place where that token was read last, all that its K heads are to say; it would otherwise
    first have to learn to join neighbouring places. The posterior is detached: the CTC head learns from the CTC
    loss alone.

    Where speech is the decoder's memory, draft layers alone get this. The embedding is that of CTC's best token then,
    which is cheaper where there are many tokens, and of the size of encoder frames, in which it would drown.

    With `ctc_positions` the prompt's positions count CTC's tokens, from the position of begin-of-text on: text and
    prompt then share one axis, and as far as CTC has the right number of tokens the decoder finds what it is to
    write next at its own position, however long the prompt.
    """

    def __init__(self, config: SpeechLlamaConfig, frame_size: int):
        super().__init__()
        self.config = config
        self.stacking = config.decoder_stacking
        self.lookahead = config.ctc_lookahead
        self.ctc_positions = config.ctc_positions
        self.blank = config.blank_token_id
        size = config.decoder_config.hidden_size
        self.projection = nn.Linear(frame_size * self.stacking, size)
        self.ctc_projection = (
            nn.Linear(size, size, bias=False) if config.ctc_in_prompt and config.speech_as_memory else None
        )
        self.previous = nn.Linear(size, size, bias=False) if config.ctc_in_prompt else None
        if self.lookahead:
            self.following = nn.Linear(size, LOOKAHEAD_SIZE, bias=False)
            self.following_projection = nn.Linear(self.lookahead * LOOKAHEAD_SIZE, size, bias=False)

    def forward(
        self, frames_BTD: Tensor, lengths_B: Tensor, ctc: CTCScores | None, token_embeddings_VD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns speech embeddings (B, L, D), L = ceil(T / stacking), their lengths (B,) and positions (B, L).

        What CTC says counts where the configuration's `decoder_reads_ctc` says so. Where draft layers remember what CTC
        reads the embeddings are (B, L, 2D): without it, for head 1, and with it.
        """
        stacked, stacked_lengths_B = stack_frames(frames_BTD, lengths_B, self.stacking)
        embeddings = self.projection(stacked)
        ids_BT = lengths_B.new_full(frames_BTD.shape[:2], self.blank)
        if self.config.decoder_reads_ctc:
            assert ctc is not None
            ids_BT = self.best_tokens(ctc, lengths_B)
            with_ctc = embeddings + self.read_ctc(ctc, ids_BT, lengths_B, token_embeddings_VD)
            embeddings = torch.cat([embeddings, with_ctc], -1) if self.config.drafts_remember_ctc else with_ctc
        missing = -ids_BT.shape[1] % self.stacking
        ids_BLS = nn.functional.pad(ids_BT, (0, missing), value=self.blank).unflatten(1, (-1, self.stacking))
        return embeddings, stacked_lengths_B, self.positions(ids_BLS, stacked_lengths_B)

    def best_tokens(self, ctc: CTCScores, lengths_B: Tensor) -> Tensor:
        """CTC's best token of each frame (B, T), blank behind each row's end."""
        return ctc.best_BT.masked_fill(~padding_mask(lengths_B, ctc.best_BT.shape[1]), self.blank)

    def positions(self, ids_BLS: Tensor, lengths_B: Tensor) -> Tensor:
        """Positions of the prompt (B, L) in the decoder.

        Args:
            ids_BLS: best token of each of the S frames of each place (B, L, S). lengths_B: places of each row.
        """
        B, L, S = ids_BLS.shape
        if not self.ctc_positions:
            return torch.arange(L, device=ids_BLS.device).expand(B, L)
        begun_BL = begins(ids_BLS.flatten(1), self.blank).cumsum(1).view(B, L, S)[..., -1]
        return lengths_B[:, None] + (begun_BL - 1).clamp(min=0)

    def read_ctc(self, ctc: CTCScores, ids_BT: Tensor, lengths_B: Tensor, token_embeddings_VD: Tensor) -> Tensor:
        """What CTC reads in every stacked frame (B, ceil(T / stacking), D), summed over its frames.

        Args:
            ids_BT: `best_tokens` of CTC.
        """
        if self.ctc_projection is None:
            posterior = torch.softmax(ctc.logits_BTV.detach().float(), -1)
            posterior[..., self.blank] = 0
            read_BTD = posterior.to(token_embeddings_VD.dtype) @ token_embeddings_VD
        else:
            read_BTD = nn.functional.embedding(ids_BT, token_embeddings_VD)  # small, beside encoder frames
            read_BTD = nn.functional.rms_norm(read_BTD, read_BTD.shape[-1:])
        read_BTD = read_BTD.to(self.projection.weight.dtype)
        stacked, _ = stack_frames(self.read_tokens(read_BTD, ids_BT), lengths_B, self.stacking)
        B, T, _ = stacked.shape
        read = stacked.view(B, T, self.stacking, -1).sum(2)
        return read if self.ctc_projection is None else self.ctc_projection(read)

    def read_tokens(self, read_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        """Add to what is read at each position what is read before and behind it.

        Args:
            read_BTD: embedding of what is read (B, T, D). ids_BT: the token that it is (B, T), or blank, which
                gets nothing, or, in a memory, what the last token before it gets: attention to frames looks at all
                of a word. A run of one token counts as one reading, as CTC has it.

        Without `ctc_in_prompt` there are no such matrices, and what is read stays as it is.
        """
        if self.previous is None:
            return read_BTD
        offsets = [0, -1, *range(1, self.lookahead + 1)]
        everywhere = self.config.speech_as_memory
        places_BTO, exists_BTO = neighbouring_readings(ids_BT, offsets, blank=self.blank, everywhere=everywhere)
        own_BTD = _gather(read_BTD, places_BTO[..., :1], exists_BTO[..., :1]) if everywhere else read_BTD
        result = own_BTD + self.previous(_gather(read_BTD, places_BTO[..., 1:2], exists_BTO[..., 1:2]))
        if self.lookahead:
            following = _gather(self.following(read_BTD), places_BTO[..., 2:], exists_BTO[..., 2:])
            result = result + self.following_projection(following)
        return result


def begins(ids_BT: Tensor, blank: int) -> Tensor:
    """Whether a token begins at a frame (B, T), by the collapsing rule of CTC; `ids_BT` has runs and blanks."""
    before_BT = nn.functional.pad(ids_BT[:, :-1], (1, 0), value=blank)
    return (ids_BT != blank) & (ids_BT != before_BT)


def neighbouring_readings(
    ids_BT: Tensor, offsets: Sequence[int], *, blank: int, everywhere: bool = False
) -> tuple[Tensor, Tensor]:
    """Where CTC's tokens around each frame begin, by its collapsing rule.

    Args:
        ids_BT: best token of each frame (B, T), runs and blanks included.
        offsets: O distances in tokens from that of the frame: −1 is the token before it, 1 the one behind it.
        everywhere: count blanks to the token before them; else there is nothing around them.

    Returns:
        (B, T, O) frame at which the run of that token begins, 0 where there is none; and (B, T, O) whether there is
        one.
    """
    token_BT, begins_BT = ids_BT != blank, begins(ids_BT, blank)
    run_BT = begins_BT.cumsum(1) - 1  # the run that a frame lies in, or that ended last
    frame_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    last = ids_BT.shape[1]
    begin_BR = torch.zeros_like(nn.functional.pad(ids_BT, (0, 1)))
    begin_BR = begin_BR.scatter(1, torch.where(begins_BT, run_BT, last), frame_BT)
    wanted_BTO = run_BT[..., None] + torch.tensor(list(offsets), device=ids_BT.device)
    exists_BTO = (token_BT | everywhere)[..., None] & (wanted_BTO >= 0) & (wanted_BTO <= run_BT[:, -1:, None])
    places = begin_BR.gather(1, wanted_BTO.clamp(0, last - 1).flatten(1)).view_as(wanted_BTO)
    return torch.where(exists_BTO, places, 0), exists_BTO


def _gather(values_BTD: Tensor, index_BTO: Tensor, exists_BTO: Tensor) -> Tensor:
    """The values at O places for each frame, joined: (B, T, O · D), zeros where there is no such place."""
    B, T, D = values_BTD.shape
    rows_B1 = T * torch.arange(B, device=index_BTO.device)[:, None]
    found = nn.functional.embedding(rows_B1 + index_BTO.flatten(1), values_BTD.reshape(B * T, D))
    return (found.view(*index_BTO.shape, D) * exists_BTO[..., None]).flatten(2)
