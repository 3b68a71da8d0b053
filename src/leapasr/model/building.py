"""A new model and its processor out of a preset: pretrained parts, or random weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    ParakeetFeatureExtractor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
)

from leapasr.config import ModelPreset
from leapasr.model.checkpoints import (
    MULTILINGUAL_VOCABULARY,
    CheckpointError,
    load_decoder,
    load_encoder,
    load_encoder_config,
    load_whisper,
    whisper_tokenizer,
)
from leapasr.model.configuration import SpeechLlamaConfig
from leapasr.model.ctc_head import SharedCTCHead
from leapasr.model.low_rank import add_low_rank
from leapasr.model.processing import SpeechLlamaProcessor
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration
from leapasr.model.whisper_decoder import WhisperDecoder, as_llama, llama_config

WHISPER_BEGIN, WHISPER_END = "<|notimestamps|>", "<|endoftext|>"


def padding_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token for padding and the CTC blank, which must stand in no text.

    The tokenizer's padding token; where it has none, its unknown token (texts that contain it are refused), and
    where it has neither, its end-of-text.

    Raises:
        ValueError: the tokenizer has none of these.
    """
    for token in (tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token):
        if token is not None:
            return token
    raise ValueError(
        "the tokenizer has no padding, unknown or end-of-text token that could be the CTC blank: "
        "set tokenizer.pad_token to a special token that texts never contain"
    )


