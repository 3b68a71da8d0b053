"""Replays: the recorded calls and no others, on a decoder whose weights are random."""

import json

import pytest
import soundfile
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

from leapasr.audio import SAMPLE_RATE
from leapasr.cli import app
from leapasr.decoding import DecodingOptions, build_loop, decode
from leapasr.evaluation import replay as replays
from leapasr.evaluation.bench import read_utterances
from leapasr.evaluation.replay import RecordedText, ReplayDrafter, build_decoder, prompts_of, read_trace, record, replay
from leapasr.transcriber import load

SMALL = LlamaConfig(
    vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
TEXTS = [
    RecordedText("verify both full", 0.5, ((3, 2), (5, 1), (0, 1), (4, 5))),
    RecordedText("verify both full", 1.5, ((0, 1), (7, 7), (9, 4))),
    RecordedText("verify both full", 1.0, ((12, 13),)),
]
VERIFY = DecodingOptions(strategy="verify", draft_length="full", max_repeats=None)


@pytest.fixture(scope="module")
def decoder():
    return build_decoder(SMALL, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory, babble):
    folder = tmp_path_factory.mktemp("replay")
    lines = []
    for index, seconds in enumerate([0.6, 1.4, 0.9]):
        soundfile.write(folder / f"{index}.wav", babble(seconds, seed=index), SAMPLE_RATE)
        lines.append({"id": f"u{index}", "audio": f"{index}.wav", "duration": seconds, "text": "The cat sat."})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS])
def test_each_call_verifies_and_emits_what_the_trace_says(decoder, texts, monkeypatch):
    widths = []
    call = decoder.call
    monkeypatch.setattr(
        decoder, "call", lambda *given, **more: widths.append(given[0].shape[1]) or call(*given, **more)
    )
    prompts = prompts_of(texts, decoder)
    loop = build_loop(decoder, VERIFY)
    keys = loop.add(prompts, drafters=[ReplayDrafter(text) for text in texts])
    results = {}
    while loop:
        results |= loop.step()
    for key, text in zip(keys, texts, strict=True):
        emitted = [record.step for record in results[key].trace]
        assert [emitted.count(step) for step in range(len(text.steps))] == [num for _, num in text.steps]
        assert results[key].tokens == list(range(text.num_tokens - 1, 0, -1))
    if len(texts) == 1:
        begin = prompts.embeddings_BLD.shape[1] - 1
        assert widths == [begin + 1 + 3, 1 + 5, 1, 1 + 4]


def test_autoregressive_replays_write_the_same_tokens(decoder):
    plain = DecodingOptions(strategy="autoregressive", max_repeats=None)
    for text, result in zip(TEXTS, decode(decoder, prompts_of(TEXTS, decoder), plain), strict=True):
        assert result.tokens == list(range(text.num_tokens - 1, 0, -1))
        assert result.num_calls == text.num_tokens


def test_a_recorder_notes_what_is_verified_and_lets_the_drafter_hear_of_it(decoder):
    text = TEXTS[1]
    recorders = [replays._Recorder(ReplayDrafter(text))]
    loop = build_loop(decoder, VERIFY)
    loop.add(prompts_of([text], decoder), drafters=recorders)
    while loop:
        loop.step()
    assert recorders[0].num_verified == [verified for verified, _ in text.steps]


def test_what_is_recorded_is_what_was_decoded(tiny_model_folder, manifest, tmp_path):
    transcriber = load(tiny_model_folder, device="cpu")
    utterances = read_utterances([manifest])
    texts = record(transcriber, utterances, batch_size=2)
    for name, options in replays.RECORDED.items():
        results = transcriber.transcribe(utterances.samples, options)
        whole = [result for result in results if not any(segment.truncated for segment in result.segments)]
        of_this = [text for text in texts if text.strategy == name]
        assert sum(len(text.steps) for text in of_this) == sum(result.decoder_calls for result in whole)
        assert sum(text.num_tokens for text in of_this) == sum(result.num_tokens for result in whole)
    if texts:
        replays.write_trace(texts, tmp_path / "trace.jsonl")
        assert read_trace(tmp_path / "trace.jsonl") == texts


