"""The command line: parses arguments and hands them on. A function a command, no logic.

Exit codes: 0 all went well; 1 some of it could not be done, and the rest was; 2 an argument or its value is wrong.
Whatever is wrong has a line on standard error.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from leapasr.decoding.options import DecodingOptions
    from leapasr.whisper_transcriber import WhisperOptions

app = typer.Typer(
    help="Speech recognition with a language model inside that predicts several tokens per decoder call.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},  # Whisper's --output_format, ...
)

Model = Annotated[str | None, typer.Option(help="Model folder or hub name; without it, the model in the package.")]
Strategy = Annotated[
    Literal["autoregressive", "threshold", "verify", "relaxed", "beam", "calibrated"],
    typer.Option(
        help="One token per call; heads trusted above a threshold; drafts checked by the next call; those accepted "
        "that the decoder finds nearly as likely as its best; the likeliest of several texts; what calibration found."
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(help="For --strategy threshold: least probability of a trusted token, 0 to 1; for beam: trust heads."),
]
Ratio = Annotated[
    float | None,
    typer.Option(
        help="For --strategy relaxed: least probability of an accepted token, as a share of the best's, 0 to 1."
    ),
]
Top = Annotated[int | None, typer.Option(help="For --strategy relaxed: accepted tokens are among so many best; 3.")]
BeamSize = Annotated[int | None, typer.Option(help="For --strategy beam: hypotheses kept; 4.")]
Heads = Annotated[int | None, typer.Option(help="Heads to use, head 1 included; all without it.")]
Drafts = Annotated[
    Literal["mtp", "ctc", "both"] | None,
    typer.Option(
        help="For --strategy verify, relaxed, beam: check the heads' tokens (mtp), CTC's tokens, or both in one draft."
    ),
]
DraftLength = Annotated[
    Literal["worthwhile", "full"] | None,
    typer.Option(help="For --strategy verify, beam: drafts as long as is fastest on this machine, or all; worthwhile."),
]
Adapter = Annotated[
    Path | None, typer.Option(help="For a Whisper: folder of heads that 'leapasr fit' made; else those in the package.")
]
Language = Annotated[
    str | None, typer.Option(help="For a Whisper: language of all audio; detected for each stretch without it.")
]
Task = Annotated[
    Literal["transcribe", "translate"] | None, typer.Option(help="For a Whisper: translate is into English.")
]
Timestamps = Annotated[
    bool, typer.Option("--timestamps", help="For a Whisper: go through recordings by the model's own timestamps.")
]
Conditioned = Annotated[
    bool,
    typer.Option("--condition-on-previous-text", help="For a Whisper, with --timestamps: go on from the text before."),
]
Use = Annotated[Literal["train", "dev", "test"] | None, typer.Option(help="Only utterances of this use.")]
Limit = Annotated[int | None, typer.Option(min=1, help="So many utterances, spread over each manifest.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Stretches of audio computed together.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU, if there is one, without it.")]
Dtype = Annotated[
    Literal["float32", "auto", "mixed", "bfloat16", "float16"],
    typer.Option(
        help="Floating-point type to compute in; mixed: speech side in bfloat16, decoder in float32, its products in "
        "bfloat16 where that is faster; auto: mixed where that is faster, else float32."
    ),
]


def complain(message: str) -> None:
    """A line on standard error."""
    typer.echo(f"leapasr: {' '.join(message.split())}", err=True)


def whisper_options(**fields: Any) -> WhisperOptions | None:
    """What a Whisper is asked to write; None where the command line says nothing of it."""
    given = {name: value for name, value in fields.items() if value}
    if not given:
        return None
    from leapasr.whisper_transcriber import WhisperOptions

    return WhisperOptions(**given)


@contextmanager
def reported() -> Iterator[None]:
    """What users can cause becomes a line on standard error and an exit code, and warnings become lines, too."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: complain(f"warning: {message}")
        try:
            yield
        except typer.Exit:  # a RuntimeError, too
            raise
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            complain(str(error) or type(error).__name__)
            raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error


