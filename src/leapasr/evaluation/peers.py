"""What leapasr is set against: transformers' `generate` on the same weights, faster-whisper on the same audio.

Shapes: B rows, L prompt positions, M positions of a memory, W step width, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperForConditionalGeneration
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from leapasr.decoding import Prompts
from leapasr.evaluation import peer_process
from leapasr.model.encoders import padding_mask
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration


@torch.inference_mode()
def generate(
    model: SpeechLlamaForConditionalGeneration, prompts: Prompts, *, max_tokens: int, **options: Any
) -> list[list[int]]:
    """Greedy decoding of a batch by transformers' own `generate`: ids of each row, end-of-text included.

    Args:
        max_tokens: most tokens a row, end-of-text included.
        options: further arguments of `generate`.
    """
    embeddings_BLD = prompts.embeddings_BLD
    rows, num_places = embeddings_BLD.shape[:2]
    inputs: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_tokens, **options}
    if prompts.memory_BMD is None:
        inputs |= left_padded(prompts)
    else:
        assert prompts.memory_lengths_B is not None
        memory = DynamicCache()
        model.remember(prompts.memory_BMD, memory, prompts.memory_lengths_B)
        # it leaves out as many places as there are in the cache
        own_memory = prompts.memory_BMD[..., : embeddings_BLD.shape[-1]]
        num_places += own_memory.shape[1]
        remembered_BM = padding_mask(prompts.memory_lengths_B, own_memory.shape[1]).long()
        begin_BL = remembered_BM.new_ones(rows, embeddings_BLD.shape[1])
        inputs["attention_mask"] = torch.cat([remembered_BM, begin_BL], 1)
        inputs["inputs_embeds"] = torch.cat([own_memory, embeddings_BLD], 1)
        inputs["past_key_values"] = memory
    ends = model.decoder.config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
    with _text_positions(model, num_places):
        written = model.decoder.generate(pad_token_id=ends[0], **inputs).tolist()
    return [row[: next((place + 1 for place, token in enumerate(row) if token in ends), len(row))] for row in written]


@torch.inference_mode()
def generate_whisper(
    model: WhisperForConditionalGeneration, frames_BTD: Tensor, *, language: str | None, task: str
) -> list[list[int]]:
    """Greedy decoding of a batch by a Whisper's own `generate`, without timestamps: ids without end-of-text.

    Args:
        frames_BTD: the encoder's frames of 30-s windows. language: a code; None: detected for each row.
    """
    config: Any = model.generation_config
    asked: dict[str, Any] = {"language": language, "task": task} if getattr(config, "is_multilingual", False) else {}
    written = model.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=frames_BTD),
        return_timestamps=False,
        force_unique_generate_call=True,  # a window is a text, even if it holds timestamps that nobody asked for
        **asked,
    ).tolist()
    begin, end = config.no_timestamps_token_id, config.eos_token_id
    rows = [row[row.index(begin) + 1 :] if begin in row else row for row in written]
    return [row[: row.index(end)] if end in row else row for row in rows]


def left_padded(prompts: Prompts) -> dict[str, Tensor]:
    """Prompts without a memory as arguments of `generate`, which wants padding on the left."""
    embeddings_BLD, lengths_B = prompts.embeddings_BLD, prompts.lengths_B
    num_places = embeddings_BLD.shape[1]
    order_BL = torch.arange(num_places, device=lengths_B.device) - (num_places - lengths_B[:, None])
    inputs = {"attention_mask": (order_BL >= 0).long()}
    order_BL = order_BL.clamp(min=0)
    inputs["inputs_embeds"] = embeddings_BLD.gather(1, order_BL[..., None].expand_as(embeddings_BLD))
    if prompts.positions_BL is not None:
        inputs["position_ids"] = prompts.positions_BL.gather(1, order_BL)
    return inputs


@contextmanager
def _text_positions(model: SpeechLlamaForConditionalGeneration, num_places: int) -> Iterator[None]:
    """Let the decoder, given ids, embed them as text behind `num_places` places of prompt and memory."""

    def embed(module: Any, args: tuple, given: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        tokens_BW: Tensor | None = given.get("input_ids")
        if tokens_BW is None:
            return args, given
        first = int(given["past_key_values"].get_seq_length()) - num_places + 1  # place 0 is begin-of-text's
        places_W = first + torch.arange(tokens_BW.shape[1], device=tokens_BW.device)
        return args, {**given, "input_ids": None, "inputs_embeds": model.embed_text(tokens_BW, places_W[None])}

    hook = model.decoder.base_model.register_forward_pre_hook(embed, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class FasterWhisper:
    """A faster-whisper model, int8, greedy, in a process of its own, so that nobody's threads are in others' way.

    Once CTranslate2 has worked in a process, whatever torch does there with two threads in short operations takes
    almost twice as long (docs/performance.md).

    Args:
        name: for tables.
        folder: a CTranslate2 folder of an English or multilingual Whisper.
        language: of what it is to hear.
        device: ``cpu`` or ``cuda``.

    Attributes:
        process: its id.

    Raises:
        ImportError: faster-whisper is not installed.
        ValueError: the folder holds no such model.
    """

    def __init__(self, name: str, folder: str | Path, *, language: str = "en", device: str = "cpu"):
        self.name = name
        self._pool = ProcessPoolExecutor(1, get_context("spawn"))
        self.process: int = self._pool.submit(
            peer_process.load, str(folder), language, device, torch.get_num_threads()
        ).result()

    def transcribe(self, samples: Sequence[np.ndarray], *, batch_size: int = 1) -> list[str]:
        """The text of each utterance (16 kHz samples, at most 30 s), several at a time by its batched pipeline."""
        return self._pool.submit(peer_process.transcribe, list(samples), batch_size).result()
