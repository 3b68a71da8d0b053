"""Freed memory goes back to the system."""

import platform

import psutil
import pytest

from leapasr import memory
from leapasr.memory import release_freed

BLOCK, NUM_BLOCKS = 64 * 1024, 3000  # too small to be the system's own business


def resident() -> int:
    return psutil.Process().memory_info().rss


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps its own house")
def test_what_is_freed_between_what_stays_is_given_back():
    release_freed()
    blocks = [bytearray(BLOCK) for _ in range(NUM_BLOCKS)]
    staying = blocks[::8] + blocks[-1:]
    before = resident()
    del blocks
    release_freed()
    assert before - resident() > BLOCK * NUM_BLOCKS // 2
    assert len(staying) == NUM_BLOCKS // 8 + 1


def test_another_c_library_is_no_trouble(monkeypatch):
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    release_freed()
