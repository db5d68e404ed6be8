"""All benchmarks in one table: python -m tests.benchmarks [name ...] [--output FILE]

Every benchmark runs in a process of its own, so that none inherits another's memory, threads or caches.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

NAMES = ("metrics", "reading", "rewards", "reranker", "encoder", "server", "scoring", "sampler", "dpo")


def measure(name: str) -> list[dict[str, object]]:
    """Rows of one benchmark."""
    code = f"from tests.benchmarks.bench_{name} import run\nfor row in run(): print('ROW', row.line(), flush=True)"
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        print(f"{name} failed:\n{done.stderr[-3000:]}", file=sys.stderr)
    return [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]


def main() -> int:
    """0 if every ratio is what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="which ones; all by default")
    parser.add_argument("--output", type=Path, help="also write the rows as JSON lines")
    given = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 180)
    rows, failed = [], []
    for name in given.names or NAMES:
        started = time.perf_counter()
        found = measure(name)
        failed += [] if found else [name]
        rows += found
        console.print(f"{name}: {time.perf_counter() - started:.0f} s", highlight=False)
    table = Table(title=f"{platform.machine()}, {os.cpu_count()} cores; ratio: how many times better, in the same run")
    for column in ("work", "peer", "ours", "peer's", "ratio", "asked", "note"):
        table.add_column(column, justify="left" if column in ("work", "peer", "note") else "right")
    for row in rows:
        reached = row["ratio"] >= row["reach"]  # type: ignore[operator]
        values = [f"{row[key]:,.3g} {row['unit']}" for key in ("ours", "theirs")]
        ratio = f"[{'green' if reached else 'red'}]{row['ratio']:.2f}[/]"
        table.add_row(str(row["work"]), str(row["peer"]), *values, ratio, f"{row['reach']:.2f}", str(row["note"]))
    console.print(table)
    if given.output:
        given.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return int(bool(failed) or any(row["ratio"] < row["reach"] for row in rows))  # type: ignore[operator]


if __name__ == "__main__":
    sys.exit(main())
