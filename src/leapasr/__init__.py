"""leapasr: speech recognition with a language model inside that predicts several tokens per decoder call.

import leapasr
transcriber = leapasr.load()
print(transcriber.transcribe("speech.flac").text)
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leapasr.audio import AudioError
    from leapasr.decoding.options import DecodingOptions
    from leapasr.transcriber import Transcriber, load
    from leapasr.transcription import Segment, Transcription, Word
    from leapasr.whisper_transcriber import WhisperOptions

__all__ = [
    "AudioError",
    "DecodingOptions",
    "Segment",
    "Transcriber",
    "Transcription",
    "WhisperOptions",
    "Word",
    "__version__",
    "load",
]

__version__ = importlib.metadata.version("leapasr")

_HOMES = {
    "AudioError": "leapasr.audio",
    "DecodingOptions": "leapasr.decoding.options",
    "Segment": "leapasr.transcription",
    "Transcriber": "leapasr.transcriber",
    "Transcription": "leapasr.transcription",
    "WhisperOptions": "leapasr.whisper_transcriber",
    "Word": "leapasr.transcription",
    "load": "leapasr.transcriber",
}


def __getattr__(name: str) -> Any:
    """Import what is public when it is first used: `import leapasr` itself stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
