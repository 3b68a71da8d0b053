"""Case and punctuation for transcripts that come without.

Words always stay the transcript's. Where they are read from a book, the book's own case and punctuation are
carried over (`BookIndex`); else those of a speech recogniser that writes them (`restore_from_hypothesis`);
else a rule gives a capital and a full stop (`restore_by_rule`).
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import kaldialign
import numpy as np

from leapasr.audio import SAMPLE_RATE, read_audio
from leapasr.data.manifests import spread
from leapasr.data.synthesis import read_paragraphs
from leapasr.text import plain, tidy

ANCHOR_WORDS = 5  # a run of this many equal words suggests a place in a book
MAX_ANCHOR_HITS = 100  # a run found more often than this suggests nothing
MAX_PLACES = 8  # places in the books that are aligned with a transcript
MAX_DIFFERENCE = 0.2  # differing words ÷ words, above which a text is not what was spoken
WINDOW_SECONDS = 29.9  # audio that Whisper hears at once
PAUSE_SECONDS = 0.1  # between the utterances of a window

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+")
_ABBREVIATIONS = {
    "mr": "mister", "mrs": "missus", "missis": "missus", "dr": "doctor", "st": "saint", "messrs": "messieurs",
    "capt": "captain", "col": "colonel", "gen": "general", "rev": "reverend", "prof": "professor",
    "lt": "lieutenant", "lieut": "lieutenant", "jr": "junior", "esq": "esquire",
}  # fmt: skip
# Words that hardly end a sentence.
_GO_ON = {
    "a", "an", "the", "and", "or", "but", "nor", "of", "if", "as", "than", "which", "who", "whose", "when", "while",
    "where", "because", "although", "though", "whether", "my", "your", "his", "its", "our", "their", "every", "into",
}  # fmt: skip
_NAMES = {
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday",
}  # fmt: skip


def _key(word: str) -> str:
    """What makes two spellings the same word: letters and digits in lower case, abbreviated titles in full."""
    letters = re.sub(r"[' ]", "", plain(word))
    return _ABBREVIATIONS.get(letters, letters)


def _transcript_words(transcript: str) -> list[str]:
    return [word for word in re.split(r"[\s-]+", transcript) if _key(word)]


def _capitalise(word: str) -> str:
    return re.sub(r"[^\W\d_]", lambda letter: letter.group().upper(), word, count=1)


def _lower_case(word: str) -> str:
    word = word.lower()
    return _capitalise(word) if re.fullmatch(r"i('\w+)?", word) else word


@dataclass(frozen=True)
class _Written:
    """A piece of written text: `words`, and behind each the characters up to the next word."""

    words: list[str]
    separators: list[str]

    @classmethod
    def of(cls, text: str) -> _Written:
        spans = [match.span() for match in _WORD.finditer(text)]
        gaps = pairwise([*spans, (len(text), len(text))])
        return cls([text[start:end] for start, end in spans], [text[a[1] : b[0]] for a, b in gaps])


@dataclass(frozen=True)
class _Transfer:
    """Transcript words as a source writes them, with what follows each, and whether the source has the word."""

    words: list[str]
    separators: list[str]
    found: list[bool]
    num_differences: int

    def text(self, start: int = 0, end: int | None = None) -> str:
        pieces = []
        for word, separator in zip(self.words[start:end], self.separators[start:end], strict=True):
            marks = re.sub(r"[^\s,.?!;:-]", " ", separator)
            pieces.append(word + (marks if marks == "-" else f"{marks} "))
        return _capitalise(tidy("".join(pieces)).rstrip(" -"))


def _runs(spoken: list[str], written: list[str]) -> Iterator[tuple[bool, int, int, int, int]]:
    """Align two lists of keys: runs (equal, start and end in `spoken`, start and end in `written`)."""
    s = w = 0
    run: list | None = None
    for left, right in kaldialign.align(spoken, written, ""):
        equal = left == right
        if run is None or run[0] != equal:
            if run:
                yield tuple(run)
            run = [equal, s, s, w, w]
        s, w = s + bool(left), w + bool(right)
        run[2], run[4] = s, w
    if run:
        yield tuple(run)


def _transfer(spoken: list[str], written: _Written, usual_case: Callable[[str], str]) -> _Transfer:
    words, separators, found, num_differences = [], [], [], 0
    keys = [_key(word) for word in spoken]
    for equal, s0, s1, w0, w1 in _runs(keys, [_key(word) for word in written.words]):
        if equal or "".join(keys[s0:s1]) == "".join(map(_key, written.words[w0:w1])):
            for word, after in _recut(spoken[s0:s1], written.words[w0:w1], written.separators[w0:w1]):
                words.append(word)
                separators.append(after)
                found.append(True)
            continue
        num_differences += max(s1 - s0, w1 - w0)
        pairs = s1 - s0 == w1 - w0
        for index in range(s1 - s0):
            word = usual_case(spoken[s0 + index])
            model = written.words[w0 + index] if pairs else ""
            capital = model[:1].isupper() and len(model) > 1
            if capital or (separators and re.search(r"[.?!]", separators[-1])):
                word = _capitalise(word)
            words.append(word)
            separators.append(written.separators[w0 + index] if pairs else " ")
            found.append(False)
        if separators and w1 > w0 and not pairs:  # the words between are not spoken: what frames them stays
            separators[-1] += written.separators[w1 - 1]
    return _Transfer(words, separators, found, num_differences)


def _recut(spoken: list[str], words: list[str], separators: list[str]) -> Iterator[tuple[str, str]]:
    """Write `spoken` with the case and separators of `words`, which have the same letters ("to-day", "TODAY")."""
    if len(spoken) == len(words):
        for transcript_word, word, separator in zip(spoken, words, separators, strict=True):
            yield _with_case(transcript_word, word), separator
        return
    after, length = {}, 0
    for word, separator in zip(words, separators, strict=True):
        length += len(_key(word))
        after[length] = separator
    letters = "".join(char for word in words for char in word if char.isalnum())
    end = 0
    for word in spoken:
        start, end = end, end + len(_key(word))
        piece = letters[start : start + 1] + letters[start + 1 : end].lower()
        yield _with_case(word, piece), after.get(end, " ")


def _with_case(transcript_word: str, word: str) -> str:
    """`transcript_word` (its apostrophes too) with the case of `word`, or an abbreviated title as `word` has it."""
    cases = [char for char in word if char.isalnum()]
    if sum(char.isalnum() for char in transcript_word) != len(cases):
        return word
    upper = iter(char.isupper() for char in cases)
    return "".join(
        (char.upper() if next(upper) else char.lower()) if char.isalnum() else char for char in transcript_word
    )


def restore_from_hypothesis(transcript: str, hypothesis: str, *, usual_case: Callable[[str], str] = _lower_case) -> str:
    """`transcript` with the case and punctuation of `hypothesis`, a cased text of nearly the same words.

    A word that the hypothesis does not have is written by `usual_case`, with a capital where the hypothesis
    has a capitalised word in its place.
    """
    return _transfer(_transcript_words(transcript), _of_hypothesis(hypothesis), usual_case).text()


def _of_hypothesis(hypothesis: str) -> _Written:
    return _Written.of(re.sub(r"\.\.+|…", " ", hypothesis))  # a recogniser's dots mean: the sentence goes on


def _without_wrong_end(text: str) -> str:
    """Whisper ends what it hears with a full stop, also where the audio breaks off in mid sentence."""
    return text[:-1] if text[-1:] in (".", "?", "!") and text[:-1].split()[-1].lower() in _GO_ON else text


def restore_by_rule(transcript: str, *, usual_case: Callable[[str], str] = _lower_case) -> str:
    """First letter upper case, names of days and months too, spelled letters stay upper case, a full stop at the end.

    "RUBOUT T G J SEVENTY NINE" → "Rubout T G J seventy nine."
    """
    words = _transcript_words(transcript)
    written = []
    for index, word in enumerate(words):
        alone = all(len(neighbour) > 1 for neighbour in (words[index - 1 : index] + words[index + 1 : index + 2]))
        is_article = word.lower() == "a" and alone and index + 1 < len(words)
        if len(word) == 1 and not is_article:
            written.append(word.upper())
        else:
            written.append(_capitalise(word.lower()) if word.lower() in _NAMES else usual_case(word))
    return _capitalise(tidy(" ".join(written))) + "." if words else ""


class BookIndex:
    """Prose in which the words of a transcript can be looked up.

    14 million words take about 15 s and 1 GB.

    Args:
        paragraphs: prose with case and punctuation, a paragraph an item.

    Raises:
        ValueError: the prose has fewer words than an anchor.
    """

    def __init__(self, paragraphs: Iterable[str]):
        self._text = "\n".join(paragraphs)
        surfaces: dict[str, int] = {}
        starts, ids = [], []
        chunk_starts, chunk_ids = [], []
        for match in _WORD.finditer(self._text):
            chunk_starts.append(match.start())
            chunk_ids.append(surfaces.setdefault(match.group(), len(surfaces)))
            if len(chunk_ids) == 1_000_000:
                starts.append(np.array(chunk_starts, dtype=np.int32))
                ids.append(np.array(chunk_ids, dtype=np.int32))
                chunk_starts, chunk_ids = [], []
        self._starts = np.concatenate([*starts, np.array(chunk_starts, dtype=np.int32)])
        surface_ids = np.concatenate([*ids, np.array(chunk_ids, dtype=np.int32)])
        if len(surface_ids) < ANCHOR_WORDS:
            raise ValueError(f"the prose has {len(surface_ids)} words: at least {ANCHOR_WORDS} are needed")
        self._key_ids: dict[str, int] = {}
        key_of_surface = np.array([self._key_ids.setdefault(_key(s), len(self._key_ids)) for s in surfaces])
        hashes = _anchor_hashes(key_of_surface[surface_ids])
        self._order = np.argsort(hashes).astype(np.int32)
        self._hashes = hashes[self._order]
        self._usual_case = _most_frequent_case(surfaces, np.bincount(surface_ids, minlength=len(surfaces)))

    def usual_case(self, word: str) -> str:
        """`word` with the case in which the prose has it most often, lower case where it never does."""
        usual = self._usual_case.get(_key(word))
        return _lower_case(word) if usual is None else _with_case(word, usual)

    def restore(self, transcript: str) -> str | None:
        """`transcript` as the prose writes it, or None where the prose does not have it.

        An utterance that ends in mid sentence ends without a full stop, as the prose has it.
        """
        spoken = _transcript_words(transcript)
        best = None
        for start, end in self._places(spoken):
            transfer = self._transfer(spoken, start, end)
            if transfer.num_differences:  # a word that one of the two lacks shifts an end of the range
                shifted = [self._transfer(spoken, start + s, end + e) for s in (-1, 0, 1) for e in (-1, 0, 1, 2)]
                transfer = min([transfer, *shifted], key=lambda transfer: transfer.num_differences)
            if best is None or transfer.num_differences < best.num_differences:
                best = transfer
        if best is None or best.num_differences > MAX_DIFFERENCE * len(spoken):
            return None
        return best.text()

    def _transfer(self, spoken: list[str], start: int, end: int) -> _Transfer:
        return _transfer(spoken, self._written(max(start, 0), min(end, len(self._starts))), self.usual_case)

    def _places(self, spoken: list[str]) -> list[tuple[int, int]]:
        """Word ranges of the prose that share anchors with `spoken`, those with most anchors first."""
        if len(spoken) < ANCHOR_WORDS:
            return []
        # An unknown word gets an id that no word has, so that no anchor with it is found.
        hashes = _anchor_hashes(np.array([self._key_ids.get(_key(word), 2**31) for word in spoken]))
        left = np.searchsorted(self._hashes, hashes, side="left")
        right = np.searchsorted(self._hashes, hashes, side="right")
        anchors = defaultdict(list)
        for offset, (first, last) in enumerate(zip(left, right, strict=True)):
            if last - first <= MAX_ANCHOR_HITS:
                for position in self._order[first:last].tolist():
                    anchors[round((position - offset) / 8)].append((offset, position))
        places = sorted(anchors.values(), key=len, reverse=True)[:MAX_PLACES]
        ranges = []
        for place in places:
            (first_offset, first), (last_offset, last) = min(place), max(place)
            ranges.append((first - first_offset, last + len(spoken) - last_offset))
        return ranges

    def _written(self, start: int, end: int) -> _Written:
        """Words `start` to `end` of the prose."""
        stop = self._starts[end] if end < len(self._starts) else len(self._text)
        written = _Written.of(self._text[self._starts[start] : stop])
        shouted = [len(word) > 1 and word.isupper() for word in written.words]
        words = []
        for index, word in enumerate(written.words):
            if shouted[index]:  # emphasis, or a chapter's first words
                word = self.usual_case(word)
                if index == 0 or re.search(r"[.?!\n]", written.separators[index - 1]):
                    word = _capitalise(word)
            words.append(word)
        return _Written(words, written.separators)


def _anchor_hashes(key_ids: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each run of `ANCHOR_WORDS` ids: (num_words,) → (num_words - ANCHOR_WORDS + 1,)."""
    num_anchors = len(key_ids) - ANCHOR_WORDS + 1
    hashes = np.zeros(num_anchors, dtype=np.uint64)
    for index in range(ANCHOR_WORDS):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + key_ids[index : index + num_anchors].astype(np.uint64)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _most_frequent_case(surfaces: dict[str, int], counts: np.ndarray) -> dict[str, str]:
    """Key → the surface most often seen, one that is not all upper case if there is any."""
    best: dict[str, tuple[bool, int, str]] = {}
    for surface, index in surfaces.items():
        candidate = (not (len(surface) > 1 and surface.isupper()), int(counts[index]), surface)
        key = _key(surface)
        if key not in best or candidate > best[key]:
            best[key] = candidate
    return {key: surface for key, (_, _, surface) in best.items()}


