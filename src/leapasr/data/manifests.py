"""Manifests of several formats to lhotse cuts.

A bad line does not end the reading: it is left out and reported, with its file, line and what is wrong.

- leapasr, a line with ``audio``: ``id``, ``audio`` (relative to the manifest), ``duration``, ``text``; optional
  ``speaker``, ``language``, ``use``, ``sampling_rate``
- NeMo, a line with ``audio_filepath``: ``audio_filepath``, ``duration``, ``text``; optional ``offset``, ``speaker``,
  ``lang``, ``use``
- lhotse cuts, a line with ``recording`` or ``tracks``: as lhotse writes it
- a lhotse folder, ``*recordings*.jsonl`` and ``*supervisions*.jsonl``: as lhotse writes them
- a Kaldi folder, ``wav.scp`` and ``text``; optional ``segments``, ``utt2spk``

Files may be gzipped (``.gz``).
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import av
import soundfile
from lhotse import AudioSource, CutSet, MonoCut, Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item

from leapasr.audio import SAMPLE_RATE

Item = TypeVar("Item")

NUM_PROBLEMS_SHOWN = 3
ROUNDING_SECONDS = 0.02  # by which a manifest may overstate a duration


@dataclass(frozen=True)
class ManifestResult:
    """The usable utterances, and a message for each line that was left out."""

    cuts: CutSet
    problems: list[str]


@dataclass(frozen=True)
class _AudioFormat:
    """What a file's header says: Hz, number of channels, seconds (0 where it does not say)."""

    rate: int
    num_channels: int
    seconds: float = 0.0


def spread(items: list, limit: int | None) -> list:
    """`limit` of the items, spread evenly over them and in order; all where there are not more.

    Raises:
        ValueError: `limit` is less than 1.
    """
    if limit is None:
        return list(items)
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def read_manifest(path: str | Path, *, use: str | None = None, limit: int | None = None) -> ManifestResult:
    """Read a manifest; the format is seen from the content.

    The cuts are at 16 kHz: audio of another rate is resampled as it is loaded. Of leapasr's own manifests only
    the first audio file is opened: where that is at 16 kHz, the others are taken to be, too.

    Args:
        path: a manifest file or a folder, in a format listed above.
        use: keep only utterances with this ``use``.
        limit: keep this many, spread evenly over the manifest.

    Raises:
        ValueError: the manifest is missing, empty, of no known format, or no usable utterance is left.
    """
    path = Path(path)
    problems: list[str] = []
    cuts = list(_without_repeats(_reader(path)(path, problems), path, problems))
    if not cuts:
        shown = "; ".join(problems[:NUM_PROBLEMS_SHOWN])
        raise ValueError(f"{path} has no usable utterance ({len(problems)} bad lines: {shown})")
    if use is not None:
        uses = [use_of(cut) for cut in cuts]
        found = sorted({str(name) for name in uses})
        cuts = [cut for cut, name in zip(cuts, uses, strict=True) if name == use]
        if not cuts:
            raise ValueError(f"{path} has no utterance with use {use!r}; found: {', '.join(found)}")
    return ManifestResult(CutSet.from_cuts(spread(cuts, limit)), problems)


def use_of(cut: Cut) -> str | None:
    """The ``use`` of a cut or of its supervision, None where there is none."""
    for holder in [cut, *cut.supervisions]:
        if getattr(holder, "custom", None) and "use" in holder.custom:
            return holder.custom["use"]
    return None


def _without_repeats(cuts: Iterator[Cut], path: Path, problems: list[str]) -> Iterator[Cut]:
    seen = set()
    for cut in cuts:
        if cut.id in seen:
            problems.append(f"{path.name}: the id {cut.id!r} is there more than once; the first is kept")
        else:
            seen.add(cut.id)
            yield cut


