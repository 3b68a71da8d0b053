"""How a text came about, for people."""

import re

import pytest

from leapasr.decoding import DecodingOptions
from leapasr.decoding.trace import accept_lengths
from leapasr.explaining import BOUNDARY, explain
from leapasr.transcriber import load
from leapasr.transcription import Transcription


@pytest.fixture(scope="module")
def transcriber(tiny_model_folder):
    return load(str(tiny_model_folder))


@pytest.mark.parametrize("drafts", ["mtp", "both"])
def test_every_call_has_a_boundary_and_every_token_a_source(transcriber, babble, drafts):
    length = None if drafts == "mtp" else "full"
    result = transcriber.transcribe(babble(2.0, 3), DecodingOptions(drafts=drafts, draft_length=length))
    text = explain(result, transcriber.processor, color=False, width=10_000)
    assert "\x1b" not in text
    *segments, sources, calls = text.splitlines()
    assert text.count(BOUNDARY) == result.decoder_calls
    for line, segment in zip(segments, result.segments, strict=True):
        assert line.startswith(f"[{segment.start:.2f} to {segment.end:.2f} s] {BOUNDARY}")
        said = re.sub(r"^\[[^\]]*\] ", "", line).replace(BOUNDARY, "")
        for record in segment.trace:
            if record.rejected:
                said = said.replace(
                    f"({transcriber.processor.tokenizer.decode([record.rejected.token]).strip()})", "", 1
                )
        assert "".join(said.split()) == "".join(segment.text.split())
    counted = {name: int(number) for name, number in re.findall(r"(\w+) (\d+)", sources)}
    assert sum(counted.values()) == result.num_tokens
    assert calls.startswith(f"{result.decoder_calls} decoder calls")
    told = {int(length): int(count) for length, count in re.findall(r"(\d+): (\d+)", calls)}
    assert sum(length * count for length, count in told.items()) == result.num_tokens
    assert max(told) == max(max(accept_lengths(segment.trace)) for segment in result.segments)


def test_colours_are_for_terminals(transcriber, babble):
    result = transcriber.transcribe(babble(1.0, 5))
    assert "\x1b[" in explain(result, transcriber.processor, color=True)


def test_silence(transcriber):
    text = explain(Transcription([], 3.0, 0.0, 0.0), transcriber.processor, color=False)
    assert "0 decoder calls, by tokens that they emitted: none" in text
