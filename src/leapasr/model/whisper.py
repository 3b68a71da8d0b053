"""Whisper as it is: a model that people already have, by hub name, transformers folder or CTranslate2 folder.

Shapes: M frames, F mel bins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from leapasr.audio import SAMPLE_RATE
from leapasr.model.checkpoints import (
    CTRANSLATE2_FILE,
    MULTILINGUAL_VOCABULARY,
    CheckpointError,
    load_ctranslate2_whisper,
    whisper_tokenizer,
)
from leapasr.model.processing import SpeechLlamaProcessor

MAX_INITIAL_TIMESTAMP = 50  # steps of 0.02 s: OpenAI's setting
_COMPUTED = ("model.encoder.embed_positions.weight",)  # sinusoids, which files hold in several precisions


def is_whisper(name_or_path: str | Path) -> bool:
    """Whether a hub name or folder is a Whisper; False if it is nothing that can be read."""
    if (Path(name_or_path) / CTRANSLATE2_FILE).is_file():
        return True
    try:
        fields, _ = AutoConfig.for_model("whisper").get_config_dict(name_or_path)
    except (OSError, ValueError):
        return False
    return fields.get("model_type") == "whisper"


def load_whisper_model(name_or_path: str | Path) -> WhisperForConditionalGeneration:
    """A Whisper with its generation configuration, float32, in evaluation mode.

    Raises:
        CheckpointError: it is no Whisper, damaged, or its generation configuration is too old to know timestamps.
        OSError: there is no such model.
    """
    if (Path(name_or_path) / CTRANSLATE2_FILE).is_file():
        return _from_ctranslate2(Path(name_or_path))
    found: Any = WhisperForConditionalGeneration.from_pretrained(
        name_or_path, dtype=torch.float32, output_loading_info=True
    )
    model, loaded = found
    missing = sorted(set(loaded["missing_keys"]) - {*_COMPUTED, "proj_out.weight"})
    if missing:
        raise CheckpointError(
            f"{name_or_path} lacks {len(missing)} of a Whisper's weights ({missing[0]}, ...): it is incomplete"
        )
    if getattr(model.generation_config, "no_timestamps_token_id", None) is None:
        raise CheckpointError(
            f"{name_or_path} has no generation_config.json that says which tokens are timestamps: take that of the "
            "Whisper it was made from"
        )
    return model.eval()


def _from_ctranslate2(folder: Path) -> WhisperForConditionalGeneration:
    config, state = load_ctranslate2_whisper(folder)
    tokenizer = whisper_tokenizer(folder)
    try:
        given = json.loads((folder / "config.json").read_text())
        suppressed, not_first = given["suppress_ids"], given["suppress_ids_begin"]
        languages = tokenizer.convert_ids_to_tokens(given["lang_ids"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder} has no usable config.json ({error}): copy it from where it came from"
        ) from error
    generation = whisper_generation_config(
        tokenizer,
        languages=languages if config.vocab_size >= MULTILINGUAL_VOCABULARY else (),
        suppressed=suppressed,
        not_first=not_first,
        max_length=config.max_target_positions,
    )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        setattr(config, name, getattr(generation, name))
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    model.to_empty(device="cpu")
    model.model.load_state_dict(state)
    model.tie_weights()
    model.generation_config = generation
    return model.eval().requires_grad_(False)


def whisper_generation_config(
    tokenizer: PreTrainedTokenizerBase,
    *,
    languages: Sequence[str],
    suppressed: Sequence[int],
    not_first: Sequence[int],
    max_length: int,
) -> GenerationConfig:
    """What a Whisper's ``generation_config.json`` says.

    Args:
        languages: tokens such as ``<|en|>``; none of a model for English alone.
        suppressed: ids that are never written. not_first: ids that no text begins with.
        max_length: tokens, prompt included.
    """
    known = tokenizer.get_vocab()
    end, start = known["<|endoftext|>"], known["<|startoftranscript|>"]
    fields: dict[str, Any] = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": start,
        "suppress_tokens": list(suppressed),
        "begin_suppress_tokens": list(not_first),
        "max_length": max_length,
        "is_multilingual": bool(languages),
        "no_timestamps_token_id": known["<|notimestamps|>"],
        "prev_sot_token_id": known["<|startofprev|>"],
        "max_initial_timestamp_index": MAX_INITIAL_TIMESTAMP,
        "return_timestamps": False,
    }
    if languages:
        fields["lang_to_id"] = {token: known[token] for token in languages}
        fields["task_to_id"] = {task: known[f"<|{task}|>"] for task in ("transcribe", "translate")}
    return GenerationConfig(**fields)


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of a model's weights, rounded to float16: the same whatever file and precision they were stored in."""
    digest = hashlib.sha256()
    seen: set[int] = set()
    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        if id(value) in seen or name in _COMPUTED or not value.is_floating_point():
            continue
        seen.add(id(value))
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().half().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class WhisperProcessor(SpeechLlamaProcessor):
    """Whisper's features of 30-s windows, and its tokenizer.

    Args:
        feature_extractor: Whisper's. tokenizer: a fast tokenizer with Whisper's special tokens.
        timestamp_begin: id of ``<|0.00|>``; ids from there on stand in no text.
    """

    def __init__(self, feature_extractor, tokenizer, *, timestamp_begin: int):
        super().__init__(feature_extractor, tokenizer)
        self.timestamp_begin = timestamp_begin

    def features(self, samples: np.ndarray) -> Tensor:
        """Log-mel features (M, F) float32, 100 frames a second, of 16 kHz samples (num_samples,) padded to 30 s."""
        return torch.as_tensor(
            np.asarray(self.feature_extractor(samples, sampling_rate=SAMPLE_RATE).input_features[0])
        ).T

    def decode_text(self, ids: Sequence[int]) -> str:
        return super().decode_text([token for token in ids if token < self.timestamp_begin])


def load_whisper_processor(name_or_path: str | Path, model: WhisperForConditionalGeneration) -> WhisperProcessor:
    """The processor of `model`, which was loaded from `name_or_path`.

    Raises:
        CheckpointError: there is no usable tokenizer.
    """
    config: WhisperConfig = model.config
    generation: Any = model.generation_config
    seconds = 2 * config.max_source_positions / 100
    assert seconds == int(seconds), "audio of whole seconds"
    extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=int(seconds))
    return WhisperProcessor(
        extractor,
        whisper_tokenizer(name_or_path),
        timestamp_begin=generation.no_timestamps_token_id + 1,
    )


def language_code(name: str) -> str:
    """The code of a language given by code or English name (``de`` of ``German``); unknown names as they are."""
    return TO_LANGUAGE_CODE.get(name.lower(), name.lower())
