import json

import pytest

from leapasr.decoding.trace import DraftToken, TokenRecord
from leapasr.subtitles import HOLD_SECONDS, MAX_CUE_SECONDS, Cue, Layout, cues, render
from leapasr.transcription import Segment, Transcription, Word, word_spans


def transcription(*segments, audio_seconds=4000.0):
    return Transcription(list(segments), audio_seconds, 0.1, 0.2)


def segment(start, end, text, words=()):
    trace = [TokenRecord(7, 0, "head2", 0.5, -0.1, DraftToken(3, 0.4, "head3"))]
    return Segment(start, end, text, [7], 1, None, trace, words=list(words))


def spoken(text, *, start=0.0, seconds=0.5):
    """Words of `seconds` each, one after the other."""
    return [
        Word(word, start + index * seconds, start + (index + 1) * seconds) for index, word in enumerate(text.split())
    ]


def test_word_spans():
    assert word_spans(["▁he", "llo", ",", "▁", "1", "2", "▁a"]) == [(0, 3), (3, 6), (6, 7)]
    assert word_spans(["x", "y", "Ġz"]) == [(0, 2), (2, 3)]
    assert word_spans([]) == []


def test_sentences_become_cues():
    words = spoken("Hello there. Who is it?", start=10.0)
    found = cues(transcription(segment(10, 12.5, "Hello there. Who is it?", words)))
    assert found == [Cue(10.0, 11.0, "Hello there."), Cue(11.0, 12.5 + HOLD_SECONDS, "Who is it?")]


def test_titles_do_not_end_cues():
    said = transcription(segment(0, 4, "", spoken("And Mr. J. Dashwood had. Then what? Oh! so")))
    assert [cue.text for cue in cues(said)] == ["And Mr. J. Dashwood had.", "Then what?", "Oh!", "so"]


def test_pauses_and_limits_end_cues():
    words = [*spoken("so it is"), *spoken("after all", start=4.0)]
    assert [cue.text for cue in cues(transcription(segment(0, 5, "", words)))] == ["so it is", "after all"]
    long = cues(transcription(segment(0, 40, "", spoken("antidisestablishment " * 40))))
    assert {cue.text.count("\n") for cue in long[:-1]} == {1}
    assert all(len(line) <= 42 for cue in long for line in cue.text.split("\n"))
    assert " ".join(cue.text for cue in long).split() == ["antidisestablishment"] * 40
    slow = cues(transcription(segment(0, 40, "", spoken("a " * 40, seconds=1.0))))
    assert all(cue.end - cue.start <= MAX_CUE_SECONDS + HOLD_SECONDS for cue in slow)
    assert " ".join(cue.text for cue in slow).split() == ["a"] * 40


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(9, 1), ["one two", "three", "four-five", "six"]),
        (Layout(9, 2), ["one two\nthree", "four-five\nsix"]),
        (Layout(4, 3), ["one\ntwo\nthree", "four-five\nsix"]),
        (Layout(80, 1), ["one two three four-five six"]),
    ],
)
def test_lines(layout, expected):
    said = transcription(segment(0, 2.5, "", spoken("one two three four-five six")))
    assert [cue.text for cue in cues(said, layout)] == expected


@pytest.mark.parametrize("fields", [{"max_line_width": 0}, {"max_line_count": -1}])
def test_bad_layouts(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        Layout(**fields)


def test_a_cue_ends_with_the_recording():
    assert cues(transcription(segment(0, 1, "", spoken("so it")), audio_seconds=1.1))[0].end == 1.1


def test_segments_without_word_times_are_cues():
    found = cues(transcription(segment(0, 1, "One."), segment(1, 2, ""), segment(2, 3661.5, "Two.")))
    assert [(cue.start, cue.text) for cue in found] == [(0, "One."), (2, "Two.")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("txt", "One. Two.\n"),
        ("srt", "1\n00:00:00,000 --> 00:00:01,250\nOne.\n\n2\n00:00:02,000 --> 01:01:02,000\nTwo.\n"),
        ("vtt", "WEBVTT\n\n00:00:00.000 --> 00:00:01.250\nOne.\n\n00:00:02.000 --> 01:01:02.000\nTwo.\n"),
        ("tsv", "start\tend\ttext\n0\t750\tOne.\n2000\t3661500\tTwo.\n"),
    ],
)
def test_written(name, expected):
    said = transcription(segment(0, 0.75, "One."), segment(2, 3661.5, "Two."))
    assert render(said, name, audio="a.wav") == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("txt", "\n"), ("srt", ""), ("vtt", "WEBVTT\n"), ("tsv", "start\tend\ttext\n")]
)
def test_nothing_said(name, expected):
    assert render(transcription(), name, audio="a.wav") == expected


def test_markup_is_escaped_where_it_is_markup():
    said = transcription(segment(0, 1, "a < b & c --> d"))
    assert "a &lt; b &amp; c --&gt; d" in render(said, "vtt", audio="a.wav")
    assert "a < b & c --> d" in render(said, "srt", audio="a.wav")


def test_a_clip_far_into_a_recording_keeps_its_times():
    said = transcription(segment(100, 101, "One.", spoken("One.", start=100.0)), audio_seconds=1.0)
    assert cues(said) == [Cue(100.0, 101.0, "One.")]


def test_json():
    text = render(transcription(segment(0, 1, "One.", [Word("One.", 0.12345, 0.5)])), "json", audio="a.wav")
    fields = json.loads(text)
    assert (fields["audio"], fields["text"], fields["audio_seconds"]) == ("a.wav", "One.", 4000)
    assert fields["language"] is None
    assert fields["decoder_calls"] == fields["num_tokens"] == 1
    (only,) = fields["segments"]
    assert only["words"] == [{"text": "One.", "start": 0.123, "end": 0.5}]
    assert only["trace"][0]["source"] == "head2"


def test_unknown_format():
    with pytest.raises(ValueError, match="unknown format 'doc': choose one of txt, vtt, srt, tsv, json"):
        render(transcription(), "doc", audio="a.wav")
