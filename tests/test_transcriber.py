import importlib.resources
import io
import itertools
import json
import operator
import shutil
import subprocess
import sys
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import inf

import numpy as np
import pytest
import soundfile
import torch

import leapasr
import leapasr.transcriber as transcriber_module
from leapasr.audio import SAMPLE_RATE, AudioError
from leapasr.chunks import SHORTEST_SECONDS, by_length, clipped, cut_pieces, cut_recording, windows
from leapasr.decoding import DecodingOptions, decode
from leapasr.decoding.ctc import align_ctc, greedy_ctc
from leapasr.decoding.guards import MAX_TOKENS_AT_LEAST, MAX_TOKENS_PER_SECOND
from leapasr.model.ctc_head import CTCScores
from leapasr.transcriber import load
from leapasr.transcription import LATENESS_SECONDS, TAIL_SECONDS, timed_words, token_times

AUTOREGRESSIVE = DecodingOptions(strategy="autoregressive")


def noise(seconds, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * SAMPLE_RATE)).astype(np.float32)


@pytest.fixture(scope="module")
def transcriber(tiny_model_folder):
    return load(tiny_model_folder, device="cpu")


def test_greedy_ctc_merges_repetitions_and_stops_at_lengths():
    frames = torch.tensor([[3, 3, 0, 3, 2, 2, 0], [0, 1, 1, 2, 0, 4, 4], [5, 5, 5, 5, 5, 5, 5]])
    logits = torch.nn.functional.one_hot(frames, 6).float()
    ctc = CTCScores.of(logits)
    assert greedy_ctc(ctc, torch.tensor([7, 4, 0]), blank=0) == [[3, 3, 2], [1, 2], []]
    assert greedy_ctc(ctc, torch.tensor([7, 7, 7]), blank=5) == [[3, 0, 3, 2, 0], [0, 1, 2, 0, 4], []]


def best_alignment(log_probs_TV, tokens, blank):
    """Textbook oracle: the best of all labellings of the frames that read as `tokens`."""
    T, V = log_probs_TV.shape
    best = (-np.inf, None)
    for labels in itertools.product(range(V), repeat=T):
        read = [label for label, before in zip(labels, (blank, *labels), strict=False) if label not in (before, blank)]
        if read == tokens:
            best = max(best, (sum(log_probs_TV[t, label] for t, label in enumerate(labels)), labels))
    return best


@pytest.mark.parametrize("tokens", [[1], [1, 2], [2, 2], [1, 2, 1], [2, 2, 1]])
def test_ctc_alignment_is_the_best_of_all(tokens):
    for seed in range(5):
        log_probs = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
        score, labels = best_alignment(log_probs.numpy(), tokens, 0)
        spans = align_ctc(log_probs, tokens, blank=0)
        found = [0] * 5
        for token, (start, end) in zip(tokens, spans, strict=True):
            assert start < end
            found[start:end] = [token] * (end - start)
        assert tuple(found) == labels
        assert sum(log_probs[t, label] for t, label in enumerate(found)) == pytest.approx(score, abs=1e-5)


def test_tokens_that_do_not_fit_the_frames_have_no_alignment():
    log_probs = torch.zeros(3, 4).log_softmax(-1)
    assert align_ctc(log_probs, [1, 2, 3], blank=0) == [(0, 1), (1, 2), (2, 3)]
    assert align_ctc(log_probs, [1, 1, 2], blank=0) is None
    assert align_ctc(log_probs, [1, 2, 3, 1], blank=0) is None
    assert align_ctc(log_probs, [], blank=0) == []


def test_a_long_text_is_aligned():
    """A chunk of 25 s has more tokens than a small integer counts."""
    tokens = [1 + n % 3 for n in range(300)]
    log_probs = torch.full((600, 4), -9.0)
    log_probs[torch.arange(0, 600, 2), torch.tensor(tokens)] = 0
    log_probs[1::2, 0] = 0
    assert align_ctc(log_probs.log_softmax(-1), tokens, blank=0) == [(2 * n, 2 * n + 1) for n in range(300)]


def test_chunks_hold_all_that_is_not_silent():
    samples = noise(5)
    chunks = cut_recording("a", samples, max_seconds=1.28)
    assert np.array_equal(np.concatenate([chunk.samples for chunk in chunks]), samples)
    assert all(chunk.seconds <= 1.28 for chunk in chunks)
    assert [chunk.start for chunk in chunks[1:]] == [chunk.end for chunk in chunks[:-1]]
    samples[: 2 * SAMPLE_RATE] = 0
    heard = cut_recording("a", samples, max_seconds=1)
    assert 1 <= heard[0].start <= 2 < heard[0].end
    assert heard[-1].end == 5
    too_short = noise(SHORTEST_SECONDS)[:-1]
    assert cut_recording("a", too_short, max_seconds=1) == []


