"""SpeechLlamaForConditionalGeneration: encoder + adapter + CTC head + LLaMA decoder + multi-token heads.

The prompt of a row is its speech embeddings followed by the begin-of-text token; text follows. Rows are
right-padded, so that padding always lies behind what a causal mask lets a real position see.

Shapes: B rows, T frames, L speech embeddings, M text tokens, U = M + 1 text positions (begin-of-text and the tokens),
W inputs of the decoder, S what these may look at, D decoder width, H what heads read (D, 2D with draft layers),
V vocabulary, F mel bins.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel
from transformers.utils import cached_file

from leapasr.model import storage
from leapasr.model.adapter import Adapter, SpeechProjection, stack_frames
from leapasr.model.checkpoints import CheckpointError
from leapasr.model.configuration import SpeechLlamaConfig
from leapasr.model.ctc_head import Blocks, CTCScores, SharedCTCHead
from leapasr.model.draft_layers import build_draft_layers, leave_out_feed_forward, read_hidden
from leapasr.model.encoders import FEATURE_RATE, build_encoder, padding_mask
from leapasr.model.mtp_heads import build_heads
from leapasr.model.precision import cast
from leapasr.model.text_trees import TextTrees

LAYERS_TOGETHER = 2  # whose keys and values are one product: more would not stay in a core's cache
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass
class SpeechEncoding:
    """What the speech side gives for a batch.

    ctc: what CTC says of (B, T) frames, `model.ctc_frame_rate` a second, in the speech side's dtype, with lengths
    ctc_lengths_B (B,); None where nobody wanted it;
    embeddings_BLD (B, L, D) for the decoder's prompt or memory ((B, L, 2D) where draft layers remember others) with
    lengths lengths_B (B,) and positions positions_BL (B, L).
    """

    ctc: CTCScores | None
    ctc_lengths_B: Tensor
    embeddings_BLD: Tensor
    lengths_B: Tensor
    positions_BL: Tensor

    @property
    def prefix(self) -> tuple[Tensor, Tensor, Tensor]:
        """The decoder's prompt without begin-of-text: embeddings, lengths, positions."""
        return self.embeddings_BLD, self.lengths_B, self.positions_BL


@dataclass
class SpeechLlamaOutput:
    """A training forward pass: the encoding, and the logits of heads 1..K at every text position, K × (B, U, V)."""

    encoding: SpeechEncoding
    head_logits: list[Tensor]


