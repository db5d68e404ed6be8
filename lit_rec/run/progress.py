"""What a person, or a cluster's scheduler, sees while a run works: long steps with their rates, warnings, tables.

Everything is told on `console` and in `step`; how is decided here alone, by `shown_as`.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

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
from rich.text import Text

WIDTH_OF_LOGS = 140  # columns where the output is a file or a pipe and nobody tells
ALL, QUIET, JSON = "all", "quiet", "json"
WARNINGS = ("[yellow]", "warning:")  # how a text begins that is told in every mode


class Terminal(Console):
    """The console; it knows what not to say.

    Attributes:
        mode: ALL; QUIET: warnings and tables; JSON: `lines` alone, and warnings as JSON on stderr.
        lines: Where JSON lines go.
        ended: Whether the last JSON line, that of the results, has been written.
    """

    mode: str = ALL
    lines: TextIO | None = None
    ended: bool = False

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print as `Console` does, where the mode lets it."""
        warning = bool(objects) and isinstance(objects[0], str) and objects[0].startswith(WARNINGS)
        if self.mode == JSON:
            if warning:
                told = Text.from_markup(objects[0]).plain if settings.get("markup", True) else objects[0]
                print(json.dumps({"event": "warning", "message": told}), file=sys.stderr, flush=True)
        elif self.mode == ALL or warning or not all(isinstance(one, str | Text) for one in objects):
            super().print(*objects, **settings)

    def aside(self, *objects: Any) -> None:
        """Print what only a person wants who reads everything."""
        if self.mode == ALL:
            super().print(*objects, highlight=False)

    def emit(self, event: str, **told: Any) -> None:
        """Write a JSON line; in other modes nothing."""
        if self.mode == JSON and self.lines is not None:
            print(json.dumps({"event": event, **told}, default=str, ensure_ascii=False), file=self.lines, flush=True)


console = Terminal(width=None if sys.stdout.isatty() else WIDTH_OF_LOGS)


@contextmanager
def shown_as(mode: str) -> Iterator[None]:
    """Tell what happens below in a mode; with JSON nothing but its lines reaches stdout, whoever prints."""
    before = console.mode, console.lines, console.ended
    console.mode, console.lines, console.ended = mode, sys.stdout, False
    try:
        if mode == JSON:
            with redirect_stdout(sys.stderr):
                yield
        else:
            yield
    finally:
        console.mode, console.lines, console.ended = before


def tell_results(rows: Sequence[Mapping[str, Any]], counts: Callable[[Mapping[str, Any]], bool], **told: Any) -> None:
    """Write the last JSON line of a command: the rows of the headline, and where the rest lies.

    Args:
        rows: Lines of results.json.
        counts: Whether a line is counted as the headline is (`Headline.counts`).
        told: More keys, such as `results`: the path of results.json.
    """
    console.emit("results", **told, rows=[row for row in rows if counts(row)])
    console.ended = True


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

    @property
    def seconds(self) -> float:
        """Since the step began."""
        return max(time.perf_counter() - self._started, 1e-6)

    def speed(self) -> tuple[float, str]:
        """Units (or extra units) per second so far, and of what."""
        return (self.extra / self.seconds, "tokens") if self.extra else (self.done / self.seconds, self._unit)

    def rate(self) -> str:
        """`speed` in words; the other way round where a unit takes more than a second."""
        speed, unit = self.speed()
        if 0 < speed < 1 and not self.extra:
            return f"{1 / speed:,.1f} s each"
        return f"{speed:,.{0 if self.extra else 1}f} {unit}/s"


@contextmanager
def step(description: str, total: int, unit: str) -> Iterator[Step]:
    """Show a step while it runs; on a terminal a bar, elsewhere one line when it is done, as JSON one at each end."""
    if console.mode == ALL and console.is_terminal:
        with _bar(description, total, unit) as tracker:
            yield tracker
        return
    tracker = Step(None, TaskID(0), unit)
    console.emit("begin", step=description, total=total, unit=unit)
    whole = False
    try:
        yield tracker
        whole = True
    finally:
        speed, per = tracker.speed()
        told = {"done": tracker.done, "unit": unit, "seconds": round(tracker.seconds, 3)}
        console.emit("end", step=description, whole=whole, **told, rate=round(speed, 3), rate_unit=f"{per}/s")
    if tracker.done and console.mode == ALL:
        seconds = f"{tracker.seconds:.1f} s"
        console.print(f"{description}: {tracker.done:,} {unit} in {seconds} ({tracker.rate()})", highlight=False)
        sys.stdout.flush()


@contextmanager
def _bar(description: str, total: int, unit: str) -> Iterator[Step]:
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
