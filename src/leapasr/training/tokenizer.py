"""The tokenizer of models trained from a vocabulary of their own: byte-pair encoding over written text."""

from __future__ import annotations

import json
import string
from collections import Counter
from collections.abc import Iterable
from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from leapasr.text import WRITTEN_PUNCTUATION

PAD, BEGIN, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
NUM_BYTES, NUM_SPECIAL = 256, 3  # of a tokenizer made from Whisper's


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer (word-initial ``▁``) on tidied texts.

    The alphabet is letters, digits and the written punctuation; digits stand alone.

    Raises:
        ValueError: `vocab_size` is too small for the alphabet.
    """
    alphabet = list(string.ascii_letters + string.digits + WRITTEN_PUNCTUATION + "▁")
    special = [PAD, BEGIN, END, UNKNOWN]
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(f"vocab_size {vocab_size} is below the alphabet's {len(alphabet) + len(special)}")
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "merged_with_next"),
            pre_tokenizers.Metaspace(prepend_scheme="always", split=True),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(_punctuation(), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BEGIN, eos_token=END, unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def frequent_tokens(whisper: PreTrainedTokenizerFast, texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Whisper's tokenizer with the `vocab_size` byte-pair tokens that `texts` need most; end, begin and padding behind.

    What a token is merged from is kept with it, so that a word whose token is kept is written as Whisper writes it.
    Any other text can be written too, in more tokens. Where the texts need fewer, Whisper's most frequent ones fill up.

    Raises:
        ValueError: `vocab_size` is less than the 256 bytes, or more than Whisper has.
    """
    fields = json.loads(whisper.backend_tokenizer.to_str())["model"]
    ids: dict[str, int] = fields["vocab"]
    if not NUM_BYTES <= vocab_size <= len(ids):
        raise ValueError(f"vocab_size must be from {NUM_BYTES} to {len(ids)}, got {vocab_size}")
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in fields["merges"]]
    merged_from = {"".join(pair): pair for pair in reversed(merges)}
    counts: Counter[int] = Counter()
    remaining = iter(texts)
    while batch := [f" {text}" for text in islice(remaining, 1000)]:
        for row in whisper(batch, add_special_tokens=False).input_ids:
            counts.update(row)
    tokens = {id: token for token, id in ids.items()}
    kept = {tokens[id] for id in range(NUM_BYTES)}
    for id in [*(id for id, _ in counts.most_common()), *range(NUM_BYTES, len(ids))]:
        wanted, new = [tokens.get(id)], set()
        while wanted:
            token = wanted.pop()
            if token in merged_from and token not in kept and token not in new:
                new.add(token)
                wanted += merged_from[token]
        if len(kept) + len(new) <= vocab_size:
            kept |= new
    vocabulary = {token: place for place, token in enumerate(sorted(kept, key=ids.__getitem__))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [pair for pair in merges if "".join(pair) in kept]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=BEGIN, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def _punctuation():
    from tokenizers import Regex

    return Regex(r"[,.?!\-]")
