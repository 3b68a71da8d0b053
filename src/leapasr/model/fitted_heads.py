"""Heads that were fitted to a model which somebody already has: heads 2..K, and a CTC head on its frozen encoder.

They find their tokens through the model's own unembedding, so they are small, and are worth nothing without that very
model: what is saved names it and holds the fingerprint of its weights. What heads guess is of a part of the vocabulary
(`FittedHeads.tokens`), so that it costs a part of what the model's own next token costs. CTC reads pieces of tokens
(`model.pieces`).

Shapes: B rows, T frames, D the model's width, V its vocabulary, C tokens that heads guess, P pieces and the blank.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from leapasr.model.adapter import Adapter
from leapasr.model.checkpoints import CheckpointError
from leapasr.model.ctc_head import CTCScores, SharedCTCHead
from leapasr.model.mtp_heads import MTPHeads, new_heads
from leapasr.model.pieces import BLANK, Pieces
from leapasr.model.storage import from_int8, replace_files, to_int8

CONFIG_FILE, WEIGHTS_FILE = "heads.json", "heads.safetensors"
SHARING_HEAD_TYPES = ("latent", "residual", "sequential")  # those that share the model's unembedding
SHIPPED = ("pretrained", "heads")  # folder inside the package


@dataclass(frozen=True, kw_only=True)
class FittedHeadsConfig:
    """What fixes the shape of fitted heads, and where they come from.

    Attributes:
        base_model: its name, for people. base_weights: fingerprint of its weights (`model.whisper.fingerprint`).
        hidden_size: width of its decoder. encoder_size: of its encoder.
        num_heads: K. head_type: of heads 2..K, one of `SHARING_HEAD_TYPES`.
        encoder_stacking, adapter_size, adapter_layers, adapter_attention_heads, adapter_ffn_size: of what lies between
            the encoder and the CTC head, as in `SpeechLlamaConfig`.
        num_tokens: C. num_pieces: P - 1, or what `Pieces` is to be asked for.
        fitted_on: names of what the heads were fitted on. fitted_hours: of audio, in the last fit. updates: of
            training, in all fits.

    Raises:
        ValueError: a field is out of range.
    """

    base_model: str
    base_weights: str
    hidden_size: int
    encoder_size: int
    num_tokens: int
    num_pieces: int = 512
    num_heads: int = 4
    head_type: str = "sequential"
    encoder_stacking: int = 2
    adapter_size: int = 256
    adapter_layers: int = 2
    adapter_attention_heads: int = 4
    adapter_ffn_size: int = 1024
    fitted_on: tuple[str, ...] = ()
    fitted_hours: float = 0.0
    updates: int = 0

    def __post_init__(self) -> None:
        if self.num_heads < 2:
            raise ValueError(f"num_heads must be at least 2, head 1 included, got {self.num_heads}")
        if self.head_type not in SHARING_HEAD_TYPES:
            known = ", ".join(SHARING_HEAD_TYPES)
            raise ValueError(f"head_type {self.head_type!r} cannot be fitted: choose one of {known}")
        if self.adapter_size % self.adapter_attention_heads:
            raise ValueError(
                f"adapter_size {self.adapter_size} is not a multiple of adapter_attention_heads "
                f"{self.adapter_attention_heads}"
            )


class FittedHeads(nn.Module):
    """Heads 2..K, and a CTC head on encoder frames, for a frozen model.

    Args:
        config: see `FittedHeadsConfig`.
        tokens: ids that heads 2..K guess.
    """

    tokens: Tensor

    def __init__(self, config: FittedHeadsConfig, tokens: Sequence[int]):
        super().__init__()
        assert len(tokens) == config.num_tokens, (len(tokens), config.num_tokens)
        self.config = config
        self.mtp_heads: MTPHeads = new_heads(config.head_type, config.num_heads, config.hidden_size, config.num_tokens)
        self.adapter = Adapter(config, config.encoder_size)
        self.ctc_head = SharedCTCHead(config.adapter_size, config.hidden_size, blank_token_id=BLANK)
        self.register_buffer("tokens", torch.tensor(list(tokens), dtype=torch.int32))

    def reset_from(self, lm_head: nn.Linear, norm: nn.Module) -> None:
        """Begin from what the model knows: its unembedding, and the norm before it."""
        self.mtp_heads.reset_from(lm_head)
        self.ctc_head.reset_from(norm)

    def ctc_scores(self, frames_BTD: Tensor, lengths_B: Tensor, unembedding_PD: Tensor) -> tuple[CTCScores, Tensor]:
        """What CTC says of (B, ceil(T / stacking)) frames, and their lengths (B,), from the encoder's frames.

        Args:
            unembedding_PD: as `rows_of_pieces` gives it.
        """
        frames, lengths_B = self.adapter(frames_BTD, lengths_B)
        return CTCScores(frames, lambda some, size: self.ctc_head.blocks(some, unembedding_PD, size)), lengths_B

    def check(self, base_weights: str, *, name: str) -> None:
        """Raises CheckpointError unless these heads were fitted to the model `name`, whose fingerprint is given."""
        if base_weights != self.config.base_weights:
            raise CheckpointError(
                f"these heads were fitted to {self.config.base_model} (weights {self.config.base_weights[:12]}…), and "
                f"{name} has other weights ({base_weights[:12]}…): fit heads to it with 'leapasr fit'"
            )

    def save(self, folder: Path) -> None:
        """Write configuration and weights, matrices in 8 bits, into `folder`, all or nothing.

        Raises:
            OSError: it cannot be written; what was there is unchanged.
        """
        state = {name: value for name, value in self.state_dict().items() if name != "tokens"}
        stored = {name: value.contiguous().cpu() for name, value in to_int8(state).items()}
        stored["tokens"] = self.tokens.cpu()

        def write(pending: Path) -> None:
            (pending / CONFIG_FILE).write_text(json.dumps(asdict(self.config), indent=2) + "\n")
            try:
                save_file(stored, pending / WEIGHTS_FILE, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"cannot write {folder / WEIGHTS_FILE}: {error}") from error
            (pending / WEIGHTS_FILE).chmod((pending / CONFIG_FILE).stat().st_mode)

        replace_files(folder, write)

    @classmethod
    def load(cls, folder: str | Path) -> FittedHeads:
        """What `save` wrote, float32, frozen.

        Raises:
            CheckpointError: there are no heads, or they are damaged.
        """
        folder = Path(folder)
        config = read_config(folder)
        try:
            stored = load_file(folder / WEIGHTS_FILE)
            tokens = stored.pop("tokens")
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE} is missing, damaged or cut short: {error}; copy it again"
            ) from error
        if len(tokens) != config.num_tokens:
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE} holds {len(tokens)} tokens, and {CONFIG_FILE} says {config.num_tokens}"
            )
        heads = cls(config, tokens.tolist())
        try:
            heads.load_state_dict({**from_int8(stored), "tokens": tokens})
        except RuntimeError as error:
            raise CheckpointError(f"{folder / WEIGHTS_FILE} is of another shape than {CONFIG_FILE}: {error}") from error
        return heads.eval().requires_grad_(False)


def rows_of_pieces(unembedding_VD: Tensor, pieces: Pieces) -> Tensor:
    """The rows (P, D) of the model's unembedding that CTC reads by; zeros for the blank, which has its own."""
    return F.pad(unembedding_VD.detach()[pieces.ids], (0, 0, 1, 0))


def read_config(folder: Path) -> FittedHeadsConfig:
    """The configuration in a folder of heads.

    Raises:
        CheckpointError: there is none that can be read.
    """
    try:
        fields = json.loads((folder / CONFIG_FILE).read_text())
        known = {field.name for field in dataclasses.fields(FittedHeadsConfig)}
        if strange := fields.keys() - known:
            raise ValueError(f"unknown fields {', '.join(sorted(strange))}")
        return FittedHeadsConfig(**{**fields, "fitted_on": tuple(fields.get("fitted_on", ()))})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} holds no fitted heads ({CONFIG_FILE}): {error}") from error


def shipped_heads(base_weights: str) -> Path | None:
    """The folder of heads inside the package that were fitted to the weights of this fingerprint; None: none are."""
    home = Path(str(importlib.resources.files("leapasr"))).joinpath(*SHIPPED)
    for folder in sorted(home.glob("*/")) if home.is_dir() else ():
        if read_config(folder).base_weights == base_weights:
            return folder
    return None
