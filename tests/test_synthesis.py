import json
import lzma
from collections import Counter

import numpy as np
import pytest
import soundfile

from leapasr.audio import SAMPLE_RATE
from leapasr.data import synthesis
from leapasr.data.synthesis import (
    ENGLISH_SHARES,
    Utterance,
    installed_engines,
    parse_voices,
    passages,
    plan,
    read_paragraphs,
    speak,
    synthesize,
    usual_voices,
)
from leapasr.text import speakable

PROSE = (
    "It was late, and the rain fell. Mr. Brown went home; nobody saw him. Why should they? "
    "He had walked a long way, over the hill and along the river, past the mill, past the church, past the old oak "
    "tree that stood at the corner, through the gate, up the path, and so at last, wet and tired, to his own door, "
    "which was open. In 1984 it was painted."
)
TEXTS = [f"This is sentence number {word}." for word in ("one", "two", "three", "four", "five", "six")]


def needs(engine):
    return pytest.mark.skipif(engine not in installed_engines(), reason=f"the speech engine {engine} is not installed")


def test_passages_are_whole_sentences_of_bounded_length():
    found = passages([PROSE, ""] * 20, min_chars=12, max_chars=90, seed=3)
    assert all(12 <= len(text) <= 90 and speakable(text) for text in found)
    assert "Mr. Brown went home, nobody saw him." in " ".join(found)
    assert not any("1984" in text for text in found)
    assert any(text.endswith(",") for text in found)  # the long sentence, cut behind commas
    assert sum(text.startswith("He had walked a long way,") for text in found) == 20
    assert len(set(map(len, found))) > 5
    assert passages([PROSE] * 20, max_chars=90, seed=3) == passages([PROSE] * 20, max_chars=90, seed=3)
    assert passages([PROSE] * 20, max_chars=90, seed=3) != passages([PROSE] * 20, max_chars=90, seed=4)


def test_other_languages_keep_their_letters():
    prose = ["Żółta łódź odpłynęła. Es waren 12 Schüler, über alles. Où êtes-vous, mon œil ?"]
    found = passages(prose, min_chars=12, max_chars=30, language="pl")
    assert sorted(found) == ["Où êtes-vous, mon œil ?", "Żółta łódź odpłynęła."]
    assert "Ou etes-vous, mon oeil?" in passages(prose, min_chars=12, max_chars=30)


def test_another_language_has_the_voices_that_speak_it():
    utterances = plan([f"text {n}" for n in range(300)], {"espeak-ng": 1.0}, seed=1, language="de")
    assert {utterance.voice for utterance in utterances} == {"de" + each for each in synthesis.ESPEAK_VARIANTS}
    assert utterances[0].id == "syn-de-1-0000000"
    with pytest.raises(ValueError, match=r"flite, hibari cannot speak 'de': choose of pico2wave, espeak-ng"):
        plan(["text"], {"espeak-ng": 1.0, "hibari": 1.0, "flite": 1.0}, seed=1, language="de")


@pytest.mark.parametrize(("language", "engines"), [("de", {"pico2wave"}), ("pl", {"espeak-ng"})])
def test_a_language_is_spoken_by_what_serves_it_best(language, engines):
    usual = parse_voices(usual_voices(language))
    assert usual.keys() == engines
    plan(["text"], usual, seed=1, language=language)  # these engines do speak it
    assert usual_voices("en") == ENGLISH_SHARES


@pytest.mark.parametrize("engine", [pytest.param(each, marks=needs(each)) for each in ("pico2wave", "espeak-ng")])
def test_another_language_is_spoken_and_said_so(tmp_path, engine):
    texts = ["Über sieben Brücken musst du gehen.", "- Sieben dunkle Jahre überstehen."]
    with pytest.raises(ValueError, match="the text is too short"):
        synthesize(texts, tmp_path, hours=1, engines={engine: 1.0}, language="de", num_workers=1)
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [(line["text"], line["language"]) for line in lines] == [(text, "de") for text in texts]


def test_paragraphs_from_plain_and_compressed_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n two \n", encoding="utf-8")
    with lzma.open(tmp_path / "a.txt.xz", "wt") as file:
        file.write("one\n two \n")
    assert list(read_paragraphs(tmp_path / "a.txt")) == list(read_paragraphs(tmp_path / "a.txt.xz")) == ["one", "two"]
    with pytest.raises(FileNotFoundError, match="text file not found"):
        list(read_paragraphs(tmp_path / "b.txt"))


