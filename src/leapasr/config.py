"""Training configurations: frozen dataclasses, and presets as functions that return them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import LlamaConfig, ParakeetEncoderConfig, PreTrainedConfig

from leapasr.data.augmentation import NO_AUGMENTATION, Augmentation
from leapasr.model.whisper_decoder import WhisperDecoder

Task = Literal["language", "text", "ctc", "joint", "heads", "mwer"]


@dataclass(frozen=True)
class MWER:
    """Minimum word error rate training on N-best lists: of word errors, the mean over utterances of Σ_i p̂_i (W_i − W̄).

    nbest: N, the size of the beam; all of its hypotheses are the list.
    reference: whether the reference joins the lists in training, where it is not there.
    ce_weight: λ, weight of the cross-entropy a token of the K heads on the reference.
    calls_weight: word errors that a decoder call weighs: of those that verification has to expect for an utterance of
        the list (`expected_calls`). It teaches further heads alone.

    Raises:
        ValueError: fewer than two hypotheses, the reference counted, or a negative weight.
    """

    nbest: int = 4
    reference: bool = False
    ce_weight: float = 1.0
    calls_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.nbest < 1:
            raise ValueError(f"nbest must be at least 1, got {self.nbest}")
        if self.nbest + self.reference < 2:
            raise ValueError("of a list of 1 there is nothing to choose: give nbest 2 or more, or add the reference")
        if min(self.ce_weight, self.calls_weight) < 0:
            raise ValueError(f"weights must not be negative, got {self.ce_weight} and {self.calls_weight}")


@dataclass(frozen=True)
class Stage:
    """One stretch of training.

    task: ``language`` (decoder and head 1, as a language model), ``text`` (decoder and heads on misread text),
        ``ctc`` (encoder, adapter and CTC head), ``joint`` (everything: CTC and the K heads), ``heads`` (heads 2..K of
        a frozen model), ``mwer`` (everything, as ``joint``, for the least word errors to be expected: see `MWER`).
    updates: optimizer updates.
    batch: seconds of audio in an update (with padding), or text tokens.
    learning_rate: the peak; linear warm-up over `warmup` updates, then linear decay to `final_lr` of it.
    frozen_encoder_layers: encoder layers (from the bottom) without gradient; None freezes them all.
    lr_scale: factor on the learning rate by parameter-name prefix.
    head_weights: weights of the cross-entropy of heads 1..K; a number w stands for 1 for head 1 and 0.8^(k−1) · w for
        head k.
    ctc_weight: weight of the CTC loss beside it.
    slips: probability that a token which the decoder reads in training is not the right one (`with_slips`).
    mwer: the lists and the loss of the task ``mwer``.
    """

    name: str
    task: Task
    updates: int
    batch: float
    learning_rate: float
    warmup: int = 100
    final_lr: float = 0.05
    frozen_encoder_layers: int | None = 0
    lr_scale: dict[str, float] = field(default_factory=dict)
    head_weights: tuple[float, ...] | float = 0.3
    ctc_weight: float = 0.5
    slips: float = 0.0
    max_norm: float = 2.0
    averaging: float = 0.999
    augmentation: Augmentation = field(default_factory=Augmentation)
    mwer: MWER = field(default_factory=MWER)

    @property
    def reads_text(self) -> bool:
        """Whether the stage trains on text alone."""
        return self.task in ("language", "text")

    @property
    def encoder_is_frozen(self) -> bool:
        """Whether the stage hears audio through an encoder of which nothing trains."""
        return self.task == "heads" or (not self.reads_text and self.frozen_encoder_layers is None)

    def weights(self, num_heads: int) -> tuple[float, ...]:
        """Weights of heads 1..K.

        Raises:
            ValueError: `head_weights` does not name one weight a head.
        """
        if not isinstance(self.head_weights, tuple):
            return (1.0, *(self.head_weights * 0.8 ** (k - 1) for k in range(2, num_heads + 1)))
        if len(self.head_weights) != num_heads:
            raise ValueError(f"stage {self.name!r}: {len(self.head_weights)} head_weights for K = {num_heads}")
        return self.head_weights


@dataclass(frozen=True)
class ModelPreset:
    """What a model is built from when training begins.

    encoder: hub name or folder of a pretrained encoder (transformers or CTranslate2), or a configuration for
        random weights. decoder: likewise a pretrained LM, or a LLaMA configuration, or the decoder of the Whisper
        that `encoder` names.
    vocab_size: size of the tokenizer trained on the text, or of what is kept of Whisper's where the decoder is its own;
        other pretrained decoders bring theirs.
    fields: further fields of `SpeechLlamaConfig`.
    lora_rank: rank of low-rank adapters (peft) on a pretrained decoder, which then stays frozen; 0: none.
    """

    encoder: str | PreTrainedConfig
    decoder: str | LlamaConfig | WhisperDecoder
    vocab_size: int = 1024
    fields: dict = field(default_factory=dict)
    lora_rank: int = 0


@dataclass(frozen=True)
class TrainingConfig:
    """A whole training run.

    manifests: training manifests and how often an epoch holds them (2.0: twice, 0.3: a random 30%).
    dev: manifests to evaluate on; text: prose for the tokenizer and the ``text`` stage.
    encoder_cache: folder of encoder frames; stages whose encoder is frozen compute them once and train from there.

    Raises:
        ValueError: with `encoder_cache`, no stage freezes its encoder, or one that does augments its audio.
    """

    model: ModelPreset | None
    stages: tuple[Stage, ...]
    manifests: dict[Path, float]
    dev: tuple[Path, ...]
    text: tuple[Path, ...]
    output: Path
    seed: int = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    checkpoint_minutes: float = 4.0
    eval_every: int = 250
    eval_utterances: int = 100
    num_workers: int = 1
    compile: bool = True
    encoder_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.encoder_cache is None:
            return
        frozen = [stage for stage in self.stages if stage.encoder_is_frozen]
        if not frozen:
            names = ", ".join(stage.name for stage in self.stages)
            raise ValueError(
                f"an encoder cache serves stages with a frozen encoder, and none of {names} is: leave it out"
            )
        for stage in frozen:
            if stage.augmentation != NO_AUGMENTATION:
                raise ValueError(
                    f"stage {stage.name!r} augments its audio, and cached encoder frames are those of the audio as it "
                    "is: switch augmentation off (--no-augmentation), or train without an encoder cache"
                )


def small_llama(vocab_size: int, *, size: int, layers: int, ffn: int, heads: int) -> LlamaConfig:
    """A LLaMA with tied embeddings and the special tokens of `leapasr.training.tokenizer`."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


