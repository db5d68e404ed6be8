"""Start-up: what a person waits for `--help` and `show-config`, a process each, on a warm disk."""

import subprocess
import sys
import time
from statistics import median

from tests.benchmarks.harness import Row

ASKED = 1.0  # seconds
COMMANDS = (["--help"], ["show-config", "--config", "configs/rlrf_ml1m.yaml"])


def start(arguments: list[str]) -> float:
    """Seconds of a command from the shell's view: this process's own processor time would say nothing of it."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lit_rec", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def run(full: bool = False) -> list[Row]:
    """Both commands in turn."""
    for arguments in COMMANDS:
        start(arguments)  # compiles, reads from the disk
    turns = [list(map(start, COMMANDS)) for _ in range(7)]
    return [
        Row(f"start of {arguments[0]}", "a second", taken, ASKED, "s", ASKED / taken, 1.0, "median of 7")
        for arguments, taken in zip(COMMANDS, map(median, zip(*turns, strict=True)), strict=True)
    ]
