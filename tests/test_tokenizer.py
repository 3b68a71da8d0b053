import string

import pytest
from transformers import AutoTokenizer

from leapasr.text import WRITTEN_PUNCTUATION, tidy
from leapasr.training.tokenizer import BEGIN, END, PAD, UNKNOWN, train_tokenizer

TEXTS = ["The cat sat on the mat, didn't it?", "Well-known dogs ran there in 1984!", "No. The dog sat."] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=100)


def test_texts_come_back_as_they_were(tokenizer):
    unseen = ["A zebra's quiz, x-ray, 2007?", "I", "it's Mr. O'Neill, no"]
    for text in [*TEXTS, *unseen]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).strip() == text


def test_special_tokens_are_the_ones_that_models_are_configured_with(tokenizer):
    assert tokenizer.convert_tokens_to_ids([PAD, BEGIN, END, UNKNOWN]) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (
        0,
        1,
        2,
        3,
    )
    assert tokenizer("the cat").input_ids == tokenizer("the cat", add_special_tokens=False).input_ids


def test_the_vocabulary_is_of_the_wanted_size_and_merges_what_is_frequent(tokenizer):
    assert len(tokenizer) == 100
    assert len(tokenizer.tokenize("The cat sat on the mat")) < len("The cat sat on the mat") / 2
    alphabet = set(string.ascii_letters + string.digits + WRITTEN_PUNCTUATION)
    assert alphabet <= set(tokenizer.get_vocab())


def test_digits_and_punctuation_stand_alone(tokenizer):
    for text in TEXTS:
        for token in tokenizer.tokenize(text):
            letters = token.removeprefix("▁")
            assert len(letters) <= 1 or not set(letters) & set(string.digits + ",.?!-")
    assert tokenizer.tokenize("1984!")[-5:] == list("1984!")


def test_what_is_outside_the_alphabet_is_unknown(tokenizer):
    def is_known(text):
        return tokenizer.unk_token_id not in tokenizer(text, add_special_tokens=False).input_ids

    for text in ("¥", "naïve", "the cat: sat", "日本"):
        assert not is_known(text)
    assert is_known(tidy("naïve"))
    foreign = train_tokenizer([*TEXTS, "日本 日本 日本"], vocab_size=100)  # not even if it was trained on it
    assert foreign.unk_token_id in foreign("日本", add_special_tokens=False).input_ids
    assert is_known(tidy("the cat: sat"))


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert loaded(text).input_ids == ids
        assert loaded.decode(ids) == tokenizer.decode(ids)
    assert train_tokenizer(TEXTS, vocab_size=100).get_vocab() == tokenizer.get_vocab()


def test_a_vocabulary_below_the_alphabet():
    with pytest.raises(ValueError, match="vocab_size 50 is below the alphabet's 73"):
        train_tokenizer(TEXTS, vocab_size=50)
