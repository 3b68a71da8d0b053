"""SpeechLlamaConfig: everything that fixes the shape of a Speech-LLaMA with multi-token prediction."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

HEAD_TYPES = ("projection", "latent", "residual", "sequential")


def _as_config(value: dict[str, Any] | PreTrainedConfig | None, default_type: str) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    fields = dict(value or {})
    model_type = fields.pop("model_type", default_type)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"unknown model type {model_type!r}: this version of transformers does not know it")
    return CONFIG_MAPPING[model_type](**fields)


class SpeechLlamaConfig(PreTrainedConfig):
    """Configuration of `SpeechLlamaForConditionalGeneration`.

    Args:
        encoder_config: transformers configuration of the speech encoder (``whisper`` or ``parakeet_encoder``).
        decoder_config: transformers configuration of a LLaMA-like causal LM.
        adapter_size: width of the adapter.
        adapter_layers: bidirectional layers of the adapter, at the rate of the CTC head.
        adapter_attention_heads: attention heads of these layers.
        adapter_ffn_size: width of their feed-forward part.
        encoder_pooling_layer: Whisper's frames are averaged in pairs behind so many of its layers, from 50 to 25 a
            second; the layers above then cost half. None: nowhere, as Whisper was trained.
        encoder_stacking: encoder frames stacked to one adapter frame (Whisper: 2, from 50 to 25 a second; 1 with
            pooling).
        decoder_stacking: adapter frames stacked to one speech embedding (2: 12.5 a second).
        speech_as_memory: the encoder's frames are keys and values in the decoder's cache, as in cross-attention, and
            pass through none of its layers; the adapter serves the CTC head, and what CTC reads reaches the draft
            layers alone, through a matrix that begins at zero. Of the decoder, only LLaMA's own modules will do.
        attention_only: decoder layers without a feed-forward part.
        ctc_unembedding: CTC finds its tokens through the decoder's unembedding.
        soft_prompt: learnt places right before begin-of-text.
        text_positions: places in the text with a learnt embedding of their own, begin-of-text the first; 0: none. No
            text can be longer.
        logit_bias: whether the decoder's unembedding has a bias.
        reserved: dimensions of the decoder's residual stream into which training must not write.
        ctc_in_prompt: add the CTC posterior's expected token embedding to each speech embedding.
        ctc_lookahead: with it, also those of the so many tokens that CTC reads next; K − 1 serves K heads.
        ctc_positions: with it, also count the decoder's positions in CTC's tokens: what CTC reads as token u lies at
            the position from which the decoder writes token u. For decoders that are trained with it.
        num_heads: K, the tokens predicted per decoder call; head 1 is the decoder's own.
        head_type: architecture of heads 2..K: ``projection``, ``latent``, ``residual`` or ``sequential``.
        draft_layers: so many of the decoder's last layers are there twice: for head 1, and for heads 2..K
            (`DraftLayers`).
        weight_storage: ``float`` or ``int8`` (matrices stored in 8 bits per output channel, widened at load).

    Raises:
        ValueError: a field is out of range, or an encoder or decoder type is unknown.
    """

    model_type = "speech_llama"
    sub_configs = {"encoder_config": AutoConfig, "decoder_config": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(
        self,
        encoder_config: dict[str, Any] | PreTrainedConfig | None = None,
        decoder_config: dict[str, Any] | PreTrainedConfig | None = None,
        *,
        adapter_size: int = 512,
        adapter_layers: int = 2,
        adapter_attention_heads: int = 8,
        adapter_ffn_size: int = 2048,
        encoder_pooling_layer: int | None = None,
        encoder_stacking: int = 2,
        decoder_stacking: int = 2,
        speech_as_memory: bool = False,
        attention_only: tuple[int, ...] = (),
        ctc_unembedding: bool = False,
        soft_prompt: int = 0,
        text_positions: int = 0,
        logit_bias: bool = False,
        reserved: tuple[int, ...] = (),
        ctc_in_prompt: bool = True,
        ctc_lookahead: int = 0,
        ctc_positions: bool = False,
        num_heads: int = 4,
        head_type: str = "latent",
        draft_layers: int = 0,
        weight_storage: str = "float",
        **kwargs: Any,
    ):
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1 (K = 1 is plain decoding), got {num_heads}")
        if head_type not in HEAD_TYPES:
            raise ValueError(f"unknown head_type {head_type!r}: choose one of {', '.join(HEAD_TYPES)}")
        if weight_storage not in ("float", "int8"):
            raise ValueError(f"unknown weight_storage {weight_storage!r}: choose 'float' or 'int8'")
        if encoder_stacking < 1 or decoder_stacking < 1:
            raise ValueError(f"stacking must be at least 1, got {encoder_stacking} and {decoder_stacking}")
        if ctc_lookahead < 0 or (ctc_lookahead and not ctc_in_prompt):
            raise ValueError(
                f"ctc_lookahead must be 0 or more, and 0 without ctc_in_prompt, got {ctc_lookahead} "
                f"with ctc_in_prompt={ctc_in_prompt}"
            )
        if ctc_positions and not ctc_in_prompt:
            raise ValueError(
                "ctc_positions needs ctc_in_prompt: a prompt without CTC's tokens cannot be counted in them"
            )
        if adapter_size % adapter_attention_heads:
            raise ValueError(
                f"adapter_size {adapter_size} is not a multiple of adapter_attention_heads {adapter_attention_heads}"
            )
        self.encoder_config = _as_config(encoder_config, "whisper")
        self.decoder_config = _as_config(decoder_config, "llama")
        if not 0 <= draft_layers <= self.decoder_config.num_hidden_layers or (draft_layers and num_heads == 1):
            raise ValueError(
                f"draft_layers must be from 0 to the decoder's {self.decoder_config.num_hidden_layers} layers, and 0 "
                f"with one head, got {draft_layers} with num_heads={num_heads}"
            )
        self.adapter_size = adapter_size
        self.adapter_layers = adapter_layers
        self.adapter_attention_heads = adapter_attention_heads
        self.adapter_ffn_size = adapter_ffn_size
        self.encoder_pooling_layer = encoder_pooling_layer
        self.encoder_stacking = encoder_stacking
        self.decoder_stacking = decoder_stacking
        self.speech_as_memory = speech_as_memory
        self.attention_only = tuple(attention_only)
        self.ctc_unembedding = ctc_unembedding
        self.soft_prompt = soft_prompt
        self.text_positions = text_positions
        self.logit_bias = logit_bias
        self.reserved = tuple(reserved)
        self.ctc_in_prompt = ctc_in_prompt
        self.ctc_lookahead = ctc_lookahead
        self.ctc_positions = ctc_positions
        self.num_heads = num_heads
        self.head_type = head_type
        self.draft_layers = draft_layers
        self.weight_storage = weight_storage
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs[name] = getattr(self.decoder_config, name)
        super().__init__(**kwargs)

    @property
    def blank_token_id(self) -> int:
        """The CTC blank: the padding token, which no text contains."""
        return self.decoder_config.pad_token_id

    @property
    def drafts_remember_ctc(self) -> bool:
        """Whether the draft layers' memory of speech also carries what CTC reads; the decoder's own does not."""
        return self.speech_as_memory and self.ctc_in_prompt and self.draft_layers > 0

    @property
    def decoder_reads_ctc(self) -> bool:
        """Whether anything that the decoder or its heads are given of the speech depends on what CTC reads."""
        return self.drafts_remember_ctc or (self.ctc_in_prompt and not self.speech_as_memory)

    @property
    def vocab_size(self) -> int:
        return self.decoder_config.vocab_size

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        return self.decoder_config


AutoConfig.register(SpeechLlamaConfig.model_type, SpeechLlamaConfig, exist_ok=True)
