"""Text on its way in (what the model is taught to write) and on its way out (scoring).

The model writes letters, digits, ``, . ? ! ' -`` and single spaces. `tidy` maps prose and transcripts
to that style; `Normalizer` is one of the two forms that word error rates are counted in.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

WRITTEN_PUNCTUATION = ",.?!'-"

_TYPOGRAPHY = str.maketrans(
    {
        "‘": "'", "’": "'", "ʼ": "'", "`": "'", "´": "'",
        "“": '"', "”": '"', "„": '"', "«": '"', "»": '"',
        "‐": "-", "‑": "-", "‒": "-", "–": "-", "—": " - ", "…": ".",
        "æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "ß": "ss", "&": " and ",
    }
)  # fmt: skip
_QUOTING_APOSTROPHE = re.compile(
    r"(?<![A-Za-z0-9])'(?!(?:[Tt]is|[Tt]was|[Ee]m|[Cc]ause)\b)|(?<=[^A-Za-z0-9s])'|(?<=[,.?!])'"
)
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+(?=[A-Z])")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Messrs|Capt|Col|Gen|Rev|Hon|vs|etc|[A-Z])\.$")


def tidy(text: str) -> str:
    """Map prose to the style that leapasr models write.

    Accents are folded, quotation marks and brackets are dropped, semicolons, colons and free-standing
    dashes become commas, white space is collapsed. Case, words and ``, . ? ! ' -`` are kept.
    """
    text = unicodedata.normalize("NFKD", text.translate(_TYPOGRAPHY))
    text = "".join(char for char in text if not unicodedata.combining(char))
    text = re.sub(r"--+", " - ", text)
    text = re.sub(r"[\"()\[\]{}<>*_]", " ", text)
    text = re.sub(r"\s-\s|\s-$|^-\s", " , ", text)
    text = re.sub(r"[;:]", ",", text)
    text = _QUOTING_APOSTROPHE.sub(" ", text)
    text = re.sub(r"\.(?:\s*\.)+", ".", text)
    text = re.sub(r"\s+([,.?!])", r"\1", text)
    text = re.sub(r",+(?=[.?!])|(?<=[,.?!]),+", "", text)
    text = re.sub(r"^[\s,.?!-]+", "", text)
    return re.sub(r"\s+", " ", text).strip()


def speakable(text: str, *, ascii: bool = True) -> bool:
    """Whether `text` holds only letters (ASCII alone, or any) and written punctuation, and is said as it is spelled."""
    return re.fullmatch(r"(?:[^\W\d_]|[ ,.?!'-])+", text, re.ASCII if ascii else 0) is not None


def ends_sentence(text: str) -> bool:
    """Whether `text` ends with one of ``. ? !`` that is not the full stop of a title or an initial."""
    return text.endswith((".", "?", "!")) and not _ABBREVIATION.search(text)


def sentences(paragraph: str) -> Iterator[str]:
    """Cut a tidied paragraph behind ``. ? !``, not behind titles and initials."""
    pending = ""
    for part in _SENTENCE_END.split(paragraph):
        pending = f"{pending} {part}".strip()
        if not _ABBREVIATION.search(pending):
            yield pending
            pending = ""
    if pending:
        yield pending


def plain(text: str) -> str:
    """The plain scoring form: lower case, letters, digits and apostrophes, single spaces."""
    text = unicodedata.normalize("NFKD", text.translate(_TYPOGRAPHY)).lower()
    text = "".join(char for char in text if not unicodedata.combining(char))
    return " ".join(re.sub(r"[^a-z0-9' ]", " ", text).split())


@lru_cache(maxsize=1)
def _whisper_english_normalizer():
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def whisper_english(text: str) -> str:
    """OpenAI Whisper's English normaliser (spelling table included), from the package whisper-normalizer."""
    return _whisper_english_normalizer()(text)


@dataclass(frozen=True)
class Normalizer:
    """A named scoring normaliser. `name` is ``whisper_english`` or ``plain``."""

    name: str

    def __call__(self, text: str) -> str:
        if self.name == "whisper_english":
            return whisper_english(text)
        if self.name == "plain":
            return plain(text)
        raise ValueError(f"unknown normaliser {self.name!r}: choose 'whisper_english' or 'plain'")


NORMALIZER, PLAIN = Normalizer("whisper_english"), Normalizer("plain")