@pytest.mark.parametrize("block_seconds", [0.01, 0.7, 3.1])
@pytest.mark.parametrize("max_seconds", [0.5, 1.28, 25])
def test_a_recording_read_in_blocks_is_cut_as_if_it_were_whole(block_seconds, max_seconds):
    samples = noise(29.9)
    samples[5 * SAMPLE_RATE : 9 * SAMPLE_RATE] = 0
    size = int(block_seconds * SAMPLE_RATE)
    pieces = [(first, samples[first : first + size]) for first in range(0, len(samples), size)]
    chunks = list(cut_pieces("a", pieces, max_seconds=max_seconds))
    whole = cut_recording("a", samples, max_seconds=max_seconds)
    assert [(chunk.start, chunk.end) for chunk in chunks] == [(chunk.start, chunk.end) for chunk in whole]
    for chunk, other in zip(chunks, whole, strict=True):
        assert np.array_equal(chunk.samples, other.samples)


def test_no_chunk_reaches_from_clip_to_clip():
    samples = noise(3)
    blocks = np.split(samples, range(7000, len(samples), 7000))
    clips = [(0.5, 0.9), (0.9, 1.1), (2.0, inf)]
    chunks = list(cut_pieces("a", clipped(blocks, clips, name="a"), max_seconds=25))
    assert [(chunk.start, chunk.end) for chunk in chunks] == [(0.5, 1.1), (2.0, 3.0)]
    for chunk in chunks:
        first = int(chunk.start * SAMPLE_RATE)
        assert np.array_equal(chunk.samples, samples[first : first + len(chunk.samples)])


def test_what_lies_behind_the_last_clip_is_not_read():
    def blocks():
        yield noise(1)
        pytest.fail("asked for more")

    assert sum(len(samples) for _, samples in clipped(blocks(), [(0.2, 0.5)], name="a")) == 0.3 * SAMPLE_RATE
    assert sum(len(samples) for _, samples in clipped(blocks(), [(0.2, 1.0)], name="a")) == 0.8 * SAMPLE_RATE


@pytest.mark.parametrize("start", [1.0, 1.5])
def test_a_clip_behind_the_end(start):
    with pytest.raises(AudioError, match=rf"a\.wav is 1\.00 s long: no clip can begin at {start:g} s"):
        list(clipped([noise(1)], [(0, 0.5), (start, 3)], name="a.wav"))


def test_batches_and_windows_lose_nothing():
    recordings = [(key, noise(0.5 + key / 10)) for key in range(7)]
    chunks = [chunk for key, samples in recordings for chunk in cut_recording(key, samples, max_seconds=2)]
    assert [[chunk.recording for chunk in batch] for batch in by_length(chunks, 3)] == [[6, 5, 4], [3, 2, 1], [0]]
    assert [[key for key, _ in window] for window in windows(recordings, seconds=1.5)] == [[0, 1, 2], [3, 4], [5, 6]]