LIGHT = Augmentation(
    speed=0.5, noise=0.15, reverberation=0.05, num_time_masks=2, max_time_mask=0.25, num_feature_masks=1,
    max_feature_mask=15,
)  # fmt: skip


# little, where Whisper's weights are: its token embeddings are small, and a step of Adam has one size for all
WHISPER_SCALES = {
    "encoder.": 0.1, "decoder.": 0.1, "decoder.model.embed_tokens.": 0.01, "decoder.lm_head.": 0.01,
    "speech_projection.projection.": 0.05, "soft_prompt.": 0.05, "text_positions.": 0.05, "draft_layers.": 0.1,
    "mtp_heads.": 2.0,
}  # fmt: skip


def tiny(encoder: str | None = None) -> tuple[ModelPreset, tuple[Stage, ...]]:
    """What ships: a pretrained Whisper (`encoder`; tiny.en), its decoder rewritten as a LLaMA, K = 8."""
    model = ModelPreset(
        encoder=encoder or "openai/whisper-tiny.en",
        decoder=WhisperDecoder(),
        vocab_size=16384,
        fields={
            "encoder_pooling_layer": 4, "encoder_stacking": 1, "decoder_stacking": 1, "adapter_size": 384,
            "adapter_layers": 4, "adapter_attention_heads": 6, "adapter_ffn_size": 1024, "ctc_lookahead": 7,
            "num_heads": 8, "head_type": "latent", "draft_layers": 2,
        },
    )  # fmt: skip
    stages = (
        # CTC leaves its all-blank plateau after 100 updates; the encoder must not move before that
        Stage("ctc", "ctc", updates=400, batch=65, learning_rate=1e-3, warmup=40, frozen_encoder_layers=None,
              lr_scale={"ctc_head.": 0.3}),
        # Whisper gets used to short inputs; until further heads know what comes when, they must not pull at head 1
        Stage("settle", "joint", updates=300, batch=65, learning_rate=4e-4, warmup=50, final_lr=1.0, averaging=0.98,
              lr_scale=WHISPER_SCALES, head_weights=0.01, augmentation=LIGHT),
        # from here on head 1, and all that it hears through, stays as it is
        Stage("reading", "ctc", updates=3000, batch=65, learning_rate=7e-4, warmup=50, final_lr=0.1, averaging=0.995,
              frozen_encoder_layers=None, augmentation=LIGHT),
        Stage("heads", "heads", updates=1500, batch=65, learning_rate=1e-3, warmup=50, final_lr=0.1, averaging=0.995,
              lr_scale={"draft_layers.": 0.4, "mtp_heads.": 0.8}, augmentation=LIGHT),
    )  # fmt: skip
    return model, stages


