"""The tokens of a byte-level BPE, taken apart into the few that its first merges make, and put together again.

BPE merges by rank: after the first merges every token of a text stands there in pieces, and further merges only join
these. A CTC head that reads pieces has some hundred outputs in place of many thousand, each of which a few hours of
speech hold often enough; what it reads is spelt with the whole vocabulary before it is worth anything to a decoder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from tokenizers import models
from transformers import PreTrainedTokenizerBase

BLANK = 0  # CTC's output in front of the pieces


class Pieces:
    """Pieces of the tokens of `tokenizer`, by their places among CTC's outputs: 1 is the first of them.

    Args:
        tokenizer: a fast one, byte-level BPE, as those of Whisper and of most language models are.
        num_pieces: as many, single bytes included, of which there are no fewer.

    Attributes:
        ids: token ids of the pieces, rising.

    Raises:
        ValueError: the tokenizer is of another kind.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_pieces: int):
        self._tokenizer = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        model = json.loads(self._tokenizer.to_str())["model"]
        if model["type"] != "BPE":
            raise ValueError(f"the tokenizer is of type {model['type']}, and pieces can be made of BPE's tokens alone")
        known: dict[str, int] = model["vocab"]
        pieces = {token: place for token, place in known.items() if len(token) == 1}
        pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        merges = pairs[: max(0, num_pieces - len(pieces))]
        pieces |= {left + right: known[left + right] for left, right in merges}
        self.ids = sorted(pieces.values())
        self._places = {token: place for place, token in enumerate(self.ids, BLANK + 1)}
        bpe = models.BPE(vocab=pieces, merges=merges)

        @cache
        def split(token: int) -> list[int]:
            spelt = self._tokenizer.id_to_token(token)
            return [self._places[piece.id] for piece in bpe.tokenize(spelt)] if spelt in known else []

        self._split = split

    def split(self, token: int) -> list[int]:
        """The pieces of a token; none of a special token."""
        return self._split(token)

    def join(self, pieces: Sequence[int], probabilities: Sequence[float]) -> tuple[list[int], list[float]]:
        """The tokens of the text that pieces spell, and of each the least probability of its pieces.

        Bytes that are no character become U+FFFD: of such a reading every token has the least probability of all.
        """
        ids = [self.ids[place - BLANK - 1] for place in pieces]
        spelt = [self._tokenizer.id_to_token(token) for token in ids]
        joined = self._tokenizer.encode(self._tokenizer.decode(ids), add_special_tokens=False)
        if "".join(joined.tokens) != "".join(spelt):
            return joined.ids, [min(probabilities, default=0.0)] * len(joined.ids)
        of_bytes = [
            probability for piece, probability in zip(spelt, probabilities, strict=True) for _ in range(len(piece))
        ]
        ends = list(accumulate(map(len, joined.tokens)))
        return joined.ids, [min(of_bytes[first:stop]) for first, stop in zip([0, *ends], ends, strict=False)]
