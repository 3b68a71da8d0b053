"""Text-only pretraining: misread text in, right text out.

A decoder that starts from random weights ignores its audio for thousands of updates. So it first learns, from
text alone, what it will later do with speech: read a sequence of token embeddings that looks like a CTC
transcript (blanks between tokens, repeats, misspelt words), and write the text that was meant. It learns to
copy, and to correct what no reader would write; the language model that this takes comes along.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from leapasr.data.batches import pad_tokens
from leapasr.model.processing import SpeechLlamaProcessor

_SOUNDALIKES = (
    ("ph", "f"), ("f", "ph"), ("ck", "k"), ("k", "c"), ("c", "k"), ("c", "s"), ("s", "c"), ("z", "s"), ("s", "z"),
    ("ee", "ea"), ("ea", "ee"), ("ee", "i"), ("i", "e"), ("e", "i"), ("e", "a"), ("a", "e"), ("o", "a"), ("a", "o"),
    ("o", "u"), ("u", "o"), ("ou", "ow"), ("ow", "ou"), ("ai", "ay"), ("ei", "ie"), ("ie", "ei"), ("y", "i"),
    ("i", "y"), ("er", "ar"), ("ar", "er"), ("or", "er"), ("er", "or"), ("tion", "sion"), ("th", "t"), ("t", "d"),
    ("d", "t"), ("b", "p"), ("p", "b"), ("g", "k"), ("v", "f"), ("m", "n"), ("n", "m"), ("gh", ""), ("h", ""),
    ("ll", "l"), ("ss", "s"), ("tt", "t"), ("nn", "n"), ("rr", "r"), ("l", "ll"), ("e", ""), ("t", ""), ("d", ""),
)  # fmt: skip


def misread_word(word: str, rng: random.Random) -> str:
    """`word` with one to three spelling slips of the kind that sound alike."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        slips = [slip for slip in _SOUNDALIKES if slip[0] in word]
        if slips:
            old, new = rng.choice(slips)
            at = rng.choice([i for i in range(len(word)) if word.startswith(old, i)])
            word = word[:at] + new + word[at + len(old) :]
    return word


def misread(text: str, rate: float, rng: random.Random) -> str:
    """`text` as a weak acoustic model might spell it: a share `rate` of its words is misspelt, lost, cut or joined."""
    words: list[str] = []
    for word in text.split():
        if rng.random() < rate:
            slip = rng.random()
            if slip < 0.75:
                word = misread_word(word, rng)
            elif slip < 0.8:
                word = ""
            elif slip < 0.88 and words:
                words[-1] += word
                continue
            elif slip < 0.94 and len(word) > 3:
                cut = rng.randrange(1, len(word))
                word = f"{word[:cut]} {word[cut:]}"
            else:
                word = word.swapcase() if len(word) == 1 else word.rstrip(",.?!")
        if word:
            words.append(word)
    return " ".join(words)