@contextmanager
def progress_bar(description: str, *, total: float | None, unit: str, hidden: bool = False) -> Iterator[Callable]:
    """A bar on standard error, if that is a terminal; gives a function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    amount = f"{{task.completed:,.0f}}{'' if total is None else ' of {task.total:,.0f}'} {unit}"
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn(amount), TimeElapsedColumn())
    disable = hidden or not console.is_terminal
    options: dict[str, Any] = {"console": console, "disable": disable, "transient": True, "redirect_stdout": False}
    with Progress(*columns, **options) as progress:
        bar = progress.add_task(description, total=total)
        yield lambda amount: progress.advance(bar, amount)


def quiet_libraries() -> None:
    """Only our own messages: one line each."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lhotse")


def decoding_options(model: str | None, **fields: Any) -> DecodingOptions:
    """The options that the command line gives, or those that calibration left with the model."""
    from leapasr.decoding.options import DecodingOptions

    if fields["strategy"] != "calibrated":
        return DecodingOptions(**fields)
    from leapasr.evaluation.calibration import calibrated_options
    from leapasr.transcriber import locate

    given = [
        f"--{name.replace('_', '-')}" for name, value in fields.items() if name != "strategy" and value is not None
    ]
    if given:
        raise ValueError(f"strategy 'calibrated' has its options from the model: leave out {', '.join(given)}")
    return calibrated_options(locate(model))


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
    if version:
        import leapasr

        typer.echo(leapasr.__version__)
        raise typer.Exit