def test_rows_hold_together(monkeypatch):
    monkeypatch.setitem(replays.SIZES, "small", SMALL)
    mtp = [RecordedText("verify mtp", text.seconds, ((0, 1),) * text.num_tokens) for text in TEXTS]
    rows = replay([*TEXTS, *mtp], size="small", batch_sizes=[1, 2], rounds=2, device="cpu")
    assert [(row.system, row.batch_size) for row in rows] == [
        (f"replay/{name}", size)
        for size in (1, 2)
        for name in ("verify both full", "verify mtp", "autoregressive", "generate")
    ]
    num_tokens, num_calls = sum(text.num_tokens for text in TEXTS), sum(len(text.steps) for text in TEXTS)
    for row in rows:
        if row.system == "replay/verify both full":
            assert (row.decoder_calls, row.tokens_per_call) == (num_calls, num_tokens / num_calls)
        elif row.system != "replay/generate":
            assert (row.decoder_calls, row.tokens_per_call) == (num_tokens, 1)
        assert 0 < row.decoder_seconds_low <= row.decoder_seconds <= row.decoder_seconds_high
        assert row.floor_ms > 0
    assert [row.speedup_vs_generate for row in rows if row.system == "replay/generate"] == [1, 1]


def test_bench_writes_a_trace_and_replays_it(tiny_model_folder, manifest, tmp_path, monkeypatch):
    monkeypatch.setitem(replays.SIZES, "small", SMALL)
    trace, figures = tmp_path / "trace.jsonl", tmp_path / "rows.json"
    written = CliRunner().invoke(
        app, ["bench", str(manifest), "--model", str(tiny_model_folder), "--trace", str(trace)]
    )
    assert (written.exit_code, written.output) == (0, "")
    replays.write_trace(TEXTS, trace)
    arguments = ["bench", "--replay", str(trace), "--decoder-size", "small", "--device", "cpu", "--repeat", "1"]
    replayed = CliRunner().invoke(app, [*arguments, "--batch-size", "2", "--json", str(figures)])
    assert replayed.exit_code == 0, replayed.output
    assert "Replays: small, random weights" in replayed.output
    assert {row["system"].split("/")[0] for row in json.loads(figures.read_text())} == {"replay"}


LINE = '{"strategy": "verify mtp", "seconds": 1.0, "steps": %s}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no text"),
        ("{}", "line 1: no trace of `leapasr bench --trace`"),
        (LINE % "[[1, 1], [1, 3]]", "line 1: each call emits one token at least, and one more than it verifies"),
        (LINE % "[[1, 0]]", "line 1: each call emits one token at least"),
        (LINE % "[[400, 400]]", "line 1: 400 tokens, and 256 can be replayed"),
    ],
)
def test_other_files_are_no_traces(tmp_path, content, message):
    (tmp_path / "trace").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_trace(tmp_path / "trace")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "3t"}, "decoder size '3t': choose one of 125m, 1b, 8b"),
        ({"rounds": 0}, "rounds and batch sizes must be at least 1, got 0"),
        ({"dtype": "mixed"}, "dtype 'mixed' is for a model with a speech side"),
        ({"dtype": "auto"}, "dtype 'auto' is for a model with a speech side"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        replay(TEXTS, **{"size": "125m", "batch_sizes": [1], "rounds": 1, **arguments})


def test_manifests_or_a_trace(manifest, tmp_path):
    for arguments in (["bench"], ["bench", str(manifest), "--replay", str(tmp_path)]):
        result = CliRunner().invoke(app, arguments)
        assert (result.exit_code, "give manifests, or --replay TRACE" in result.output) == (2, True)