def _reader(path: Path) -> Callable[[Path, list[str]], Iterator[Cut]]:
    """The function that reads the format of `path`."""
    if path.is_dir():
        if (path / "wav.scp").exists():
            return _read_kaldi
        if _named(path, "recordings") and _named(path, "supervisions"):
            return _read_lhotse_folder
        raise ValueError(
            f"{path} is a folder without a manifest: it needs wav.scp and text (Kaldi), or recordings and "
            "supervisions .jsonl files (lhotse); or give the manifest file itself"
        )
    if not path.exists():
        raise ValueError(f"manifest not found: {path}")
    for number, text in _lines(path):
        fields = _parsed(text, f"{path.name}:{number}", [])
        if fields is None:
            continue
        if "audio_filepath" in fields:
            return _read_nemo
        if "recording" in fields or "tracks" in fields:
            return _read_lhotse_cuts
        if "sources" in fields or "recording_id" in fields:
            raise ValueError(f"{path} holds lhotse recordings or supervisions alone: give the folder that has both")
        return _read_own
    return _read_own


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of the lines that are not blank.

    Raises:
        ValueError: the file is empty or is not text.
    """
    empty = True
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    empty = False
                    yield number, text.strip()
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is no manifest: it cannot be read as text ({error})") from error
    if empty:
        raise ValueError(f"{path} is empty: a manifest needs a line an utterance")


def _parsed(text: str, place: str, problems: list[str]) -> dict | None:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        problems.append(f"{place}: not JSON ({error.msg} at column {error.colno})")
        return None
    if not isinstance(fields, dict):
        problems.append(f"{place}: not a JSON object but {type(fields).__name__}")
        return None
    return fields


def _number(fields: dict, name: str) -> float:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def _checked(fields: dict, names: tuple[str, ...], audio: str, folder: Path) -> Path:
    """The audio file's path, once the fields of a line are found to be usable."""
    missing = [name for name in names if fields.get(name) is None]
    if missing:
        raise ValueError(f"no {' and no '.join(missing)}")
    not_strings = [name for name in ("text", audio) if not isinstance(fields[name], str)]
    if not_strings:
        raise ValueError(f"{not_strings[0]} must be a string, got {fields[not_strings[0]]!r}")
    if _number(fields, "duration") <= 0:
        raise ValueError(f"duration must be more than 0 seconds, got {fields['duration']}")
    path = folder / fields[audio]
    if not path.is_file():
        raise ValueError(f"audio file not found: {path}")
    return path


def _header(path: Path) -> _AudioFormat:
    """Raises ValueError where the file is not audio."""
    try:
        info = soundfile.info(str(path))
        return _AudioFormat(info.samplerate, info.channels, info.duration)
    except soundfile.LibsndfileError:
        pass
    try:
        with av.open(str(path)) as container:
            stream = container.streams.audio[0]
            return _AudioFormat(stream.rate, stream.channels, (container.duration or 0) / 1e6)
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"not an audio file: {path}") from error


def _cut(
    *,
    id: str,
    audio: Path,
    header: _AudioFormat,
    duration: float,
    text: str,
    start: float = 0.0,
    recording_id: str | None = None,
    speaker: str | None = None,
    language: str | None = None,
    custom: dict | None = None,
) -> MonoCut:
    """`duration` seconds of the file `audio`, from `start` on; `header` says what the file holds.

    Raises:
        ValueError: the file is too short for that.
    """
    seconds = header.seconds or start + duration
    if start < 0 or start + duration > seconds + ROUNDING_SECONDS:
        raise ValueError(f"{start:.2f} to {start + duration:.2f} s is outside the file's {seconds:.2f} s: {audio}")
    duration = min(duration, seconds - start)
    recording = Recording(
        id=recording_id or id,
        sources=[AudioSource(type="file", channels=list(range(header.num_channels)), source=str(audio))],
        sampling_rate=header.rate,
        num_samples=round(seconds * header.rate),
        duration=seconds,
    )
    supervision = SupervisionSegment(
        id=id,
        recording_id=recording.id,
        start=0.0,
        duration=duration,
        text=text,
        speaker=speaker,
        language=language,
        custom=custom or None,
    )
    cut = MonoCut(id=id, start=start, duration=duration, channel=0, recording=recording, supervisions=[supervision])
    return cut if header.rate == SAMPLE_RATE else cut.resample(SAMPLE_RATE)