def test_a_recording_as_path_bytes_and_samples(transcriber, tmp_path):
    samples = noise(1)
    soundfile.write(tmp_path / "a.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    expected = transcriber.transcribe(samples)
    assert expected.tokens
    for audio in (
        tmp_path / "a.wav",
        str(tmp_path / "a.wav"),
        (tmp_path / "a.wav").read_bytes(),
        samples.astype(float),
    ):
        assert transcriber.transcribe(audio).tokens == expected.tokens


def test_what_a_transcription_says(transcriber, babble):
    samples = babble(1, seed=5)
    result = transcriber.transcribe(samples, AUTOREGRESSIVE)
    (segment,) = result.segments
    assert (segment.start, segment.end, result.audio_seconds) == (0, 1, 1)
    assert result.text == segment.text == transcriber.processor.decode_text(segment.tokens)
    assert result.tokens == segment.tokens == [record.token for record in segment.trace[: len(segment.tokens)]]
    assert result.decoder_calls == result.num_tokens == len(result.trace[0])
    assert result.encoder_seconds > 0
    assert result.decoder_seconds > 0
    fewer = transcriber.transcribe(samples, DecodingOptions(drafts="mtp"))
    assert fewer.tokens == result.tokens
    assert fewer.num_tokens == result.num_tokens
    assert fewer.decoder_calls < result.decoder_calls


def test_a_batch_gives_what_each_recording_gives_alone(transcriber, babble):
    recordings = [babble(seconds, seed) for seed, seconds in enumerate([0.3, 4.0, 0.05, 1.1, 2.7])]
    options = DecodingOptions(draft_length="full")
    together = transcriber.transcribe(recordings, options, batch_size=3, word_times=True)
    for samples, result in zip(recordings, together, strict=True):
        alone = transcriber.transcribe(samples, options, batch_size=1, word_times=True)
        for one, other in zip(result.segments, alone.segments, strict=True):
            fields = operator.attrgetter("start", "end", "tokens", "text", "decoder_calls", "truncated", "words")
            assert fields(one) == fields(other)
        assert result.audio_seconds == len(samples) / SAMPLE_RATE
    assert len(together[1].segments) >= 4
    assert together[1].segments[-1].end == 4.0


def test_several_recordings_of_any_iterable(transcriber, babble, tmp_path):
    samples = babble(1, seed=5)
    soundfile.write(tmp_path / "a.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    expected = transcriber.transcribe(samples).tokens
    with (tmp_path / "a.wav").open("rb") as file:
        sources = (source for source in (samples, str(tmp_path / "a.wav"), file))
        assert [result.tokens for result in transcriber.transcribe(sources)] == [expected] * 3
    with (tmp_path / "a.wav").open("rb") as file:
        assert transcriber.transcribe(file).tokens == expected


SAID = operator.attrgetter("start", "end", "text", "tokens", "words", "decoder_calls", "truncated")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_stream_gives_the_segments_in_order(transcriber, babble, batch_size):
    samples, options = babble(9, seed=4), DecodingOptions(draft_length="full")
    samples[3 * SAMPLE_RATE : 6 * SAMPLE_RATE] = 0
    expected = transcriber.transcribe(samples, options, word_times=True).segments
    streamed = list(transcriber.stream(samples, options, batch_size=batch_size, word_times=True))
    assert len(streamed) >= 5
    assert list(map(SAID, streamed)) == list(map(SAID, expected))


def test_a_stream_reads_what_it_needs(transcriber, babble, monkeypatch):
    """Ten minutes of sound: the first segment comes when a few chunks are read, and little is ever held."""
    num_read, minute = 0, babble(60, seed=2)

    def blocks(source):
        nonlocal num_read
        for _ in range(10):
            for block in np.split(minute, 60):
                num_read += 1
                yield block.copy()

    monkeypatch.setattr("leapasr.transcriber.read_blocks", blocks)
    stream = transcriber.stream("a.wav", DecodingOptions(max_tokens=1, drafts="mtp"), batch_size=8)
    next(stream)
    assert num_read <= 25
    tracemalloc.start()
    last = [next(stream) for _ in range(100)][-1]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert last.start > 60
    assert num_read - last.end < 25
    assert peak < 30 * SAMPLE_RATE * 4 * 2
    stream.close()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"clips": []}, "no clips: give at least one start"),
        ({"language": "fr"}, "language 'fr' asked for"),
        ({"options": DecodingOptions(num_heads=9)}, "num_heads 9 asked for"),
    ],
)
def test_a_stream_refuses_at_the_call(transcriber, wrong, message):
    with pytest.raises(ValueError, match=message):
        transcriber.stream(noise(1), **wrong)


def test_a_stream_of_what_cannot_be_read(transcriber):
    stream = transcriber.stream("missing.wav")
    with pytest.raises(AudioError, match="not found"):
        next(stream)


def test_threads_share_a_transcriber(tiny_model_folder, babble):
    """Each gets what it gets alone, whatever the others do meanwhile."""
    shared, alone = load(tiny_model_folder, device="cpu"), load(tiny_model_folder, device="cpu")
    recordings = [babble(seconds, seed=seed) for seed, seconds in enumerate([0.4, 2.5, 1.2, 1.9])]
    ways = [
        DecodingOptions(),
        DecodingOptions(strategy="autoregressive"),
        DecodingOptions(strategy="beam", beam_size=2),
    ]
    calls = [(samples, options) for options in ways for samples in recordings]

    def transcribed(transcriber, samples, options):
        segments = transcriber.transcribe(samples, options, word_times=True).segments
        streamed = list(transcriber.stream(samples, options, batch_size=2, word_times=True))
        fields = operator.attrgetter("start", "end", "text", "tokens", "words", "truncated", "alternatives")
        return list(map(fields, segments)), list(map(fields, streamed))

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda call: transcribed(shared, *call), calls))
    for call, found in zip(calls, together, strict=True):
        expected = transcribed(alone, *call)
        for mine, other in zip(found, expected, strict=True):
            assert [each[:-1] for each in mine] == [each[:-1] for each in other]
            scores = [score for each in mine for _, score in each[-1]]
            assert scores == pytest.approx([score for each in other for _, score in each[-1]], abs=1e-4)
    assert any(found[0] for found in together)