def build_model(
    preset: ModelPreset, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> SpeechLlamaForConditionalGeneration:
    """The model that training starts from, float32; what is not pretrained is random, from `seed`.

    Raises:
        ValueError: the decoder's vocabulary or special tokens are not the tokenizer's, or there are adapters
            (`lora_rank`) for a decoder that is not pretrained.
        CheckpointError: a pretrained part cannot be used.
    """
    if isinstance(preset.decoder, WhisperDecoder):
        return _build_from_whisper(preset, preset.decoder, tokenizer, seed=seed)
    encoder_config, encoder_state = _encoder(preset)
    decoder, decoder_config = _decoder(preset.decoder)
    if preset.lora_rank and decoder is None:
        raise ValueError(
            f"lora_rank {preset.lora_rank} adapts a pretrained decoder, and this one has random weights: "
            "set lora_rank to 0, or name a pretrained decoder"
        )
    _set_special_tokens(decoder_config, tokenizer)
    torch.manual_seed(seed)
    model = SpeechLlamaForConditionalGeneration(SpeechLlamaConfig(encoder_config, decoder_config, **preset.fields))
    if encoder_state is not None:
        _load(model.encoder.encoder, encoder_state, str(preset.encoder))
    if model.config.ctc_in_prompt:
        # what CTC reads must not drown in an untrained projection, many times its size: that one begins at zero
        nn.init.zeros_(model.speech_projection.projection.weight)
    if decoder is not None:
        _load(model.decoder, decoder.state_dict(), str(preset.decoder))
        model.reset_heads()
    if preset.lora_rank:
        add_low_rank(model.decoder, rank=preset.lora_rank)
    return model


def _build_from_whisper(
    preset: ModelPreset, decoder: WhisperDecoder, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> SpeechLlamaForConditionalGeneration:
    """A Speech-LLaMA that writes what the Whisper `preset.encoder` writes, and whose CTC and further heads are new."""
    if not isinstance(preset.encoder, str):
        raise ValueError("the decoder is to be a Whisper's own, and the encoder has random weights: name a Whisper")
    whisper, state = load_whisper(preset.encoder)
    known = whisper_tokenizer(preset.encoder).get_vocab()
    forced = ["<|startoftranscript|>", WHISPER_BEGIN]
    if whisper.vocab_size >= MULTILINGUAL_VOCABULARY:
        forced[1:1] = ["<|en|>", "<|transcribe|>"]
    decoder_config = llama_config(whisper, decoder, vocab_size=len(tokenizer))
    _set_special_tokens(decoder_config, tokenizer)
    torch.manual_seed(seed)
    config = SpeechLlamaConfig(
        whisper, decoder_config, speech_as_memory=True, attention_only=tuple(range(0, 2 * whisper.decoder_layers, 2)),
        ctc_unembedding=True, logit_bias=True,
        soft_prompt=len(forced) - 1, text_positions=whisper.max_target_positions - len(forced) + 1,
        reserved=(decoder.mark(whisper),), **preset.fields,
    )  # fmt: skip
    model = SpeechLlamaForConditionalGeneration(config)
    if model.speech_projection.ctc_projection is not None:
        nn.init.zeros_(model.speech_projection.ctc_projection.weight)
    encoder_state = {
        name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")
    }
    _load(model.encoder.encoder, encoder_state, preset.encoder)
    tokens = [known.get(token, -1) for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    tokens[tokenizer.bos_token_id], tokens[tokenizer.eos_token_id] = known[WHISPER_BEGIN], known[WHISPER_END]
    rewritten = as_llama(whisper, state, decoder, tokens=tokens, forced=[known[token] for token in forced])
    _, unexpected = model.load_state_dict(rewritten, strict=False)
    assert not unexpected, unexpected
    assert isinstance(model.ctc_head, SharedCTCHead)
    model.ctc_head.reset_from(model.decoder.model.norm)
    model.reset_heads()
    return model


def build_processor(preset: ModelPreset, tokenizer: PreTrainedTokenizerBase) -> SpeechLlamaProcessor:
    """Features as the preset's encoder wants them, and a copy of `tokenizer` that has a padding token.

    Raises:
        ValueError: no token can be the padding. CheckpointError: there is no such encoder.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = padding_token(tokenizer)
    config = load_encoder_config(preset.encoder) if isinstance(preset.encoder, str) else preset.encoder
    extractor = WhisperFeatureExtractor if config.model_type == "whisper" else ParakeetFeatureExtractor
    return SpeechLlamaProcessor(extractor(feature_size=config.num_mel_bins), tokenizer)


def _encoder(preset: ModelPreset) -> tuple[PreTrainedConfig, dict[str, Tensor] | None]:
    return load_encoder(preset.encoder) if isinstance(preset.encoder, str) else (preset.encoder, None)


def _decoder(given: str | LlamaConfig) -> tuple[PreTrainedModel | None, PreTrainedConfig]:
    """The pretrained decoder, if there is one, and a configuration that may be changed."""
    if isinstance(given, str):
        decoder = load_decoder(given)
        return decoder, copy.deepcopy(decoder.config)
    return None, copy.deepcopy(given)


def _set_special_tokens(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a decoder's configuration the special tokens of `tokenizer`; begin-of-text may be the decoder's own."""
    if config.vocab_size != len(tokenizer):
        raise ValueError(
            f"the decoder's vocabulary has {config.vocab_size} tokens, the tokenizer's {len(tokenizer)}: use the "
            "tokenizer that the decoder was trained with, or resize the decoder (resize_token_embeddings) and save it"
        )
    config.pad_token_id = tokenizer.convert_tokens_to_ids(padding_token(tokenizer))
    end = tokenizer.eos_token_id
    config.eos_token_id = end if end is not None else _first(config.eos_token_id)
    begin = tokenizer.bos_token_id
    config.bos_token_id = begin if begin is not None else _first(config.bos_token_id, config.eos_token_id)
    if config.eos_token_id is None:
        raise ValueError("neither the tokenizer nor the decoder says which token ends a text: set tokenizer.eos_token")


def _first(*values: int | list[int] | None) -> int | None:
    """The first token id; some configurations list several."""
    ids = [value[0] if isinstance(value, list) else value for value in values if value is not None]
    return ids[0] if ids else None


def _load(module: nn.Module | PreTrainedModel, state: dict[str, Tensor], source: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"the weights of {source} do not fit its configuration: {error}") from error