def _read_own(path: Path, problems: list[str]) -> Iterator[Cut]:
    common: _AudioFormat | None = None  # what all files are taken to be, from the first; None: open each
    first = True
    for number, text in _lines(path):
        place = f"{path.name}:{number}"
        if (fields := _parsed(text, place, problems)) is None:
            continue
        try:
            audio = _checked(fields, ("id", "audio", "duration", "text"), "audio", path.parent)
            if first or (common is None and "sampling_rate" not in fields):
                header = _header(audio)
                if first and header.rate == SAMPLE_RATE:
                    common = _AudioFormat(header.rate, header.num_channels)
                first = False
            elif common is not None and fields.get("sampling_rate") in (None, common.rate):
                header = common
            else:
                header = _AudioFormat(int(_number(fields, "sampling_rate")), num_channels=1)
            known = ("id", "audio", "duration", "text", "speaker", "language", "sampling_rate")
            yield _cut(
                id=str(fields["id"]),
                audio=audio,
                header=header,
                duration=_number(fields, "duration"),
                text=fields["text"],
                speaker=fields.get("speaker"),
                language=fields.get("language"),
                custom={name: value for name, value in fields.items() if name not in known},
            )
        except ValueError as error:
            problems.append(f"{place}: {error}")


def _read_nemo(path: Path, problems: list[str]) -> Iterator[Cut]:
    for number, text in _lines(path):
        place = f"{path.name}:{number}"
        if (fields := _parsed(text, place, problems)) is None:
            continue
        try:
            audio = _checked(fields, ("audio_filepath", "duration", "text"), "audio_filepath", path.parent)
            duration, header = _number(fields, "duration"), _header(audio)
            start = _number(fields, "offset") if fields.get("offset") is not None else 0.0
            yield _cut(
                id=f"{audio.stem}-{number}",
                audio=audio,
                header=header,
                start=start,
                duration=duration,
                text=fields["text"],
                recording_id=audio.stem,
                speaker=fields.get("speaker"),
                language=fields.get("lang"),
                custom={"use": fields["use"]} if "use" in fields else None,
            )
        except ValueError as error:
            problems.append(f"{place}: {error}")


def _named(folder: Path, kind: str) -> Path | None:
    """The lhotse manifest of a kind in a folder.

    Raises:
        ValueError: there is more than one.
    """
    found = sorted([*folder.glob(f"*{kind}*.jsonl"), *folder.glob(f"*{kind}*.jsonl.gz")])
    if len(found) > 1:
        raise ValueError(
            f"{folder} has several {kind} manifests, {[file.name for file in found]}: keep one in a folder"
        )
    return found[0] if found else None


def _items(path: Path, kind: type[Item], problems: list[str]) -> Iterator[tuple[str, Item]]:
    """Place and object of each line of a lhotse manifest that holds a `kind`."""
    for number, text in _lines(path):
        place = f"{path.name}:{number}"
        if (fields := _parsed(text, place, problems)) is None:
            continue
        try:
            item = deserialize_item(fields)
        except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            problems.append(f"{place}: not a lhotse {kind.__name__} ({type(error).__name__}: {error})")
            continue
        if isinstance(item, kind):
            yield place, item
        else:
            problems.append(f"{place}: a lhotse {type(item).__name__}, where a {kind.__name__} is needed")


def _lhotse_problem(cut: Cut) -> str | None:
    """What makes a lhotse cut unusable, None if nothing does."""
    if cut.duration <= 0:
        return f"duration must be more than 0 seconds, got {cut.duration}"
    if not cut.supervisions or any(supervision.text is None for supervision in cut.supervisions):
        return "no text"
    for track in getattr(cut, "tracks", None) or [cut]:
        holder = getattr(track, "cut", track)
        if getattr(holder, "recording", None) is None:
            return "no recording"
        for source in holder.recording.sources:
            if source.type == "file" and not Path(source.source).is_file():
                return f"audio file not found: {source.source}"
    return None