def test_chunks_without_speech_have_no_segment(transcriber, monkeypatch):
    """The CTC head decides: here it hears nothing in what begins in a recording's first second."""
    encode, blank = transcriber.encode, transcriber.model.config.blank_token_id

    def deaf(chunks):
        batch = encode(chunks)
        with torch.inference_mode():
            for row, chunk in enumerate(chunks):
                if chunk.start < 1:
                    batch.ctc.best_BT[row] = blank
        return batch

    monkeypatch.setattr(transcriber, "encode", deaf)
    samples = noise(4)
    samples[int(1.1 * SAMPLE_RATE) : int(1.3 * SAMPLE_RATE)] = 0  # the first chunk ends there
    everything = transcriber.transcribe(samples, AUTOREGRESSIVE, vad_filter=False)
    speech = transcriber.transcribe(samples, AUTOREGRESSIVE)
    starts = [segment.start for segment in everything.segments]
    assert starts[0] == 0
    assert 1 < starts[1] < 1.28
    assert [segment.start for segment in speech.segments] == starts[1:]
    assert [segment.start for segment in transcriber.stream(samples, AUTOREGRESSIVE, batch_size=1)] == starts[1:]
    assert speech.audio_seconds == 4
    assert transcriber.transcribe(noise(0.9), AUTOREGRESSIVE).segments  # a word of its own may not be heard


def test_progress_counts_all_audio(transcriber):
    silence, done = np.zeros(2 * SAMPLE_RATE, dtype=np.float32), []
    samples = np.concatenate([silence, noise(1.5), silence])
    list(transcriber.transcribe_each([samples, "missing.wav", silence], progress=done.append))
    assert sum(done) == pytest.approx(5.5 + 2)


