"""Other multi-token heads for a model that is trained already."""

from __future__ import annotations

import torch

from leapasr.model.configuration import SpeechLlamaConfig
from leapasr.model.mtp_heads import build_heads
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration


@torch.no_grad()
def set_heads(
    model: SpeechLlamaForConditionalGeneration, *, num_heads: int | None, head_type: str | None, seed: int
) -> None:
    """Give `model` `num_heads` heads of `head_type`, in place; None leaves the model's own. Head 1 stays as it is.

    Heads that the model has of this type are kept; those that are missing start as copies of head 1 (what is random
    in them comes from `seed`), and those beyond `num_heads` are dropped.

    Raises:
        ValueError: `num_heads` is less than 1, or `head_type` is unknown.
    """
    old_type, old_heads = model.config.head_type, model.mtp_heads
    num_heads = model.num_heads if num_heads is None else num_heads
    head_type = old_type if head_type is None else head_type
    if (num_heads, head_type) == (model.num_heads, old_type):
        return
    fields = model.config.to_dict() | {"num_heads": num_heads, "head_type": head_type}
    torch.manual_seed(seed)
    heads = build_heads(SpeechLlamaConfig.from_dict(fields))
    model.config.num_heads, model.config.head_type, model.mtp_heads = num_heads, head_type, heads
    if heads is None:
        return
    heads.to(model.device, model.dtype).reset_from(model.decoder.lm_head)
    if old_heads is not None and head_type == old_type:
        state = heads.state_dict()
        for name, weight in old_heads.state_dict().items():
            if name in state:  # where heads share a matrix, each has its rows, in their order
                rows = min(len(weight), len(state[name]))
                state[name][:rows] = weight[:rows]
