"""From a `ModelPreset` to a model and its processor."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import ParakeetFeatureExtractor, PreTrainedConfig, PreTrainedTokenizerBase, WhisperFeatureExtractor

from leapasr.config import ModelPreset
from leapasr.model.checkpoints import load_decoder, load_encoder
from leapasr.model.configuration import SpeechLlamaConfig
from leapasr.model.processing import SpeechLlamaProcessor
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration


def build_processor(encoder_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> SpeechLlamaProcessor:
    """The processor for an encoder: its log-mel features, and `tokenizer`."""
    if encoder_config.model_type == "whisper":
        extractor = WhisperFeatureExtractor(feature_size=encoder_config.num_mel_bins)
    else:
        extractor = ParakeetFeatureExtractor(feature_size=encoder_config.num_mel_bins)
    return SpeechLlamaProcessor(extractor, tokenizer)


def build_model(
    preset: ModelPreset, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> SpeechLlamaForConditionalGeneration:
    """A model of `preset`: pretrained parts where it names them, random weights from `seed` elsewhere.

    Raises:
        ValueError: the tokenizer's vocabulary is not the decoder's, or the decoder has no padding token.
        CheckpointError: a pretrained part cannot be read.
    """
    torch.manual_seed(seed)
    encoder_weights = decoder_weights = None
    if isinstance(preset.encoder, str):
        encoder_config, encoder_weights = load_encoder(
            Path(preset.encoder) if Path(preset.encoder).exists() else preset.encoder
        )
    else:
        encoder_config = preset.encoder
    if isinstance(preset.decoder, str):
        pretrained = load_decoder(preset.decoder)
        decoder_config, decoder_weights = pretrained.config, pretrained.state_dict()
    else:
        decoder_config = preset.decoder
    if len(tokenizer) > decoder_config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the decoder's vocabulary only {decoder_config.vocab_size}"
        )
    if decoder_config.pad_token_id is None:
        raise ValueError(
            "the decoder has no pad_token_id, which serves as the CTC blank: set one that no text contains"
        )
    model = SpeechLlamaForConditionalGeneration(SpeechLlamaConfig(encoder_config, decoder_config, **preset.fields))
    if encoder_weights is not None:
        model.encoder.encoder.load_state_dict(encoder_weights)
    if decoder_weights is not None:
        model.decoder.load_state_dict(decoder_weights)
        if model.mtp_heads is not None:
            model.mtp_heads.reset_from(model.decoder.lm_head)
    return model
