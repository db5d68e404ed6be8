"""Processes of a sweep: as many at a time as asked for, and stopped one and all."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lit_rec.run import children
from lit_rec.run.children import DONE, FAILED, KEPT, WAITING, Child, overview, run_children
from lit_rec.run.sweep import tell_failures
from lit_rec.stopping import stoppable

ROOT = str(Path(__file__).parents[2])


def script(folder: Path, name: str, code: str) -> Child:
    """A child that runs some Python."""
    return Child(name, folder / name, [sys.executable, "-c", textwrap.dedent(code)])


def quiet() -> Console:
    return Console(file=StringIO(), width=120)


@pytest.fixture
def listening() -> Iterator[None]:
    """Interrupts are heard, also where the tests themselves were started in the background, which ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class TestChildren:
    def test_one_that_fails_does_not_stop_the_others(self, tmp_path: Path, capsys: Any) -> None:
        told = quiet()
        runs = [
            script(tmp_path, "a", "print('fine')"),
            script(tmp_path, "b", "import sys; print('x' * 30000); print('\\x1b[31mlast words'); sys.exit(2)"),
            script(tmp_path, "c", "import os; os.kill(os.getpid(), 9)"),
            Child("d", tmp_path / "d", ["never started"], KEPT),
        ]
        run_children(runs, jobs=1, console=told)
        assert [(child.state, child.code) for child in runs] == [(DONE, 0), (FAILED, 2), (FAILED, -9), (KEPT, None)]
        assert runs[0].log.read_text() == "fine\n"
        tell_failures([child for child in runs if child.code])
        said = capsys.readouterr().err
        assert "2 of the runs failed" in said
        assert "| [31mlast words" in said
        assert "signal 9" in said
        printed = told.file.getvalue()  # type: ignore[attr-defined]
        assert "d: finished before" in printed
        assert "b: failed" in printed
        shown = Console(file=StringIO(), width=120)
        shown.print(overview(runs, 40))
        assert "2 failed" in shown.file.getvalue()  # type: ignore[attr-defined]

    def test_as_many_at_a_time_as_asked_for(self, tmp_path: Path) -> None:
        """Two children that wait for each other end only when they run together; more than two never do."""
        code = """
            import os, sys, time
            mine, other, at_work = sys.argv[1:]
            open(mine, "w").close()
            open(f"{at_work}/{os.getpid()}", "w").close()
            while not os.path.exists(other):
                time.sleep(0.01)
            time.sleep(0.05)
            most = len(os.listdir(at_work))
            os.remove(f"{at_work}/{os.getpid()}")
            print(most)
        """
        (tmp_path / "at_work").mkdir()
        runs = [script(tmp_path, f"r{n}", code) for n in range(4)]
        for n, child in enumerate(runs):
            other = n + 1 if n % 2 == 0 else n - 1
            child.command = [*child.command, f"{tmp_path}/{n}", f"{tmp_path}/{other}", f"{tmp_path}/at_work"]
        run_children(runs, jobs=2, console=quiet())
        assert [child.code for child in runs] == [0] * 4
        assert max(int(child.log.read_text()) for child in runs) <= 2

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_an_interrupt_stops_all_and_the_stubborn_too(
        self, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, listening: None
    ) -> None:
        monkeypatch.setattr(children, "PATIENCE", 0.5)
        polite = """
            import time
            try:
                print("up", flush=True)
                time.sleep(60)
            except KeyboardInterrupt:
                print("stopped", flush=True)
        """
        stubborn = """
            import signal, time
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            print("up", flush=True)
            time.sleep(60)
        """
        runs = [
            script(tmp_path, "polite", polite),
            script(tmp_path, "stubborn", stubborn),
            script(tmp_path, "last", ""),
        ]

        def interrupt() -> None:
            while not all(run.log.is_file() and "up" in run.log.read_text() for run in runs[:2]):
                time.sleep(0.02)
            os.kill(os.getpid(), number)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with stoppable() as stop, pytest.raises(KeyboardInterrupt):
            run_children(runs, jobs=2, console=quiet())
        thread.join()
        assert stop.number == number
        assert runs[0].log.read_text() == "up\nstopped\n"
        assert [run.process.poll() for run in runs[:2] if run.process] == [0, -9]
        assert [run.state for run in runs] == [WAITING] * 3
        assert runs[2].process is None

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a child that ends with its parent is Linux'")
    def test_runs_end_with_a_sweep_that_is_killed(self, tmp_path: Path) -> None:
        code = f"""
            import sys
            from pathlib import Path
            from lit_rec.run.children import Child, run_children
            sleep = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
            run_children([Child("a", Path({str(tmp_path)!r}), [sys.executable, "-c", sleep])], jobs=1)
        """
        sweep = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.DEVNULL)
        log = tmp_path / "log.txt"
        while not (log.is_file() and log.read_text().endswith("\n")):
            assert sweep.poll() is None
            time.sleep(0.02)
        sweep.kill()
        sweep.wait()
        pid = int(log.read_text())
        for _ in range(500):
            state = Path(f"/proc/{pid}/stat")
            if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return
            time.sleep(0.02)
        raise AssertionError("the run outlived its sweep")
