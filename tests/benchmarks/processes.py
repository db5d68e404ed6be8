"""A process for every benchmark, so that none inherits another's memory, threads or caches.

What they all import takes ten seconds on a slow machine. It is imported once, by a process that computes nothing, and
that the others are forked from.
"""

import os
import sys
import tempfile
from dataclasses import asdict
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

FORKED = get_context("forkserver")
FORKED.set_forkserver_preload(["lightning", "transformers.modeling_utils", "peft"])


def measure(name: str, **options: Any) -> list[dict[str, Any]]:
    """Rows of one benchmark, run with these options; none where it failed, once that has been said."""
    ours, theirs = FORKED.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r") as said:
        process = FORKED.Process(target=_run, args=(name, options, said.name, theirs))
        process.start()
        theirs.close()
        try:
            found: list[dict[str, Any]] = ours.recv()
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
    rows.send([asdict(row) for row in import_module(f"tests.benchmarks.bench_{name}").run(**options)])
