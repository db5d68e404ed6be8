"""Stages are there whole or not at all, and know what they were made from."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_rec.errors import UserError
from lit_rec.run.folder import FORMAT, HOLDER, MANIFEST, RunFolder, never, publish, write_atomic


def writes(text: str, made: list[str]) -> Callable[[Path], dict[str, Any]]:
    def build(work: Path) -> dict[str, Any]:
        made.append(text)
        (work / "file").write_text(text)
        return {"letters": len(text)}

    return build


def leftovers(path: Path) -> list[Path]:
    return [p for p in path.rglob("*") if p.name.endswith(".tmp")]


def test_stage_is_built_once_and_reused(tmp_path: Path) -> None:
    made: list[str] = []
    key = {"a": 1, "nested": {"b": [1, 2], "c": None}}
    with RunFolder(tmp_path) as run:
        assert not run.done("x/one")
        folder = run.run_stage("x/one", writes("first", made), key=key)
        assert run.run_stage("x/one", writes("again", made), key=key) == folder == run.stage("x/one")
        assert run.done("x/one")
    with RunFolder(tmp_path) as run:
        run.run_stage("x/one", writes("later", made), key=dict(reversed(key.items())))
        assert run.log[0]["reused"] is True
    assert made == ["first"]
    assert (folder / "file").read_text() == "first"
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["counts"] == {"letters": 5}
    assert manifest["key"] == key
    assert manifest["versions"]["torch"]


def test_changed_value_is_named(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        run.run_stage("one", writes("1", []), key={"lr": 0.1, "old": 1, "same": 2})
    with RunFolder(tmp_path) as run, pytest.raises(UserError, match="another configuration") as caught:
        run.run_stage("one", writes("2", []), key={"lr": 0.2, "new": 1, "same": 2})
    assert caught.value.where == "stage one"
    for part in ("lr: 0.1 -> 0.2", "new: absent -> 1", "old: 1 -> absent"):
        assert part in caught.value.why
    assert "same" not in caught.value.why
    assert "--fresh" in caught.value.fix
    assert (tmp_path / "stages/one/file").read_text() == "1"


def test_changed_value_within_a_part_is_named_alone(tmp_path: Path) -> None:
    """A part of the configuration has many values: the message shows the one that changed, not both parts whole."""
    long = {f"value_{i}": "x" * 40 for i in range(30)}
    with RunFolder(tmp_path) as run:
        run.run_stage("one", writes("1", []), key={"reranker": {**long, "lr": 0.1, "args": {"heads": 2}}})
    with RunFolder(tmp_path) as run, pytest.raises(UserError) as caught:
        run.run_stage("one", writes("2", []), key={"reranker": {**long, "lr": 0.2, "args": {"heads": 4}}})
    assert "reranker.lr: 0.1 -> 0.2" in caught.value.why
    assert "reranker.args.heads: 2 -> 4" in caught.value.why
    assert "value_1" not in caught.value.why


def test_stage_depends_on_the_stages_before_it(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        run.run_stage("one", writes("1", []), key={"a": 1})
        run.run_stage("two", writes("2", []), key={}, after=("one",))
    (tmp_path / "stages/one" / MANIFEST).unlink()  # the first is built anew from something else
    with RunFolder(tmp_path) as run:
        run.run_stage("one", writes("1", []), key={"a": 2})
        with pytest.raises(UserError, match="another configuration"):
            run.run_stage("two", writes("2", []), key={}, after=("one",))


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_stage_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fails(work: Path) -> None:
        (work / "half").write_text("half")
        raise error

    with RunFolder(tmp_path) as run:
        with pytest.raises(type(error)):
            run.run_stage("one", fails, key={})
        assert not run.done("one")
        assert not leftovers(tmp_path)
        run.run_stage("one", writes("whole", []), key={})
    assert sorted(p.name for p in (tmp_path / "stages/one").iterdir()) == ["file", MANIFEST]


def test_manifest_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with RunFolder(tmp_path) as run:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space"):
                run.run_stage("one", writes("1", []), key={})
        assert not run.done("one")
        assert not leftovers(tmp_path)


def test_what_a_kill_left_is_ignored_and_replaced(tmp_path: Path) -> None:
    half = tmp_path / "stages" / ".one.tmp"
    half.mkdir(parents=True)
    (half / "half").write_text("half")
    (tmp_path / "stages" / "one").mkdir()  # a folder without a manifest is no stage
    (tmp_path / "stages" / "one" / "half").write_text("half")
    with RunFolder(tmp_path) as run:
        assert not run.done("one")
        folder = run.run_stage("one", writes("1", []), key={})
    assert sorted(p.name for p in folder.iterdir()) == ["file", MANIFEST]
    assert not leftovers(tmp_path)


HOLD = """
import sys, time
from lit_rec.run.folder import RunFolder
run = RunFolder(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_folder_in_use_is_told_with_who_uses_it_and_a_dead_process_uses_nothing(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        for _ in range(2):  # a refusal leaves the lock to who has it
            with pytest.raises(UserError, match="another run is using") as caught:
                RunFolder(tmp_path)
            assert caught.value.where == "config key run.dir"
            assert f"process {other.pid} on {socket.gethostname()} has held it since 20" in caught.value.why
    finally:
        other.kill()
        other.wait()
    assert (tmp_path / HOLDER).is_file()  # what a killed process leaves behind
    with RunFolder(tmp_path):
        with pytest.raises(UserError, match="another run is using") as caught:
            RunFolder(tmp_path)
        assert f"process {os.getpid()} " in caught.value.why
    assert not (tmp_path / HOLDER).exists()
    (tmp_path / HOLDER).write_bytes(b"\xff{")  # whatever it holds, nobody stumbles over it
    RunFolder(tmp_path).close()


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("lit_rec.run.folder.FileLock.acquire", none)
    with pytest.raises(UserError, match="has no locks") as caught:
        RunFolder(tmp_path)
    assert "flock" in caught.value.fix


def test_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot write"):
            RunFolder(path)


@pytest.mark.parametrize("older", [{"format": 0}, {"format": FORMAT + 1, "versions": {"lit_rec": "9.9"}}])
def test_another_format_is_told(tmp_path: Path, older: dict[str, Any]) -> None:
    """Of another format nothing but the format is looked at: its key may be anywhere."""
    with RunFolder(tmp_path) as run:
        folder = run.run_stage("one", writes("1", []), key={})
    write_atomic(folder / MANIFEST, json.dumps({"name": "one", **older}))
    with RunFolder(tmp_path) as run, pytest.raises(UserError, match="another version") as caught:
        run.run_stage("one", writes("2", []), key={})
    assert f"its format is {older['format']}" in caught.value.why
    assert ("of lit_rec 9.9" in caught.value.why) == ("versions" in older)
    assert "--fresh" in caught.value.fix


def cut(folder: Path) -> None:
    (folder / "file").write_text("1")


def spoil(text: str) -> Callable[[Path], None]:
    return lambda folder: write_atomic(folder / MANIFEST, text)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (cut, "file has 1 bytes, not 5"),
        (lambda folder: (folder / "file").unlink(), "file is missing"),
        (spoil(""), "manifest.json cannot be read"),
        (spoil("{"), "manifest.json cannot be read"),
        (spoil("[1]"), "manifest.json cannot be read"),
        (spoil("[" * 100_000), "manifest.json cannot be read"),
        (spoil(json.dumps({"format": FORMAT, "key": 3})), "manifest.json holds no key"),
    ],
)
def test_a_damaged_stage_is_told_and_made_again_once_it_is_deleted(
    tmp_path: Path, damage: Callable[[Path], None], why: str
) -> None:
    with RunFolder(tmp_path) as run:
        folder = run.run_stage("x/one", writes("whole", []), key={})
    damage(folder)
    with RunFolder(tmp_path) as run, pytest.raises(UserError, match="is damaged") as caught:
        run.run_stage("x/one", writes("again", []), key={})
    assert caught.value.where == "stage x/one"
    assert caught.value.why.startswith(why)
    assert str(folder) in caught.value.fix
    shutil.rmtree(folder)
    with RunFolder(tmp_path) as run:
        assert (run.run_stage("x/one", writes("again", []), key={}) / "file").read_text() == "again"


