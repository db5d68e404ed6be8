"""How benchmarks run: ours and the peer in turn in one process, medians, a ratio; absolute times mean little."""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

CLOCK = "LIT_REC_BENCHMARK_CLOCK"  # set by --processor-time for the processes that measure
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        work: What is done, with its sizes.
        peer: Who else does it.
        ours: Our median.
        theirs: The peer's.
        unit: Of both.
        ratio: How many times better ours is.
        reach: The ratio that is asked for.
        note: What a reader has to know.
    """

    work: str
    peer: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    reach: float
    note: str = ""

    @property
    def reached(self) -> bool:
        """Whether the ratio is what is asked for."""
        return self.ratio >= self.reach

    def line(self) -> str:
        """The row as JSON."""
        return json.dumps(asdict(self))


def now() -> float:
    """Seconds on the clock that is measured with: wall-clock, or processor time where that is asked for."""
    return time.process_time() if os.environ.get(CLOCK) == "processor" else time.perf_counter()


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    started = now()
    call()
    return now() - started


def interleave(ours: Callable[[], object], *peers: Callable[[], object], repeats: int = 3) -> list[float]:
    """Median seconds of ours and of every peer, run in turn so that a noisy minute hits all of them."""
    calls = (ours, *peers)
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for times, call in zip(taken, calls, strict=True):
            times.append(seconds(call))
    return [statistics.median(times) for times in taken]


def faster(work: str, peer: str, taken: Sequence[float], reach: float, note: str = "") -> Row:
    """A row from seconds: ours against the best of the peer's settings."""
    ours, theirs = taken[0], min(taken[1:])
    return Row(work, peer, ours, theirs, "s", theirs / ours, reach, note)
