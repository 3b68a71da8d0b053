"""Threads that share jobs out: all is done once, on the caller's cores, and no error, result or job is lost."""

import threading
import time

import pytest
import torch

from leapasr.workers import NUM_WORKERS, num_workers, share_out


@pytest.fixture
def four_cores():
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


def doubled(jobs):
    for job in jobs:
        yield 2 * job


def recorded(taken):
    """A thousand jobs, and in `taken` those that somebody took."""
    for job in range(1000):
        taken.append(job)
        yield job


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_job_is_done_once(number):
    def jobs():
        for job in range(100):
            time.sleep(0.001)  # time for another thread to ask, which no generator can bear
            yield job

    assert sorted(share_out(doubled, jobs(), number)) == list(range(0, 200, 2))
    assert list(share_out(doubled, [], number)) == []


def test_jobs_are_done_at_the_same_time():
    meeting = threading.Barrier(2)

    def meet(jobs):
        for job in jobs:
            meeting.wait(timeout=30)  # an error, if nobody else comes
            yield job

    assert sorted(share_out(meet, range(6), 2)) == list(range(6))


def test_each_thread_has_its_part_of_the_cores(four_cores):
    def cores(jobs):
        for _ in jobs:
            torch.ones(500, 500) @ torch.ones(500, 500)
            yield torch.get_num_threads()

    assert list(share_out(cores, range(8), 2)) == [2] * 8
    assert torch.get_num_threads() == 4
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [4]


def test_one_alone_works_in_the_callers_thread():
    threads = list(share_out(lambda jobs: [threading.current_thread() for _ in jobs], range(3), 1))
    assert threads == [threading.current_thread()] * 3


def test_how_many(four_cores):
    cpu = torch.device("cpu")
    assert [num_workers(cpu, jobs) for jobs in (0, 1, 2, 9)] == [1, 1, NUM_WORKERS, NUM_WORKERS]
    assert num_workers(torch.device("meta"), 9) == 1
    torch.set_num_threads(1)
    assert num_workers(cpu, 9) == 1


def test_an_error_comes_behind_the_results_of_others():
    both, failed = threading.Barrier(2), threading.Event()

    def fails(jobs):
        for job in jobs:
            both.wait(timeout=30)
            if job == 0:
                failed.set()
                raise ValueError("job 0")
            failed.wait(timeout=30)
            time.sleep(0.05)  # the error is there by now
            yield job

    shared = share_out(fails, range(9), 2)
    assert next(shared) == 1
    with pytest.raises(ValueError, match="job 0"):
        next(shared)


def test_an_error_of_the_jobs_themselves():
    def jobs():
        yield from range(4)
        raise OSError("the fifth cannot be read")

    results = []
    with pytest.raises(OSError, match="fifth"):
        results.extend(iter(share_out(doubled, jobs(), 2)))
    assert sorted(results) == [0, 2, 4, 6]


def test_who_stops_leaves_jobs_undone_and_no_thread_behind():
    taken = []
    before = threading.active_count()
    results = share_out(doubled, recorded(taken), 2)
    next(results)
    results.close()
    assert len(taken) < 20
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_no_job_is_taken_long_before_its_result_is():
    taken = []
    results = share_out(doubled, recorded(taken), 2)
    for index in range(5):
        next(results)
        time.sleep(0.05)
        assert len(taken) <= index + 1 + 2 + 2 * 2  # those in the queue, in the threads' hands, and just begun
    results.close()
