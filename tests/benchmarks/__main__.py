"""All benchmarks in one table: python -m tests.benchmarks [name ...] [--full] [--plot FILE] [--output FILE]

Every benchmark runs in a process of its own. Sizes are such that the whole table takes less than 20 minutes on 2 cores;
--full takes the sizes that a study has.
"""

import argparse
import os
import platform
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lit_rec.cli import prepare
from tests.benchmarks.harness import CLOCK
from tests.benchmarks.processes import measure

NAMES = (
    "start",
    "metrics",
    "reading",
    "rewards",
    "reranker",
    "encoder",
    "server",
    "scoring",
    "sampler",
    "several",
    "dpo",
    "growth",
    "gpu",
)
WITH_LLM = {"scoring", "sampler", "several", "dpo", "gpu"}
NOWHERE = ("gpu",)  # these need not have rows: there may be none here


def ticks() -> tuple[int, int]:
    """Of all processors since they were started: those taken by other virtual machines of the host, and all."""
    stat = Path("/proc/stat")
    of_all = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]] if stat.exists() else [0] * 8
    return of_all[7], sum(of_all)


def fetch_llm(console: Console) -> None:
    """Fetch the quickstart's model, once for all processes; where that fails, say that another one is measured."""
    from lit_rec.config import load_config
    from lit_rec.errors import UserError
    from lit_rec.llm.loading import local_source

    try:
        local_source(load_config("configs/quickstart.yaml", []).llm, "llm")
    except UserError as error:  # such as on a machine without a network: the rows say so, too
        console.print(f"{error}\nmeasured with random weights instead", highlight=False)


def main() -> int:
    """0 if every ratio is what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="which ones; all by default")
    parser.add_argument("--output", type=Path, help="also write the rows as JSON lines")
    parser.add_argument("--full", action="store_true", help="the sizes of a real study: hours rather than minutes")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure processor time instead of wall-clock: for a machine that does other work too",
    )
    parser.add_argument("--plot", type=Path, help="also draw the curves of `growth` into this file (.svg or .png)")
    given = parser.parse_args()
    os.environ[CLOCK] = "processor" if given.processor_time else "wall"
    prepare(None)  # as the command line does, for the peers as well
    console = Console(width=None if sys.stdout.isatty() else 180)
    waits = {"passive": "sleep", "active": "spin"}.get(os.environ.get("OMP_WAIT_POLICY", "active").lower(), "wait")
    console.print(f"threads {waits} while they wait for each other", highlight=False)
    if WITH_LLM & set(given.names or NAMES):
        fetch_llm(console)
    rows, failed = [], []
    for name in given.names or NAMES:
        started, before = time.perf_counter(), ticks()
        options = {"plot": str(given.plot)} if given.plot and name == "growth" else {}
        found = measure(name, full=given.full, **options)
        failed += [] if found or name in NOWHERE else [name]
        rows += found
        stolen, spent = (after - first for after, first in zip(ticks(), before, strict=True))
        took = f"{name}: {time.perf_counter() - started:.0f} s"
        console.print(f"{took}, {stolen / max(1, spent):.0%} of the processors taken by others", highlight=False)
        for row in found:
            console.print(f"  {row.ratio:,.3g} of {row.reach:.3g}: {row.work}; {row.peer}", highlight=False)
    table = Table(title=f"{platform.machine()}, {os.cpu_count()} cores; ratio: how many times better, in the same run")
    for column in ("work", "peer", "ours", "peer's", "ratio", "asked", "note"):
        table.add_column(column, justify="left" if column in ("work", "peer", "note") else "right")
    for row in rows:
        values = [f"{value:,.3g} {row.unit}" for value in (row.ours, row.theirs)]
        ratio = f"[{'green' if row.reached else 'red'}]{row.ratio:.2f}[/]"
        table.add_row(row.work, row.peer, *values, ratio, f"{row.reach:.2f}", row.note)
    console.print(table)
    if given.output:
        given.output.write_text("".join(row.line() + "\n" for row in rows))
    return int(bool(failed) or not all(row.reached for row in rows))


if __name__ == "__main__":
    sys.exit(main())
