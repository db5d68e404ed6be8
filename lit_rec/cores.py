"""The processor's cores: how many there are for this process, and whether other processes are at work on them."""

import hashlib
import os
import threading
import time

PROBE = 0.04  # seconds; the slices in which a scheduler shares a core out are a tenth of that
ENOUGH = 0.8  # of a core: less, and something else is at work on it
LOOKS = 3  # before that is believed: what is over a moment later would else decide for hours


def usable() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free(count: int) -> bool:
    """Whether so many threads would each get a core of their own just now: each works a moment and looks at its clock.

    Load averages say what was a minute ago, and inside a container they are another machine's.
    """
    return any(_free_now(count) for _ in range(LOOKS))


def _free_now(count: int) -> bool:
    got: list[float] = []
    start = threading.Barrier(count)
    threads = [threading.Thread(target=_work, args=(start, got)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return min(got) >= ENOUGH


def _work(start: threading.Barrier, got: list[float]) -> None:
    """Compute for `PROBE` seconds; append which part of them this thread was given a core."""
    block = bytes(1 << 20)  # hashed without Python's lock
    start.wait()
    began, had = time.perf_counter(), time.thread_time()
    while time.perf_counter() - began < PROBE:
        hashlib.sha256(block).digest()
    got.append((time.thread_time() - had) / (time.perf_counter() - began))
