"""Freed memory goes back to the system.

glibc keeps what a thread frees for its next allocation. Chunks of ever other lengths fill such gaps badly: they are a
quarter of what a process holds behind an hour of audio.
"""

from __future__ import annotations

import ctypes
from functools import cache


def release_freed() -> None:
    """Give freed memory back, where the C library is glibc; a few milliseconds."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> ctypes._NamedFuncPointer | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows
        return None