def test_a_trained_stage_is_not_made_again_alone(tmp_path: Path) -> None:
    """One fit leaves the policies of all rounds: a deleted one cannot be had from what is trained by now."""
    with RunFolder(tmp_path) as run:
        folder = run.run_stage("round_1/policy", writes("whole", []), key={})
    cut(folder)
    with RunFolder(tmp_path) as run, pytest.raises(UserError, match="is damaged") as caught:
        run.run_stage("round_1/policy", writes("again", []), key={})
    assert "--fresh" in caught.value.fix
    shutil.rmtree(folder)
    with RunFolder(tmp_path) as run, pytest.raises(UserError, match="policy or agent is missing") as caught:
        run.run_stage("round_1/policy", never, key={})
    assert "round_1" in caught.value.where
    assert "--fresh" in caught.value.fix


def test_a_name_is_given_once_everything_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files first, then the folders that name them, then the new name, then the folder that holds it."""
    happened: list[str] = []
    real_replace, real_sync = os.replace, os.fsync

    def fsync(number: int) -> None:
        happened.append(f"sync {Path(os.readlink(f'/proc/self/fd/{number}')).relative_to(tmp_path)}")
        real_sync(number)

    def replace(source: Any, target: Any) -> None:
        happened.append(f"name {Path(target).relative_to(tmp_path)}")
        real_replace(source, target)

    work = tmp_path / "work"
    (work / "deep").mkdir(parents=True)
    (work / "deep" / "file").write_text("new")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").write_text("old")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    publish(work, tmp_path / "kept")
    named = happened.index("name kept")
    assert set(happened[:named]) == {"sync work/deep/file", "sync work/deep", "sync work", "name .kept.old"}
    assert happened[named + 1 :] == ["sync ."]
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == [
        "kept",
        "kept/deep",
        "kept/deep/file",
    ]
    happened.clear()
    write_atomic(tmp_path / "one", "text")
    assert happened == ["sync .one.tmp", "name one", "sync ."]


def test_a_clock_that_goes_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    with RunFolder(tmp_path) as run:
        run.run_stage("one", writes("1", made), key={"a": 1})
    for path in tmp_path.rglob("*"):
        os.utime(path, (4e9, 4e9))
    monkeypatch.setattr("time.time", lambda: 1.0)
    with RunFolder(tmp_path) as run:
        run.run_stage("one", writes("2", made), key={"a": 1})
        run.run_stage("two", writes("3", made), key={}, after=("one",))
    assert made == ["1", "3"]


def test_fresh_keeps_the_answers_alone(tmp_path: Path) -> None:
    made: list[str] = []
    with RunFolder(tmp_path) as run:
        run.run_stage("one", writes("1", made), key={"a": 1})
    left = ("results.json", "report.html", "checkpoints/x.ckpt", "adapter/a", "agent/a", "hints.json", "wandb_run")
    for name in (*left, "answers/answers.jsonl", "csv/x/metrics.csv", "mlflow_runs.json"):
        write_atomic(tmp_path / name, "x")
    with RunFolder(tmp_path, fresh=True) as run:
        run.run_stage("one", writes("2", made), key={"a": 2})
    assert made == ["1", "2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "answers", "stages"]


def test_a_folder_of_somebodys_own_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "project"
    for name in ("results.json", "checkpoints/mine", "stages/mine", ".git/config"):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text("mine")
    before = sorted(own.rglob("*"))
    for _ in range(2):  # a first try leaves nothing that would let a second one in
        with pytest.raises(UserError, match="is no run folder, and not empty") as caught:
            RunFolder(own, fresh=True)
        assert "checkpoints, results.json, stages" in caught.value.why
    assert sorted(own.rglob("*")) == before
    home, work = tmp_path / "home", tmp_path / "home" / "work"
    work.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    for place in (".", "..", "/", home, work, tmp_path):
        with pytest.raises(UserError, match="is no place for a run"):
            RunFolder(place, fresh=True)
    assert not any(work.iterdir())


def test_a_run_folder_is_known_by_what_a_run_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration, even a damaged one, or a stage of any format; and what may lie there before a first start."""
    kept: dict[str, dict[str, bytes]] = {
        "made": {"config.yaml": b"recipe: rlrf\nname: x\n", "notes.md": b""},
        "damaged": {"config.yaml": b"\xff\nrecipe: re2llm\nrun:\n  di", "results.json": b""},
        "older": {"stages/one/manifest.json": b'{"format": 1}', "results.json": b"[]"},
        "stopped": {"stages/.one.tmp/half": b"", "report.html": b""},
        "begun": {"answers/answers.jsonl": b"", "slurm-1.out": b"", ".lock": b"", "processes/1/log.txt": b""},
    }
    for name, files in kept.items():
        for file, content in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(content)
        RunFolder(tmp_path / name).close()
    monkeypatch.chdir(tmp_path / "made")
    RunFolder(".").close()


def test_write_atomic_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "file"
    write_atomic(target, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert [p.name for p in target.parent.iterdir()] == ["file"]
