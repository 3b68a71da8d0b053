"""Long recordings: chapters against their utterances alone, what is written where nobody speaks, and word times.

    python experiments/longform.py --speech SPEECH

SPEECH is a folder with librispeech/manifest.jsonl, whose ids are speaker-chapter-number. Utterances of a chapter are
joined as they are, and transcribed in chunks of the usual length and of others; where faster-whisper is installed, in
those of its voice activity detection (Silero's), too. Word times are taken on speech of
flite, which says how long each of its phones lasts: sentences of the same texts, with pauses in between, one
recording a voice. Writes longform.md and .json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import kaldialign
import numpy as np
import torch
from lhotse.cut import Cut
from results import percent

from leapasr.audio import SAMPLE_RATE, cut_at_silences, read_audio
from leapasr.data.manifests import read_manifest, spread
from leapasr.data.synthesis import installed_engines
from leapasr.decoding import DecodingOptions
from leapasr.evaluation.scoring import WordErrors, count_errors, word_error_rate_difference
from leapasr.text import NORMALIZER, plain
from leapasr.transcriber import Transcriber, load
from leapasr.transcription import Transcription, Word

OPTIONS = DecodingOptions()
NEAR_SEAM = 2  # words on each side of a seam
NOISE_SECONDS, NOISE_DBFS = 20, (-20, -40, -60)
VOICES = ("slt", "rms", "awb", "kal16")
GONE = "*"


@dataclass
class Seams:
    """Errors at the words beside seams, of which `lost` are deletions and `doubled` insertions, and elsewhere."""

    errors: int = 0
    words: int = 0
    lost: int = 0
    doubled: int = 0
    errors_elsewhere: int = 0
    words_elsewhere: int = 0

    def add(self, reference: str, said: Transcription) -> None:
        """Count a recording: an error is beside a seam if one of the nearest words that were heard is."""
        words, beside = [], set()
        for segment in said.segments:
            words += NORMALIZER(segment.text).split()
            beside |= set(range(len(words) - NEAR_SEAM, len(words) + NEAR_SEAM))
        beside -= set(range(len(words) - NEAR_SEAM, len(words) + NEAR_SEAM))  # the end is no seam
        place = 0
        for wanted, heard in kaldialign.align(NORMALIZER(reference).split(), words, GONE):
            near, error = place in beside, wanted != heard
            place += heard != GONE
            if near:
                self.words += wanted != GONE
                self.errors += error
                self.lost += heard == GONE
                self.doubled += wanted == GONE
            else:
                self.words_elsewhere += wanted != GONE
                self.errors_elsewhere += error


def chapters_of(cuts: Sequence[Cut]) -> dict[str, list[Cut]]:
    """Utterances by chapter, in their order."""
    chapters: dict[str, list[Cut]] = {}
    for cut in sorted(cuts, key=lambda cut: cut.id):
        chapters.setdefault(cut.id.rsplit("-", 1)[0], []).append(cut)
    return chapters


def silero_spans(samples: np.ndarray, max_seconds: float) -> list[tuple[int, int]]:
    """Stretches of speech by Silero's voice activity detection, none longer than `max_seconds`."""
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    longest = VadOptions(max_speech_duration_s=max_seconds - 1, min_silence_duration_ms=500)
    return [(span["start"], span["end"]) for span in get_speech_timestamps(samples, longest)]


def noises(seed: int = 0) -> dict[str, np.ndarray]:
    """Sounds in which nobody speaks, of one loudness (mean square 1)."""
    rng = np.random.default_rng(seed)
    times = np.arange(NOISE_SECONDS * SAMPLE_RATE) / SAMPLE_RATE
    walk = np.cumsum(rng.normal(size=len(times)))
    chord = sum(np.sin(2 * np.pi * pitch * times) for pitch in (261.6, 329.6, 392.0))
    sounds = {
        "white noise": rng.normal(size=len(times)),
        "rumble": walk - np.convolve(walk, np.ones(801) / 801, "same"),
        "mains hum": np.sin(2 * np.pi * 50 * times) + 0.3 * np.sin(2 * np.pi * 150 * times),
        "chords": chord * np.exp(-3 * (2 * times % 1)),
        "beeps": np.sin(2 * np.pi * 1000 * times) * (times % 1 < 0.2),
    }
    return {name: sound / np.sqrt(np.mean(sound**2)) for name, sound in sounds.items()}


@cache
def num_phones(word: str, voice: str) -> int:
    done = subprocess.run(["flite", "-voice", voice, "-t", word, "-ps", "none"], capture_output=True, text=True)
    return len([phone for phone in done.stdout.split() if phone != "pau"])


