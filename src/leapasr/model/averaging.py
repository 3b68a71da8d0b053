"""The mean of several models' weights: runs that began with the same model and heard their data in other orders.

What each of them has learnt by heart differs and is averaged out, what they have in common stays ("model soups",
Wortsman et al., arXiv 2203.05482).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration


def average_models(folders: Sequence[Path]) -> SpeechLlamaForConditionalGeneration:
    """A model, float32, whose weights are the mean of those in `folders`.

    Raises:
        ValueError: there are fewer than two, one is no folder, or they are of different architectures.
        CheckpointError: one of them is no model, or damaged.
    """
    if len(folders) < 2:
        raise ValueError(f"an average takes two models at least, got {len(folders)}")
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: the folders of trained models are wanted")
    mean = SpeechLlamaForConditionalGeneration.from_pretrained(folders[0], dtype=torch.float32)
    wanted = mean.state_dict()
    total = {name: value.double() for name, value in wanted.items()}
    for folder in folders[1:]:
        state = SpeechLlamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
        differing = [name for name in wanted.keys() | state.keys() if _shape(wanted, name) != _shape(state, name)]
        if differing:
            raise ValueError(
                f"{folder} is of another architecture than {folders[0]} ({len(differing)} weights differ, "
                f"{min(differing)} for one): only models that began as the same one can be averaged"
            )
        for name, value in state.items():
            total[name] += value
    mean.load_state_dict({name: (value / len(folders)).to(wanted[name].dtype) for name, value in total.items()})
    return mean


def _shape(state: dict[str, torch.Tensor], name: str) -> torch.Size | None:
    return state[name].shape if name in state else None
