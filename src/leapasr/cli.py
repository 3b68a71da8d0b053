"""The command line: parses arguments and calls the package; no logic of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__.splitlines()[0])


@contextmanager
def user_errors() -> Iterator[None]:
    """A mistake of the user's becomes one line and exit code 2, not a traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        typer.echo(f"leapasr: {error}", err=True)
        raise typer.Exit(2) from error


@app.command()
def transcribe(
    files: Annotated[list[Path], typer.Argument(help="Recordings, in any container.")],
    model: Annotated[str | None, typer.Option(help="Hub name or folder; default: the model in the package.")] = None,
    strategy: Annotated[str, typer.Option(help="autoregressive, threshold or verify.")] = "verify",
    threshold: Annotated[float | None, typer.Option(help="For strategy threshold: trust a head from here on.")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads to use; default: all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    device: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Write what is said in each recording, with the decoder calls that it took."""
    with user_errors():
        from leapasr.decoding import DecodingOptions
        from leapasr.transcriber import Transcription, load

        options = DecodingOptions(strategy=strategy, threshold=threshold, num_heads=heads)  # type: ignore[arg-type]
        transcriber = load(model, device=device)
        failed = False
        for index, result in transcriber.transcribe_each(list(map(str, files)), options, batch_size=batch_size):
            if isinstance(result, Transcription):
                calls = f"{result.decoder_calls} decoder calls for {result.num_tokens} tokens"
                typer.echo(f"{files[index]}: {result.text}")
                typer.echo(f"  {calls}", err=True)
            else:
                failed = True
                typer.echo(f"leapasr: {result}", err=True)
    if failed:
        sys.exit(1)


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder of checkpoints, logs and the trained model.")],
    preset: Annotated[str, typer.Option(help="tiny (what ships) or base (the paper's scale).")] = "tiny",
    manifest: Annotated[
        list[str] | None, typer.Option(help="Training manifest, with :WEIGHT for how often an epoch holds it.")
    ] = None,
    dev: Annotated[list[Path] | None, typer.Option(help="Dev manifest (its lines with use = dev).")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Prose for tokenizer and text stage, plain or .xz.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Pretrained encoder: hub name or folder.")] = None,
    init: Annotated[Path | None, typer.Option(help="Start from this leapasr model, not the preset's parts.")] = None,
    stages: Annotated[str | None, typer.Option(help="Only these stages of the preset, comma-separated.")] = None,
    updates: Annotated[int | None, typer.Option(help="Updates of every stage, instead of the preset's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, data order and augmentation.")] = 1,
) -> None:
    """Train a model, stage by stage; the same command goes on where an interrupted run stopped."""
    with user_errors():
        from leapasr.training.run import train as run_training

        folder = run_training(
            preset, output=output, manifests=manifest or [], dev=dev or [], text=text or [], encoder=encoder,
            initial_model=init, stages=stages, updates=updates, seed=seed,
        )  # fmt: skip
    typer.echo(f"model: {folder}")


@app.command()
def synthesize(
    text: Annotated[Path, typer.Argument(help="Prose, plain or .xz.")],
    output: Annotated[Path, typer.Option(help="Folder for audio and manifest.jsonl.")],
    hours: Annotated[float, typer.Option(help="Hours of speech wanted, what is there already included.")],
    voices: Annotated[
        str, typer.Option(help="ENGINE:SHARE, comma-separated.")
    ] = "hibari:0.9,espeak-ng:0.04,flite:0.06",
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """Speak prose with the installed voices, as training data."""
    with user_errors():
        from leapasr.data.synthesis import parse_voices, passages, read_paragraphs
        from leapasr.data.synthesis import synthesize as run_synthesis

        texts = passages(read_paragraphs(text), seed=seed)
        manifest = run_synthesis(texts, output, hours=hours, engines=parse_voices(voices), seed=seed)
    typer.echo(f"manifest: {manifest}")


@app.command()
def restore(
    manifest: Annotated[Path, typer.Argument(help="Manifest with transcripts without case and punctuation.")],
    output: Annotated[Path, typer.Option(help="Manifest to write.")],
    prose: Annotated[Path | None, typer.Option(help="Books that the speech may be read from.")] = None,
    whisper: Annotated[Path | None, typer.Option(help="Whisper folder for faster-whisper, for all the rest.")] = None,
) -> None:
    """Give transcripts case and punctuation: from books, from Whisper, else by rule; the words stay."""
    with user_errors():
        from leapasr.data.restoration import restore_manifest

        typer.echo(restore_manifest(manifest, output, prose=prose, whisper=whisper))