def speak(text: str, voice: str) -> tuple[np.ndarray, list[Word]] | None:
    """Flite's speech and where each word lies in it; None where its phones cannot be told apart by word."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        command = ["flite", "-voice", voice, "-psdur", "-t", text, "-o", wav.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        samples = read_audio(wav.name)
    ends = [(phone, float(end)) for phone, end in re.findall(r"([a-z]+):([\d.]+)", done.stdout)]
    starts = [0.0, *(end for _, end in ends)]
    spans = [(start, end) for (phone, end), start in zip(ends, starts, strict=False) if phone != "pau"]
    counts = [num_phones(word, voice) for word in text.split()]
    if sum(counts) != len(spans) or 0 in counts:
        return None
    words, place = [], 0
    for word, count in zip(text.split(), counts, strict=True):
        words.append(Word(word, spans[place][0], spans[place + count - 1][1]))
        place += count
    return samples, words


def spoken(texts: Sequence[str], voice: str) -> tuple[np.ndarray, list[Word]]:
    """A recording of sentences with pauses of 0.2 to 1.5 s behind them, and its words."""
    rng, parts, words, start = random.Random(voice), [], [], 0.0
    for said in filter(None, (speak(text, voice) for text in texts)):
        words += [Word(word.text, start + word.start, start + word.end) for word in said[1]]
        parts += [said[0], np.zeros(int(rng.uniform(0.2, 1.5) * SAMPLE_RATE), dtype=np.float32)]
        start = sum(map(len, parts)) / SAMPLE_RATE
    return np.concatenate(parts), words


def time_errors(known: Sequence[Word], heard: Sequence[Word]) -> list[tuple[float, float]]:
    """How much later (seconds) words that were heard right begin and end than they do."""
    references, hypotheses = ([plain(word.text) or "-" for word in words] for words in (known, heard))
    place, other, errors = 0, 0, []
    for wanted, found in kaldialign.align(references, hypotheses, GONE):
        if wanted == found:
            right, mine = known[place], heard[other]
            errors.append((mine.start - right.start, mine.end - right.end))
        place += wanted != GONE
        other += found != GONE
    return errors


def seams_section(
    transcriber: Transcriber, chapters: dict[str, list[Cut]], chunk_seconds: Sequence[float], batch_size: int
) -> tuple[list[str], dict]:
    """Chapters joined against their utterances alone; `chunk_seconds` are lengths of chunks to try."""
    cutters: dict[str, Callable[[np.ndarray], list[tuple[int, int]]]] = {
        f"chapters, chunks of {seconds:g} s": partial(cut_at_silences, max_seconds=seconds) for seconds in chunk_seconds
    }
    if importlib.util.find_spec("faster_whisper"):
        cutters["chapters, cut by Silero"] = partial(silero_spans, max_seconds=transcriber.max_seconds)
    texts: dict[str, list[str]] = {name: [] for name in ("utterances alone", "chapters", *cutters)}
    references, seams, dropped, hours = [], Seams(), 0, 0.0
    for name, cuts in chapters.items():
        samples = [cut.load_audio()[0] for cut in cuts]
        joined = np.concatenate(samples)
        reference = " ".join(cut.supervisions[0].text for cut in cuts)
        references.append(reference)
        alone = transcriber.transcribe(samples, OPTIONS, batch_size=batch_size)
        dropped += sum(not result.segments for result in alone)
        together = transcriber.transcribe(joined, OPTIONS, batch_size=batch_size)
        texts["utterances alone"].append(" ".join(result.text for result in alone))
        texts["chapters"].append(together.text)
        for cutter, cut in cutters.items():
            parts = [joined[start:end] for start, end in cut(joined)]
            results = transcriber.transcribe(parts, OPTIONS, batch_size=batch_size)
            texts[cutter].append(" ".join(result.text for result in results))
        seams.add(reference, together)
        hours += len(joined) / SAMPLE_RATE / 3600
        print(name, f"{hours:.2f} h", flush=True)
    errors: dict[str, WordErrors] = {name: count_errors(references, each, NORMALIZER) for name, each in texts.items()}
    base = errors["utterances alone"]
    rows, figures = [], []
    for name, counted in errors.items():
        more = word_error_rate_difference(base, counted)
        kinds = (counted.substitutions_N, counted.deletions_N, counted.insertions_N)
        sums = [int(kind.sum()) for kind in kinds]
        rows.append(
            f"| {name} | {percent(counted.rate)} | {100 * (counted.rate / base.rate - 1):+.1f} "
            f"| {percent(more.value)} ({percent(more.low)} to {percent(more.high)}) | {' / '.join(map(str, sums))} |"
        )
        figures.append({"name": name, "wer": counted.rate, "more": more._asdict(), "errors": sums})
    lines = [
        "## Chapters",
        "",
        f"{len(chapters)} chapters, {sum(map(len, chapters.values()))} utterances, {hours:.2f} h; intervals by "
        f"bootstrap over chapters. {dropped} utterances are without text, as the CTC head heard nothing in them.",
        "",
        "| transcribed | WER % | relative % | points more (95% interval) | substituted / deleted / inserted |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
        f"Within {NEAR_SEAM} words of the seams between chunks {seams.errors} errors on {seams.words} words "
        f"({percent(seams.errors / max(seams.words, 1))}%; {seams.lost} deletions, {seams.doubled} insertions), "
        f"elsewhere {percent(seams.errors_elsewhere / max(seams.words_elsewhere, 1))}%.",
    ]
    return lines, {"chapters": figures, "seams": asdict(seams), "dropped": dropped}


def noise_section(transcriber: Transcriber) -> tuple[list[str], dict]:
    """What is written where nobody speaks."""
    lines = [
        "",
        "## Where nobody speaks",
        "",
        f"{NOISE_SECONDS} s of each sound; without `vad_filter` / with it.",
        "",
        "| sound | " + " | ".join(f"{level} dBFS" for level in NOISE_DBFS) + " |",
        "| --- |" + " --- |" * len(NOISE_DBFS),
    ]
    figures = {}
    for name, sound in noises().items():
        levels = [(sound * 10 ** (level / 20)).clip(-1, 1).astype(np.float32) for level in NOISE_DBFS]
        written = [
            [result.text for result in transcriber.transcribe(levels, OPTIONS, vad_filter=vad_filter)]
            for vad_filter in (False, True)
        ]
        figures[name] = written
        cells = (f"{without or '–'} / {filtered or '–'}" for without, filtered in zip(*written, strict=True))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines, {"noise": figures}


def times_section(transcriber: Transcriber, texts: Sequence[str], batch_size: int) -> tuple[list[str], dict]:
    """Word times against those of flite's speech."""
    lines = [
        "",
        "## Word times",
        "",
        "Of words that were heard right; milliseconds. Lateness is signed, and what the median words have.",
        "",
        "| voice | words | starts, median error | ends | starts, lateness | ends | 90% of starts within |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    figures, everything = [], []
    for voice in VOICES:
        samples, known = spoken(texts, voice)
        heard = transcriber.transcribe(samples, OPTIONS, batch_size=batch_size, word_times=True).words
        everything.append((voice, time_errors(known, heard), len(known)))
    everything.append(("all", [each for _, errors, _ in everything for each in errors], sum(n for *_, n in everything)))
    for voice, errors, num_words in everything:
        starts, ends = zip(*errors, strict=True)
        row = {
            "voice": voice,
            "num_words": num_words,
            "num_right": len(errors),
            "start_error": statistics.median(map(abs, starts)),
            "end_error": statistics.median(map(abs, ends)),
            "start_bias": statistics.median(starts),
            "end_bias": statistics.median(ends),
            "start_90": float(np.quantile(np.abs(starts), 0.9)),
        }
        figures.append(row)
        shown = (f"{1000 * row[key]:.0f}" for key in ("start_error", "end_error", "start_bias", "end_bias", "start_90"))
        lines.append(f"| {voice} | {len(errors)} of {num_words} | {' | '.join(shown)} |")
    return lines, {"times": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name; the shipped model without it")
    parser.add_argument("--speech", type=Path, required=True, help="folder with librispeech")
    parser.add_argument("--use", default="test")
    parser.add_argument("--chapters", type=int, help="so many of them, spread evenly; all without it")
    parser.add_argument("--chunk-seconds", type=float, nargs="*", default=[12, 16, 20], help="lengths of chunks to try")
    parser.add_argument("--sentences", type=int, default=40, help="so many that each voice says")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    if "flite" not in installed_engines():
        parser.error("flite is not installed: it speaks the words of known times")

    transcriber = load(arguments.model)
    cuts = list(read_manifest(arguments.speech / "librispeech" / "manifest.jsonl", use=arguments.use).cuts)
    chapters = chapters_of(cuts)
    names = spread(list(chapters), arguments.chapters)
    texts = [cut.supervisions[0].text.lower() for cut in spread(cuts, arguments.sentences)]
    page = [
        "# Long recordings and word times",
        "",
        f"`experiments/longform.py`: librispeech/{arguments.use}, float32, batch {arguments.batch_size}, "
        f"{torch.get_num_threads()} CPU threads; words are compared after the {NORMALIZER.name} normaliser of Whisper.",
        "",
    ]
    figures: dict = {}
    sections = (
        lambda: seams_section(
            transcriber, {name: chapters[name] for name in names}, arguments.chunk_seconds, arguments.batch_size
        ),
        lambda: noise_section(transcriber),
        lambda: times_section(transcriber, texts, arguments.batch_size),
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    for section in sections:
        lines, found = section()
        page += lines
        figures |= found
        (arguments.output / "longform.md").write_text("\n".join(page) + "\n")
    (arguments.output / "longform.json").write_text(json.dumps(figures, indent=1) + "\n")
    print("\n".join(page))


if __name__ == "__main__":
    main()
