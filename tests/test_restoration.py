import json
import sys
import types

import numpy as np
import pytest
import soundfile

from leapasr.data.restoration import BookIndex, restore_by_rule, restore_from_hypothesis, restore_manifest
from leapasr.text import plain

PROSE = [
    "CHAPTER ONE begins. It was a dark and stormy night, and Mr. Brown - who hated rain - stayed at home.",
    '"Will you not come in?" said Mrs. O\'Brien; "I\'ve made the drawing-room warm for you to-day."',
    "HE WENT on without a word. The doctor had told him so, in the year 1862, and it was VERY well known in London.",
    "The white snow lay on the wild fields, and the white snow lay on the wild woods, as far as he could see.",
    "Dr. Smith, the eldest of the three brothers, had never been seen without his hat. Nobody knew why.",
    "They went out together, they went far, and all of them were very glad of it.",
]


@pytest.fixture(scope="module")
def books():
    return BookIndex(PROSE)


@pytest.mark.parametrize(
    ("transcript", "expected"),
    [
        ("IT WAS A DARK AND STORMY NIGHT AND MISTER BROWN WHO HATED RAIN STAYED AT HOME",
         "It was a dark and stormy night, and Mr. Brown, who hated rain, stayed at home."),
        ("WILL YOU NOT COME IN SAID MISSUS O'BRIEN I'VE MADE THE DRAWING ROOM WARM FOR YOU TODAY",
         "Will you not come in? said Mrs. O'Brien, I've made the drawing-room warm for you today."),
        ("HE WENT ON WITHOUT A WORD THE DOCTOR HAD TOLD HIM SO",
         "He went on without a word. The doctor had told him so,"),
        ("AND IT WAS VERY WELL KNOWN IN LONDON", "And it was very well known in London."),
        ("LAY ON THE WILD FIELDS AND THE", "Lay on the wild fields, and the"),
        ("THE WHITE SNOW LAY ON THE WILD WOODS AS FAR AS", "The white snow lay on the wild woods, as far as"),
        ("DOCTOR SMITH THE ELDEST OF THE THREE BROTHERS", "Dr. Smith, the eldest of the three brothers,"),
        ("SEEN WITHOUT HIS HAT NOBODY KNEW WHY", "Seen without his hat. Nobody knew why."),
    ],
)  # fmt: skip
def test_a_book_gives_case_and_punctuation(books, transcript, expected):
    assert books.restore(transcript) == expected


def test_words_that_differ_stay_the_transcripts(books):
    restored = books.restore("IT WAS A DARK AND GLOOMY NIGHT AND MISTER JONES WHO HATED RAIN STAYED RIGHT AT HOME")
    assert restored == "It was a dark and gloomy night, and Mr. Jones, who hated rain, stayed right at home."
    restored = books.restore("THE DOCTOR HAD TOLD HIM SO IN THE YEAR EIGHTEEN SIXTY TWO AND IT WAS VERY WELL KNOWN")
    assert restored == "The doctor had told him so, in the year eighteen sixty two, and it was very well known"


@pytest.mark.parametrize(
    "transcript",
    [
        "",
        "DARK AND STORMY",
        "NOTHING OF THE KIND WAS EVER WRITTEN IN A BOOK",
        "IT WAS A DARK AND STORMY NIGHT BUT ALL THE REST OF THIS IS FROM SOME OTHER BOOK THAT NOBODY HAS",
    ],
)
def test_what_the_books_do_not_have_is_none(books, transcript):
    assert books.restore(transcript) is None


def test_usual_case(books):
    words = ["LONDON", "NIGHT", "VERY", "I", "UNKNOWN"]
    assert [books.usual_case(word) for word in words] == ["London", "night", "very", "I", "unknown"]


def test_too_little_prose_is_an_error():
    with pytest.raises(ValueError, match="has 2 words: at least 5"):
        BookIndex(["Two words."])


@pytest.mark.parametrize(
    ("transcript", "hypothesis", "expected"),
    [
        ("HELLO THERE HOW ARE YOU", "Hello there! How are you?", "Hello there! How are you?"),
        ("I THINK SALLY IS RIGHT", "I think Selly is right.", "I think Sally is right."),
        ("HE LEFT THEN SHE CAME", "He left. Since she came.", "He left. Then she came."),
        ("I'M SURE THAT I'LL GO", "", "I'm sure that I'll go"),
        ("THE FOOT PRINTS WERE OLD", "The footprints were old.", "The foot prints were old."),
        ("THE FOOTPRINTS WERE OLD", "The foot-prints were old", "The footprints were old"),
        ("IT GOES ON AND ON", "It goes on... and on...", "It goes on and on"),
        ("twenty two cats", "22 cats.", "Twenty two cats."),
        ("THE BOYS' HATS", "The boys' hats", "The boys' hats"),
        ("", "Nothing was said.", ""),
    ],
)
def test_a_hypothesis_gives_case_and_punctuation(transcript, hypothesis, expected):
    assert restore_from_hypothesis(transcript, hypothesis) == expected


