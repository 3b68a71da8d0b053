"""Speech LLMs of transformers in the decoding loop: a language model whose prompt holds embeddings of audio.

Granite Speech, Qwen3-ASR, Voxtral and Qwen2-Audio differ in how audio becomes embeddings and where in the prompt these
go; each does it in its own forward pass, just before its language model. So the forward pass is run up to there, and
what the language model would have been given is the prompt.

Shapes: B rows, L prompt positions, D width.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from leapasr.decoding.causal_lm import CausalLMDecoder
from leapasr.decoding.interface import Prompts
from leapasr.model.mtp_heads import MTPHeads

SPEECH_LLMS = ("granite_speech", "qwen3_asr", "voxtral", "qwen2_audio")  # that were tested


class _ReachedLanguageModel(Exception):
    """Carries what the language model was to be given out of a forward pass."""

    def __init__(self, given: dict[str, Any]):
        super().__init__()
        self.given = given


class SpeechLLMDecoder(CausalLMDecoder):
    """The language model of a speech LLM and, for K > 1, heads 2..K.

    Args:
        model: a model ``...ForConditionalGeneration`` of one of `SPEECH_LLMS`, in evaluation mode, on the device and in
            the dtype that it is to run in. mtp_heads: None for K = 1.

    Raises:
        ValueError: the model is of another type, or has no end-of-text token.
    """

    def __init__(self, model: PreTrainedModel, mtp_heads: MTPHeads | None = None):
        found = model.config.model_type
        if found not in SPEECH_LLMS:
            raise ValueError(f"a model of type {found!r} is no speech LLM that is known: {', '.join(SPEECH_LLMS)}")
        super().__init__(model, mtp_heads, body=model.get_decoder())
        self.model = model

    @torch.inference_mode()
    def prompts(self, **inputs: Any) -> Prompts:
        """What rows begin with, from what the model's processor gives: ``input_ids``, ``attention_mask``, audio, ...

        Padding may lie on either side.

        Raises:
            ValueError: audio and its places in the text do not match.
        """

        def catch(module: Any, args: tuple, given: dict[str, Any]) -> NoReturn:
            raise _ReachedLanguageModel(given)

        hook = self.body.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.model(**inputs)
        except _ReachedLanguageModel as reached:
            embeddings_BLD, mask_BL = reached.given["inputs_embeds"], reached.given.get("attention_mask")
        finally:
            hook.remove()
        if mask_BL is None:
            mask_BL = torch.ones(embeddings_BLD.shape[:2], device=embeddings_BLD.device)
        return _right_padded(embeddings_BLD, mask_BL.bool())


def _right_padded(embeddings_BLD: Tensor, valid_BL: Tensor) -> Prompts:
    """Prompts of the places (B, L) that are valid, in their order."""
    order_BL = (~valid_BL).long().argsort(dim=1, stable=True)
    lengths_B = valid_BL.sum(1)
    moved_BLD = embeddings_BLD.gather(1, order_BL[..., None].expand_as(embeddings_BLD))
    return Prompts(moved_BLD[:, : int(lengths_B.max())], lengths_B)
