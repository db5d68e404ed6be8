"""What a person sees while a run works: one line per long step, with its rate."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

WIDTH_OF_LOGS = 140  # columns where the output is a file or a pipe and nobody tells

console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_LOGS)


class Step:
    """Progress of one step.

    Args:
        advance: Called with the number of units done.
    """

    def __init__(self, bar: Progress | None, task: TaskID, unit: str) -> None:
        self._bar, self._task, self._unit = bar, task, unit
        self.done, self.extra, self.computed, self._started = 0, 0, 0, time.perf_counter()

    def __call__(self, units: int = 1, extra: int = 0) -> None:
        """Report `units` done; `extra` counts something finer (tokens). Stored work comes with extra 0 and no rate."""
        self.done += units
        self.extra += extra
        self.computed += units if extra else 0
        if self._bar is not None:
            self._bar.update(self._task, advance=units, rate=self.rate())

    def rate(self) -> str:
        """Units (or extra units) per second so far."""
        seconds = max(time.perf_counter() - self._started, 1e-6)
        if self.extra:
            return f"{self.extra / seconds:,.0f} tokens/s"
        return f"{self.done / seconds:,.1f} {self._unit}/s"


@contextmanager
def step(description: str, total: int, unit: str) -> Iterator[Step]:
    """Show a step while it runs; on a terminal a bar, elsewhere one line when it is done."""
    if not console.is_terminal:
        tracker = Step(None, TaskID(0), unit)
        yield tracker
        seconds = time.perf_counter() - tracker._started
        if tracker.done:
            console.print(
                f"{description}: {tracker.done:,} {unit} in {seconds:.1f} s ({tracker.rate()})", highlight=False
            )
            sys.stdout.flush()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}", style="dim"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, rate="")
        yield Step(bar, task, unit)
