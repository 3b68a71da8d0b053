"""Synthetic speech: prose → spoken utterances → a JSON-lines manifest.

The voices are whatever is installed: hibari (a natural neural voice, ``pip install hibari-tts``), and the command-line
programs pico2wave (SVOX Pico: six languages, clear), espeak-ng and flite (robotic, any speed and pitch). Each utterance
is derived from its index and the seed alone, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import importlib.util
import json
import lzma
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from leapasr.audio import SAMPLE_RATE, read_audio, resample
from leapasr.text import sentences, speakable, tidy

SHARD = 200  # utterances a worker speaks before it reports
ENGLISH = "en"
ESPEAK_VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029")
ESPEAK_VARIANTS = ("", "+m1", "+m3", "+m4", "+m7", "+f1", "+f2", "+f3", "+f4")  # of another language's one voice
FLITE_VOICES = ("slt", "rms", "awb", "kal16")
PICO_VOICES = {"en": ("en-US", "en-GB"), "de": ("de-DE",), "es": ("es-ES",), "fr": ("fr-FR",), "it": ("it-IT",)}
ENGLISH_SHARES = "hibari:0.9,espeak-ng:0.04,flite:0.06"


@dataclass(frozen=True)
class Utterance:
    """What to say (`text`), who says it (`engine`, `voice`), how fast (`speed`, 1 is normal) and the seed."""

    id: str
    text: str
    engine: str
    voice: str
    speed: float
    seed: int


def installed_engines() -> list[str]:
    """The speech engines found on this machine, of hibari, pico2wave, espeak-ng and flite."""
    found = ["hibari"] if importlib.util.find_spec("hibari") else []
    return found + [name for name in ("pico2wave", "espeak-ng", "flite") if shutil.which(name)]


def usual_voices(language: str) -> str:
    """Engines with shares, as `parse_voices` reads them, that serve a language best.

    Whisper base hears 17 to 30% of pico2wave's words wrong, and 54 to 92% of espeak-ng's (docs/existing-models.md).
    """
    if language == ENGLISH:
        return ENGLISH_SHARES
    return "pico2wave" if language in PICO_VOICES else "espeak-ng"


def voices_of(language: str) -> dict[str, tuple[str, ...]]:
    """The voices of each engine that speaks the language."""
    voices = {"pico2wave": PICO_VOICES[language]} if language in PICO_VOICES else {}
    if language == ENGLISH:
        return voices | {"hibari": ("heart",), "espeak-ng": ESPEAK_VOICES, "flite": FLITE_VOICES}
    return voices | {"espeak-ng": tuple(language + variant for variant in ESPEAK_VARIANTS)}


def read_paragraphs(path: Path) -> Iterator[str]:
    """The lines of a text file, plain or ``.xz``.

    Raises:
        FileNotFoundError: `path` does not exist.
    """
    if not path.is_file():
        raise FileNotFoundError(f"text file not found: {path}")
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        yield from (line.strip() for line in lines)


def passages(
    paragraphs: Iterable[str], *, min_chars: int = 12, max_chars: int = 230, seed: int = 0, language: str = ENGLISH
) -> list[str]:
    """Cut prose into passages of one or a few sentences that a voice can say in about 1 to 16 seconds.

    Passage lengths are spread evenly over the range; a longer sentence is cut behind a comma. Passages with
    digits or symbols are left out. The order is shuffled with `seed`. English is tidied (`tidy`); other languages are
    left as they are written.
    """
    is_english = language == ENGLISH
    rng = random.Random(seed)
    result: list[str] = []
    for paragraph in paragraphs:
        paragraph = tidy(paragraph) if is_english else paragraph
        pending, target = "", rng.randint(min_chars, max_chars)
        for sentence in sentences(paragraph):
            while len(sentence) > max_chars and ", " in sentence[:max_chars]:
                cut = sentence.rindex(", ", 0, max_chars) + 1
                result.append(sentence[:cut])
                sentence = sentence[cut:].strip()
            if pending and len(pending) + len(sentence) + 1 > target:
                result.append(pending)
                pending, target = "", rng.randint(min_chars, max_chars)
            pending = f"{pending} {sentence}".strip()
        result.append(pending)
    result = [text for text in result if min_chars <= len(text) <= max_chars and speakable(text, ascii=is_english)]
    rng.shuffle(result)
    return result


def plan(texts: list[str], engines: dict[str, float], seed: int, *, language: str = ENGLISH) -> list[Utterance]:
    """Give every text a voice and a speed. `engines` maps engine name to its share.

    Raises:
        ValueError: an engine does not speak the language.
    """
    voices = voices_of(language)
    if strange := sorted(engines.keys() - voices.keys()):
        raise ValueError(f"{', '.join(strange)} cannot speak {language!r}: choose of {', '.join(voices)}")
    prefix = f"syn-{seed}" if language == ENGLISH else f"syn-{language}-{seed}"
    utterances = []
    for index, text in enumerate(texts):
        rng = random.Random(f"{seed}/{index}")
        engine = rng.choices(list(engines), weights=list(engines.values()))[0]
        utterances.append(
            Utterance(
                id=f"{prefix}-{index:07d}",
                text=text,
                engine=engine,
                voice=rng.choice(voices[engine]),
                speed=round(rng.uniform(0.85, 1.25), 2),
                seed=index,
            )
        )
    return utterances


_HIBARI = None


def speak(utterance: Utterance) -> np.ndarray:
    """Samples of `utterance`, float32 mono at 16 kHz.

    Raises:
        RuntimeError: the engine failed or is not installed.
    """
    global _HIBARI
    if utterance.engine == "hibari":
        from hibari import Hibari

        _HIBARI = _HIBARI or Hibari(threads=1)
        return resample(_HIBARI(utterance.text, speed=utterance.speed, seed=utterance.seed), 24_000)
    rng = random.Random(utterance.seed)
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        if utterance.engine == "espeak-ng":
            command = ["espeak-ng", "-v", utterance.voice, "-s", str(int(165 * utterance.speed))]
            command += ["-p", str(rng.randint(20, 80)), "-w", wav.name, "--", utterance.text]  # "- Ja" is a text
        elif utterance.engine == "pico2wave":
            pitch, speed = rng.randint(75, 135), int(100 * utterance.speed)
            tagged = f'<pitch level="{pitch}"><speed level="{speed}">{utterance.text}</speed></pitch>'
            command = ["pico2wave", "-l", utterance.voice, "-w", wav.name, "--", tagged]
        elif utterance.engine == "flite":
            command = ["flite", "-voice", utterance.voice, "--setf", f"duration_stretch={1 / utterance.speed:.2f}"]
            command += ["-t", utterance.text, "-o", wav.name]
        else:
            raise RuntimeError(f"unknown speech engine {utterance.engine!r}; installed: {installed_engines()}")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{utterance.engine} failed on {utterance.id}: {done.stderr.strip()}")
        return read_audio(wav.name)


def _speak_shard(shard: list[Utterance], output: Path, language: str) -> list[dict]:
    import soundfile

    lines = []
    for utterance in shard:
        samples = speak(utterance)
        if not len(samples):
            continue
        relative = Path("audio") / utterance.id[-7:-4] / f"{utterance.id}.flac"
        (output / relative).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(output / relative, np.clip(samples, -1, 1), SAMPLE_RATE)
        lines.append(
            {
                "id": utterance.id,
                "audio": str(relative),
                "duration": round(len(samples) / SAMPLE_RATE, 3),
                "text": utterance.text,
                "speaker": f"{utterance.engine}-{utterance.voice}",
                "language": language,
                "corpus": "synthetic",
                "use": "train",
            }
        )
    return lines


def _lines_of(manifest: Path) -> list[dict]:
    """The lines of an interrupted manifest; a last one without its line end was torn, and is cut off the file."""
    text = manifest.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        manifest.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def synthesize(
    texts: list[str],
    output: Path,
    *,
    hours: float,
    engines: dict[str, float],
    seed: int = 0,
    language: str = ENGLISH,
    num_workers: int = 2,
    progress=None,
) -> Path:
    """Speak `texts` until `hours` of audio are there; returns the manifest's path (``output/manifest.jsonl``).

    A manifest that is there already is continued: its utterances count, none is spoken twice.
    `progress`, if given, is called with the seconds of audio so far.

    Raises:
        ValueError: an engine is not installed or does not speak `language` (a code), or no text is left before `hours`
            are reached.
    """
    missing = set(engines) - set(installed_engines())
    if missing:
        raise ValueError(f"speech engines not installed: {sorted(missing)}; found: {installed_engines()}")
    output.mkdir(parents=True, exist_ok=True)
    manifest = output / "manifest.jsonl"
    spoken = _lines_of(manifest) if manifest.exists() else []
    done_ids = {line["id"] for line in spoken}
    seconds = sum(line["duration"] for line in spoken)
    todo = [utterance for utterance in plan(texts, engines, seed, language=language) if utterance.id not in done_ids]
    shards = iter([todo[start : start + SHARD] for start in range(0, len(todo), SHARD)])
    with ProcessPoolExecutor(num_workers) as pool, manifest.open("a") as out:
        running = {
            pool.submit(_speak_shard, shard, output, language)
            for shard, _ in zip(shards, range(num_workers + 1), strict=False)
        }
        while running:
            for future in as_completed(running):
                running.discard(future)
                for line in future.result():
                    out.write(json.dumps(line) + "\n")
                    seconds += line["duration"]
                out.flush()
                if progress:
                    progress(seconds)
                if seconds < hours * 3600 and (shard := next(shards, None)):
                    running.add(pool.submit(_speak_shard, shard, output, language))
                break
    if seconds < hours * 3600:
        raise ValueError(f"only {seconds / 3600:.2f} of {hours} hours could be spoken: the text is too short")
    return manifest


def parse_voices(voices: str) -> dict[str, float]:
    """``ENGINE:SHARE,ENGINE:SHARE`` as a mapping; a share left out is 1.

    Raises:
        ValueError: a share is not a positive number.
    """
    engines = {}
    for voice in voices.split(","):
        engine, _, share = voice.partition(":")
        try:
            engines[engine] = float(share or 1)
        except ValueError:
            raise ValueError(f"share of {engine!r} must be a number, got {share!r}") from None
        if engines[engine] <= 0:
            raise ValueError(f"share of {engine!r} must be positive, got {share}")
    return engines
