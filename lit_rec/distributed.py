"""Several processes at work on one run: who does what, and how they agree. With one process all of this is trivial.

Every process runs the same program on the same configuration and the same run folder. What takes long is cut into
pieces of which each takes its share (`share`), or into jobs (`divide`); then all of them go on with the same results.
Which files are there is for process 0 to say (`agreed`), and what they all make alike only process 0 keeps. Values
travel pickled, between these processes alone, which trust each other: they are one user's, started by one launcher.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from lit_rec.errors import UserError

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # a process that is done with its share waits for the others; who dies ends all of them


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is.

    Attributes:
        rank: Number among all processes.
        size: Processes in all.
        local_rank: Number on its machine.
        local_size: Processes on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


_place = Place()
_alone = 0


def discover(env: Mapping[str, str] = os.environ) -> Place | None:
    """The place that a launcher gave this process: ours, torchrun's, or SLURM's srun. None: there was no launcher.

    Raises:
        UserError: What the launcher says is not whole.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # set by srun alone, not by sbatch or salloc
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    else:
        return None
    given = [env.get(name, "") for name in names]
    numbers = [re.match(r"\d+", text) for text in given]  # tasks per node may read "4(x2)"
    if missing := [name for name, number in zip(names[:3], numbers, strict=False) if number is None]:
        raise UserError(
            "this process was started as one of several, but not told which",
            where=f"environment variable {missing[0]}",
            fix="start with `python -m lit_rec fit ... trainer.devices=N`, torchrun or srun",
        )
    rank, size, local = (int(number[0]) for number in numbers[:3] if number is not None)
    return Place(rank, size, local, int(numbers[3][0]) if numbers[3] is not None else size)


def check(found: Place | None, devices: int) -> None:
    """Hold what a launcher has started against `trainer.devices`; 1 and -1 leave it to the launcher.

    Raises:
        UserError: They do not fit.
    """
    if found is not None and devices not in (-1, 1, found.local_size):
        raise UserError(
            f"the launcher started {found.local_size} processes on this machine",
            where=f"config key trainer.devices: {devices}",
            fix=f"use trainer.devices={found.local_size}, or start {devices} processes",
        )


def start(found: Place | None) -> None:
    """Meet the other processes.

    Args:
        found: As `discover` found it; None, or one of one: nothing happens.
    """
    global _place
    if found is None or found.size == 1 or found == _place:
        return
    import torch.distributed as dist

    if "MASTER_ADDR" not in os.environ:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        slurm = SLURMEnvironment(auto_requeue=False)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = slurm.main_address, str(slurm.main_port)
    told = {"RANK": found.rank, "WORLD_SIZE": found.size, "LOCAL_RANK": found.local_rank}
    os.environ.update({name: str(value) for name, value in told.items()})
    os.environ["LOCAL_WORLD_SIZE"] = str(found.local_size)
    os.environ["GROUP_RANK"] = str(found.rank // found.local_size)
    dist.init_process_group(backend(), rank=found.rank, world_size=found.size, timeout=PATIENCE)
    _place = found


def backend() -> str:
    """What the processes talk through; what lies on the CPU goes through gloo in any case."""
    import torch

    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def leave() -> bool:
    """Part from the others, the common work being done; whether this is the process that tells what came of it."""
    global _place
    first = _place.rank == 0
    if _place.size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()
        _place = Place(local_rank=_place.local_rank)
    return first


def place() -> Place:
    """Which process this is; process 0 of 1 where it works alone."""
    return Place(local_rank=_place.local_rank) if _alone else _place


def main() -> bool:
    """Whether this process is the one that keeps what all of them make alike."""
    return place().rank == 0


def size() -> int:
    """Processes that work together here."""
    return place().size


@contextmanager
def alone() -> Iterator[None]:
    """Work without the others: nothing below is shared out, and nobody is waited for."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def share(items: Sequence[T]) -> Sequence[T]:
    """The part of a list that is this process's to do."""
    here = place()
    return items[here.rank :: here.size]


def gathered(value: T) -> list[T]:
    """What every process has here, by rank."""
    if size() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def agreed(value: T) -> T:
    """What process 0 has here."""
    if size() == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait until all are here."""
    gathered(None)


def whole(part: Sequence[T]) -> list[T]:
    """Put the results of everybody's `share` together again, in the order of the list that was shared."""
    parts = gathered(list(part))
    longest = max(len(one) for one in parts)
    return [one[n] for n in range(longest) for one in parts if n < len(one)]


def divide(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Do every job, each by one process on its own; all get all results."""
    if size() == 1:
        return [job() for job in jobs]
    mine = share(jobs)
    with alone():
        done = [job() for job in mine]
    return whole(done)


def total(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over the processes; a key that one lacks counts 0."""
    parts = gathered(dict(values))
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: sum(part.get(key, 0.0) for part in parts) for key in keys}