def test_a_plan_gives_every_text_a_voice_by_share():
    texts = [f"text {n}" for n in range(2000)]
    engines = {"espeak-ng": 3.0, "flite": 1.0}
    utterances = plan(texts, engines, seed=1)
    assert [utterance.text for utterance in utterances] == texts
    assert len({utterance.id for utterance in utterances}) == 2000
    assert 0.71 < Counter(utterance.engine for utterance in utterances)["espeak-ng"] / 2000 < 0.79
    assert {utterance.voice for utterance in utterances} == {*synthesis.ESPEAK_VOICES, *synthesis.FLITE_VOICES}
    assert all(0.85 <= utterance.speed <= 1.25 for utterance in utterances)
    assert plan(texts[:10], engines, seed=1) == utterances[:10]  # an utterance depends on its index and the seed alone
    assert plan(texts, engines, seed=2) != utterances


@pytest.mark.parametrize(
    ("engine", "voice"),
    [
        pytest.param(engine, voice, marks=needs(engine))
        for engine, voice in (("espeak-ng", "en-gb"), ("flite", "slt"), ("hibari", "heart"), ("pico2wave", "en-GB"))
    ],
)
def test_every_engine_speaks(engine, voice):
    text = "The cat sat on the mat, and the dog slept."
    normal, fast = (speak(Utterance("u", text, engine, voice, speed, 1)) for speed in (1.0, 1.25))
    assert normal.dtype == np.float32
    assert 1.5 * SAMPLE_RATE < len(normal) < 6 * SAMPLE_RATE
    assert 0.01 < np.sqrt(np.mean(normal**2)) < 1
    assert 0.65 * len(normal) < len(fast) < 0.95 * len(normal)


def test_an_engine_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(synthesis, "installed_engines", lambda: ["flite"])
    with pytest.raises(ValueError, match=r"engines not installed: \['hibari'\]; found: \['flite'\]"):
        synthesize(TEXTS, tmp_path, hours=0.001, engines={"hibari": 1.0, "flite": 1.0})
    with pytest.raises(RuntimeError, match="unknown speech engine 'parrot'"):
        speak(Utterance("u", "hello", "parrot", "polly", 1.0, 0))


@needs("espeak-ng")
def test_synthesis_writes_a_manifest_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(synthesis, "SHARD", 2)
    options = {"engines": {"espeak-ng": 1.0}, "seed": 4, "num_workers": 1}
    heard = []
    with pytest.raises(ValueError, match=r"only 0\.00 of 5 hours could be spoken: the text is too short"):
        synthesize(TEXTS[:3], tmp_path, hours=5, progress=heard.append, **options)
    manifest = tmp_path / "manifest.jsonl"
    first = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [line["text"] for line in first] == TEXTS[:3]
    assert heard == sorted(heard)
    assert heard[-1] == pytest.approx(sum(line["duration"] for line in first))
    for line in first:
        info = soundfile.info(tmp_path / line["audio"])
        assert (info.samplerate, info.channels) == (SAMPLE_RATE, 1)
        assert info.duration == pytest.approx(line["duration"], abs=0.001)
        assert (line["use"], line["corpus"], line["speaker"][:10]) == ("train", "synthetic", "espeak-ng-")
    with pytest.raises(ValueError, match="the text is too short"):
        synthesize(TEXTS, tmp_path, hours=5, **options)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert lines[:3] == first
    assert sorted(line["text"] for line in lines) == sorted(TEXTS)  # none twice
    assert synthesize(TEXTS, tmp_path, hours=heard[-1] / 3600 / 2, **options) == manifest  # there already
    assert len(manifest.read_text().splitlines()) == 6
    manifest.write_text(manifest.read_text()[:-30])  # killed while it wrote its last line
    with pytest.raises(ValueError, match="the text is too short"):
        synthesize(TEXTS, tmp_path, hours=5, **options)
    assert [json.loads(line) for line in manifest.read_text().splitlines()] == lines


def test_voices_and_their_shares():
    assert parse_voices("hibari:0.7,espeak-ng:0.2,flite") == {"hibari": 0.7, "espeak-ng": 0.2, "flite": 1.0}
    with pytest.raises(ValueError, match="share of 'flite' must be a number, got 'much'"):
        parse_voices("flite:much")
    for share in ("0", "-1"):
        with pytest.raises(ValueError, match=f"share of 'flite' must be positive, got {share}"):
            parse_voices(f"flite:{share}")
