"""How many threads compute."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

MOST = 8  # calls side by side: with more of them Python would be what they wait for
Thing = TypeVar("Thing")
Result = TypeVar("Result")


@contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Compute in this thread alone meanwhile; afterwards as before.

    Small steps wait for the threads they are handed to longer than they compute.
    """
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(call: Callable[[Thing], Result], things: Sequence[Thing], wanted: bool = True) -> Iterator[Result]:
    """What `call` gives for each of the things, in their order; the cores each take a call of their own meanwhile.

    Calls of many small operations are done sooner so than one after another by all cores, of which one call alone has
    the use. A call must enter `torch.inference_mode` by itself: threads do not inherit it.
    """
    cores = torch.get_num_threads()
    workers = min(cores, MOST, len(things))
    if workers < 2 or not wanted:
        yield from map(call, things)
        return
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(cores // workers,)) as pool:
            yield from pool.map(call, things)
    finally:
        torch.set_num_threads(cores)  # what is set in one thread holds for those that are begun after it