def scratch(encoder: str | None = None) -> tuple[ModelPreset, tuple[Stage, ...]]:
    """A pretrained Whisper encoder (`encoder`; Whisper base), a decoder of 13M parameters from random weights."""
    model = ModelPreset(
        encoder=encoder or "openai/whisper-base",
        decoder=small_llama(1024, size=512, layers=4, ffn=1280, heads=8),
        vocab_size=1024,
        fields={
            "encoder_pooling_layer": 2, "encoder_stacking": 1, "adapter_size": 512, "adapter_layers": 2,
            "ctc_lookahead": 7, "ctc_positions": True, "num_heads": 8,
            "head_type": "latent",
        },
    )  # fmt: skip
    stages = (
        Stage("language", "language", updates=1000, batch=8192, learning_rate=1.5e-3),
        Stage("text", "text", updates=900, batch=3000, learning_rate=1e-3, slips=0.1, augmentation=NO_AUGMENTATION),
        # CTC leaves its all-blank plateau after 150 to 200 updates; the encoder must not move before that
        Stage("ctc", "ctc", updates=320, batch=65, learning_rate=1e-3, warmup=40, frozen_encoder_layers=None),
        Stage(
            "encoder", "ctc", updates=3000, batch=65, learning_rate=4e-4, final_lr=0.8, frozen_encoder_layers=2,
            lr_scale={"encoder.": 0.4}, augmentation=LIGHT,
        ),
        Stage(
            "joint", "joint", updates=6000, batch=65, learning_rate=4e-4, frozen_encoder_layers=2,
            lr_scale={"encoder.": 0.4, "speech_projection.projection.": 0.3}, slips=0.1, augmentation=LIGHT,
        ),
    )  # fmt: skip
    return model, stages


def base(encoder: str | None = None) -> tuple[ModelPreset, tuple[Stage, ...]]:
    """The paper's scale (arXiv 2409.08148): a FastConformer of about 100M parameters, LLaMA of about 125M, K = 4."""
    model = ModelPreset(
        encoder=encoder
        or ParakeetEncoderConfig(hidden_size=512, num_hidden_layers=17, num_attention_heads=8, intermediate_size=2048),
        decoder=small_llama(4096, size=768, layers=14, ffn=2560, heads=12),
        vocab_size=4096,
        fields={"adapter_size": 512, "encoder_stacking": 1, "decoder_stacking": 1, "num_heads": 4},
    )
    stages = (
        Stage("text", "text", updates=50_000, batch=32_000, learning_rate=6e-4, warmup=2000),
        Stage("ctc", "ctc", updates=50_000, batch=1200, learning_rate=1e-3, warmup=5000),
        Stage("joint", "joint", updates=200_000, batch=1200, learning_rate=5e-4, warmup=5000),
    )
    return model, stages


def heads() -> tuple[None, tuple[Stage, ...]]:
    """Heads 2..K of a model that is trained already and stays as it is; fits an encoder cache."""
    stage = Stage(
        "heads", "heads", updates=3000, batch=320, learning_rate=1e-3, frozen_encoder_layers=None,
        augmentation=NO_AUGMENTATION,
    )  # fmt: skip
    return None, (stage,)


def mwer() -> tuple[None, tuple[Stage, ...]]:
    """All of a model that is trained already, for the least word errors to be expected; rates as for the model that
    ships: a tenth for a Whisper's encoder and decoder."""
    stage = Stage(
        "mwer", "mwer", updates=300, batch=65, learning_rate=1e-4, warmup=20, averaging=0.98, lr_scale=WHISPER_SCALES,
        ctc_weight=0.3, augmentation=LIGHT,
    )  # fmt: skip
    return None, (stage,)


PRESETS: dict[str, Callable[..., tuple[ModelPreset | None, tuple[Stage, ...]]]] = {
    "tiny": tiny,
    "scratch": scratch,
    "base": base,
    "heads": heads,
    "mwer": mwer,
}
