"""How a text came about, for people to read: which source each token is of, and where the decoder calls lie."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from leapasr.decoding.trace import TokenRecord, accept_length_histogram
from leapasr.model.processing import SpeechLlamaProcessor
from leapasr.transcription import Segment, Transcription

STYLES = {"head1": "bold", "bonus": "bold", "ctc": "green", "jacobi": "yellow", "beam": "magenta"}  # heads 2..K: cyan
BOUNDARY = "│"


def explain(transcription: Transcription, processor: SpeechLlamaProcessor, *, color: bool, width: int = 100) -> str:
    """The text, a bar before the tokens of each decoder call, tokens coloured by source, and what the calls emitted.

    Args:
        processor: of the model.
        color: whether to colour, with a terminal's escape codes.
        width: characters to a line.
    """
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=color, color_system="standard" if color else None)
    for segment in transcription.segments:
        console.print(
            Text.assemble((f"[{segment.start:.2f} to {segment.end:.2f} s] ", "dim"), *_pieces(segment, processor))
        )
    legend = ((source, f" {count}  ") for source, count in _sources(transcription).items())
    console.print(
        Text.assemble("tokens by source: ", *(part for name, count in legend for part in ((name, _style(name)), count)))
    )
    lengths = accept_length_histogram(transcription.trace)
    counted = ", ".join(f"{length}: {count}" for length, count in sorted(lengths.items()))
    console.print(f"{transcription.decoder_calls} decoder calls, by tokens that they emitted: {counted or 'none'}")
    return out.getvalue()


def _style(source: str) -> str:
    return STYLES.get(source, "cyan")


def _sources(transcription: Transcription) -> Counter[str]:
    return Counter(record.source for trace in transcription.trace for record in trace)


def token_texts(segment: Segment, processor: SpeechLlamaProcessor) -> list[str]:
    """What each of a segment's tokens adds to its text; a character that several tokens make up comes with the last."""
    texts, text = [], ""
    for end in range(1, len(segment.tokens) + 1):
        longer = processor.tokenizer.decode(segment.tokens[:end], skip_special_tokens=True).rstrip("\ufffd")
        texts.append(longer[len(text) :])
        text = longer
    return texts


def rejected_text(record: TokenRecord, processor: SpeechLlamaProcessor) -> str:
    """The drafted token that head 1 replaced; empty if there was none."""
    return processor.tokenizer.decode([record.rejected.token]).strip() if record.rejected else ""


def _pieces(segment: Segment, processor: SpeechLlamaProcessor) -> Iterator[tuple[str, str]]:
    """Each token's text and style; a boundary before the first token of each call, and what a call replaced."""
    step, texts = None, token_texts(segment, processor)
    for index, record in enumerate(segment.trace):
        if record.step != step:
            step = record.step
            yield BOUNDARY, "dim"
        if index < len(texts):
            yield texts[index], _style(record.source)
        if record.rejected:
            yield f"({rejected_text(record, processor)})", "red strike"
