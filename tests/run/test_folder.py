"""Stages are there whole or not at all, and know what they were made from."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_rec.errors import UserError
from lit_rec.run.folder import FORMAT, MANIFEST, RunFolder, write_atomic


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


def test_folder_in_use_is_told(tmp_path: Path) -> None:
    with RunFolder(tmp_path), pytest.raises(UserError, match="another run is using") as caught:
        RunFolder(tmp_path)
    assert caught.value.where == "config key run.dir"
    RunFolder(tmp_path).close()


def test_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot write"):
            RunFolder(path)


def test_another_format_is_told(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        folder = run.run_stage("one", writes("1", []), key={})
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": FORMAT + 1}))
    with RunFolder(tmp_path) as run, pytest.raises(UserError, match="another version"):
        run.run_stage("one", writes("2", []), key={})


def test_fresh_keeps_the_answers_alone(tmp_path: Path) -> None:
    made: list[str] = []
    with RunFolder(tmp_path) as run:
        run.run_stage("one", writes("1", made), key={"a": 1})
    for name in ("results.json", "report.html", "answers/answers.jsonl", "checkpoints/x.ckpt", "adapter/a"):
        write_atomic(tmp_path / name, "x")
    with RunFolder(tmp_path, fresh=True) as run:
        run.run_stage("one", writes("2", made), key={"a": 2})
    assert made == ["1", "2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "answers", "stages"]


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
