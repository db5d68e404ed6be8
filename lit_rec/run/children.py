"""Several runs at work, each in a process of its own: started, watched, and stopped together."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

KEPT, WAITING, WORKING, DONE, FAILED = "finished before", "", "at work", "done", "failed"
PATIENCE = 20.0  # seconds a stopped run has for its last batch before it is killed; a killed run resumes as well
PAUSE = 0.1  # seconds between two looks at the processes
LAST = 12  # lines of a failed run that are told
_TAIL = 1 << 14  # bytes of a log that are looked at for its last lines
_PR_SET_PDEATHSIG = 1


@dataclass
class Child:
    """One run.

    Attributes:
        name: For people.
        folder: Its run folder; what it says goes to `log.txt` there.
        command: What is executed.
        state: One of the states above.
        code: Exit code; negative: the signal that killed it; None: it has not ended.
    """

    name: str
    folder: Path
    command: Sequence[str]
    state: str = WAITING
    code: int | None = None
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    seconds: float = 0.0

    @property
    def log(self) -> Path:
        """Where everything goes that the run says."""
        return self.folder / "log.txt"

    def start(self, *, env: Mapping[str, str] | None = None, shown: bool = False) -> None:
        """Start the process; its output replaces that of an earlier attempt.

        Args:
            env: Its environment; None: this process's own.
            shown: Let it write to the terminal, and keep no log.
        """
        here = str(Path(__file__).resolve().parents[2])  # lit_rec, also where it is not installed
        paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
        with contextlib.ExitStack() as stack:
            log = None
            if not shown:
                self.folder.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(self.log.open("wb"))
            # A session of its own: Ctrl-C reaches the sweep alone, which then stops its runs one and all.
            self.process = subprocess.Popen(
                list(self.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT if log else None,
                env={**(env or os.environ), "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
                preexec_fn=prepare(),
            )
        self.state, self.started = WORKING, time.monotonic()

    def look(self) -> bool:
        """Whether the run has just ended."""
        if self.process is None or self.state != WORKING:
            return False
        self.seconds = time.monotonic() - self.started
        self.code = self.process.poll()
        if self.code is None:
            return False
        self.state = FAILED if self.code else DONE
        return True

    def last_lines(self, count: int = LAST) -> list[str]:
        """What the run said last, without control characters."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        lines = ["".join(c for c in line if c.isprintable()).rstrip() for line in text.splitlines()]
        return [line for line in lines if line][-count:]


def prepare() -> Callable[[], None]:
    """What a run's process does first: it listens to interrupts and, where Linux can, is killed when the sweep is.

    A sweep that was started in the background ignores interrupts, and its runs would inherit that. What nobody watches
    would hold its folder's lock.
    """
    linux = sys.platform.startswith("linux")
    library, parent = ctypes.CDLL(None) if linux else None, os.getpid()

    def begin() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if library is not None:
            library.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
            if os.getppid() != parent:  # it died in between
                os._exit(1)

    return begin


def run_children(children: Sequence[Child], *, jobs: int, console: Console | None = None) -> None:
    """Start every child that is waiting, `jobs` at a time, until all have ended; each child knows how it went.

    Raises:
        KeyboardInterrupt: By Ctrl-C or a scheduler; all children have been stopped before.
    """
    if console is None:
        from lit_rec.run.progress import console as shared

        console = shared
    with _overview(children, console) as tell:
        try:
            for child in children:
                if child.state == KEPT:
                    tell(child)
            while any(child.state in (WAITING, WORKING) for child in children):
                free = jobs - sum(child.state == WORKING for child in children)
                for child in [child for child in children if child.state == WAITING][:free]:
                    child.start()
                    tell(child)
                time.sleep(PAUSE)
                for child in children:
                    if child.look():
                        tell(child)
        except BaseException:
            stop_children(children)
            raise


def stop_children(children: Sequence[Child]) -> None:
    """Interrupt what is at work, as Ctrl-C would, and kill what does not end; a second Ctrl-C kills at once."""
    working = [child for child in children if child.process is not None and child.process.poll() is None]
    try:
        for child in working:
            _signal(child, signal.SIGINT)
        limit = time.monotonic() + PATIENCE
        for child in working:
            assert child.process is not None
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, limit - time.monotonic()))
    finally:
        for child in working:
            assert child.process is not None
            if child.process.poll() is None:
                _signal(child, signal.SIGKILL)
                child.process.wait()
            child.state = WAITING


def _signal(child: Child, number: int) -> None:
    """Reach the run and whatever it has started."""
    assert child.process is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process.pid, number)


@contextlib.contextmanager
def _overview(children: Sequence[Child], console: Console) -> Iterator[Callable[[Child], None]]:
    """Show what is going on: a table on a terminal, elsewhere a line for whatever begins or ends."""
    if console.is_terminal:
        with Live(get_renderable=lambda: overview(children, console.height), console=console, refresh_per_second=2):
            yield lambda child: None
        return

    def tell(child: Child) -> None:
        ended = f" after {child.seconds:.0f} s" if child.state in (DONE, FAILED) else ""
        code = f" (exit code {child.code})" if child.state == FAILED else ""
        place = f"{1 + list(children).index(child)} of {len(children)}"
        console.print(Text(f"{place} {child.name}: {child.state}{ended}{code}"), soft_wrap=True)
        console.file.flush()

    yield tell


def overview(children: Sequence[Child], height: int) -> Table:
    """Every run with its state; where the terminal is too low for all, what is at work and what failed comes first."""
    counts = Counter(child.state or "waiting" for child in children)
    table = Table(
        title=Text("Sweep: " + ", ".join(f"{n} {state}" for state, n in counts.items())), title_justify="left"
    )
    for column in ("run", "state", "time", "says"):
        table.add_column(column, justify="right" if column == "time" else "left", no_wrap=True, overflow="ellipsis")
    order = {state: place for place, state in enumerate((WORKING, FAILED, WAITING, DONE, KEPT))}
    room = max(3, height - 7)
    shown = sorted(children, key=lambda child: order[child.state]) if len(children) > room else list(children)
    for child in shown[:room]:
        time_taken = f"{child.seconds:.0f} s" if child.seconds else ""
        says = (child.last_lines(1) or [""])[0] if child.state in (WORKING, FAILED) else ""
        style = {FAILED: "red", DONE: "green"}.get(child.state, "")
        table.add_row(
            Text(child.name), Text(child.state or "waiting", style=style), time_taken, Text(says, style="dim")
        )
    if len(children) > room:
        table.caption = Text(f"and {len(children) - room} more")
    return table
