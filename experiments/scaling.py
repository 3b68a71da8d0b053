r"""How time and memory grow with a recording's length and with the number of heads: docs/scaling.md and .json.

    python experiments/scaling.py --speech SPEECH --peer tiny.en=CT2FOLDER [--dtype auto]

SPEECH is a folder with librispeech/manifest.jsonl, of whose test utterances recordings are joined. Each recording is
transcribed by a command of its own, so that its memory, and the time that starting takes, are its own; faster-whisper
(int8, greedy, its batched pipeline) hears the same files, up to an hour of them. Systems take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

from leapasr.audio import SAMPLE_RATE
from leapasr.data.manifests import read_manifest
from leapasr.decoding import DecodingOptions
from leapasr.evaluation.bench import bench, folders_of, peak_resident_mb, read_utterances
from leapasr.evaluation.evaluate import reference_of, samples_of
from leapasr.evaluation.scoring import count_errors
from leapasr.evaluation.systems import AUTOREGRESSIVE, Generate, Leapasr
from leapasr.text import NORMALIZER
from leapasr.transcriber import load

LENGTHS = {"10 s": 10, "1 min": 60, "10 min": 600, "1 h": 3600, "3 h": 10_800}  # least seconds
REPEATED = 600  # recordings up to so many seconds are transcribed `--rounds` times, longer ones once
PEERS_UP_TO = 3600
POLL_SECONDS = 0.05
NUM_HEADS = (2, 4, 6, 8)
UTTERANCES = 12
# a process of its own without torch: `leapasr.evaluation.peers` would take its time to start, and its memory
FASTER_WHISPER = """
import sys
from faster_whisper import BatchedInferencePipeline, WhisperModel
model = WhisperModel(sys.argv[1], device="cpu", compute_type="int8", cpu_threads=int(sys.argv[4]))
segments, _ = BatchedInferencePipeline(model).transcribe(
    sys.argv[2], batch_size=int(sys.argv[3]), language="en", beam_size=1, temperature=0.0, without_timestamps=True
)
print(" ".join(segment.text.strip() for segment in segments))
"""


@dataclass(frozen=True)
class LengthRow:
    """One system on one recording; seconds are of the whole command, its start included: median and range.

    peak_memory_mb: of its process. wer: a fraction of one.
    """

    system: str
    recording: str
    audio_seconds: float
    batch_size: int
    rounds: int
    seconds: float
    seconds_low: float
    seconds_high: float
    peak_memory_mb: float
    wer: float


@dataclass(frozen=True)
class Recording:
    """A file, and what is said in it."""

    name: str
    path: Path
    seconds: float
    text: str


def join_recordings(speech: Path, folder: Path, lengths: Sequence[str]) -> list[Recording]:
    """Test utterances one behind the other, chapter by chapter, up to each length; all begin alike."""
    cuts = sorted(read_manifest(speech / "librispeech" / "manifest.jsonl", use="test").cuts, key=lambda cut: cut.id)
    recordings: list[Recording] = []
    pieces: list[np.ndarray] = []
    texts: list[str] = []
    num_samples, rest = 0, iter(cuts)
    for name in sorted(lengths, key=LENGTHS.__getitem__):
        while num_samples < LENGTHS[name] * SAMPLE_RATE and (cut := next(rest, None)) is not None:
            pieces.append(samples_of(cut))
            texts.append(reference_of(cut))
            num_samples += len(pieces[-1])
        path = folder / f"{name.replace(' ', '')}.flac"
        soundfile.write(path, np.concatenate(pieces), SAMPLE_RATE)
        recordings.append(Recording(name, path, num_samples / SAMPLE_RATE, " ".join(texts)))
    return recordings


def run(command: Sequence[str]) -> tuple[str, float, float]:
    """What a command writes, its seconds, and its peak memory in MB."""
    peak = 0.0
    with tempfile.TemporaryFile("w+") as written:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=written, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            peak = peak_resident_mb(process.pid) or peak
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - start
        if process.returncode:
            raise SystemExit(f"{' '.join(command[:3])} … ended with {process.returncode}")
        written.seek(0)
        return written.read(), seconds, peak


def measure_lengths(arguments: argparse.Namespace, folder: Path) -> list[LengthRow]:
    """Rows by recording; a recording's systems take turns."""
    ours = [str(Path(sys.executable).with_name("leapasr")), "transcribe", "--dtype", arguments.dtype, "-f", "txt"]
    threads = str(torch.get_num_threads())
    rows = []
    for recording in join_recordings(arguments.speech, folder, arguments.lengths):
        repeated = LENGTHS[recording.name] <= REPEATED
        sizes = {"leapasr": 8} | ({"leapasr, one chunk at a time": 1} if repeated else {})
        commands = {
            name: (size, [*ours, "--batch-size", str(size), str(recording.path)]) for name, size in sizes.items()
        }
        if LENGTHS[recording.name] <= PEERS_UP_TO:
            for name, peer in folders_of(arguments.peer).items():
                given = [sys.executable, "-c", FASTER_WHISPER, peer, str(recording.path), "8", threads]
                commands[f"faster-whisper/{name}"] = (8, given)
        rounds = arguments.rounds if repeated else 1
        done: dict[str, list[tuple[str, float, float]]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, (_, command) in commands.items():
                done[name].append(run(command))
                print(recording.name, name, *(f"{figure:.1f}" for figure in done[name][-1][1:]), flush=True)
        for name, (batch_size, _) in commands.items():
            texts, seconds, memory = zip(*done[name], strict=True)
            assert len(set(texts)) == 1, f"{name} writes {recording.name} in {len(set(texts))} ways"
            if name.startswith("leapasr"):
                assert texts[0] == done["leapasr"][0][0], f"{name} writes another text of {recording.name}"
            rows.append(
                LengthRow(
                    system=name,
                    recording=recording.name,
                    audio_seconds=recording.seconds,
                    batch_size=batch_size,
                    rounds=rounds,
                    seconds=statistics.median(seconds),
                    seconds_low=min(seconds),
                    seconds_high=max(seconds),
                    peak_memory_mb=max(memory),
                    wer=count_errors([recording.text], [" ".join(texts[0].split())], NORMALIZER).rate,
                )
            )
    return rows


def measure_heads(arguments: argparse.Namespace) -> list[dict]:
    """A bench row a number of heads, drafts of the heads alone, behind those of one head and of `generate`."""
    transcriber = load(dtype=arguments.dtype)
    manifest = arguments.speech / "librispeech" / "manifest.jsonl"
    utterances = read_utterances([manifest], use="test", limit=UTTERANCES)
    plain = Leapasr(transcriber, DecodingOptions(strategy="autoregressive"))
    systems = [plain, Generate(transcriber)]
    for number in NUM_HEADS:
        system = Leapasr(transcriber, DecodingOptions(strategy="verify", drafts="mtp", num_heads=number))
        system.name = f"{system.name}, K = {number}"
        systems.append(system)
    assert plain.name == AUTOREGRESSIVE
    rows = bench(transcriber, systems, utterances, batch_sizes=[1, 8], rounds=arguments.rounds)
    return [asdict(row) for row in rows]


def page(lengths: Sequence[LengthRow], heads: Sequence[dict]) -> list[str]:
    """Markdown of both tables."""
    lines = [
        "# Scaling",
        "",
        "`experiments/scaling.py`. Test-clean's utterances, joined; seconds are of a whole command, from its start on.",
        "",
        "| recording | system | batch | seconds (range) | RTFx | peak memory, MB | WER % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in lengths:
        spread = f" ({row.seconds_low:.1f} to {row.seconds_high:.1f})" if row.rounds > 1 else ""
        lines.append(
            f"| {row.recording} | {row.system} | {row.batch_size} | {row.seconds:.1f}{spread} "
            f"| {row.audio_seconds / row.seconds:.1f} | {row.peak_memory_mb:.0f} | {100 * row.wer:.1f} |"
        )
    if heads:
        first = heads[0]
        lines += [
            "",
            f"{first['num_utterances']} utterances ({first['audio_seconds']:.0f} s) of test-clean, {first['dtype']}, "
            f"{first['num_threads']} threads; drafts of the heads alone.",
            "",
            "| system | batch | decoder s | against `generate` | against autoregressive | tokens per call |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
    for each in heads:
        per_call = each["tokens_per_call"]
        lines.append(
            f"| {each['system']} | {each['batch_size']} | {each['decoder_seconds']:.2f} "
            f"| {each['speedup_vs_generate']:.2f}x | {each['speedup_vs_autoregressive']:.2f}x "
            f"| {'' if per_call is None else f'{per_call:.2f}'} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--peer", action="append", default=[], help="NAME=FOLDER of a faster-whisper model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", nargs="*", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--part", choices=("lengths", "heads"), help="this part alone; the other stays as it is")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    file = arguments.output / "scaling.json"
    known = json.loads(file.read_text()) if file.exists() else {"lengths": [], "heads": []}
    if arguments.part != "heads":
        with tempfile.TemporaryDirectory() as folder:
            known["lengths"] = [asdict(row) for row in measure_lengths(arguments, Path(folder))]
    if arguments.part != "lengths":
        known["heads"] = measure_heads(arguments)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(known, indent=1) + "\n")
    lengths = [LengthRow(**row) for row in known["lengths"]]
    (arguments.output / "scaling.md").write_text("\n".join(page(lengths, known["heads"])) + "\n")


if __name__ == "__main__":
    main()
