"""The model that ships: that it hears, and that the contracts hold on trained weights as on random ones (float32)."""

import importlib.resources
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from leapasr.audio import read_audio
from leapasr.chunks import Chunk
from leapasr.decoding import DecodingOptions
from leapasr.decoding.costs import steady
from leapasr.decoding.interface import Ways
from leapasr.decoding.reference import beam_reference, decode_reference, full_forward
from leapasr.decoding.unembedding import RoughUnembedding
from leapasr.evaluation.peers import generate
from leapasr.evaluation.scoring import count_errors
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration
from leapasr.text import NORMALIZER
from leapasr.transcriber import load

PACKAGE = Path(str(importlib.resources.files("leapasr")))
FOLDER = PACKAGE / "pretrained" / "tiny"
MEGABYTES = 45
AUTOREGRESSIVE, VERIFY = DecodingOptions(strategy="autoregressive"), DecodingOptions(strategy="verify")
SPOKEN = {
    "austen-0870.flac": "and mister john dashwood had then leisure to consider how much there might be prudently in "
    "his power to do for them",
    "austen-0890.flac": "unless to be rather cold hearted and rather selfish is to be ill disposed",
    "austen-0930.flac": "he might even have been made amiable himself",
}


@pytest.fixture(scope="module")
def transcriber():
    return load()


@pytest.fixture(scope="module")
def batch(transcriber):
    recordings = [(n, read_audio(PACKAGE / "samples" / name)) for n, name in enumerate(SPOKEN)]
    chunks = transcriber.cut(recordings)
    assert len(chunks) == len(SPOKEN)
    return transcriber.encode(chunks)


@pytest.fixture(scope="module")
def mixed():
    return load(dtype="mixed")


def test_mixed_keeps_the_decoder_and_what_it_promises(transcriber, mixed):
    recordings = [(n, read_audio(PACKAGE / "samples" / name)) for n, name in enumerate(SPOKEN)]
    encoded = mixed.encode(mixed.cut(recordings))
    assert (mixed.dtype, transcriber.dtype) == ("mixed", "float32")
    assert {parameter.dtype for parameter in mixed.model.encoder.parameters()} == {torch.bfloat16}
    memory, exact = encoded.prompts.memory_BMD, transcriber.encode(mixed.cut(recordings)).prompts.memory_BMD
    assert (memory.dtype, encoded.ctc.frames_BTD.dtype) == (torch.bfloat16, torch.bfloat16)
    size = mixed.decoder.lm_head.in_features  # behind that lies what CTC reads, of which one token may be another
    assert not torch.equal(memory, exact)
    difference = (memory - exact)[..., :size].norm() / exact[..., :size].norm()
    assert difference < 0.03
    expected = [result.tokens for result in mixed.decode(encoded, AUTOREGRESSIVE).results]
    assert [result.tokens for result in mixed.decode(encoded, VERIFY).results] == expected


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX")
def test_rounded_products_change_nothing_of_what_mixed_promises(mixed):
    encoded = mixed.encode(mixed.cut([(n, read_audio(PACKAGE / "samples" / name)) for n, name in enumerate(SPOKEN)]))
    mixed.costs  # noqa: B018 (found now, and not when something is decoded: that would undo what is prepared here)
    decoder, ways = mixed.decoder, mixed.decoder.ways
    try:
        decoder.prepare(Ways("onednn", rough=True, rounded=True))
        assert steady(decoder)
        expected = [result.tokens for result in mixed.decode(encoded, AUTOREGRESSIVE).results]
        for options in (VERIFY, DecodingOptions(drafts="mtp"), DecodingOptions(draft_length="full")):
            assert [result.tokens for result in mixed.decode(encoded, options).results] == expected
    finally:
        decoder.prepare(ways)


def test_it_is_small_and_says_what_it_is_and_whose():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) <= MEGABYTES * 1e6
    card = (FOLDER / "README.md").read_text()
    for section in ("## Figures", "## Data", "## Limits", "## Licence"):
        assert section in card
    assert "Permission is hereby granted" in (FOLDER / "LICENSE-whisper").read_text()


def test_it_hears_the_samples(transcriber):
    files = [PACKAGE / "samples" / name for name in SPOKEN]
    results = transcriber.transcribe(files, VERIFY)
    errors = count_errors(list(SPOKEN.values()), [result.text for result in results], NORMALIZER)
    assert errors.rate < 0.25
    assert all(result.text[0].isupper() for result in results)  # it writes what people read
    assert all(segment.truncated is None for result in results for segment in result.segments)