@app.command()
def transcribe(
    files: Annotated[
        list[Path],
        typer.Argument(help="Audio or video files, folders of them, globs ('talks/*.mp3'); - is standard input."),
    ],
    model: Model = None,
    strategy: Strategy = "verify",
    threshold: Threshold = None,
    ratio: Ratio = None,
    top: Top = None,
    beam_size: BeamSize = None,
    heads: Heads = None,
    drafts: Drafts = None,
    draft_length: DraftLength = None,
    nbest: Annotated[
        int | None, typer.Option(help="For --strategy beam: texts of each stretch of audio, for --output-format json.")
    ] = None,
    output_format: Annotated[
        Literal["txt", "vtt", "srt", "tsv", "json", "all"],
        typer.Option("--output-format", "-f", "--format", help="What to write."),
    ] = "txt",
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir",
            "-o",
            help="Folder for a transcript a file; without it, they are printed. Files whose transcripts are there are "
            "skipped.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Transcribe again files whose transcripts are there.")
    ] = False,
    language: Annotated[
        str | None, typer.Option(help="Language of the speech, a code or a name; refused if the model has another.")
    ] = None,
    adapter: Adapter = None,
    task: Task = None,
    timestamps: Timestamps = False,
    condition_on_previous_text: Conditioned = False,
    initial_prompt: Annotated[
        str | None, typer.Option(help="Text to go on from; refused, as models here take none.")
    ] = None,
    word_timestamps: Annotated[
        bool | None, typer.Option(help="Times of words; without either, where the format has a place for them.")
    ] = None,
    max_line_width: Annotated[int | None, typer.Option(help="Characters of a line of subtitles; 42.")] = None,
    max_line_count: Annotated[int | None, typer.Option(help="Lines of a subtitle; 2.")] = None,
    clip_timestamps: Annotated[
        str,
        typer.Option(
            help="START,END,START,END,... in seconds: transcribe that alone; without the last END, to the end."
        ),
    ] = "0",
    vad_filter: Annotated[bool, typer.Option(help="Leave out stretches in which the encoder hears no speech.")] = True,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show which source each token is of, and where decoder calls lie.")
    ] = False,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Transcribe audio files."""
    with reported():
        options = decoding_options(
            model,
            strategy=strategy,
            threshold=threshold,
            ratio=ratio,
            top=top,
            beam_size=beam_size,
            nbest=nbest,
            num_heads=heads,
            drafts=drafts,
            draft_length=draft_length,
        )
        from leapasr.explaining import explain as explain_text
        from leapasr.transcriber import load
        from leapasr.transcribing import clips_of, plan, transcribe_files

        clips = clips_of(clip_timestamps)
        job = plan(
            files,
            format=output_format,
            output_folder=output_dir,
            overwrite=overwrite,
            word_times=word_timestamps,
            max_line_width=max_line_width,
            max_line_count=max_line_count,
            nbest=nbest,
            explained=explain,
        )
        quiet_libraries()
        whisper = whisper_options(
            task=task, timestamps=timestamps, condition_on_previous_text=condition_on_previous_text
        )
        transcriber = load(model, device=device, dtype=dtype, adapter=adapter, whisper=whisper)
        transcriber.check(options, language=language, initial_prompt=initial_prompt)
    to_terminal = output_dir is None and sys.stdout.isatty()
    explanation = partial(explain_text, processor=transcriber.processor, color=to_terminal) if explain else None
    hidden = to_terminal or not sys.stderr.isatty()
    total = None if hidden else job.audio_seconds()
    with reported(), progress_bar("transcribing", total=total, unit="s of audio", hidden=hidden) as advance:
        summary = transcribe_files(
            transcriber,
            job,
            options,
            batch_size=batch_size,
            clips=clips,
            language=language,
            vad_filter=vad_filter,
            explanation=explanation,
            write=lambda text: typer.echo(text, nl=False),
            complain=complain,
            progress=advance,
        )
    typer.echo(str(summary), err=True)
    raise typer.Exit(1 if summary.num_bad else 0)


@app.command()
def evaluate(
    manifests: Annotated[list[Path], typer.Argument(help="Manifests: leapasr, NeMo, lhotse or Kaldi.")],
    model: Model = None,
    adapter: Adapter = None,
    language: Language = None,
    strategy: Strategy = "verify",
    threshold: Threshold = None,
    ratio: Ratio = None,
    top: Top = None,
    beam_size: BeamSize = None,
    heads: Heads = None,
    drafts: Drafts = None,
    draft_length: DraftLength = None,
    use: Use = None,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "float32",
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    hypotheses: Annotated[Path | None, typer.Option(help="Write a JSON line an utterance to this file.")] = None,
) -> None:
    """Score a model on manifests, and set a strategy against autoregressive decoding."""
    from rich.console import Console

    with reported():
        options = decoding_options(
            model,
            strategy=strategy,
            threshold=threshold,
            ratio=ratio,
            top=top,
            beam_size=beam_size,
            num_heads=heads,
            drafts=drafts,
            draft_length=draft_length,
        )
        from leapasr.data.manifests import read_manifest
        from leapasr.evaluation.evaluate import evaluate as evaluate_cuts
        from leapasr.evaluation.evaluate import write_hypotheses, write_reports
        from leapasr.evaluation.table import report_table
        from leapasr.transcriber import load

        quiet_libraries()
        transcriber = load(
            model, device=device, dtype=dtype, adapter=adapter, whisper=whisper_options(language=language)
        )
        transcriber.check(options)
    reports, failed = [], False
    with reported():
        for path in manifests:
            try:
                manifest = read_manifest(path, use=use, limit=limit)
                seconds = sum(cut.duration for cut in manifest.cuts)
                with progress_bar(str(path), total=seconds, unit="s of audio") as advance:
                    reports += evaluate_cuts(
                        transcriber,
                        manifest.cuts,
                        [options],
                        batch_size=batch_size,
                        test_set=str(path),
                        problems=manifest.problems,
                        progress=advance,
                    )
            except (ValueError, OSError) as error:
                complain(str(error))
                failed = True
        for report in reports:
            for problem in report.problems:
                complain(f"{report.test_set}: {problem}")
                failed = True
        if reports:
            Console().print(report_table(reports))
            if json:
                write_reports(reports, json)
            if hypotheses:
                write_hypotheses(reports, hypotheses)
    raise typer.Exit(1 if failed else 0)


@app.command()
def bench(
    manifests: Annotated[
        list[Path] | None, typer.Argument(help="Manifests: leapasr, NeMo, lhotse or Kaldi. None with --replay.")
    ] = None,
    model: Model = None,
    adapter: Adapter = None,
    language: Language = None,
    use: Use = None,
    limit: Limit = None,
    batch_size: Annotated[str, typer.Option(help="Stretches of audio computed together: sizes, by commas.")] = "1,8",
    repeat: Annotated[int, typer.Option(min=1, help="Rounds in which every system takes its turn.")] = 3,
    peer: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER of a faster-whisper model to time as well; may be repeated.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    json: Annotated[Path | None, typer.Option(help="Write a row a system and batch size to this file.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for speedup.png and time.png.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write to this file what each call verified and emitted; times nothing.")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Time such a trace on a decoder of random weights instead of a model.")
    ] = None,
    decoder_size: Annotated[str, typer.Option(help="For --replay: 125m, 1b or 8b.")] = "1b",
) -> None:
    """Time strategies side by side with transformers' generate, and faster-whisper, on the same audio."""
    from rich.console import Console

    if (replay is None) == (not manifests):
        raise typer.BadParameter("give manifests, or --replay TRACE")
    if replay:
        with reported():
            _replay(replay, decoder_size, batch_size, rounds=repeat, device=device, dtype=dtype, json=json)
        return
    assert manifests
    with reported():
        import torch

        from leapasr.evaluation import bench as timing
        from leapasr.evaluation.bench_report import bench_table, draw, write_rows
        from leapasr.evaluation.peers import FasterWhisper
        from leapasr.evaluation.systems import build_systems
        from leapasr.transcriber import load

        sizes, folders = timing.sizes_of(batch_size), timing.folders_of(peer or [])
        utterances = timing.read_utterances(manifests, use=use, limit=limit)
        for problem in utterances.problems:
            complain(problem)
        quiet_libraries()
        if threads:
            torch.set_num_threads(threads)
        transcriber = load(
            model, device=device, dtype=dtype, adapter=adapter, whisper=whisper_options(language=language)
        )
        if trace:
            from leapasr.evaluation.replay import record, write_trace

            write_trace(record(transcriber, utterances), trace)
            raise typer.Exit(1 if utterances.problems else 0)
        kind = transcriber.model.device.type
        systems = build_systems(
            transcriber, [FasterWhisper(name, folder, device=kind) for name, folder in folders.items()]
        )
        total = timing.num_turns(systems, sizes, repeat)
        with progress_bar("rounds", total=total, unit="turns") as advance:
            rows = timing.bench(transcriber, systems, utterances, batch_sizes=sizes, rounds=repeat, progress=advance)
        Console(width=None if sys.stdout.isatty() else 200).print(bench_table(rows))
        if json:
            write_rows(rows, json)
        if plots:
            for path in draw(rows, plots):
                typer.echo(path)
    raise typer.Exit(1 if utterances.problems else 0)


