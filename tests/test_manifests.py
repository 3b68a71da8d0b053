import gzip
import json
import re

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, RecordingSet, SupervisionSegment, SupervisionSet

from leapasr.audio import SAMPLE_RATE
from leapasr.data.manifests import read_manifest, spread


def write_tone(path, *, seconds=1.0, rate=SAMPLE_RATE, num_channels=1):
    """A file whose first channel starts at amplitude 0.1 and rises by 0.1 each half second (0.5 s steps)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = 0.1 * (1 + np.arange(int(seconds * rate)) // (rate // 2))
    soundfile.write(path, np.stack([steps] + [np.zeros_like(steps)] * (num_channels - 1), axis=1), rate)
    return path


def own_line(id, /, **changes):
    line = {"id": id, "audio": f"audio/{id}.wav", "duration": 1.0, "text": f"text of {id}", "speaker": "s"}
    line |= {"language": "en", "use": "train", "corpus": "toy"} | changes
    return {name: value for name, value in line.items() if value is not None}


def write_lines(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def loaded(cut):
    audio = cut.load_audio()
    assert audio.dtype == np.float32
    assert audio.shape == (1, round(cut.duration * SAMPLE_RATE))
    assert cut.sampling_rate == SAMPLE_RATE
    return audio[0]


def test_own_manifest(tmp_path):
    for name in "abc":
        write_tone(tmp_path / f"audio/{name}.wav")
    manifest = write_lines(tmp_path / "m.jsonl", [own_line("a"), own_line("b", use="test"), "", own_line("c")])
    result = read_manifest(manifest)
    assert result.problems == []
    assert [cut.id for cut in result.cuts] == ["a", "b", "c"]
    supervision = result.cuts["b"].supervisions[0]
    assert (supervision.text, supervision.speaker, supervision.language) == ("text of b", "s", "en")
    assert supervision.custom == {"use": "test", "corpus": "toy"}
    assert loaded(result.cuts["a"])[[100, -100]] == pytest.approx([0.1, 0.2], abs=1e-3)


def test_only_the_first_audio_file_is_opened(tmp_path):
    write_tone(tmp_path / "audio/a.wav")
    (tmp_path / "audio/b.wav").write_bytes(b"not audio at all")
    manifest = write_lines(tmp_path / "m.jsonl", [own_line("a"), own_line("b")])
    assert len(read_manifest(manifest).cuts) == 2


@pytest.mark.parametrize("stated", [None, 8_000])
def test_own_manifest_of_another_rate_is_resampled(tmp_path, stated):
    for name in "ab":
        write_tone(tmp_path / f"audio/{name}.wav", rate=8_000)
    manifest = write_lines(tmp_path / "m.jsonl", [own_line(name, sampling_rate=stated) for name in "ab"])
    for cut in read_manifest(manifest).cuts:
        assert np.median(loaded(cut)[:4_000]) == pytest.approx(0.1, abs=0.01)


def test_a_line_that_states_another_rate_than_the_first_file(tmp_path):
    write_tone(tmp_path / "audio/a.wav")
    write_tone(tmp_path / "audio/b.wav", rate=8_000)
    lines = [own_line("a", sampling_rate=SAMPLE_RATE), own_line("b", sampling_rate=8_000)]
    for cut in read_manifest(write_lines(tmp_path / "m.jsonl", lines)).cuts:
        assert loaded(cut)[[100, -100]] == pytest.approx([0.1, 0.2], abs=1e-2)


@pytest.mark.parametrize("suffix", ["ogg", "flac"])
def test_compressed_audio_loads(tmp_path, suffix):
    write_tone(tmp_path / f"audio/a.{suffix}")
    manifest = write_lines(tmp_path / "m.jsonl", [own_line("a", audio=f"audio/a.{suffix}")])
    assert len(loaded(read_manifest(manifest).cuts[0])) == SAMPLE_RATE


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"id": "x", ', "not JSON"),
        ("[1, 2]", "not a JSON object but list"),
        (own_line("x", id=None), "no id"),
        (own_line("x", audio=None), "no audio"),
        (own_line("x", text=None), "no text"),
        (own_line("x", duration=None, text=None), "no duration and no text"),
        (own_line("x", text=5), "text must be a string, got 5"),
        (own_line("x", audio=5), "audio must be a string, got 5"),
        (own_line("x", duration=0), "more than 0 seconds, got 0"),
        (own_line("x", duration=-1.5), "more than 0 seconds, got -1.5"),
        (own_line("x", duration="1"), "duration must be a number, got '1'"),
        (own_line("x", duration=True), "duration must be a number, got True"),
        ('{"id": "x", "audio": "audio/a.wav", "text": "", "duration": NaN}', "must be a number, got nan"),
        (own_line("x", audio="audio/none.wav"), "audio file not found: .*none.wav"),
        (own_line("x", audio="audio"), "audio file not found: .*audio"),
    ],
)
@pytest.mark.parametrize("position", [0, 1])
def test_a_bad_line_is_reported_and_the_rest_goes_on(tmp_path, line, problem, position):
    write_tone(tmp_path / "audio/a.wav")
    lines = [own_line("a")]
    lines.insert(position, line)
    result = read_manifest(write_lines(tmp_path / "m.jsonl", lines))
    assert [cut.id for cut in result.cuts] == ["a"]
    assert len(result.problems) == 1
    assert re.search(rf"^m.jsonl:{position + 1}: .*{problem}", result.problems[0])


def test_a_repeated_id_is_reported(tmp_path):
    write_tone(tmp_path / "audio/a.wav")
    result = read_manifest(write_lines(tmp_path / "m.jsonl", [own_line("a"), own_line("a")]))
    assert len(result.cuts) == 1
    assert result.problems == ["m.jsonl: the id 'a' is there more than once; the first is kept"]


def test_use_and_limit(tmp_path):
    write_tone(tmp_path / "audio/a.wav")
    lines = [own_line(f"{n:02}", audio="audio/a.wav", use="train" if n % 2 else "dev") for n in range(20)]
    manifest = write_lines(tmp_path / "m.jsonl", lines)
    assert [cut.id for cut in read_manifest(manifest, use="dev", limit=5).cuts] == ["00", "04", "08", "12", "16"]
    assert len(read_manifest(manifest, use="train", limit=100).cuts) == 10
    with pytest.raises(ValueError, match="no utterance with use 'test'; found: dev, train"):
        read_manifest(manifest, use="test")
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        read_manifest(manifest, limit=0)


def test_a_line_without_use_is_not_taken_for_one(tmp_path):
    write_tone(tmp_path / "audio/a.wav")
    with pytest.raises(ValueError, match="no utterance with use 'train'; found: None"):
        read_manifest(write_lines(tmp_path / "m.jsonl", [own_line("a", use=None)]), use="train")


@pytest.mark.parametrize(("num_items", "limit"), [(10, 3), (10, 10), (10, 11), (1, 1), (7, None)])
def test_spread_is_even(num_items, limit):
    chosen = spread(list(range(num_items)), limit)
    assert len(chosen) == min(num_items, limit or num_items)
    assert chosen == sorted(set(chosen))
    gaps = np.diff(chosen)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_missing_empty_and_useless_manifests_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"manifest not found: .*none.jsonl"):
        read_manifest(tmp_path / "none.jsonl")
    (tmp_path / "m.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"m.jsonl is empty"):
        read_manifest(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl").write_bytes(b"\xff\xfe\x00\x80" * 10)
    with pytest.raises(ValueError, match="cannot be read as text"):
        read_manifest(tmp_path / "m.jsonl")
    write_lines(tmp_path / "m.jsonl", ["nonsense", own_line("a")])
    with pytest.raises(ValueError, match=r"no usable utterance .2 bad lines: m.jsonl:1: not JSON.*; m.jsonl:2: audio"):
        read_manifest(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="folder without a manifest"):
        read_manifest(tmp_path)


def test_nemo(tmp_path):
    write_tone(tmp_path / "a.wav", seconds=2, rate=8_000)
    good = {"audio_filepath": "a.wav", "duration": 0.5, "text": "hello", "offset": 1.0, "speaker": "s", "lang": "en"}
    lines = [good, good | {"offset": 9}, good | {"duration": 0}, {"audio_filepath": "a.wav"}]
    lines += [good | {"duration": 1.5}, good | {"offset": None}]
    result = read_manifest(write_lines(tmp_path / "m.json", lines))
    first, second = result.cuts
    assert (first.supervisions[0].text, first.supervisions[0].speaker) == ("hello", "s")
    assert np.median(loaded(first)) == pytest.approx(0.3, abs=0.01)
    assert np.median(loaded(second)) == pytest.approx(0.1, abs=0.01)
    assert [problem.split(":")[1] for problem in result.problems] == ["2", "3", "4", "5"]
    assert "9.00 to 9.50 s is outside the file's 2.00 s" in result.problems[0]


def lhotse_sets(folder):
    recordings = [Recording.from_file(write_tone(folder / f"{name}.wav", seconds=2, rate=8_000)) for name in "ab"]
    supervisions = [
        SupervisionSegment("u1", "a", start=0.5, duration=0.5, text="one", custom={"use": "train"}),
        SupervisionSegment("u2", "a", start=1.0, duration=1.0, text="two"),
        SupervisionSegment("u3", "b", start=0.0, duration=2.0, text="three", custom={"use": "train"}),
    ]
    return recordings, supervisions


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_lhotse_cuts(tmp_path, suffix):
    recordings, supervisions = lhotse_sets(tmp_path)
    cuts = CutSet.from_manifests(
        RecordingSet.from_recordings(recordings), SupervisionSet.from_segments(supervisions)
    ).trim_to_supervisions()
    path = tmp_path / f"cuts.{suffix}"
    cuts.to_file(path)
    result = read_manifest(path)
    assert result.problems == []
    assert [cut.supervisions[0].text for cut in result.cuts] == ["one", "two", "three"]
    assert np.median(loaded(result.cuts[0])) == pytest.approx(0.2, abs=0.01)
    assert len(read_manifest(path, use="train").cuts) == 2


def test_bad_lines_of_lhotse_cuts(tmp_path):
    recordings, supervisions = lhotse_sets(tmp_path)
    cuts = CutSet.from_manifests(RecordingSet.from_recordings(recordings), SupervisionSet.from_segments(supervisions))
    good, other = [cut.to_dict() for cut in cuts]
    no_start = {name: value for name, value in good.items() if name != "start"}
    gone = json.loads(json.dumps(other).replace("b.wav", "gone.wav"))
    lines = [good, "{", no_start | {"id": "x"}, gone, good | {"id": "y", "supervisions": []}]
    lines += [good | {"id": "z", "duration": 0}, supervisions[0].to_dict()]
    result = read_manifest(write_lines(tmp_path / "cuts.jsonl", lines))
    assert [cut.id for cut in result.cuts] == [good["id"]]
    expected = ["2: not JSON", "3: ", "4: audio file not found", "5: no text", "6: duration", "7: "]
    assert len(result.problems) == len(expected)
    for problem, start in zip(result.problems, expected, strict=True):
        assert problem.startswith(f"cuts.jsonl:{start}")


def test_lhotse_folder(tmp_path):
    recordings, supervisions = lhotse_sets(tmp_path)
    folder = tmp_path / "manifests"
    folder.mkdir()
    RecordingSet.from_recordings(recordings).to_file(folder / "toy_recordings_train.jsonl.gz")
    lines = [supervision.to_dict() for supervision in supervisions]
    lines += [lines[0] | {"id": "u4", "recording_id": "none"}, lines[0] | {"id": "u5", "duration": 0}, {"id": "u6"}]
    write_lines(folder / "toy_supervisions_train.jsonl", lines)
    result = read_manifest(folder)
    assert [cut.id for cut in result.cuts] == ["u1", "u2", "u3"]
    assert np.median(loaded(result.cuts["u1"])) == pytest.approx(0.2, abs=0.01)
    assert [problem.split(":")[1] for problem in result.problems] == ["4", "5", "6"]
    with pytest.raises(ValueError, match="give the folder that has both"):
        read_manifest(folder / "toy_supervisions_train.jsonl")
    write_lines(folder / "toy_recordings_dev.jsonl", ["{}"])
    with pytest.raises(ValueError, match="several recordings manifests"):
        read_manifest(folder)


def test_kaldi_folder_without_segments(tmp_path):
    write_tone(tmp_path / "a.wav", seconds=1.5, rate=8_000, num_channels=2)
    (tmp_path / "wav.scp").write_text(f"a {tmp_path}/a.wav\nb gone.wav\nc sox x.wav -t wav - |\nd\n")
    (tmp_path / "text").write_text("a HELLO YOU\nb GONE\nc PIPE\ne NONE\n")
    (tmp_path / "utt2spk").write_text("a speaker\n")
    result = read_manifest(tmp_path)
    (cut,) = result.cuts
    assert (cut.supervisions[0].text, cut.supervisions[0].speaker, cut.duration) == ("HELLO YOU", "speaker", 1.5)
    assert np.median(loaded(cut)[:7_000]) == pytest.approx(0.1, abs=0.01)
    starts = [
        "wav.scp:4: 2 fields",
        "text:2: audio file not found",
        "text:3: wav.scp gives a command",
        "text:4: no rec",
    ]
    assert len(result.problems) == len(starts)
    for problem, start in zip(result.problems, starts, strict=True):
        assert problem.startswith(start)


def test_kaldi_folder_with_segments(tmp_path):
    write_tone(tmp_path / "a.wav", seconds=2)
    (tmp_path / "wav.scp").write_text("a a.wav\n")
    (tmp_path / "segments").write_text("u1 a 0.5 1.0\nu2 a 1.5 -1\nu3 a 1.0 1.0\nu4 a one 2\n")
    (tmp_path / "text").write_text("u1 ONE\nu2 TWO\nu3 THREE\nu4 FOUR\nu5 FIVE\n")
    result = read_manifest(tmp_path)
    assert [cut.id for cut in result.cuts] == ["u1", "u2"]
    assert [np.median(loaded(cut)) for cut in result.cuts] == pytest.approx([0.2, 0.4], abs=0.01)
    assert [problem.split(":")[:2] for problem in result.problems] == [["text", "3"], ["text", "4"], ["text", "5"]]
    (tmp_path / "text").unlink()
    with pytest.raises(ValueError, match="no text"):
        read_manifest(tmp_path)


def test_gzipped_own_manifest(tmp_path):
    write_tone(tmp_path / "audio/a.wav")
    with gzip.open(tmp_path / "m.jsonl.gz", "wt") as out:
        out.write(json.dumps(own_line("a")) + "\n")
    assert len(read_manifest(tmp_path / "m.jsonl.gz").cuts) == 1
