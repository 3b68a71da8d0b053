"""Tokens in pieces and back, on a byte-level BPE that is trained here."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from leapasr.model.pieces import Pieces

TEXT = " the cat sat on the mat, where is the dog then? Überall, naïve the there them"


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT] * 9, trainers.BpeTrainer(vocab_size=310, initial_alphabet=alphabet, show_progress=False)
    )
    bpe.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def in_pieces(pieces, tokens):
    return [place for token in tokens for place in pieces.split(token)]


@pytest.mark.parametrize("num_pieces", [1, 256, 270, 290, 9999])
def test_a_text_comes_back_from_its_pieces(tokenizer, num_pieces):
    pieces = Pieces(tokenizer, num_pieces)
    assert len(pieces.ids) == max(256, min(num_pieces, tokenizer.vocab_size))
    assert pieces.ids == sorted(pieces.ids)
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    spelt = in_pieces(pieces, tokens)
    assert len(spelt) >= len(tokens)
    assert (len(spelt) == len(tokens)) == (num_pieces == 9999)
    joined, probabilities = pieces.join(spelt, [0.5] * len(spelt))
    assert joined == tokens
    assert probabilities == [0.5] * len(tokens)


def test_pieces_are_those_that_the_first_merges_make_of_the_whole_text(tokenizer):
    pieces = Pieces(tokenizer, 280)
    kept = set(pieces.ids)
    assert kept == set(range(280))  # a trained BPE numbers letters first, then merges by rank
    parts = [
        tokenizer.convert_ids_to_tokens(pieces.ids[place - 1]) for place in in_pieces(pieces, tokenizer.encode(" the"))
    ]
    assert "".join(parts) == "Ġthe"


def test_a_token_is_as_sure_as_its_least_sure_piece(tokenizer):
    pieces = Pieces(tokenizer, 256)
    tokens = tokenizer.encode(" the cat", add_special_tokens=False)
    assert [tokenizer.decode([token]) for token in tokens] == [" the", " cat"]
    spelt = in_pieces(pieces, tokens)
    assert pieces.join(spelt, [0.9, 0.3, 0.8, 0.7, 0.6, 0.5, 0.4, 0.95])[1] == [0.3, 0.4]


def test_half_a_character_makes_a_doubtful_reading_of_the_rest(tokenizer):
    pieces = Pieces(tokenizer, 256)
    spelt = in_pieces(pieces, tokenizer.encode(" the Ü", add_special_tokens=False))[:-1]
    tokens, probabilities = pieces.join(spelt, [0.9, 0.3, *[0.8] * (len(spelt) - 2)])
    assert tokenizer.decode(tokens) == " the �"
    assert set(probabilities) == {0.3}


def test_nothing_and_special_tokens(tokenizer):
    pieces = Pieces(tokenizer, 280)
    assert pieces.join([], []) == ([], [])
    assert pieces.split(tokenizer.convert_tokens_to_ids("<|end|>")) == []


def test_another_kind_of_tokenizer_is_refused():
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="type WordLevel"):
        Pieces(PreTrainedTokenizerFast(tokenizer_object=words), 300)
