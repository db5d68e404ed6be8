"""Real attempts at a real command, one after the other, each in a process of its own that something happens to."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.llm.odd import ODD

SHORT = [text for text in ODD if len(text) < 400]  # a model in process writes no more than it is asked for
# Imports everything once and forks one attempt after another.
DRIVER = textwrap.dedent("""
    import itertools, json, os, subprocess, sys, time

    os.environ["OMP_NUM_THREADS"] = "1"
    from lit_rec.cli import main
    from lit_rec.llm.language_model import LanguageModel
    from lit_rec.llm.store import Answer
    from lit_rec.run import commands

    odd = itertools.cycle(json.loads(sys.argv[2]))
    for attempt in json.loads(sys.argv[1]):
        if attempt["before"]:
            subprocess.run(attempt["before"], shell=True, check=True)
        child = os.fork()
        if child == 0:
            with open(attempt["log"], "wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            if attempt["clock"]:
                real = time.time
                time.time = lambda: real() + attempt["clock"]
            if attempt["odd"]:
                LanguageModel._answer = lambda self, ids, stop: Answer(next(odd), len(ids), "stop")
            try:
                code = main(attempt["argv"])
            except BaseException:
                import traceback
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            os._exit(code)
        print("\\n" + json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)
""")


@dataclass
class Attempt:
    """One start of the command.

    Attributes:
        argv: Its arguments.
        log: Where all it says goes.
        before: A shell command that comes first.
        clock: Seconds by which its clock is wrong.
        odd: Whether the LLM answers oddly.
        code: Its exit code; negative: the signal that ended it.
    """

    argv: list[str]
    log: str
    before: str = ""
    clock: float = 0.0
    odd: bool = False
    code: int = field(default=-99)

    @property
    def said(self) -> str:
        """What it said."""
        return Path(self.log).read_text(errors="replace")


def run_attempts(attempts: Sequence[Attempt]) -> None:
    """Make all attempts; each knows its exit code afterwards."""
    command = [sys.executable, "-c", DRIVER, json.dumps([asdict(one) for one in attempts]), json.dumps(SHORT)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=1200)
    codes = [json.loads(line) for line in done.stdout.splitlines() if line.strip().lstrip("-").isdigit()]
    assert len(codes) == len(attempts), done.stdout[-2000:] + done.stderr[-4000:]
    for one, code in zip(attempts, codes, strict=True):
        one.code = code


def can_mount() -> bool:
    """Whether this process may mount a small disk."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=False).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
    return True


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own, mounted at a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, left: int) -> None:
    """Fill a disk so that so many bytes are left."""
    ballast = folder / "ballast"
    ballast.unlink(missing_ok=True)
    room = os.statvfs(folder)
    with ballast.open("wb") as file:
        file.truncate(0)
        os.posix_fallocate(file.fileno(), 0, max(room.f_bavail * room.f_frsize - left, 1))