def test_words_always_stay():
    rng = np.random.default_rng(0)
    vocabulary = ["A", "I'M", "FOOT", "PRINT", "FOOTPRINT", "O", "CLOCK", "SO", "THE", "BOY'S"]
    for _ in range(200):
        transcript = " ".join(rng.choice(vocabulary, rng.integers(1, 12)))
        words = [word.capitalize() if rng.random() < 0.3 else word.lower() for word in rng.choice(vocabulary, 8)]
        hypothesis = "".join(word + rng.choice([" ", ", ", ". ", "-", "? ", " - "]) for word in words)
        assert plain(restore_from_hypothesis(transcript, hypothesis)) == plain(transcript)


@pytest.mark.parametrize(
    ("transcript", "expected"),
    [
        ("RUBOUT T G J W B SEVENTY NINE FIFTY NINE", "Rubout T G J W B seventy nine fifty nine."),
        ("FIFTY EIGHT OH NINE AND A HALF", "Fifty eight oh nine and a half."),
        ("FIFTY SEVEN FOURTEEN A", "Fifty seven fourteen A."),
        ("MAY TWELFTH", "May twelfth."),
        ("ON THE THIRD OF MARCH I'M HERE", "On the third of March I'm here."),
        ("zero", "Zero."),
        ("", ""),
    ],
)
def test_rule(transcript, expected):
    assert restore_by_rule(transcript) == expected


def write_corpus(folder, texts):
    folder.mkdir()
    soundfile.write(folder / "a.wav", np.zeros(16_000), 16_000)
    lines = [
        {"id": f"u{n}", "audio": "a.wav", "duration": 1.0, "text": text, "speaker": "s", "use": use}
        for n, (text, use) in enumerate(texts)
    ]
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_manifest_by_book_and_rule(tmp_path):
    prose = tmp_path / "prose.txt"
    prose.write_text("\n".join(PROSE))
    manifest = write_corpus(
        tmp_path / "corpus",
        [("SEEN WITHOUT HIS HAT NOBODY KNEW WHY", "train"), ("NOT IN LONDON", "train"), ("NOBODY", "test"),
         ('he said: "So far, so good";', "train")],
    )  # fmt: skip
    sources = restore_manifest(manifest, tmp_path / "out" / "restored.jsonl", prose=prose)
    lines = read_lines(tmp_path / "out" / "restored.jsonl")
    assert [(line["id"], line["text_source"], line["text"]) for line in lines] == [
        ("u0", "book", "Seen without his hat. Nobody knew why."),
        ("u1", "rule", "Not in London."),
        ("u3", "transcript", "He said, So far, so good,"),
    ]
    assert sources == {"book": 1, "rule": 1, "transcript": 1}
    assert lines[0]["text_original"] == "SEEN WITHOUT HIS HAT NOBODY KNEW WHY"
    assert {line["audio"] for line in lines} == {str((tmp_path / "corpus" / "a.wav").resolve())}
    with pytest.raises(ValueError, match="no line with use 'dev'"):
        restore_manifest(manifest, tmp_path / "out" / "none.jsonl", use="dev")


def fake_whisper(monkeypatch, hypotheses, *, fail_after=None):
    """A stand-in for the faster_whisper package, which gives one hypothesis after the other."""
    heard = []

    class WhisperModel:
        def __init__(self, folder, **options):
            pass

        def transcribe(self, samples, **options):
            if len(heard) == fail_after:
                raise KeyboardInterrupt
            heard.append(len(samples))
            return [types.SimpleNamespace(text=hypotheses[len(heard) - 1])], None

    monkeypatch.setitem(sys.modules, "faster_whisper", types.SimpleNamespace(WhisperModel=WhisperModel))
    return heard


def test_whisper_hears_several_utterances_at_once_and_they_are_split_again(tmp_path, monkeypatch):
    texts = ["I SAW SALLY", "WHO SAW ME BUT", "QUITE UNLIKE IT"]
    manifest = write_corpus(tmp_path / "corpus", [(text, "train") for text in texts])
    heard = fake_whisper(monkeypatch, ["I saw Selly. Who saw me? But. Noise.", "No."])
    sources = restore_manifest(manifest, tmp_path / "restored.jsonl", whisper=tmp_path)
    lines = read_lines(tmp_path / "restored.jsonl")
    assert [(line["text_source"], line["text"]) for line in lines] == [
        ("whisper", "I saw Sally."),
        ("whisper", "Who saw me? But"),
        ("rule", "Quite unlike it."),
    ]
    assert sources == {"whisper": 2, "rule": 1}
    assert heard == [3 * (16_000 + 1_600), 16_000 + 1_600]  # what was not understood is heard again alone


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    texts = [f"UTTERANCE {name}" for name in ("ONE", "TWO", "THREE")]
    manifest = write_corpus(tmp_path / "corpus", [(text, "train") for text in texts])
    lines = [line | {"duration": 20.0} for line in read_lines(manifest)]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "restored.jsonl"
    restore_manifest(manifest, output)
    assert [line["text_source"] for line in read_lines(output)] == ["rule"] * 3
    fake_whisper(monkeypatch, ["Utterance one!"], fail_after=1)
    with pytest.raises(KeyboardInterrupt):
        restore_manifest(manifest, output, whisper=tmp_path)
    output.write_text(output.read_text() + '{"id": "torn')
    heard = fake_whisper(monkeypatch, ["Utterance two?", "Utterance three."])
    restore_manifest(manifest, output, whisper=tmp_path)
    assert [line["text"] for line in read_lines(output)] == ["Utterance one!", "Utterance two?", "Utterance three."]
    assert len(heard) == 2
