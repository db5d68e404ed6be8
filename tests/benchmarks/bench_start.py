"""Start-up: what a person waits for `--help` and `show-config`, a process each, on a warm disk."""

import subprocess
import sys
from statistics import median

from tests.benchmarks.harness import Row, seconds

ASKED = 1.0  # seconds
COMMANDS = (["--help"], ["show-config", "--config", "configs/rlrf_ml1m.yaml"])


def start(arguments: list[str]) -> None:
    """Run a command to its end."""
    subprocess.run([sys.executable, "-m", "lit_rec", *arguments], check=True, stdout=subprocess.DEVNULL)


def run(full: bool = False) -> list[Row]:
    """Wall-clock from the shell's view; both commands in turn."""
    for arguments in COMMANDS:
        start(arguments)  # compiles, reads from the disk
    turns = [[seconds(lambda arguments=arguments: start(arguments)) for arguments in COMMANDS] for _ in range(7)]
    return [
        Row(f"start of {arguments[0]}", "a second", taken, ASKED, "s", ASKED / taken, 1.0, "median of 7")
        for arguments, taken in zip(COMMANDS, map(median, zip(*turns, strict=True)), strict=True)
    ]