def _is_bare(text: str) -> bool:
    """Whether `text` has neither case nor punctuation."""
    return text in (text.upper(), text.lower()) and not re.search(r"[,.?!;:]", text)


def restore_manifest(
    manifest_path: Path,
    output_path: Path,
    *,
    prose: Path | None = None,
    whisper: Path | None = None,
    use: str | None = "train",
    limit: int | None = None,
    num_threads: int = 1,
) -> Counter:
    """Write `manifest_path` again with cased, punctuated `text`; returns how many lines each source gave.

    Lines keep their fields; `audio` becomes absolute, the old text goes to `text_original`, and `text_source`
    says where case and punctuation come from: ``transcript`` (it was cased: only tidied), ``book``,
    ``whisper`` or ``rule``. With `whisper`, an output that is there is continued: only its ``rule`` lines
    and the missing ones are worked on, and lines are written as they get ready.

    Args:
        prose: text file, plain or ``.xz``, a paragraph a line, to look transcripts up in.
        whisper: folder of a faster-whisper (CTranslate2) model for what the prose does not have.
        use: keep the lines with this ``use``; None keeps all.
        limit: this many lines, spread evenly.
        num_threads: CPU threads for Whisper.

    Raises:
        ValueError: the manifest has no line with this `use`.
    """
    manifest_path, output_path = Path(manifest_path), Path(output_path)
    lines = [json.loads(line) for line in manifest_path.read_text(encoding="utf-8").splitlines() if line.strip()]
    lines = spread([line for line in lines if use is None or line.get("use") == use], limit)
    if not lines:
        raise ValueError(f"{manifest_path} has no line with use {use!r}")
    done = _restored_before(output_path) if whisper else {}
    todo = [line for line in lines if line["id"] not in done]
    books = BookIndex(read_paragraphs(prose)) if prose and any(_is_bare(line["text"]) for line in todo) else None
    usual_case = books.usual_case if books else _lower_case

    def restored(line: dict, text: str, source: str) -> dict:
        audio = str((manifest_path.parent / line["audio"]).resolve())
        return {**line, "audio": audio, "text": text, "text_source": source, "text_original": line["text"]}

    rest = []
    for line in todo:
        if not _is_bare(line["text"]):
            done[line["id"]] = restored(line, _capitalise(tidy(line["text"])), "transcript")
        elif books and (text := books.restore(line["text"])):
            done[line["id"]] = restored(line, text, "book")
        elif whisper:
            rest.append(restored(line, "", "whisper"))
        else:
            text = restore_by_rule(line["text"], usual_case=usual_case)
            done[line["id"]] = restored(line, text, "rule")
    results = [done[line["id"]] for line in lines if line["id"] in done]
    output_path.parent.mkdir(parents=True, exist_ok=True)
    partial = output_path.with_name(output_path.name + ".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in results), encoding="utf-8")
    partial.replace(output_path)
    sources = Counter(line["text_source"] for line in results)
    if not whisper:
        return sources
    with output_path.open("a", encoding="utf-8") as out:
        for line in _restore_by_whisper(rest, whisper, usual_case, num_threads):
            out.write(json.dumps(line) + "\n")
            out.flush()
            sources[line["text_source"]] += 1
    return sources


def _restored_before(output_path: Path) -> dict[str, dict]:
    """The lines of an earlier run by id, without those that Whisper can better and without a torn last one."""
    done = {}
    if output_path.exists():
        for text in output_path.read_text(encoding="utf-8").splitlines(keepends=True):
            if text.endswith("\n"):
                line = json.loads(text)
                if line["text_source"] != "rule":
                    done[line["id"]] = line
    return done


def _windows(lines: list[dict]) -> Iterator[list[dict]]:
    """Lines of one speaker in the order of their ids, together short enough for Whisper to hear at once."""
    window: list[dict] = []
    seconds = 0.0
    for line in sorted(lines, key=lambda line: (str(line.get("speaker")), line["id"])):
        added = line["duration"] + PAUSE_SECONDS
        if window and (seconds + added > WINDOW_SECONDS or window[-1].get("speaker") != line.get("speaker")):
            yield window
            window, seconds = [], 0.0
        window.append(line)
        seconds += added
    if window:
        yield window


def _restore_by_whisper(
    lines: list[dict], folder: Path, usual_case: Callable[[str], str], num_threads: int
) -> Iterator[dict]:
    """`lines` with `text` as Whisper writes it, several of one speaker heard at once.

    What Whisper makes too little of is heard again alone, and left to the rule if that does not help.
    """
    if not lines:
        return
    from faster_whisper import WhisperModel

    model = WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=num_threads)
    pause = np.zeros(int(PAUSE_SECONDS * SAMPLE_RATE), dtype=np.float32)
    windows = list(reversed(list(_windows(lines))))
    while windows:
        window = windows.pop()
        samples = np.concatenate([part for line in window for part in (read_audio(line["audio"]), pause)])
        segments, _ = model.transcribe(
            samples,
            language="en",
            beam_size=1,
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
        )
        hypothesis = " ".join(segment.text for segment in segments)
        words = [_transcript_words(line["text_original"]) for line in window]
        transfer = _transfer(list(chain.from_iterable(words)), _of_hypothesis(hypothesis), usual_case)
        start = 0
        for line, line_words in zip(window, words, strict=True):
            end = start + len(line_words)
            if sum(transfer.found[start:end]) >= len(line_words) / 2:
                yield {**line, "text": _without_wrong_end(transfer.text(start, end)), "text_source": "whisper"}
            elif len(window) > 1:
                windows.append([line])
            else:
                text = restore_by_rule(line["text_original"], usual_case=usual_case)
                yield {**line, "text": text, "text_source": "rule"}
            start = end