def _replay(
    trace: Path, size: str, batch_size: str, *, rounds: int, device: str | None, dtype: str, json: Path | None
) -> None:
    from rich.console import Console

    from leapasr.evaluation.bench import sizes_of
    from leapasr.evaluation.bench_report import write_rows
    from leapasr.evaluation.replay import read_trace, replay_table
    from leapasr.evaluation.replay import replay as replay_trace

    texts, sizes = read_trace(trace), sizes_of(batch_size)
    quiet_libraries()
    with progress_bar(f"replay, {size}", total=1, unit="of it") as advance:
        rows = replay_trace(
            texts, size=size, batch_sizes=sizes, rounds=rounds, device=device, dtype=dtype, progress=advance
        )
    Console(width=None if sys.stdout.isatty() else 200).print(replay_table(rows))
    if json:
        write_rows(rows, json)


@app.command()
def calibrate(
    dev: Annotated[Path, typer.Option(help="Manifest to calibrate on: its lines with use = dev.")],
    max_wer_increase: Annotated[
        str, typer.Option(help="Most WER increase, as a share of autoregressive decoding's WER, with 95% confidence.")
    ] = "1%",
    test: Annotated[Path | None, typer.Option(help="Manifest to report on: its lines with use = test.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder; without it, the model in the package.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many utterances of each, spread over it.")] = None,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Find the fastest setting whose WER increase stays inside a budget, and keep it with the model."""
    from rich.console import Console

    with reported():
        from leapasr.data.manifests import read_manifest
        from leapasr.evaluation.calibration import budget_of, calibration_table, save_calibration
        from leapasr.evaluation.calibration import calibrate as calibrate_on
        from leapasr.evaluation.evaluate import evaluate as evaluate_cuts
        from leapasr.evaluation.table import report_table
        from leapasr.transcriber import load, locate

        budget, folder = budget_of(max_wer_increase), Path(locate(model))
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder, and calibration is kept with the model: give a local copy")
        cuts = read_manifest(dev, use="dev", limit=limit).cuts
        test_cuts = read_manifest(test, use="test", limit=limit).cuts if test else None
        quiet_libraries()
        transcriber = load(str(folder), device=device, dtype=dtype)
        with progress_bar(str(dev), total=sum(cut.duration for cut in cuts), unit="s of audio") as advance:
            found = calibrate_on(
                transcriber, list(cuts), budget=budget, batch_size=batch_size, test_set=str(dev), progress=advance
            )
        Console().print(calibration_table(found))
        if found.chosen is None:
            complain(f"no setting has fewer calls than verification and a WER increase of at most {budget:.2%}")
            raise typer.Exit(1)
        options = found.candidates[found.chosen]
        typer.echo(save_calibration(found, folder))
        if test_cuts is not None:
            seconds = sum(cut.duration for cut in test_cuts)
            with progress_bar(str(test), total=seconds, unit="s of audio") as advance:
                reports = evaluate_cuts(
                    transcriber, test_cuts, [options], batch_size=batch_size, test_set=str(test), progress=advance
                )
            Console().print(report_table(reports))


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder of checkpoints, logs and the trained model.")],
    preset: Annotated[
        str,
        typer.Option(
            help="tiny (what ships: a Whisper, decoder and all), scratch (a new decoder behind a Whisper encoder), "
            "base (the paper's scale), heads (on the frozen --init model), or mwer (all of the --init model, for "
            "fewer word errors)."
        ),
    ] = "tiny",
    manifest: Annotated[
        list[str] | None, typer.Option(help="Training manifest; with =WEIGHT, how often an epoch holds it.")
    ] = None,
    dev: Annotated[list[Path] | None, typer.Option(help="Manifest to evaluate on: its lines with use = dev.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Prose, plain or .xz, a paragraph a line.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Pretrained encoder, for tiny a whole Whisper: hub name or folder.")
    ] = None,
    init: Annotated[Path | None, typer.Option(help="Go on from this leapasr model instead of building one.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Heads of the model, head 1 included.")] = None,
    head_type: Annotated[
        Literal["projection", "latent", "residual", "sequential"] | None, typer.Option(help="What heads 2 to K are.")
    ] = None,
    draft_layers: Annotated[
        int | None, typer.Option(min=0, help="Decoder layers that heads 2 to K have to themselves.")
    ] = None,
    stages: Annotated[str | None, typer.Option(help="Only these stages of the preset, by commas.")] = None,
    updates: Annotated[int | None, typer.Option(min=1, help="Updates of every stage, instead of the preset's.")] = None,
    augmentation: Annotated[bool, typer.Option(help="Vary speed, noise, room, and mask features.")] = True,
    nbest: Annotated[int | None, typer.Option(min=1, help="For mwer: hypotheses of a list (4).")] = None,
    reference: Annotated[
        bool | None, typer.Option(help="For mwer: whether the reference joins each list (no).")
    ] = None,
    ce_weight: Annotated[
        float | None, typer.Option(min=0, help="For mwer: weight of the cross-entropy on the reference (1).")
    ] = None,
    calls_weight: Annotated[
        float | None,
        typer.Option(min=0, help="For mwer: word errors that a decoder call weighs, for heads 2 to K (0)."),
    ] = None,
    encoder_cache: Annotated[
        Path | None, typer.Option(help="Folder to keep a frozen encoder's output in; needs --no-augmentation.")
    ] = None,
    precision: Annotated[Literal["bf16", "fp32"], typer.Option(help="Of the forward and backward pass.")] = "bf16",
    compile: Annotated[bool, typer.Option(help="Compile the layers: slow to start, then faster.")] = True,
    seed: Annotated[int, typer.Option(help="Of new weights, the order of data, and augmentation.")] = 1,
) -> None:
    """Train a model, stage by stage. The same command goes on where it was interrupted."""
    from leapasr.training.run import train as run_training

    quiet_libraries()
    with reported():
        folder = run_training(
            preset,
            output=output,
            manifests=manifest or [],
            dev=dev or [],
            text=text or [],
            encoder=encoder,
            initial_model=init,
            num_heads=heads,
            head_type=head_type,
            draft_layers=draft_layers,
            stages=stages,
            updates=updates,
            augment=augmentation,
            nbest=nbest,
            reference=reference,
            ce_weight=ce_weight,
            calls_weight=calls_weight,
            encoder_cache=encoder_cache,
            precision=precision,
            compile=compile,
            seed=seed,
            report=complain,
        )
    typer.echo(folder)


@app.command()
def fit(
    model: Annotated[str, typer.Argument(help="Whisper: hub name, transformers folder or CTranslate2 folder.")],
    audio: Annotated[
        list[Path], typer.Option(help="Manifest, or folder of audio files; may be repeated. Transcripts are not read.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the fitted heads.")],
    heads: Annotated[int, typer.Option(min=2, help="Heads, head 1 included, which is the model's own.")] = 5,
    head_type: Annotated[
        Literal["latent", "residual", "sequential"], typer.Option(help="What heads 2 to K are.")
    ] = "sequential",
    adapter_size: Annotated[int, typer.Option(min=4, help="Width of what reads the encoder for CTC.")] = 256,
    adapter_layers: Annotated[int, typer.Option(min=1, help="Its layers.")] = 2,
    updates: Annotated[int, typer.Option(min=1, help="Updates of training.")] = 3000,
    learning_rate: Annotated[float, typer.Option(min=0, help="The peak.")] = 1e-3,
    init: Annotated[
        Path | None, typer.Option(help="Folder of heads to begin with, of the same model and shape; new ones without.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for what the model makes of the audio; in --output without it.")
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Language of all audio; without it, what manifests say, or what is detected.")
    ] = None,
    precision: Annotated[Literal["bf16", "fp32"], typer.Option(help="Of products.")] = "bf16",
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of new weights and the order of lessons.")] = 1,
) -> None:
    """Fit heads to a Whisper: the same output in fewer decoder calls. The same command goes on where it stopped."""
    quiet_libraries()
    with reported():
        from leapasr.training.fit import FitConfig
        from leapasr.training.fit import fit as fit_heads
        from leapasr.transcriber import device_of

        folder = fit_heads(
            model,
            audio,
            output,
            FitConfig(
                num_heads=heads,
                head_type=head_type,
                adapter_size=adapter_size,
                adapter_layers=adapter_layers,
                precision=precision,
                updates=updates,
                learning_rate=learning_rate,
                seed=seed,
            ),
            init=init,
            cache=cache,
            language=language,
            device=device_of(device),
            progress=lambda description, total: progress_bar(description, total=total, unit=""),
            complain=complain,
        )
    typer.echo(folder)


@app.command()
def average(
    models: Annotated[list[Path], typer.Argument(help="Folders of models that began as the same one.")],
    output: Annotated[Path, typer.Option(help="Folder of the averaged model.")],
) -> None:
    """Average the weights of runs that began with the same model: often better than each of them."""
    from leapasr.model.averaging import average_models
    from leapasr.model.processing import SpeechLlamaProcessor

    quiet_libraries()
    with reported():
        model = average_models(models)
        model.save_pretrained(output)
        SpeechLlamaProcessor.from_pretrained(models[0]).save_pretrained(output)
    typer.echo(output)


@app.command()
def serve(
    model: Model = None,
    adapter: Adapter = None,
    language: Language = None,
    task: Task = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 is all that this machine has.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen at; 0 is any that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="LEAPASR_API_KEY", help="Key that clients must give; none without it.")
    ] = None,
    batch_size: BatchSize = 8,
    max_upload_mb: Annotated[float, typer.Option(min=0, help="Most megabytes of a request.")] = 25,
    max_seconds: Annotated[float, typer.Option(min=0, help="Longest recording.")] = 3600,
    queue: Annotated[int, typer.Option(min=1, help="Most transcriptions in hand; others are told to come again.")] = 64,
    timeout: Annotated[float, typer.Option(min=0, help="Most seconds from a request's first byte to its text.")] = 600,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Serve OpenAI's transcription API, and a page to try it with."""
    with reported():
        from leapasr.serving.limits import Limits
        from leapasr.serving.server import is_loopback, served_name
        from leapasr.serving.server import serve as serve_model
        from leapasr.transcriber import load

        limits = Limits(
            upload_bytes=int(max_upload_mb * 1e6), audio_seconds=max_seconds, num_requests=queue, timeout=timeout
        )
        quiet_libraries()
        transcriber = load(
            model, device=device, dtype=dtype, adapter=adapter, whisper=whisper_options(language=language, task=task)
        )
        if not api_key and not is_loopback(host):
            complain(f"warning: whoever reaches {host} can use this server: give it an --api-key")
        serve_model(
            transcriber,
            name=served_name(model),
            host=host,
            port=port,
            api_key=api_key or None,
            batch_size=batch_size,
            limits=limits,
        )


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="Model folder or hub name.")] = None, adapter: Adapter = None
) -> None:
    """Show what a model is made of."""
    from rich.console import Console
    from rich.table import Table

    from leapasr.transcriber import load, locate

    quiet_libraries()
    with reported():
        place = locate(model)
        transcriber = load(place, device="cpu", adapter=adapter)
        information = transcriber.describe(place)
    table = Table(place, "", show_lines=False)
    for name, value in information.rows():
        table.add_row(name, value)
    Console().print(table)


