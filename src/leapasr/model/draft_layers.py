"""Draft layers: decoder layers that further heads have to themselves.

The state that gives head 1 its next token knows little of the tokens behind that. Training it to know more moves head
1 away from what it knows (a small Whisper's word error rate grows within a few hundred updates). So further heads may
branch off before the decoder's last layers and go through copies of these: at first the same function, then free to
look further ahead while head 1 stays as it is, token for token. Layers for drafting behind a frozen decoder are known
from EAGLE (arXiv 2401.15077); a branch out of its middle from Kangaroo (arXiv 2404.18911).

Shapes: B rows, W inputs, D decoder width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from leapasr.model.configuration import SpeechLlamaConfig


class NoFeedForward(nn.Module):
    """In the place of a feed-forward part that a layer does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


def leave_out_feed_forward(layers: Iterable[nn.Module]) -> None:
    """Leave decoder layers nothing but their attention."""
    for layer in layers:
        layer.post_attention_layernorm, layer.mlp = nn.Identity(), NoFeedForward()


class DraftLayers(nn.Module):
    """Copies of a decoder's last layers and of its last norm, for heads 2..K.

    Their keys and values lie in the decoder's cache, behind its own layers'.
    """

    def __init__(self, model_config: SpeechLlamaConfig):
        super().__init__()
        config = copy.deepcopy(model_config.decoder_config)
        num_decoder_layers, config.num_hidden_layers = config.num_hidden_layers, model_config.draft_layers
        self.branching = num_decoder_layers - model_config.draft_layers  # decoder layers before the branch
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[self.branching :]
        config.vocab_size, config.pad_token_id = 1, None
        self.body: Any = AutoModel.from_config(config)
        self.body.embed_tokens = None  # they begin with hidden states
        for place, layer in enumerate(self.body.layers):
            layer.self_attn.layer_idx = num_decoder_layers + place
            if self.branching + place in model_config.attention_only:
                leave_out_feed_forward([layer])

    @torch.no_grad()
    def reset_from(self, decoder_body: Any) -> None:
        """Take the weights of the decoder's last layers and norm: heads then read what head 1 reads."""
        self.body.layers.load_state_dict(decoder_body.layers[self.branching :].state_dict())
        self.body.norm.load_state_dict(decoder_body.norm.state_dict())

    def forward(self, hidden_BWD: Tensor, **inputs: Any) -> Tensor:
        """Last hidden states (B, W, D) for heads 2..K, from the decoder's hidden states at the branch."""
        return self.body(inputs_embeds=hidden_BWD, **inputs).last_hidden_state


def read_hidden(body: nn.Module, draft_layers: DraftLayers | None, inputs_embeds: Tensor, **inputs: Any) -> Tensor:
    """What heads read of each input: last hidden states (B, W, D).

    With draft layers (B, W, 2D): head 1's states, and behind them those of heads 2..K.

    Args:
        body: the decoder without its unembedding. inputs: as transformers' decoders take them.
    """
    if draft_layers is None:
        return body(inputs_embeds=inputs_embeds, **inputs).last_hidden_state
    output = body(inputs_embeds=inputs_embeds, output_hidden_states=True, **inputs)
    drafting = draft_layers(output.hidden_states[draft_layers.branching], **inputs)
    return torch.cat([output.last_hidden_state, drafting], -1)


def build_draft_layers(config: SpeechLlamaConfig) -> DraftLayers | None:
    """The draft layers of `config`; None where there are none."""
    return DraftLayers(config) if config.draft_layers else None