def join_rows(
    first_BLD: Tensor,
    first_lengths_B: Tensor,
    second_BUD: Tensor,
    second_lengths_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Put each row's second part directly behind the valid positions of its first part.

    Returns the joined rows (B, L', D), right-padded with whatever lies there, and the index (B, L') of each
    joined position within the concatenation of both parts. L' is the longest joined row.
    """
    B, L, _ = first_BLD.shape
    U = second_BUD.shape[1]
    size = int((first_lengths_B + (U if second_lengths_B is None else second_lengths_B)).max())
    position = torch.arange(size, device=first_BLD.device)[None]
    index_BP = torch.where(
        position < first_lengths_B[:, None], position, L + (position - first_lengths_B[:, None]).clamp(max=U - 1)
    )
    both = torch.cat([first_BLD, second_BUD], 1)
    return both.gather(1, index_BP[..., None].expand(-1, -1, both.shape[-1])), index_BP


def _stack(rows: Sequence[Tensor], lengths_B: Tensor) -> Tensor:
    """Rows (1, T, ...), of which so many places are real, in one tensor (B, max(lengths), ...), zeros behind them."""
    stacked = rows[0].new_zeros(len(rows), int(lengths_B.max()), *rows[0].shape[2:])
    for place, (row, length) in enumerate(zip(rows, lengths_B.tolist(), strict=True)):
        stacked[place, :length] = row[0, :length]
    return stacked


def _joint_projection(layers: Sequence[Any]) -> nn.Linear:
    """Keys and values of `layers`, side by side, of what is normed once for all of them."""
    parts = [
        (layer.input_layernorm.weight, project)
        for layer in layers
        for project in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    ]
    weight_PD = torch.cat([project.weight * norm_D for norm_D, project in parts]).detach()
    with torch.device("meta"):
        joint = nn.Linear(weight_PD.shape[1], weight_PD.shape[0], bias=parts[0][1].bias is not None)
    joint.weight = nn.Parameter(weight_PD, requires_grad=False)
    if joint.bias is not None:
        joint.bias = nn.Parameter(torch.cat([project.bias for _, project in parts]).detach(), requires_grad=False)
    return joint


def _projected(linear: nn.Linear, x_BLD: Tensor, lengths_B: Tensor | None) -> Tensor:
    """What `linear` makes of rows as far as they go, (B, L, P), zeros behind that; without gradients."""
    B, L, D = x_BLD.shape
    projected = x_BLD.new_empty(B, L, linear.out_features)
    for x_LD, row, length in zip(x_BLD, projected, [L] * B if lengths_B is None else lengths_B.tolist(), strict=True):
        if linear.bias is None:
            torch.mm(x_LD[:length], linear.weight.t(), out=row[:length])
        else:
            torch.addmm(linear.bias, x_LD[:length], linear.weight.t(), out=row[:length])
        row[length:] = 0
    return projected


def _unpacked(packed_PD: Tensor, places: tuple[Tensor, ...], size: tuple[int, int]) -> Tensor:
    """What lies at these places of B rows and L, (B, L, D), zeros elsewhere; without places, what is given."""
    if not places:
        return packed_PD
    rows = packed_PD.new_zeros(*size, packed_PD.shape[-1])
    rows[places] = packed_PD
    return rows


def join_positions(positions_BL: Tensor, lengths_B: Tensor, size: int) -> Tensor:
    """Positions (B, size) of joined rows: of the prefix as given, of what is behind it consecutive."""
    place = torch.arange(size, device=lengths_B.device)[None]
    longer = nn.functional.pad(positions_BL, (0, max(0, size - positions_BL.shape[1])))[:, :size]
    return torch.where(place < lengths_B[:, None], longer, place)


class SpeechLlamaForConditionalGeneration(PreTrainedModel):
    """A Speech-LLaMA whose decoder predicts K tokens per call.

    Args:
        config: see `SpeechLlamaConfig`.
    """

    config_class = SpeechLlamaConfig
    main_input_name = "input_features"
    base_model_prefix = ""
    _supports_sdpa = True
    input_modalities = ["audio"]

    def __init__(self, config: SpeechLlamaConfig):
        super().__init__(config)
        self.encoder = build_encoder(config.encoder_config, pooling_layer=config.encoder_pooling_layer)
        self.adapter = Adapter(config, self.encoder.output_size)
        hidden_size = config.decoder_config.hidden_size
        self.ctc_head = (
            SharedCTCHead(config.adapter_size, hidden_size, blank_token_id=config.blank_token_id)
            if config.ctc_unembedding
            else nn.Linear(config.adapter_size, config.vocab_size)
        )
        frame_size = self.encoder.output_size * config.encoder_stacking
        self.speech_projection = SpeechProjection(
            config, frame_size if config.speech_as_memory else config.adapter_size
        )
        self.decoder = AutoModelForCausalLM.from_config(config.decoder_config)
        leave_out_feed_forward(self.decoder.model.layers[index] for index in config.attention_only)
        size = config.decoder_config.hidden_size
        if config.logit_bias:
            self.decoder.lm_head.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.text_positions = nn.Embedding(config.text_positions, size) if config.text_positions else None
        self.soft_prompt = nn.Embedding(config.soft_prompt, size) if config.soft_prompt else None
        self.mtp_heads = build_heads(config)
        self.draft_layers = build_draft_layers(config)
        self._ctc_unembedding: Tensor | None = None  # the decoder's, in the speech side's dtype
        self._joint_projections: list[list[nn.Linear]] = [[], []]  # likewise, of layers that read the same
        self.post_init()
        self.reset_heads()

    def save_pretrained(  # type: ignore[override]
        self, folder: str | os.PathLike, *, weights: Literal["float", "int8"] = "float", max_shard_size: Any = None
    ) -> None:
        """Write the model into `folder`, all or nothing: what is there survives a failure.

        Args:
            weights: ``float`` stores the weights as they are; ``int8`` stores matrices in 8 bits with a scale per
                output channel, and they are widened when loaded. Low-rank adapters are merged.
            max_shard_size: what `push_to_hub` gives; the weights are one file whatever it is.

        Raises:
            ValueError: `weights` is neither. OSError: `folder` cannot be written.
        """
        storage.save(self, Path(folder), weights=weights)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name_or_path: str | os.PathLike, *args: Any, config: SpeechLlamaConfig | None = None, **kwargs: Any
    ) -> SpeechLlamaForConditionalGeneration:
        """Load a model that `save_pretrained` wrote, in evaluation mode.

        Args:
            name_or_path: a folder or a hub name.
            config: instead of the one that is stored.
            kwargs: as of transformers' `from_pretrained`, ``dtype`` for one.

        Raises:
            CheckpointError: the model is of another type or architecture, or damaged, or weights are missing.
            OSError: there is no such model.
        """
        hub = {option: kwargs.pop(option) for option in _HUB_OPTIONS if option in kwargs}
        if config is None:
            fields, _ = cls.config_class.get_config_dict(name_or_path, **hub)
            found, wanted = fields.get("model_type"), cls.config_class.model_type
            if found != wanted:
                raise CheckpointError(f"{name_or_path} is a model of type {found!r}, not {wanted!r}")
            config = cls.config_class.from_dict(fields)
        path = cached_file(name_or_path, storage.WEIGHTS_FILE, **hub)
        assert path is not None  # it raises OSError where there is none
        with torch.device("meta"):
            architecture = cls(config)
        state = storage.read(Path(path), architecture)
        return super().from_pretrained(None, *args, config=config, state_dict=state, **kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder.lm_head

    @property
    def num_heads(self) -> int:
        """K: tokens predicted per decoder call."""
        return self.config.num_heads

    @property
    def speech_dtype(self) -> torch.dtype:
        """What the speech side computes in: encoder, adapter, CTC head and speech projection."""
        return self.adapter.projection.weight.dtype

    def set_speech_dtype(self, dtype: torch.dtype) -> None:
        """Let the speech side compute in `dtype`; the decoder, and what it is given, stays in its own.

        The speech side is all before the decoder, and the keys and values of a memory of speech. Call it when
        the model is on its device, and has the weights, that it is to stay with.
        """
        for part in (self.encoder, self.adapter, self.ctc_head, self.speech_projection):
            cast(part, dtype)
        if self.config.ctc_unembedding:
            self._ctc_unembedding = self.decoder.lm_head.weight.detach().to(dtype)
        if self.config.speech_as_memory:
            own, drafting = self._layers_with_memory()
            self._joint_projections = [
                [
                    _joint_projection(layers[first : first + LAYERS_TOGETHER]).to(dtype)
                    for first in range(0, len(layers), LAYERS_TOGETHER)
                ]
                for layers in (own, drafting)
            ]

    @property
    def ctc_frame_rate(self) -> float:
        """CTC frames a second."""
        return self.encoder.frame_rate / self.config.encoder_stacking

    def reset_heads(self) -> None:
        """Let heads 2..K, and their draft layers, begin as copies of head 1 and of what it reads through."""
        if self.draft_layers is not None:
            self.draft_layers.reset_from(self.decoder.base_model)
        if self.mtp_heads is not None:
            self.mtp_heads.reset_from(self.decoder.lm_head)

    def keep_reserved(self) -> None:
        """Let no gradient reach what writes into the reserved dimensions of the decoder's residual stream."""
        if not self.config.reserved:
            return
        index = torch.tensor(self.config.reserved, device=self.device)
        columns = [self.get_input_embeddings(), self.text_positions, self.soft_prompt]
        rows = [self.speech_projection.projection, self.speech_projection.ctc_projection]
        for layer in chain(*self._layers_with_memory()):
            rows += [layer.self_attn.o_proj, getattr(layer.mlp, "down_proj", None)]
        for dimension, modules in ((1, columns), (0, rows)):
            for parameter in (
                parameter for module in modules if module is not None for parameter in module.parameters()
            ):
                parameter.register_hook(partial(torch.Tensor.index_fill, dim=dimension, index=index, value=0))

    def encode(self, input_features: Tensor, feature_lengths: Tensor, *, with_ctc: bool = True) -> SpeechEncoding:
        """Encode log-mel features (B, T, F) with valid lengths (B,); rows do not see each other's padding.

        Without `with_ctc` CTC is read only where the decoder or its heads depend on it.

        On a CPU each row is encoded by itself, padded to a whole second, unless gradients are asked for: a row alone
        keeps the cores busy, padding would cost as much as speech, and oneDNN builds its kernels for each length anew.
        """
        if self.device.type != "cpu" or torch.is_grad_enabled():
            return self._encode(input_features, feature_lengths, with_ctc=with_ctc)
        parts = []
        for features_TF, length in zip(input_features, feature_lengths.tolist(), strict=True):
            size = min(-(-length // FEATURE_RATE) * FEATURE_RATE, max(length, self.encoder.max_feature_frames))
            padded_TF = nn.functional.pad(features_TF[:length], (0, 0, 0, size - length))
            parts.append(self._encode(padded_TF[None], feature_lengths.new_tensor([length]), with_ctc=with_ctc))
        ctc_lengths_B = torch.cat([part.ctc_lengths_B for part in parts])
        lengths_B = torch.cat([part.lengths_B for part in parts])
        scores = [part.ctc for part in parts if part.ctc is not None]
        ctc = None
        if scores:
            frames_BTD = _stack([each.frames_BTD for each in scores], ctc_lengths_B)
            ctc = CTCScores(frames_BTD, self._ctc_blocks, _stack([each.best_BT for each in scores], ctc_lengths_B))
        return SpeechEncoding(
            ctc,
            ctc_lengths_B,
            _stack([part.embeddings_BLD for part in parts], lengths_B),
            lengths_B,
            _stack([part.positions_BL for part in parts], lengths_B),
        )

    def _encode(self, input_features: Tensor, feature_lengths: Tensor, *, with_ctc: bool) -> SpeechEncoding:
        frames, lengths_B = self.encoder(input_features.to(self.speech_dtype), feature_lengths)
        return self.encode_frames(frames, lengths_B, with_ctc=with_ctc)

    def encode_frames(self, frames_BTD: Tensor, lengths_B: Tensor, *, with_ctc: bool = True) -> SpeechEncoding:
        """The part behind the encoder: encoder frames (B, T, D) and lengths (B,) to a `SpeechEncoding`.

        `with_ctc` as of `encode`.
        """
        with_ctc = with_ctc or self.config.decoder_reads_ctc
        frames, ctc_lengths_B = stack_frames(frames_BTD, lengths_B, self.config.encoder_stacking)
        ctc = None
        if with_ctc or not self.config.speech_as_memory:
            adapted, _ = self.adapter(frames_BTD, lengths_B)
            if with_ctc:
                ctc = CTCScores(adapted, self._ctc_blocks)
            if not self.config.speech_as_memory:
                frames = adapted
        embeddings, lengths_B, positions_BL = self.speech_projection(
            frames, ctc_lengths_B, ctc, self.get_input_embeddings().weight
        )
        if not self.config.speech_as_memory:
            embeddings = embeddings.to(self.decoder.dtype)
        return SpeechEncoding(ctc, ctc_lengths_B, embeddings, lengths_B, positions_BL)

    def _ctc_blocks(self, frames: Tensor, size: int | None) -> Blocks:
        """CTC logits of adapter frames (..., D), of so many tokens at a time; None: of all at once."""
        if isinstance(self.ctc_head, nn.Linear):
            return [(0, self.ctc_head(frames))]
        unembedding_VD = self.decoder.lm_head.weight if self._ctc_unembedding is None else self._ctc_unembedding
        return self.ctc_head.blocks(frames, unembedding_VD, size)

    def embed_text(self, tokens_BW: Tensor, places_BW: Tensor) -> Tensor:
        """Embeddings (B, W, D) of token ids (B, W) at these places of their texts; begin-of-text lies at place 0."""
        embeddings = self.get_input_embeddings()(tokens_BW)
        if self.text_positions is None:
            return embeddings
        return embeddings + self.text_positions(places_BW.clamp(max=self.config.text_positions - 1))

    def begin_text(self, tokens_BM: Tensor) -> Tensor:
        """Embeddings of the soft prompt, begin-of-text and the tokens (B, M) of a text: (B, num_soft + 1 + M, D)."""
        begin_B1 = tokens_BM.new_full((len(tokens_BM), 1), self.config.bos_token_id)
        text_BU = torch.cat([begin_B1, tokens_BM], 1)
        text_BUD = self.embed_text(text_BU, torch.arange(text_BU.shape[1], device=text_BU.device).expand_as(text_BU))
        if self.soft_prompt is None:
            return text_BUD
        return torch.cat([self.soft_prompt.weight.expand(len(text_BUD), -1, -1), text_BUD], 1)

    def prompt(self, encoding: SpeechEncoding) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The fields of `decoding.Prompts`, begin-of-text included.

        Embeddings (B, L, D), right-padded, lengths (B,), positions (B, L), and twice None; where speech is the
        decoder's memory, None for positions, the memory (B, M, D) and its lengths (B,).
        """
        begin_BND = self.begin_text(encoding.lengths_B.new_empty(len(encoding.lengths_B), 0))
        if self.config.speech_as_memory:
            num_begin = torch.full_like(encoding.lengths_B, begin_BND.shape[1])
            return begin_BND, num_begin, None, encoding.embeddings_BLD, encoding.lengths_B
        prompt, _ = join_rows(encoding.embeddings_BLD, encoding.lengths_B, begin_BND)
        positions = join_positions(encoding.positions_BL, encoding.lengths_B, prompt.shape[1])
        return prompt, encoding.lengths_B + begin_BND.shape[1], positions, None, None

    def _layers_with_memory(self) -> tuple[list[Any], list[Any]]:
        """The decoder's layers, and the draft layers, in the order of their places in the cache."""
        own: Any = self.decoder.base_model.layers
        return list(own), [] if self.draft_layers is None else list(self.draft_layers.body.layers)

    def remember(
        self,
        embeddings_BLD: Tensor,
        cache: Cache,
        lengths_B: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Put the keys and values of speech embeddings into every layer of the decoder's `cache`.

        They have no rotary position: a decoder with a memory has learnt ones.

        Args:
            embeddings_BLD: (B, L, D); (B, L, 2D) where draft layers read others than the decoder's own layers.
            lengths_B: of the rows; what lies behind them is not computed, and is zero in the cache.
            dtype: of keys and values; None: the decoder's.
        """
        D = self.config.decoder_config.hidden_size
        (own, drafting), (own_joint, drafting_joint) = self._layers_with_memory(), self._joint_projections
        states = chain(
            self._keys_and_values(own, embeddings_BLD[..., :D], lengths_B, own_joint),
            self._keys_and_values(drafting, embeddings_BLD[..., -D:], lengths_B, drafting_joint),
        )
        head_dim = own[0].self_attn.head_dim
        for index, both in enumerate(states):
            keys, values = (
                each.to(dtype or self.decoder.dtype).unflatten(-1, (-1, head_dim)).transpose(1, 2) for each in both
            )
            cache.update(keys, values, index)

    def _keys_and_values(
        self, layers: Sequence[Any], read_BLD: Tensor, lengths_B: Tensor | None, joint: Sequence[nn.Linear]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What each of `layers` remembers of what they all read; by joint projections of them, if there are any."""
        if joint:
            norm, size = layers[0].input_layernorm, layers[0].self_attn.k_proj.out_features
            normed_BLD = nn.functional.rms_norm(read_BLD, read_BLD.shape[-1:], None, norm.variance_epsilon)
            for linear in joint:
                states = _projected(linear, normed_BLD.to(self.speech_dtype), lengths_B).split(size, -1)
                yield from zip(states[::2], states[1::2], strict=True)
            return
        places: tuple[Tensor, ...] = ()
        B, L, _ = read_BLD.shape
        if lengths_B is not None and int(lengths_B.min()) < L:
            places = padding_mask(lengths_B, L).nonzero(as_tuple=True)  # once: a GPU is waited for
            read_BLD = read_BLD[places]  # (P, D): the places of all rows, one behind the other
        for layer in layers:
            normed = layer.input_layernorm(read_BLD)
            projections = layer.self_attn.k_proj, layer.self_attn.v_proj
            keys, values = (_unpacked(project(normed), places, (B, L)) for project in projections)
            yield keys, values

    def read_text(
        self,
        embeddings_BLD: Tensor,
        lengths_B: Tensor,
        positions_BL: Tensor,
        text_BM: Tensor,
        *,
        num_heads: int | None = None,
    ) -> list[Tensor]:
        """Teacher-forced logits of heads 1..K behind a prefix of embeddings.

        Args:
            embeddings_BLD, lengths_B, positions_BL: as of `read_texts`.
            text_BM: token ids (B, M), padded with any id behind each row's end.
            num_heads: as of `head_logits`.

        Returns:
            `num_heads` tensors (B, U, V); at position u (0 is begin-of-text) head k predicts token u + k.
        """
        trees = TextTrees.of(
            text_BM[:, None],
            torch.full_like(lengths_B[:, None], text_BM.shape[1]),
            begin_token_id=self.config.bos_token_id,
        )
        return self.head_logits(
            self.read_texts(embeddings_BLD, lengths_B, positions_BL, trees), text_BM, num_heads=num_heads
        )

    def read_texts(self, embeddings_BLD: Tensor, lengths_B: Tensor, positions_BL: Tensor, trees: TextTrees) -> Tensor:
        """What heads read (`read_hidden`) of several texts a row, teacher forced in one pass.

        The texts stand behind one prefix, whose keys and values they share, as they share what they have in common
        themselves (`TextTrees`).

        Args:
            embeddings_BLD, lengths_B, positions_BL: the prefix, without begin-of-text, as `SpeechEncoding` has it.

        Returns:
            (B, W, H), of each node, for `head_logits`.
        """
        B, L, _ = embeddings_BLD.shape
        dtype, device, num_soft = embeddings_BLD.dtype, embeddings_BLD.device, self.config.soft_prompt
        inputs = self.embed_text(trees.tokens_BW, trees.places_BW).to(dtype)
        positions, sees = trees.places_BW + num_soft, trees.sees_BWW
        if self.soft_prompt is not None:  # before begin-of-text, and seen from everywhere behind it
            inputs = torch.cat([self.soft_prompt.weight.to(dtype).expand(B, -1, -1), inputs], 1)
            positions = torch.cat([torch.arange(num_soft, device=device).expand(B, -1), positions], 1)
            sees = nn.functional.pad(sees, (num_soft, 0), value=True)
            soft_SW = torch.ones(num_soft, sees.shape[2], dtype=torch.bool, device=device).tril()
            sees = torch.cat([soft_SW.expand(B, -1, -1), sees], 1)
        W = inputs.shape[1]
        mask = torch.cat([padding_mask(lengths_B, L)[:, None].expand(B, W, L), sees], 2)
        cache = None
        if self.config.speech_as_memory:
            cache = DynamicCache()
            self.remember(embeddings_BLD, cache)
        else:
            inputs = torch.cat([embeddings_BLD, inputs], 1)
            causal_LS = torch.ones(L, L + W, dtype=torch.bool, device=device).tril()
            mask = torch.cat([causal_LS.expand(B, -1, -1), mask], 1)
            positions = torch.cat([positions_BL, lengths_B[:, None] + positions], 1)
        hidden = read_hidden(
            self.decoder.base_model,
            self.draft_layers,
            inputs,
            position_ids=positions,
            # given whole: from positions alone transformers would make out other texts
            attention_mask=torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)[:, None],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return hidden[:, -trees.tokens_BW.shape[1] :]

    def head_logits(self, hidden_BUH: Tensor, text_BM: Tensor, *, num_heads: int | None = None) -> list[Tensor]:
        """Logits of heads 1..K from what `read_texts` gave, along one text a row.

        Args:
            hidden_BUH: (B, U, H). text_BM: ids (B, M) of the same texts.
            num_heads: 1 for head 1 alone; None for all K.

        Returns:
            `num_heads` tensors (B, U, V).
        """
        D = self.config.decoder_config.hidden_size
        logits = [self.decoder.lm_head(hidden_BUH[..., :D])]
        if self.mtp_heads is not None and num_heads != 1:
            next_BUD = nn.functional.pad(self.get_input_embeddings()(text_BM), (0, 0, 0, 1))
            logits += self.mtp_heads.training_logits(hidden_BUH[..., -D:], next_BUD, self.decoder.lm_head)
        return logits

    def forward(self, input_features: Tensor, feature_lengths: Tensor, text_ids: Tensor) -> SpeechLlamaOutput:
        """Teacher-forced training pass; the losses are in `leapasr.training.losses`.

        Args:
            input_features: log-mel features (B, T, F).
            feature_lengths: valid frames (B,).
            text_ids: token ids (B, M) without begin- and end-of-text, padded with any id.
        """
        encoding = self.encode(input_features, feature_lengths)
        return SpeechLlamaOutput(encoding, self.read_text(*encoding.prefix, text_ids))
