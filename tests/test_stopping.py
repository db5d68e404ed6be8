"""A signal is heard wherever it comes, and the exit code says which it was."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}


def started(code: str) -> "subprocess.Popen[str]":
    """Some Python, in place of the command line that `python -m lit_rec` imports."""
    told = f"""
        import sys, types
        cli = types.ModuleType("lit_rec.cli")
        def main():
            {textwrap.indent(textwrap.dedent(code), " " * 12).strip()}
        cli.main = main
        sys.modules["lit_rec.cli"] = cli
        from lit_rec.__main__ import run
        sys.exit(run())
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(told)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def stopped(code: str, number: int) -> tuple[int, str]:
    """The exit code and what was said, where a signal came after "up"."""
    going = started(code)
    assert going.stdout is not None
    assert going.stdout.readline() == "up\n"
    time.sleep(0.05)
    going.send_signal(number)
    said = going.communicate(timeout=20)[0]
    return going.returncode, said


WAYS = {
    "asleep": """
        import time
        print("up", flush=True)
        time.sleep(30)
    """,
    "in an exec, as dataclasses and named tuples have it": """
        print("up", flush=True)
        exec("import time\\ntime.sleep(30)")
    """,
    "where an import turns it into another exception": """
        import time
        print("up", flush=True)
        try:
            time.sleep(30)
        except BaseException:
            raise ImportError("cannot load module more than once per process")
    """,
    "where Lightning leaves by SystemExit": """
        import time
        print("up", flush=True)
        try:
            time.sleep(30)
        except KeyboardInterrupt:
            sys.exit(1)
    """,
    "where Python throws exceptions away": """
        import time
        class Slow:
            def __del__(self):
                print("up", flush=True)
                time.sleep(30)
        Slow()
        time.sleep(30)
    """,
}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: signal.Signals(n).name)
@pytest.mark.parametrize("way", WAYS)
def test_a_signal_stops(way: str, number: int) -> None:
    code, said = stopped(WAYS[way], number)
    by = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    assert (code, said) == (SIGNALS[number], f"{by}; the same command resumes\n")  # type: ignore[index]


def test_what_no_signal_did_is_raised() -> None:
    going = started("1 / 0")
    assert "ZeroDivisionError" in going.communicate(timeout=20)[0]
    assert going.returncode == 1


def test_at_the_end_signals_come_too_late() -> None:
    """All is done: a code that says otherwise would have a scheduler run it again."""
    code = """
        import atexit, time
        atexit.register(lambda: (print("up", flush=True), time.sleep(0.5)))
        return 0
    """
    assert stopped(code, signal.SIGTERM) == (0, "")


def test_inside_each_other_and_where_interrupts_are_ignored() -> None:
    """The outer of two goes on listening; what `nohup` and `&` have ignored stays so."""
    code = """
        import os, signal
        from lit_rec.stopping import stoppable
        with stoppable() as stop:
            pass
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        except KeyboardInterrupt:
            return stop.number
    """
    going = started(code)
    assert going.communicate(timeout=20)[0] == ""
    assert going.returncode == signal.SIGUSR1
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nfrom lit_rec.stopping import stoppable\n"
    kept = "with stoppable():\n    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN"
    assert subprocess.run([sys.executable, "-c", ignoring + kept], cwd=ROOT, check=False).returncode == 0