def _usable(place: str, cut: Cut, problems: list[str]) -> Iterator[Cut]:
    if problem := _lhotse_problem(cut):
        problems.append(f"{place}: {problem}")
    else:
        yield cut.resample(SAMPLE_RATE)


def _read_lhotse_cuts(path: Path, problems: list[str]) -> Iterator[Cut]:
    for place, cut in _items(path, Cut, problems):
        yield from _usable(place, cut, problems)


def _read_lhotse_folder(folder: Path, problems: list[str]) -> Iterator[Cut]:
    recordings_path, supervisions_path = _named(folder, "recordings"), _named(folder, "supervisions")
    assert recordings_path is not None  # that is how the folder was recognised
    assert supervisions_path is not None
    recordings = {recording.id: recording for _, recording in _items(recordings_path, Recording, problems)}
    for place, supervision in _items(supervisions_path, SupervisionSegment, problems):
        recording = recordings.get(supervision.recording_id)
        if recording is None:
            problems.append(f"{place}: no recording {supervision.recording_id!r} in {recordings_path.name}")
            continue
        if supervision.duration <= 0:
            problems.append(f"{place}: duration must be more than 0 seconds, got {supervision.duration}")
            continue
        whole = CutSet.from_manifests(
            recordings=RecordingSet.from_recordings([recording]),
            supervisions=SupervisionSet.from_segments([supervision]),
        )
        for cut in whole.trim_to_supervisions(keep_overlapping=False):
            yield from _usable(place, cut.with_id(supervision.id), problems)


def _table(path: Path, problems: list[str], *, num_fields: int = 2) -> dict[str, tuple[str, list[str]]]:
    """Key → (place, the other fields) of a Kaldi file's lines; the last field takes the rest of the line."""
    rows = {}
    for number, text in _lines(path):
        fields = text.split(maxsplit=num_fields - 1)
        if len(fields) < num_fields and path.name != "text":
            problems.append(f"{path.name}:{number}: {num_fields} fields needed, got {text!r}")
        else:
            rows[fields[0]] = (f"{path.name}:{number}", fields[1:] or [""])
    return rows


def _read_kaldi(folder: Path, problems: list[str]) -> Iterator[Cut]:
    if not (folder / "text").exists():
        raise ValueError(f"{folder} has wav.scp but no text: transcripts are needed")
    recordings = _table(folder / "wav.scp", problems)
    speakers = _table(folder / "utt2spk", problems) if (folder / "utt2spk").exists() else {}
    segments = None
    if (folder / "segments").exists():
        segments = _table(folder / "segments", problems, num_fields=4)
    headers: dict[str, _AudioFormat] = {}
    for id, (place, (text,)) in _table(folder / "text", problems).items():
        try:
            if segments is not None and id not in segments:
                raise ValueError(f"no segment {id!r} in segments")
            recording_id, start, end = (id, "0", "-1") if segments is None else segments[id][1]
            if recording_id not in recordings:
                raise ValueError(f"no recording {recording_id!r} in wav.scp")
            source = recordings[recording_id][1][0]
            if source.endswith("|"):
                raise ValueError(f"wav.scp gives a command for {recording_id!r} ({source}): write its output to a file")
            audio = folder / source
            if not audio.is_file():
                raise ValueError(f"audio file not found: {audio}")
            header = headers.get(recording_id) or headers.setdefault(recording_id, _header(audio))
            duration = (header.seconds if end == "-1" else float(end)) - float(start)
            if duration <= 0:
                raise ValueError(f"duration must be more than 0 seconds, got {duration:.3f}")
            yield _cut(
                id=id,
                audio=audio,
                header=header,
                start=float(start),
                duration=duration,
                text=text,
                recording_id=recording_id,
                speaker=speakers[id][1][0] if id in speakers else None,
            )
        except ValueError as error:
            problems.append(f"{place}: {error}")
