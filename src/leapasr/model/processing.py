"""SpeechLlamaProcessor: audio to log-mel features, text to token ids and back.

Features are extracted an utterance at a time, so that what a row sees never depends on its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from leapasr.audio import SAMPLE_RATE


def spelling(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], Sequence[int]]:
    """What tells the characters of its tokens, as numbers; those of byte-level BPE stand for bytes."""
    return cache(lambda token: tuple(map(ord, tokenizer.convert_ids_to_tokens(token) or "")))


class SpeechLlamaProcessor(ProcessorMixin):
    """A transformers feature extractor (Whisper's or Parakeet's log-mel) and a fast tokenizer."""

    def __init__(self, feature_extractor, tokenizer, **kwargs):
        super().__init__(feature_extractor, tokenizer, **kwargs)

    def features(self, samples: np.ndarray) -> Tensor:
        """Log-mel features (T, F) float32, 100 frames a second, of one utterance's 16 kHz samples (num_samples,)."""
        extractor = self.feature_extractor
        if extractor.__class__.__name__ == "WhisperFeatureExtractor":
            options = {"truncation": False, "padding": False}
            return torch.as_tensor(
                np.asarray(extractor(samples, sampling_rate=SAMPLE_RATE, **options).input_features[0])
            ).T
        output = extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return output.input_features[0, : int(output.attention_mask.sum())]

    @staticmethod
    def pad(features: Sequence[Tensor], multiple: int = 1) -> tuple[Tensor, Tensor]:
        """Right-pad features with zeros to (B, T, F), T a multiple of `multiple`; returns lengths (B,) too."""
        lengths_B = torch.tensor([len(f) for f in features])
        longest = -(-int(lengths_B.max()) // multiple) * multiple
        padded = features[0].new_zeros(len(features), longest, features[0].shape[1])
        for row, f in zip(padded, features, strict=True):
            row[: len(f)] = f
        return padded, lengths_B

    def encode_text(self, text: str) -> list[int]:
        """Token ids of `text`, without begin- and end-of-text.

        Raises:
            ValueError: characters that the vocabulary does not have.
        """
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if self.tokenizer.unk_token_id in ids:
            known = {c for token in self.tokenizer.get_vocab() for c in token} | {" "}
            strange = sorted({c for c in text if c not in known})
            raise ValueError(
                f"characters outside the vocabulary: {' '.join(strange)!r} in {text!r}; tidy the text first"
            )
        return ids

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def __call__(self, audio: Sequence[np.ndarray], text: Sequence[str] | None = None) -> BatchFeature:
        """Model inputs of a batch: ``input_features`` (B, T, F), ``feature_lengths`` (B,), and with `text`
        ``text_ids`` (B, M), ``text_lengths`` (B,)."""
        padded, lengths_B = self.pad([self.features(samples) for samples in audio])
        data = {"input_features": padded, "feature_lengths": lengths_B}
        if text is not None:
            ids = [torch.tensor(self.encode_text(t), dtype=torch.long) for t in text]
            data["text_ids"] = torch.nn.utils.rnn.pad_sequence(
                ids, batch_first=True, padding_value=self.tokenizer.pad_token_id
            )
            data["text_lengths"] = torch.tensor([len(i) for i in ids])
        return BatchFeature(data)
