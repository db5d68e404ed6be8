"""A process for every benchmark, so that none inherits another's memory, threads or caches; and for sides of some.

What they all import takes ten seconds on a slow machine. It is imported once, by a process that computes nothing, and
that the others are forked from; not where there is a GPU, which a process that was forked may be unable to use.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import Row

ROOT, TOLD = Path(__file__).parents[2], "TOLD "
BEGUN = get_context("spawn" if Path("/dev/nvidiactl").exists() else "forkserver")
BEGUN.set_forkserver_preload(["lightning", "transformers.modeling_utils", "peft"])


def measure(name: str, **options: Any) -> list[Row]:
    """Rows of one benchmark, run with these options; none where it failed, once that has been said."""
    ours, theirs = BEGUN.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r") as said:
        process = BEGUN.Process(target=_run, args=(name, options, said.name, theirs))
        process.start()
        theirs.close()
        try:
            found: list[Row] = ours.recv()
        except EOFError:
            found = []
        process.join()
        if process.exitcode:
            print(f"{name} failed:\n{said.read()[-3000:]}", file=sys.stderr)
    return [] if process.exitcode else found


def _run(name: str, options: dict[str, Any], said: str, rows: Connection) -> None:
    """What is printed goes into the file `said`, the rows into the pipe."""
    with open(said, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    rows.send(import_module(f"tests.benchmarks.bench_{name}").run(**options))


class Side:
    """A process of its own that stays, works when it is asked to, and tells JSON; so that sides can take turns."""

    def __init__(self, process: subprocess.Popen[str], said: Any) -> None:
        self.process, self.said = process, said

    def ask(self, wanted: str = "go") -> None:
        """Begin."""
        assert self.process.stdin is not None
        print(wanted, file=self.process.stdin, flush=True)

    def told(self) -> Any:
        """Wait for the answer.

        Raises:
            RuntimeError: The process has ended instead; with what it said.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(TOLD):
                return json.loads(line.removeprefix(TOLD))
        self.said.seek(0)
        raise RuntimeError(self.said.read()[-2000:])

    def work(self, wanted: str = "go") -> Any:
        """Ask, and wait."""
        self.ask(wanted)
        return self.told()


def tell(value: Any) -> None:
    """Answer, within such a process."""
    print(TOLD + json.dumps(value), flush=True)


@contextmanager
def side(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[Side]:
    """Start Python with these arguments, at the root of the project; it ends with its input."""
    asked: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with tempfile.TemporaryFile("w+") as said:
        env = {**os.environ, **(environment or {})}
        with subprocess.Popen([sys.executable, *arguments], stderr=said, env=env, **asked) as process:
            yield Side(process, said)