def alike_tokens(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """For each token id, the tokens of which one begins or ends with the other: "▁con" is like "▁co" and "on"."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    ids = [id for id in range(len(pieces)) if id not in special and pieces[id]]

    def alike(a: str, b: str) -> bool:
        return a != b and (a.startswith(b) or b.startswith(a) or a.endswith(b) or b.endswith(a))

    return [[other for other in ids if alike(piece, pieces[other])] for piece in pieces]


def misread_tokens(tokens: Sequence[int], rate: float, alike: Sequence[Sequence[int]], rng: random.Random) -> list[int]:
    """`tokens` as CTC might emit them: a share `rate` is lost, said twice, or one that is alike.

    A token and its neighbours compete for the same frames: CTC writes "giift" for "gift" and "deressing" for
    "depressing", which no misspelling of a word looks like.
    """
    result: list[int] = []
    for token in tokens:
        slip = rng.random() / rate if rate else 1.0
        if slip >= 1:
            result.append(token)
        elif slip < 0.25 and alike[token]:
            result += [rng.choice(alike[token]), token]
        elif slip < 0.65 and alike[token]:
            result.append(rng.choice(alike[token]))
        elif slip < 0.7:
            result += [token, token]
    return result


@dataclass
class TextBatch:
    """A batch of misread texts.

    read_ids (B, L): the token read at each prefix position, the blank (padding) id where there is none;
    read_weights (B, L): how surely it is read, in 0.5..1; read_lengths (B,); text_ids (B, M), text_lengths (B,).
    """

    read_ids: Tensor
    read_weights: Tensor
    read_lengths: Tensor
    text_ids: Tensor
    text_lengths: Tensor
    audio_seconds: float = 0.0


def _rounded(length: float) -> int:
    """`length` rounded up to 16, 32, 48, 64, 96, 128, 192, …: at most a third of a row is padding."""
    step = 16
    while length > 4 * step:
        step *= 2
    return -int(-length // step) * step


class MisreadBatches(Dataset):
    """Batches of about `batch_tokens` text tokens of `texts`, by like length; item i depends on (seed, epoch, i).

    With ``unread`` nothing is read before the text: a plain language model's batches.
    """

    def __init__(
        self,
        texts: Sequence[str],
        processor: SpeechLlamaProcessor,
        *,
        batch_tokens: int,
        seed: int,
        epoch: int,
        unread: bool = False,
    ):
        self.processor, self.seed, self.epoch, self.unread = processor, seed, epoch, unread
        self.batch_tokens = batch_tokens
        self.alike = [] if unread else alike_tokens(processor.tokenizer)
        rng = random.Random(f"{seed}/{epoch}")
        # about 2.7 characters a token; pools of like length keep padding small and the order random. Shapes come
        # from a small set (`_rounded`): compiled code and the kernels' caches grow with every new one.
        order = rng.sample(range(len(texts)), len(texts))
        self.batches: list[list[str]] = []
        for start in range(0, len(order), 4096):
            pool = sorted((texts[i] for i in order[start : start + 4096]), key=len)
            pending: list[str] = []
            for text in pool:
                if pending and len(pending) >= max(1, int(batch_tokens / _rounded(len(text) / 2.7))):
                    self.batches.append(pending)
                    pending = []
                pending.append(text)
            self.batches.append(pending)
        rng.shuffle(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> TextBatch:
        rng = random.Random(f"{self.seed}/{self.epoch}/{index}")
        blank = self.processor.tokenizer.pad_token_id
        texts, reads, weights = [], [], []
        for text in self.batches[index]:
            texts.append(self.processor.encode_text(text))
            if self.unread:
                continue
            read: list[int] = [blank] * rng.randrange(1, 4)
            misspelt = self.processor.encode_text(misread(text, rng.uniform(0, 0.4), rng))
            for token in misread_tokens(misspelt, rng.uniform(0, 0.25), self.alike, rng):
                read += [token] * (2 if rng.random() < 0.1 else 1) + [blank] * rng.choice((0, 0, 0, 1, 1, 2))
            reads.append(read + [blank] * rng.randrange(1, 4))
            weights.append([rng.uniform(0.5, 1) for _ in reads[-1]])
        text_ids, text_lengths = pad_tokens(texts, blank)
        text_ids = pad(text_ids, (0, _rounded(text_ids.shape[1]) - text_ids.shape[1]), value=blank)
        if self.unread:
            nothing = torch.zeros(len(texts), 0, dtype=torch.long)
            return TextBatch(nothing, nothing.float(), nothing.sum(1), text_ids, text_lengths)
        read_ids, read_lengths = pad_tokens(reads, blank)
        read_ids = pad(read_ids, (0, _rounded(read_ids.shape[1]) - read_ids.shape[1]), value=blank)
        read_weights = torch.zeros(read_ids.shape)
        for row, values in zip(read_weights, weights, strict=True):
            row[: len(values)] = torch.tensor(values)
        return TextBatch(read_ids, read_weights * (read_ids != blank), read_lengths, text_ids, text_lengths)