@pytest.mark.parametrize(("drafts", "reduction"), [("mtp", 1.5), ("ctc", 2), ("both", 2)])
def test_verification_writes_what_autoregression_writes_in_fewer_calls(transcriber, batch, drafts, reduction):
    verify = DecodingOptions(strategy="verify", drafts=drafts, draft_length=None if drafts == "mtp" else "full")
    plain, verified = (transcriber.decode(batch, options).results for options in (AUTOREGRESSIVE, verify))
    reference = decode_reference(transcriber.decoder, batch.prompts, AUTOREGRESSIVE, max_tokens=batch.max_tokens)
    assert [result.tokens for result in plain] == [result.tokens for result in reference]
    assert [result.tokens for result in verified] == [result.tokens for result in reference]
    assert sum(result.num_calls for result in verified) < sum(result.num_calls for result in plain) / reduction


@pytest.mark.parametrize(("drafts", "reduction"), [("mtp", 1.3), ("both", 1.5)])
def test_a_beam_is_the_textbooks_in_fewer_calls(transcriber, batch, drafts, reduction):
    options = DecodingOptions(strategy="beam", drafts=drafts, nbest=2)
    results = transcriber.decode(batch, options).results
    expected = beam_reference(transcriber.decoder, batch.prompts, options, max_tokens=batch.max_tokens)
    for result, hypotheses in zip(results, expected, strict=True):
        assert [each.tokens for each in result.hypotheses] == [each.tokens for each in hypotheses]
        scores = [each.score for each in hypotheses]
        assert [each.score for each in result.hypotheses] == pytest.approx(scores, abs=1e-2)
        assert reduction * result.num_calls < len(result.trace)


def test_a_recording_alone_gives_what_it_gives_in_a_batch(transcriber, batch):
    together = transcriber.decode(batch, VERIFY).results
    for chunk, result in zip(batch.chunks, together, strict=True):
        assert transcriber.decode(transcriber.encode([chunk]), VERIFY).results[0].tokens == result.tokens


@pytest.mark.parametrize(("rough", "tolerance"), [(False, 1e-3), (True, 0.03)])
def test_cached_hidden_states_are_those_of_one_forward_pass(transcriber, batch, monkeypatch, rough, tolerance):
    """Head 1's log-probabilities from step after step through the cache, against the whole text at once."""
    decoder = transcriber.decoder
    assert transcriber.costs  # measured before the next line
    monkeypatch.setattr(decoder, "_rough", RoughUnembedding(decoder.lm_head) if rough else None)
    for row, result in enumerate(transcriber.decode(batch, AUTOREGRESSIVE).results):
        prompt = batch.prompts.row(row)
        with torch.inference_mode():
            text, places = torch.tensor([result.tokens]), 1 + torch.arange(len(result.tokens))[None]
            hidden = full_forward(decoder, prompt, decoder.embed(text, places)[0])[int(prompt.lengths_B) - 1 :]
            log_probs = decoder.logits(hidden).log_softmax(-1)
        tokens = torch.tensor([record.token for record in result.trace])
        expected = log_probs[: len(tokens)].gather(1, tokens[:, None])[:, 0]
        seen = torch.tensor([record.log_probability for record in result.trace])
        assert torch.allclose(seen, expected, atol=tolerance)


def test_transformers_generate_writes_the_same(transcriber, batch):
    model = transcriber.model
    results = transcriber.decode(batch, AUTOREGRESSIVE).results
    written = generate(model, batch.prompts, max_tokens=max(batch.max_tokens))
    for tokens, result in zip(written, results, strict=True):
        assert tokens[:-1] == result.tokens
        assert tokens[-1] == model.config.eos_token_id


def test_saved_and_loaded_it_writes_the_same(transcriber, batch, tmp_path):
    transcriber.model.save_pretrained(tmp_path)
    again = SpeechLlamaForConditionalGeneration.from_pretrained(tmp_path)
    transcriber.processor.save_pretrained(tmp_path)
    assert again.config.weight_storage == "float"
    chunk: Chunk = batch.chunks[0]
    other = load(str(tmp_path))
    wanted = transcriber.decode(transcriber.encode([chunk]), VERIFY).results[0].tokens
    assert other.decode(other.encode([chunk]), VERIFY).results[0].tokens == wanted


def test_loading_is_quiet():
    """Whoever loads the model from Python is told of no troubles that are none."""
    code = "import leapasr; print(leapasr.load().language)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "en\n"
    assert "[transformers]" not in done.stderr
