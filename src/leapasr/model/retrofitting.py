"""Other multi-token heads for a model that is trained already."""

from __future__ import annotations

from typing import Any

import torch

from leapasr.model.configuration import SpeechLlamaConfig
from leapasr.model.draft_layers import build_draft_layers
from leapasr.model.mtp_heads import build_heads
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration


def head_fields(*, num_heads: int | None, head_type: str | None, draft_layers: int | None) -> dict[str, Any]:
    """Fields of `SpeechLlamaConfig` for what is not None; a model of head 1 alone has no draft layers."""
    chosen = {"num_heads": num_heads, "head_type": head_type, "draft_layers": 0 if num_heads == 1 else draft_layers}
    return {name: value for name, value in chosen.items() if value is not None}


@torch.no_grad()
def set_heads(
    model: SpeechLlamaForConditionalGeneration,
    *,
    num_heads: int | None = None,
    head_type: str | None = None,
    draft_layers: int | None = None,
    seed: int,
) -> None:
    """Give `model` `num_heads` heads of `head_type` behind `draft_layers` layers of their own, in place.

    None leaves the model's own. Head 1 stays as it is. Heads that the model has of this type are kept; those that are
    missing start as copies of head 1 (what is random in them comes from `seed`), and those beyond `num_heads` are
    dropped, all of them with their draft layers. Another number of draft layers than the model's begin as copies of
    the decoder's.

    Raises:
        ValueError: `num_heads` is less than 1, `head_type` is unknown, or there are not so many layers.
    """
    chosen = head_fields(num_heads=num_heads, head_type=head_type, draft_layers=draft_layers)
    new = SpeechLlamaConfig.from_dict(model.config.to_dict() | chosen)
    torch.manual_seed(seed)
    if new.draft_layers != model.config.draft_layers:
        model.config.draft_layers, model.draft_layers = new.draft_layers, build_draft_layers(new)
        if model.draft_layers is not None:
            model.draft_layers.to(model.device, model.dtype).reset_from(model.decoder.base_model)
    if (new.num_heads, new.head_type) == (model.config.num_heads, model.config.head_type):
        return
    old_heads, heads = model.mtp_heads, build_heads(new)
    same_type = new.head_type == model.config.head_type
    model.config.num_heads, model.config.head_type, model.mtp_heads = new.num_heads, new.head_type, heads
    if heads is None:
        return
    heads.to(model.device, model.dtype).reset_from(model.decoder.lm_head)
    if old_heads is not None and same_type:
        state = heads.state_dict()
        for name, weight in old_heads.state_dict().items():
            if name in state:  # where heads share a matrix, each has its rows, in their order
                rows = min(len(weight), len(state[name]))
                state[name][:rows] = weight[:rows]