def test_the_language_is_on_the_models_card(tiny_model_folder, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    cards = {
        "---\nlanguage: de\n---\n": "de",
        "---\nlanguage:\n- de\n---\n": "de",
        "---\nlanguage: [de, en]\n---\n": None,
        "---\nlicense: mit\n---\n": None,
        "---\n- a: [\n---\n": None,
        "No metadata": None,
    }
    for card, language in cards.items():
        (folder / "README.md").write_text(card)
        assert load(folder, device="cpu").language == language
    (folder / "README.md").write_text("---\nlanguage: de\n---\n")
    transcriber = load(folder, device="cpu")
    assert transcriber.transcribe(noise(1), language="German").language == "de"
    with pytest.raises(ValueError, match="'English' asked for, but the model writes 'de' alone"):
        transcriber.transcribe(noise(1), language="English")


def test_tokens_are_those_of_decode_on_the_models_own_calls(transcriber):
    samples, model = noise(1), transcriber.model
    inputs = transcriber.processor([samples])
    with torch.no_grad():
        encoding = model.encode(inputs["input_features"], inputs["feature_lengths"])
        prompts = leapasr.decoding.Prompts(*model.prompt(encoding))
    options = DecodingOptions(max_tokens=20)
    assert transcriber.transcribe(samples, options).tokens == decode(transcriber.decoder, prompts, options)[0].tokens
    blank = model.config.blank_token_id
    (ctc,) = greedy_ctc(encoding.ctc, encoding.ctc_lengths_B, blank=blank)
    assert transcriber.ctc_text(samples) == transcriber.processor.decode_text(ctc) != ""


@pytest.mark.parametrize("samples", [np.zeros(0), np.zeros(30_000), noise(0.01), noise(0.09), noise(3) * 1e-6])
def test_silence_and_too_little_audio_give_no_text(transcriber, samples):
    result = transcriber.transcribe(samples)
    assert (result.text, result.segments, result.decoder_calls, result.num_tokens) == ("", [], 0, 0)
    assert transcriber.ctc_text(samples) == ""


def test_word_times(transcriber, babble):
    options, samples = DecodingOptions(max_tokens=10), babble(4, seed=3)
    result = transcriber.transcribe(samples, options, word_times=True)
    assert not any(segment.words for segment in transcriber.transcribe(samples, options).segments)
    said = [segment for segment in result.segments if segment.text]
    assert len(said) >= 3
    for segment in said:
        assert [word.text for word in segment.words] == segment.text.split()
        times = [time for pair in segment.token_times for time in pair]
        assert len(segment.token_times) == len(segment.tokens)
        assert times == sorted(times)
        assert (segment.words[0].start, segment.words[-1].end) == (times[0], times[-1])
        assert segment.start <= times[0] < times[-1] <= segment.end


def test_more_tokens_than_ctc_frames_have_no_word_times(transcriber):
    tokens, log_probs_TV = list(range(4, 30)), torch.zeros(20, 48).log_softmax(-1)
    place = {"frame_rate": 25.0, "blank": 0, "start": 0.0, "end": 0.8}
    assert token_times(tokens, log_probs_TV, **place) == timed_words(tokens, [], transcriber.processor) == []
    assert len(token_times(tokens[:20], log_probs_TV, **place)) == 20


def test_tokens_last_from_before_they_are_heard_to_the_next_or_a_pause():
    heard_T = [7, 0, 8, 8, 0, 0, 9, *[0] * 12, 7, 0, 0, 9]  # the token of each frame of 40 ms
    log_probs_TV = torch.nn.functional.one_hot(torch.tensor(heard_T), 10).float().log()
    times = token_times([7, 8, 9, 7, 9], log_probs_TV, frame_rate=25.0, blank=0, start=5.0, end=5.91)
    late = LATENESS_SECONDS
    expected = [
        (5.0, 5.04),  # half of what there is before it
        (5.04, 5.24 - late),
        (5.24 - late, 5.28 + TAIL_SECONDS),  # a pause
        (5.76 - late, 5.88 - late),
        (5.88 - late, 5.91),  # the end of the audio
    ]
    assert [time for span in times for time in span] == pytest.approx([time for span in expected for time in span])


def test_long_texts_have_word_times():
    """25 s of speech have up to 150 tokens."""
    log_probs_TV = torch.randn(625, 48, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    tokens = [4 + index % 40 for index in range(150)]
    spans = token_times(tokens, log_probs_TV, frame_rate=25.0, blank=0, start=0.0, end=25.0)
    assert len(spans) == 150
    assert [time for span in spans for time in span] == sorted(time for span in spans for time in span)


def test_no_recordings(transcriber):
    assert transcriber.transcribe([]) == []


def test_token_bound_follows_the_audio(transcriber):
    chunks = transcriber.cut([(0, noise(1)), (1, noise(0.5))])
    expected = [MAX_TOKENS_AT_LEAST + MAX_TOKENS_PER_SECOND * seconds for seconds in (1, 0.5)]
    assert transcriber.encode(chunks).max_tokens == pytest.approx(expected, abs=1)
    assert transcriber.max_seconds == 1.28


def test_truncated_texts_say_so(transcriber):
    result = transcriber.transcribe(noise(3), DecodingOptions(max_tokens=1))
    assert result.truncated == ["length"] * len(result.segments)


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_two_threads_write_what_one_writes(transcriber, babble, batch_size, tmp_path):
    sources = [babble(1.5, 1), tmp_path / "none.wav", babble(2.5, 2), babble(0.7, 3), babble(3.1, 4), noise(0.5)]
    done = []
    expected = dict(transcriber.transcribe_each(sources, batch_size=1))
    torch.set_num_threads(2)
    try:
        found = list(transcriber.transcribe_each(sources, batch_size=batch_size, progress=done.append))
        streamed = list(transcriber.stream(np.concatenate([babble(2.5, 2), babble(3.1, 4)]), batch_size=batch_size))
    finally:
        torch.set_num_threads(1)
    assert [index for index, _ in found] == [0, 1, 2, 3, 4, 5]
    for index, result in found:
        if index == 1:
            assert "not found" in str(result)
            continue
        assert [segment.tokens for segment in result.segments] == [
            segment.tokens for segment in expected[index].segments
        ]
        assert result.encoder_seconds > 0
    assert sum(done) == pytest.approx(1.5 + 2.5 + 0.7 + 3.1 + 0.5, abs=0.01)
    alone = transcriber.stream(np.concatenate([babble(2.5, 2), babble(3.1, 4)]), batch_size=1)
    assert [segment.tokens for segment in streamed] == [segment.tokens for segment in alone]


def test_samples_that_were_heard_are_let_go(transcriber, babble, monkeypatch):
    monkeypatch.setattr(transcriber_module, "windows", partial(windows, seconds=3.0))
    given, left = [], []

    def sources():
        for index in range(9):
            left.append([place for place, each in enumerate(given) if each() is not None])
            samples = babble(1.2, index)
            given.append(weakref.ref(samples))
            yield samples
            del samples

    assert len(dict(transcriber.transcribe_each(sources(), batch_size=1))) == 9
    assert [left[3], left[6]] == [[2], [5]]  # windows of three: when one is read, the one before it is gone


def test_bad_audio_among_good(transcriber, tmp_path):
    (tmp_path / "empty.wav").touch()
    sources = [tmp_path / "none.wav", noise(0.5), tmp_path / "empty.wav", noise(0.6)]
    results = dict(transcriber.transcribe_each(sources))
    assert sorted(results) == [0, 1, 2, 3]
    assert "not found" in str(results[0])
    assert "is empty" in str(results[2])
    assert results[1].tokens
    assert results[3].tokens
    with pytest.raises(AudioError, match=r"none\.wav"):
        transcriber.transcribe(sources)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((2, 100)), r"float64 \(2, 100\): average channels"),
        (np.zeros(100, dtype=np.int16), r"int16 \(100,\)"),
        (np.array([0.0, np.nan, np.inf]), "2 of 3 samples are not finite"),
        (b"", "0 bytes"),
        (16_000, "a path, a file's bytes or a binary file object, got 16000"),
        (b"not audio", "cannot be read as audio"),
    ],
)
def test_bad_audio(transcriber, samples, message):
    with pytest.raises(AudioError, match=message):
        transcriber.transcribe(samples)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_bad_batch_size(transcriber, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        transcriber.transcribe(noise(1), batch_size=batch_size)


def test_more_heads_than_the_model_has(transcriber):
    with pytest.raises(ValueError, match="num_heads 5 asked for, but the model has 4"):
        transcriber.transcribe(noise(1), DecodingOptions(num_heads=5))


def test_bfloat16(tiny_model_folder):
    transcriber = load(tiny_model_folder, device="cpu", dtype="bfloat16")
    assert transcriber.model.dtype == torch.bfloat16
    assert transcriber.transcribe(noise(1)).decoder_calls > 0


def damaged(folder, tmp_path, change):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def write_config(**fields):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def truncate(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (write_config(model_type="llama"), "model of type 'llama', not 'speech_llama'"),
        (write_config(model_type="whisper"), "lacks [0-9]+ of a Whisper's weights"),
        (write_config(adapter_size=32), "another architecture"),
        (truncate("model.safetensors", 5000), "damaged or cut short"),
        (truncate("model.safetensors", 0), "damaged or cut short"),
        (truncate("config.json", 50), "not a valid JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no usable processor"),
        (truncate("tokenizer.json", 50), "no usable processor"),
    ],
)
def test_unusable_models(tiny_model_folder, tmp_path, change, message):
    folder = damaged(tiny_model_folder, tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, device="cpu")
    assert str(folder) in str(caught.value)


