"""A recording as Whisper hears it when it writes timestamps: window by window, each where the last one's text ends.

The rules are transformers' (`WhisperGenerationMixin._retrieve_segment` and what is around it), so that a recording is
cut where `generate` cuts it.

Shapes: T feature frames, F mel bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

STEP_SECONDS = 0.02  # of a timestamp
FRAMES_PER_STEP = 2  # feature frames
FRAME_SECONDS = 0.01


@dataclass(frozen=True)
class Written:
    """A segment of a window: seconds from the recording's start, and its tokens, timestamps included."""

    start: float
    end: float
    tokens: list[int]


@dataclass(eq=False)
class WindowedRecording:
    """Where a recording's transcription stands.

    Attributes:
        features_TF: log-mel features of all of it (T, F).
        window: feature frames that are heard at once.
        timestamp_begin: id of ``<|0.00|>``.
        place: feature frames that are done.
        written: segments so far.
    """

    features_TF: Tensor
    window: int
    timestamp_begin: int
    place: int = 0
    written: list[Written] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.place >= len(self.features_TF)

    @property
    def num_frames(self) -> int:
        """Feature frames of the next window that are of the recording."""
        return min(self.window, len(self.features_TF) - self.place)

    @property
    def start(self) -> float:
        """Where the next window begins, in seconds."""
        return self.place * FRAME_SECONDS

    def next_window(self) -> Tensor:
        """Features of the next window (window, F), with zeros behind the recording's end."""
        heard_TF = self.features_TF[self.place : self.place + self.num_frames]
        return torch.nn.functional.pad(heard_TF, (0, 0, 0, self.window - len(heard_TF)))

    def previous_tokens(self, most: int) -> list[int]:
        """The last tokens of what was written, `most` of them; of two timestamps that end a segment only one."""
        tokens: list[int] = []
        for segment in self.written:
            ends_twice = len(segment.tokens) > 2 and segment.tokens[-2] >= self.timestamp_begin
            tokens += segment.tokens[:-1] if ends_twice else segment.tokens
        return tokens[-most:]

    def advance(self, tokens: Sequence[int]) -> list[Written]:
        """Take in what was written of the window, end-of-text left out; gives its segments."""
        tokens, start, num_frames = list(tokens), self.start, self.num_frames
        is_time = [token >= self.timestamp_begin for token in tokens]
        ends_once = is_time[-2:] == [False, True]
        ends = [n + 1 for n in range(len(tokens) - 1) if is_time[n] and is_time[n + 1]]
        if ends:
            if ends_once:
                ends.append(len(tokens))
            else:
                ends[-1] += 1  # the last segment keeps both, to tell that it ended
            segments, first = [], 0
            for end in ends:
                part = tokens[first:end]
                closing = part[-1] if end != ends[-1] or ends_once else part[-2]
                segments.append(Written(start + self._seconds(part[0]), start + self._seconds(closing), part))
                first = end
            moved = num_frames if ends_once else (tokens[first - 2] - self.timestamp_begin) * FRAMES_PER_STEP
        else:
            times = [token for token in tokens if token >= self.timestamp_begin]
            steps = num_frames // FRAMES_PER_STEP
            if times and times[-1] != self.timestamp_begin:
                steps = times[-1] - self.timestamp_begin
            segments, moved = [Written(start, start + steps * STEP_SECONDS, tokens)], num_frames
        self.place += moved or num_frames  # nothing was heard: `generate` would hear it again and again
        self.written += segments
        return segments

    def _seconds(self, token: int) -> float:
        return (token - self.timestamp_begin) * STEP_SECONDS