@app.command()
def synthesize(
    text: Annotated[Path, typer.Argument(help="Prose, plain or .xz, a paragraph a line.")],
    output: Annotated[Path, typer.Option(help="Folder for manifest.jsonl and audio; what is there is continued.")],
    hours: Annotated[float, typer.Option(min=0.0, help="Hours of speech, what is there already included.")],
    language: Annotated[str, typer.Option(help="Code.")] = "en",
    voices: Annotated[
        str | None,
        typer.Option(
            help="Speech engines with shares, by commas; in English hibari:0.9,espeak-ng:0.04,flite:0.06, in German, "
            "Spanish, French and Italian pico2wave, else espeak-ng."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the texts' order, voices and speeds.")] = 1,
) -> None:
    """Speak prose with the voices that are installed: training data."""
    from leapasr.data.synthesis import parse_voices, passages, read_paragraphs, usual_voices
    from leapasr.data.synthesis import synthesize as synthesize_speech

    with reported(), progress_bar("speaking", total=hours * 3600, unit="s of speech") as advance:
        spoken = 0.0

        def progress(seconds: float) -> None:
            nonlocal spoken
            advance(seconds - spoken)
            spoken = seconds

        manifest = synthesize_speech(
            passages(read_paragraphs(text), seed=seed, language=language),
            output,
            hours=hours,
            engines=parse_voices(voices or usual_voices(language)),
            seed=seed,
            language=language,
            num_workers=workers,
            progress=progress,
        )
    typer.echo(manifest)


@app.command()
def restore(
    manifest: Annotated[Path, typer.Argument(help="leapasr manifest with bare transcripts.")],
    output: Annotated[Path, typer.Option(help="Manifest to write.")],
    prose: Annotated[Path | None, typer.Option(help="Books, plain or .xz, a paragraph a line, to look up.")] = None,
    whisper: Annotated[Path | None, typer.Option(help="faster-whisper model folder for what books lack.")] = None,
    use: Annotated[Literal["train", "dev", "test"], typer.Option(help="Lines of this use.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="So many lines, spread over the manifest.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads for Whisper.")] = 1,
) -> None:
    """Give bare transcripts case and punctuation: training targets."""
    from leapasr.data.restoration import restore_manifest

    with reported():
        counts = restore_manifest(
            manifest, output, prose=prose, whisper=whisper, use=use, limit=limit, num_threads=threads
        )
    typer.echo(", ".join(f"{source}: {count}" for source, count in counts.most_common()))