def test_models_that_are_not_there(tiny_model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"model folder not found: .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file: give the model's folder"):
        load(tiny_model_folder / "model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"dtype": "float8"}, "unknown dtype 'float8'"), ({"device": "warp"}, "device 'warp' cannot be used")],
)
def test_bad_device_and_dtype(tiny_model_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(tiny_model_folder, **arguments)


@pytest.mark.parametrize(("speedup", "dtype"), [(7.0, "mixed"), (1.5, "mixed"), (1.2, "float32"), (0.1, "float32")])
def test_auto_is_what_is_faster_here(tiny_model_folder, monkeypatch, speedup, dtype):
    monkeypatch.setattr("leapasr.transcriber.bfloat16_speedup", lambda device: speedup)
    assert load(tiny_model_folder, device="cpu", dtype="auto").dtype == dtype
    assert load(tiny_model_folder, device="cpu").dtype == "float32"


def test_importing_the_package_is_cheap():
    code = "import sys, leapasr; assert leapasr.__version__; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_says_that_it_is_typed():
    assert (importlib.resources.files("leapasr") / "py.typed").is_file()


def test_public_names():
    for name in leapasr.__all__:
        assert getattr(leapasr, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = leapasr.nothing


def test_file_objects_in_memory(transcriber):
    file = io.BytesIO()
    soundfile.write(file, noise(1), SAMPLE_RATE, format="flac")
    assert transcriber.transcribe(file.getvalue()).tokens
