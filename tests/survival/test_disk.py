"""A full disk, a disk that must not be written, a clock that goes back: one message, and the same command goes on."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_rec.errors import UserError
from lit_rec.llm.store import Answer, AnswerStore
from lit_rec.run.folder import MANIFEST, RunFolder
from tests.session_worlds import make_session_world
from tests.survival.attempts import Attempt, can_mount, fill, run_attempts, small_disk
from tests.worlds import BARE, World, make_unified_world, make_world

pytestmark = pytest.mark.skipif(not can_mount(), reason="a small disk cannot be mounted here (it takes root)")
KB = 1024


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "1m") as folder:
        yield folder


def whole(run: Path) -> None:
    """Whatever has its name is there whole."""
    for manifest in run.rglob(MANIFEST):
        told = json.loads(manifest.read_text())
        assert {file: (manifest.parent / file).stat().st_size for file in told["files"]} == told["files"]
    for name in ("results.json", "rounds.json", "environment.json"):
        if (run / name).exists():
            json.loads((run / name).read_text())
    assert not [path for path in run.rglob("*.tmp") if path.is_file()]
    AnswerStore(run / "answers")


def test_a_stage_that_does_not_fit_leaves_the_folder_as_it_was(disk: Path) -> None:
    def build(work: Path) -> None:
        (work / "large").write_bytes(bytes(600 * KB))

    with RunFolder(disk / "run") as run:
        run.run_stage("one", build, key={})
        with pytest.raises(OSError, match="No space left"):
            run.run_stage("two", build, key={})
        assert sorted(path.name for path in (disk / "run" / "stages").iterdir()) == ["one"]
        shutil.rmtree(disk / "run" / "stages" / "one")
        run.run_stage("two", build, key={})
        assert run.done("two")


def test_an_answer_that_does_not_fit_is_not_half_there(disk: Path) -> None:
    store = AnswerStore(disk)
    store.add([("first", Answer("x" * 1000, 1, "stop"))])
    fill(disk, 32 * KB)
    with pytest.raises(OSError, match="No space left"):
        store.add([("second", Answer("y" * 200 * KB, 1, "stop"))])
    assert "second" not in store
    assert len(AnswerStore(disk)) == 1
    (disk / "ballast").unlink()
    store.add([("second", Answer("y" * 200 * KB, 1, "stop"))])
    assert len(AnswerStore(disk)) == 2


def test_a_disk_without_room_for_a_lock(disk: Path) -> None:
    fill(disk, 0)
    with pytest.raises((OSError, UserError), match="No space left"):
        RunFolder(disk / "run")
    (disk / "ballast").unlink()
    RunFolder(disk / "run").close()


def test_a_disk_that_must_not_be_written(disk: Path) -> None:
    RunFolder(disk / "run").close()
    AnswerStore(disk / "answers")
    os.system(f"mount -o remount,ro {disk}")
    with pytest.raises(UserError, match="cannot write") as caught:
        RunFolder(disk / "run")
    assert "Read-only file system" in caught.value.why
    with pytest.raises(UserError, match="cannot write"):
        AnswerStore(disk / "answers")


def go_through(world: World, disk: Path, more: list[str], free: list[int]) -> None:
    """Run on a disk that is too small again and again, with a wrong clock; then compare with a quiet run."""
    run, logs = disk / "run", world.root
    quiet = Attempt(["fit", "--config", world.config, *more], str(logs / "quiet.log"))
    argv = ["fit", "--config", world.config, f"run.dir={run}", *more]
    filler = (
        f"{shutil.which('python3')} -c 'import os; from pathlib import Path; exec(open(\"{logs}/fill.py\").read())'"
    )
    (logs / "fill.py").write_text(
        f"p = Path({str(disk)!r}) / 'ballast'; p.unlink(missing_ok=True); room = os.statvfs(p.parent)\n"
        "file = p.open('wb'); left = int(os.environ['LEFT'])\n"
        "os.posix_fallocate(file.fileno(), 0, max(room.f_bavail * room.f_frsize - left, 1))\n"
    )
    full = [Attempt(argv, str(logs / f"full_{n}.log"), before=f"LEFT={left} {filler}") for n, left in enumerate(free)]
    locked = Attempt(argv, str(logs / "ro.log"), before=f"mount -o remount,ro {disk}")
    edited = Attempt([*argv, "seed=4"], str(logs / "edited.log"), before=f"mount -o remount,rw {disk}")
    future = f"rm {disk}/ballast; find {run} -exec touch -d '2099-01-01' {{}} +"
    last = Attempt(argv, str(logs / "last.log"), before=future, clock=-10 * 365 * 86400.0)
    run_attempts([quiet, *full, locked, edited, last])
    assert quiet.code == 0, quiet.said
    failed = [one for one in full if one.code]  # a run that had come far needs little more
    assert len(failed) >= min(len(full), 6)
    for one in failed:
        assert one.code == 2, (one.code, one.said[-3000:])
        assert "Traceback" not in one.said
        assert one.said.count("error:") == 1
        assert "No space left on device" in one.said
        assert "the same command resumes" in one.said
    assert (locked.code, edited.code) == (2, 2), locked.said + edited.said
    assert "Read-only file system" in locked.said
    assert "seed: 3 -> 4" in edited.said
    assert last.code == 0, last.said[-3000:]
    whole(run)
    assert (run / "results.json").read_bytes() == (world.run / "results.json").read_bytes()
    assert len(json.loads((run / "results.json").read_text())) > 20
    keys = [key for line in (run / "answers/answers.jsonl").read_text().splitlines() for key in json.loads(line)]
    assert len(keys) == len(set(keys))  # nothing is paid for twice


@pytest.mark.slow
def test_a_run_on_a_disk_that_is_full_read_only_and_then_neither(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    with small_disk(tmp_path / "disk", "64m") as disk:
        go_through(world, disk, BARE, [120 * KB])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["rlrf", "re2llm", "unified"])
def test_every_recipe_on_a_disk_that_is_full_at_many_points(tmp_path: Path, recipe: str) -> None:
    make = {"rlrf": make_world, "re2llm": make_session_world, "unified": make_unified_world}[recipe]
    world = make(tmp_path)
    with small_disk(tmp_path / "disk", "96m") as disk:
        go_through(world, disk, [], [4 * KB, *(n * KB for n in (24, 60, 100, 140, 180, 240, 320, 420, 600))])
