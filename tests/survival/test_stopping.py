"""Killed, terminated or interrupted at any time, by one process or two: the same command ends with the same results."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.session_worlds import make_session_world
from tests.worlds import make_unified_world, make_world

MAKE = {"rlrf": make_world, "re2llm": make_session_world, "unified": make_unified_world}
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}
POINTS = 20


def start(config: str, run: Path, processes: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lit_rec", "fit", "--config", config, f"run.dir={run}"]
    return subprocess.Popen(
        [*command, f"trainer.devices={processes}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,  # which has interrupts switched on, as a terminal has
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def finish(config: str, run: Path, processes: int) -> float:
    """Run to the end; how many seconds it took."""
    began = time.monotonic()
    going = start(config, run, processes)
    said = going.communicate(timeout=600)[0]
    assert going.returncode == 0, said
    return time.monotonic() - began


def keys(run: Path) -> list[str]:
    lines = (run / "answers/answers.jsonl").read_bytes().splitlines()
    return [key for line in lines for key in json.loads(line)]


def left_over(run: Path) -> list[int]:
    """Processes that still work on a run."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(run) in part for part in process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("recipe", sorted(MAKE))
def test_stopped_at_many_points(recipe: str, processes: int, tmp_path: Path) -> None:
    """Signals at random moments of one run after another, until one comes to its end; then the results are compared."""
    config = MAKE[recipe](tmp_path).config
    whole = finish(config, tmp_path / "whole", 1)
    run, draw = tmp_path / "stopped", random.Random(f"{recipe} {processes}")
    run.mkdir()
    stopped = 0
    while stopped < POINTS:
        number = draw.choice([signal.SIGKILL, *CODES])
        going = start(config, run, processes)
        # Past the imports, most attempts get somewhere; a run that is done early on is begun anew, in a new folder.
        with contextlib.suppress(subprocess.TimeoutExpired):
            going.wait(timeout=draw.uniform(0.2, 1.0) * (whole if stopped % 4 else 2 * whole))
        going.send_signal(number)
        said = going.communicate(timeout=60)[0]
        if going.returncode != 0:
            assert going.returncode == CODES.get(number, -signal.SIGKILL), said
            assert "Traceback" not in said
            stopped += 1
            limit = time.monotonic() + 30
            while left_over(run):
                assert time.monotonic() < limit, f"{number.name} left processes behind"
                time.sleep(0.1)
            continue
        assert (run / "results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()
        assert len(keys(run)) == len(set(keys(run)))
        run = tmp_path / f"stopped_{stopped}"
    finish(config, run, processes)
    assert (run / "results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()
    assert len(keys(run)) == len(set(keys(run))), "an answer was asked for twice"


def test_a_scheduler_takes_the_machine(tmp_path: Path) -> None:
    """Told of the end of its time, a run says so, leaves with a code to requeue on, and can go on."""
    config, run = make_world(tmp_path).config, tmp_path / "run"
    going = start(config, run, 1)
    while not (run / "stages/fold_0/zero_shot/vectors/manifest.json").is_file():
        assert going.poll() is None, going.communicate()[0]
        time.sleep(0.05)
    going.send_signal(signal.SIGTERM)
    said = going.communicate(timeout=30)[0]
    assert going.returncode == CODES[signal.SIGTERM]
    assert "stopped by SIGTERM; the same command resumes" in said
    assert "Traceback" not in said
    assert (run / "config.yaml").is_file()
