import io
import tracemalloc

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from leapasr.audio import (
    SAMPLE_RATE,
    AudioError,
    cut_at_silences,
    declared_seconds,
    is_silent,
    read_audio,
    read_blocks,
    resample,
)


def tone(seconds: float, *, rate: int, frequency: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def encode(path, samples: np.ndarray, *, rate: int, codec: str, layout: str = "mono") -> None:
    """Write mono `samples` to each channel of `path` with FFmpeg's encoder `codec`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        num_channels = stream.layout.nb_channels
        frame = av.AudioFrame.from_ndarray(np.tile(samples, (num_channels, 1)), format="fltp", layout=layout)
        frame.sample_rate = rate
        resampler = av.AudioResampler(format=stream.format.name, layout=layout, rate=rate)
        for part in [*resampler.resample(frame), None]:
            container.mux(stream.encode(part))


def assert_same_tone(samples: np.ndarray, *, seconds: float, amplitude: float = 0.5) -> None:
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert abs(len(samples) / SAMPLE_RATE - seconds) < 0.1
    middle = samples[SAMPLE_RATE // 4 : SAMPLE_RATE // 4 + SAMPLE_RATE // 2]
    phases = 2 * np.pi * 440 * np.arange(len(middle)) / SAMPLE_RATE
    basis = np.stack([np.sin(phases), np.cos(phases)], axis=1)
    weights, *_ = np.linalg.lstsq(basis, middle, rcond=None)
    assert abs(np.hypot(*weights) - amplitude) < 0.03
    assert np.abs(basis @ weights - middle).max() < 0.05


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_wav_of_any_rate_and_depth(tmp_path, rate, subtype):
    soundfile.write(tmp_path / "a.wav", tone(1, rate=rate), rate, subtype=subtype)
    samples = read_audio(tmp_path / "a.wav")
    assert_same_tone(samples, seconds=1)
    assert abs(len(samples) - SAMPLE_RATE) <= 1


@pytest.mark.parametrize("suffix", ["wav", "flac"])
@pytest.mark.parametrize("num_channels", [2, 6])
def test_channels_are_averaged(tmp_path, suffix, num_channels):
    channels = np.zeros((48_000, num_channels), dtype=np.float32)
    channels[:, 0] = 1.5 * tone(1, rate=48_000)
    channels[:, 1] = 0.5 * tone(1, rate=48_000)
    soundfile.write(tmp_path / f"a.{suffix}", channels, 48_000)
    assert_same_tone(read_audio(tmp_path / f"a.{suffix}") * num_channels / 2, seconds=1)


@pytest.mark.parametrize(
    ("name", "codec", "rate", "layout"),
    [
        ("a.mp3", "libmp3lame", 44_100, "stereo"),
        ("a.ogg", "libopus", 48_000, "mono"),
        ("a.webm", "libopus", 48_000, "stereo"),
        ("a.m4a", "aac", 44_100, "stereo"),
        ("a.mp4", "aac", 48_000, "5.1"),
        ("a.flac", "flac", 16_000, "mono"),
        ("a.mka", "pcm_s16le", 8_000, "mono"),
    ],
)
def test_compressed_containers(tmp_path, name, codec, rate, layout):
    encode(tmp_path / name, tone(2, rate=rate), rate=rate, codec=codec, layout=layout)
    amplitude = 0.5 * 5 / 6 if layout == "5.1" else 0.5  # the sixth channel holds low frequencies only
    assert_same_tone(read_audio(tmp_path / name), seconds=2, amplitude=amplitude)


def test_path_string_bytes_and_file_objects_give_the_same(tmp_path):
    path = tmp_path / "odd: name %d.flac"
    soundfile.write(path, tone(1, rate=22_050), 22_050)
    expected = read_audio(path)
    np.testing.assert_array_equal(read_audio(str(path)), expected)
    np.testing.assert_array_equal(read_audio(path.read_bytes()), expected)
    np.testing.assert_array_equal(read_audio(io.BytesIO(path.read_bytes())), expected)
    with path.open("rb") as file:
        np.testing.assert_array_equal(read_audio(file), expected)


def test_streamed_resampling_equals_resampling_at_once(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 7 * 44_100).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 44_100, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), resample(samples, 44_100), atol=1e-4)


def test_samples_that_are_not_numbers_become_zero(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([0.5, np.nan, np.inf, -np.inf, 0.25]), SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav"), np.float32([0.5, 0, 0, 0, 0.25]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"This is not audio.\n" * 200, "a.wav"),
        (bytes(5_000), "a.wav"),
        (b"RIFF\xff\xff\x00\x00WAVEfmt \x10\x00\x00\x00", "a.wav"),
        (np.random.default_rng(1).bytes(20_000), "a.wav"),
    ],
)
def test_what_is_no_audio_is_an_audio_error(tmp_path, content, message):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(AudioError, match=message):
        read_audio(tmp_path / "a.wav")
    with pytest.raises(AudioError):
        read_audio(content)
    with pytest.raises(AudioError):
        read_audio(io.BytesIO(content))


def test_missing_file_directory_and_no_samples_are_audio_errors(tmp_path):
    with pytest.raises(AudioError, match=r"not found.*missing.wav"):
        read_audio(tmp_path / "missing.wav")
    with pytest.raises(AudioError, match="is a directory"):
        read_audio(tmp_path)
    with pytest.raises(AudioError, match="not found"):
        read_audio("http://localhost/a.wav")
    soundfile.write(tmp_path / "a.wav", np.zeros(0), SAMPLE_RATE)
    with pytest.raises(AudioError, match=r"a.wav"):
        read_audio(tmp_path / "a.wav")


def test_video_without_sound_is_an_audio_error(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), dtype=np.uint8), format="rgb24")
        for part in [frame, None]:
            container.mux(stream.encode(part))
    with pytest.raises(AudioError, match="no audio stream, only video"):
        read_audio(tmp_path / "a.mp4")


def test_a_playlist_does_not_open_other_files(tmp_path):
    soundfile.write(tmp_path / "secret.wav", tone(1, rate=16_000), 16_000)
    content = f"ffconcat version 1.0\nfile {tmp_path / 'secret.wav'}\n".encode()
    with pytest.raises(AudioError):
        read_audio(content)


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [("a.flac", "flac", 16_000), ("a.ogg", "libopus", 48_000), ("a.m4a", "aac", 16_000), ("a.webm", "libopus", 48_000)],
)
def test_damage_in_the_middle_warns_and_keeps_what_there_is(tmp_path, name, codec, rate):
    noise = np.random.default_rng(2).uniform(-0.5, 0.5, 10 * rate).astype(np.float32)
    encode(tmp_path / name, noise, rate=rate, codec=codec)
    content = bytearray((tmp_path / name).read_bytes())
    middle, length = len(content) // 2, len(content) // 10
    content[middle : middle + length] = bytes(length)
    with pytest.warns(UserWarning, match=r"audio of .* is damaged: .* at [345]\.\d\d s"):
        samples = read_audio(bytes(content))
    assert 4 * SAMPLE_RATE < len(samples) < 9.5 * SAMPLE_RATE


@pytest.mark.parametrize(("name", "codec"), [("a.flac", "flac"), ("a.mp3", "libmp3lame")])
def test_truncated_file_warns_and_gives_what_there_is(tmp_path, name, codec):
    encode(tmp_path / name, tone(10, rate=16_000), rate=16_000, codec=codec)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=rf"{name} is damaged: .*stopped at [3456]\.\d\d s.* 10\.\d\d s long"):
        samples = read_audio(tmp_path / name)
    assert 3 * SAMPLE_RATE < len(samples) < 7 * SAMPLE_RATE


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "codec"), [("a.flac", "flac"), ("a.mp3", "libmp3lame"), ("a.m4a", "aac"), ("a.wav", "pcm_s16le")]
)
def test_undamaged_files_do_not_warn(tmp_path, name, codec):
    encode(tmp_path / name, tone(3, rate=16_000), rate=16_000, codec=codec)
    assert_same_tone(read_audio(tmp_path / name), seconds=3)


def test_blocks_are_read_as_they_are_asked_for(tmp_path):
    rate = 44_100
    encode(tmp_path / "a.flac", tone(30, rate=rate), rate=rate, codec="flac")
    expected, blocks = read_audio(tmp_path / "a.flac"), read_blocks(tmp_path / "a.flac")
    tracemalloc.start()
    first = next(blocks)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < expected.nbytes / 4
    rest = list(blocks)
    assert len(rest) >= 28
    assert np.array_equal(np.concatenate([first, *rest]), expected)


def test_seconds_by_the_header(tmp_path):
    encode(tmp_path / "a.flac", tone(3, rate=16_000), rate=16_000, codec="flac")
    (tmp_path / "b.txt").write_text("no audio")
    assert declared_seconds(tmp_path / "a.flac") == pytest.approx(3, abs=0.1)
    assert declared_seconds(tmp_path / "b.txt") is None
    assert declared_seconds(tmp_path / "missing.wav") is None


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.integers(0, 40_000),
    max_seconds=st.floats(1 / SAMPLE_RATE, 3.0).filter(lambda seconds: int(seconds * SAMPLE_RATE) > 40),
    search_seconds=st.none() | st.floats(0, 4.0),
    loud=st.booleans(),
)
def test_chunks_tile_the_recording(num_samples, max_seconds, search_seconds, loud):
    samples = np.random.default_rng(num_samples).normal(0, 0.1 * loud, num_samples).astype(np.float32)
    chunks = cut_at_silences(samples, max_seconds=max_seconds, search_seconds=search_seconds)
    edges = [0, *(end for _, end in chunks)]
    assert [start for start, _ in chunks] == edges[:-1]
    assert edges[-1] == num_samples
    assert all(0 < end - start <= max_seconds * SAMPLE_RATE for start, end in chunks)


def test_cuts_fall_into_the_pauses():
    samples = np.concatenate([tone(4.5, rate=SAMPLE_RATE), np.zeros(SAMPLE_RATE // 2, np.float32)] * 10)
    chunks = cut_at_silences(samples, max_seconds=12)
    assert [round(end / SAMPLE_RATE, 1) % 5 for _, end in chunks[:-1]] == pytest.approx(
        [4.8] * len(chunks[:-1]), abs=0.2
    )


def test_no_short_rest_is_left():
    samples = np.random.default_rng(0).normal(0, 0.1, int(10.2 * SAMPLE_RATE)).astype(np.float32)
    chunks = cut_at_silences(samples, max_seconds=10)
    assert len(chunks) == 2
    assert chunks[-1][1] - chunks[-1][0] >= SAMPLE_RATE


def test_bad_lengths_are_named():
    with pytest.raises(ValueError, match=r"max_seconds .* got 0"):
        cut_at_silences(np.zeros(10, np.float32), max_seconds=0)
    with pytest.raises(ValueError, match=r"search_seconds .* got -1"):
        cut_at_silences(np.zeros(10, np.float32), max_seconds=1, search_seconds=-1)


def test_silence():
    assert is_silent(np.zeros(0, np.float32))
    assert is_silent(np.zeros(5_000, np.float32))
    assert is_silent(np.full(5_000, 1e-4, np.float32))
    assert not is_silent(np.concatenate([np.zeros(50_000, np.float32), tone(0.05, rate=SAMPLE_RATE)]))


def test_audio_longer_than_it_may_be(tmp_path):
    soundfile.write(tmp_path / "long.flac", tone(3, rate=SAMPLE_RATE), SAMPLE_RATE)
    assert len(read_audio(tmp_path / "long.flac", max_seconds=3.1)) == 3 * SAMPLE_RATE
    with pytest.raises(AudioError, match=r"long\.flac is longer than 2\.5 s: cut it"):
        read_audio(tmp_path / "long.flac", max_seconds=2.5)


def test_titles_in_another_encoding_do_no_harm(tmp_path):
    for name in ("a.wav", "a.flac"):
        with soundfile.SoundFile(tmp_path / name, "w", SAMPLE_RATE, 1) as file:
            file.title = "Gesprach"
            file.write(tone(1, rate=SAMPLE_RATE))
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data.replace(b"Gesprach", "Gespräch".encode("latin-1")))
        assert_same_tone(read_audio(tmp_path / name, strict=True), seconds=1)
        assert declared_seconds(tmp_path / name) == pytest.approx(1)


def test_damage_is_an_error_where_it_is_to_be(tmp_path):
    soundfile.write(tmp_path / "whole.flac", tone(3, rate=SAMPLE_RATE), SAMPLE_RATE)
    assert len(read_audio(tmp_path / "whole.flac", strict=True)) == 3 * SAMPLE_RATE
    data = (tmp_path / "whole.flac").read_bytes()
    with pytest.raises(AudioError, match=r"is damaged: .*; 1\.\d+ s were decoded"):
        read_audio(data[: len(data) // 2], strict=True)


def test_a_wav_file_that_is_cut_short_is_noticed(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(3, rate=SAMPLE_RATE), SAMPLE_RATE)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    for source in (path, path.read_bytes()):
        with pytest.raises(AudioError, match=rf"the file says that it has {len(data)} bytes, and {len(data) // 2} are"):
            read_audio(source, strict=True)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF])
def test_a_wav_file_of_a_writer_that_could_not_know_its_length_is_whole(size):
    file = io.BytesIO()
    soundfile.write(file, tone(1, rate=SAMPLE_RATE), SAMPLE_RATE, format="wav")
    data = bytearray(file.getvalue())
    data[4:8] = size.to_bytes(4, "little")
    assert_same_tone(read_audio(bytes(data), strict=True), seconds=1)
