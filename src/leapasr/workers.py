"""Jobs that several threads share out among each other, each with its part of the cores.

Two threads with a core each are faster than one after the other with both: an operation on one row is too short to be
divided well, and what lies between operations is not divided at all. More than two would wait for Python's lock.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

NUM_WORKERS = 2

Job = TypeVar("Job")
Result = TypeVar("Result")
_ENDED = object()  # a worker has


def num_workers(device: torch.device, num_jobs: int) -> int:
    """How many threads are to share `num_jobs` jobs on this device; 1 where they would be no faster."""
    return max(1, min(NUM_WORKERS, num_jobs, torch.get_num_threads())) if device.type == "cpu" else 1


def share_out(work: Callable[[Iterator[Job]], Iterable[Result]], jobs: Iterable[Job], number: int) -> Iterator[Result]:
    """What `work` makes of `jobs`, by this many threads, each with its part of the caller's cores; as it is done.

    No job is taken long before it is asked for: the threads wait where nobody takes what they have made.

    Args:
        work: makes any number of results of jobs that it takes one by one; run in each thread, with different jobs.
        jobs: taken by one thread at a time.

    Raises:
        whatever `work` or `jobs` raised first, behind the results of the other threads.
    """
    if number == 1:
        yield from work(iter(jobs))
        return
    num_cores = torch.get_num_threads()
    remaining, lock = iter(jobs), threading.Lock()
    results: queue.Queue = queue.Queue(number)
    errors: list[BaseException] = []
    left, begun = threading.Event(), threading.Barrier(number + 1)

    def taken() -> Iterator[Job]:
        while not (left.is_set() or errors):
            with lock:
                job = next(remaining, _ENDED)
            if job is _ENDED:
                return
            yield job  # type: ignore[misc]

    def run() -> None:
        torch.set_num_threads(max(1, num_cores // number))
        torch.get_num_threads()  # asked once, a thread keeps its number, whatever others set
        begun.wait()
        try:
            for result in work(taken()):
                results.put(result)
                if left.is_set():
                    return
        except BaseException as error:
            errors.append(error)
        finally:
            results.put(_ENDED)

    for index in range(number):
        threading.Thread(target=run, name=f"leapasr-{index}", daemon=True).start()
    begun.wait()
    torch.set_num_threads(num_cores)  # of threads that are begun later: the number that was set last
    num_running = number
    try:
        while num_running:
            result = results.get()
            if result is _ENDED:
                num_running -= 1
            else:
                yield result
    finally:
        left.set()
        while num_running:  # who waits to hand something over goes on, and ends
            num_running -= results.get() is _ENDED
    if errors:
        raise errors[0]
