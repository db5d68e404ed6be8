"""Killed anywhere, the same command ends with the same results, and nothing the LLM said is asked for twice.

What the tests of the three recipes share; each has a file of its own, so that they run side by side.
"""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.worlds import World

# A process that imports everything once and forks one run after another, each killed at its own point: a real SIGKILL
# in the middle of a real run, at a place that does not depend on the machine's speed.
DRIVER = textwrap.dedent("""
    import json, os, signal, sys

    os.environ["OMP_NUM_THREADS"] = "1"
    from lit_rec.cli import main
    from lit_rec.llm.store import AnswerStore
    from lit_rec.run import commands

    plan = json.loads(sys.argv[1])
    replace, add = os.replace, AnswerStore.add


    def die():
        os.kill(os.getpid(), signal.SIGKILL)


    def at_rename(when, name):
        def patched(source, target, **kwargs):
            if when == "before" and str(target).endswith(name):
                die()
            replace(source, target, **kwargs)
            if when == "after" and str(target).endswith(name):
                die()
        os.replace = patched


    def at_answer(number):
        calls = []
        def patched(self, batch):
            calls.append(1)
            if len(calls) == number:  # half of the line reaches the disk
                with self.path.open("ab") as file:
                    file.write(b'{"0123": {"text": "half a li')
                    file.flush()
                die()
            add(self, batch)
        AnswerStore.add = patched


    for config, when, where in plan:
        child = os.fork()
        if child == 0:
            if when == "answer":
                at_answer(where)
            elif when != "never":
                at_rename(when, where)
            os._exit(main(["fit", "--config", config]))
        status = os.waitpid(child, 0)[1]
        died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print(json.dumps([when, where, died, status]), flush=True)
""")


def drive(quiet: World, killed: World, points: list[list[object]]) -> list[list[object]]:
    """Run one, and run and kill the other; what became of every attempt at that."""
    plan = [[quiet.config, "never", ""], *([killed.config, *point] for point in points), [killed.config, "never", ""]]
    command = [sys.executable, "-c", DRIVER, json.dumps(plan)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=420)
    attempts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    assert len(attempts) == len(plan), done.stdout[-2000:] + done.stderr[-4000:]
    assert attempts[0][3] == attempts[-1][3] == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return attempts[1:]


def stored_keys(world: World) -> list[str]:
    """The key of every answer in the store, in the order they were written."""
    lines = (world.run / "answers" / "answers.jsonl").read_text().splitlines()
    return [key for line in lines for key in json.loads(line)]


@dataclass(frozen=True)
class Worlds:
    """The same experiment undisturbed, and killed at every point."""

    quiet: World
    killed: World
    points: list[list[object]]
    attempts: list[list[object]]


class Resumed:
    """The tests; a subclass says of which run, and where it is killed."""

    make: Callable[[Path], World]
    points: list[list[object]]

    @pytest.fixture(scope="class")
    def worlds(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
        quiet, killed = (request.cls.make(tmp_path_factory.mktemp(name)) for name in ("quiet", "killed"))
        return Worlds(quiet, killed, request.cls.points, drive(quiet, killed, request.cls.points))

    def test_every_point_was_reached(self, worlds: Worlds) -> None:
        assert [(when, where) for when, where, died, _ in worlds.attempts if died] == [tuple(p) for p in worlds.points]

    def test_results_are_the_same_to_the_byte(self, worlds: Worlds) -> None:
        weights = [f"{folder}/{name}" for folder, name in (("adapter", "adapter_model"), ("reranker", "reranker"))]
        names = ["results.json", "hints.json", *(f"{name}.safetensors" for name in [*weights, "agent/policy"])]
        present = [name for name in names if (worlds.quiet.run / name).exists()]
        assert any(name.endswith(".safetensors") for name in present)
        for name in present:
            assert (worlds.killed.run / name).read_bytes() == (worlds.quiet.run / name).read_bytes(), name
        assert len(json.loads((worlds.quiet.run / "results.json").read_text())) > 100

    def test_no_answer_was_generated_twice(self, worlds: Worlds) -> None:
        keys = stored_keys(worlds.killed)
        assert len(keys) == len(set(keys))
        assert set(keys) == set(stored_keys(worlds.quiet))

    def test_nothing_half_written_is_left(self, worlds: Worlds) -> None:
        stages = [p for p in (worlds.killed.run / "stages").rglob("*") if p.is_dir() and p.name.startswith(".")]
        assert stages == []
        assert (worlds.killed.run / "report.html").is_file()
