"""The run folder: named stages that are there whole or not at all, and that know what they were made from."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lit_rec.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1
LIBRARIES = ("torch", "lightning", "transformers", "peft", "polars")


def canonical(value: Any) -> Any:
    """A value as JSON would give it back, so that keys compare equal after a restart."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def digest(value: Any) -> str:
    """Short hash of a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def other_configuration(run: Path, where: str, found: Sequence[str], fix: str) -> UserError:
    """What to say where a run was made otherwise than it is used now; `found` are `differences`."""
    return UserError(
        f"{run} holds a run with another configuration",
        where=where,
        why=f"changed: {'; '.join(found[:5])}"[:600],
        fix=fix,
    )


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file that is there whole or not at all, and survives a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Every value in which two plain trees differ, as `name.of.value: old -> new`.

    >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4})
    ['a.c: 2 -> 3', 'd: absent -> 4']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        prefix = f"{name}." if name else ""
        keys = [*new, *(k for k in old if k not in new)]
        pairs = ((f"{prefix}{k}", old.get(k, "absent"), new.get(k, "absent")) for k in keys)
        return [line for key, a, b in pairs for line in differences(a, b, key)]
    return [] if old == new else [f"{name}: {old} -> {new}"]


def sync_files(folder: Path) -> None:
    """Have every file of a folder on disk: a manifest that survives a power cut must not outlive what it describes."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


class RunFolder:
    """A folder of stages.

    Args:
        path: The folder; made when missing.
        fresh: Remove what an earlier run left there (answers stay: they are paid for).
        wait: Seconds to wait for another run that uses it.

    Raises:
        UserError: The folder cannot be written, another run uses it, or it is no run folder.
    """

    def __init__(self, path: str | Path, *, fresh: bool = False, wait: float = 0) -> None:
        self.path = Path(path)
        self.log: list[dict[str, Any]] = []
        self._keys: dict[str, str] = {}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(str(self.path / ".lock"))
            self._lock.acquire(timeout=wait)
        except Timeout:
            raise UserError(
                f"another run is using {self.path}",
                where="config key run.dir",
                fix="wait for it to end, or choose another run.dir",
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}",
                where="config key run.dir",
                why=str(error),
                fix="choose a folder you may write to",
            ) from error
        if fresh:
            for name in (
                "stages",
                "checkpoints",
                "tensorboard",
                "results.json",
                "rounds.json",
                "report.html",
                "adapter",
                "reranker",
            ):
                target = self.path / name
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)

    def close(self) -> None:
        """Let others use the folder."""
        self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def stage(self, name: str) -> Path:
        """Where a stage lies (it may not exist yet)."""
        return self.path / "stages" / name

    def done(self, name: str) -> bool:
        """Whether a stage is finished."""
        return (self.stage(name) / MANIFEST).is_file()

    def run_stage(
        self,
        name: str,
        build: Callable[[Path], Mapping[str, Any] | None],
        *,
        key: Mapping[str, Any],
        after: tuple[str, ...] = (),
    ) -> Path:
        """Build a stage, or reuse it when it was built from the same things.

        Args:
            name: Path below `stages/`.
            build: Writes the stage's files into the folder it is given; may return counts for the manifest.
            key: Every configuration value the stage depends on.
            after: Stages it is made from; they must have been run or reused before.

        Returns:
            The stage's folder.

        Raises:
            UserError: The stage exists and was built from other values: the message names them.
        """
        folder = self.stage(name)
        own = canonical({**key, **{f"stage {s}": self._keys[s] for s in after}})
        if self._keys.get(name) == digest(own):
            return folder  # visited before in this process
        if (folder / MANIFEST).is_file():
            manifest = json.loads((folder / MANIFEST).read_text())
            self._compare(name, manifest, own)
            self._keys[name] = digest(own)
            self.log.append({**manifest, "reused": True})
            return folder
        started = time.perf_counter()
        work = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir(parents=True)
            counts = build(work) or {}
            manifest = {
                "name": name,
                "format": FORMAT,
                "key": own,
                "counts": canonical(counts),
                "seconds": round(time.perf_counter() - started, 2),
                "versions": {library: version(library) for library in LIBRARIES},
            }
            sync_files(work)
            write_atomic(work / MANIFEST, json.dumps(manifest, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(work, folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        self._keys[name] = digest(own)
        self.log.append({**manifest, "reused": False})
        return folder

    def _compare(self, name: str, manifest: dict[str, Any], own: dict[str, Any]) -> None:
        old = manifest["key"]
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"{self.path} was written by another version of lit_rec",
                where=f"stage {name}",
                fix="start anew with --fresh, or choose another run.dir",
            )
        if old == own:
            return
        # A changed value shows in the stage that uses it first; later stages would only repeat it.
        fix = "restore the value, choose another run.dir, or start anew with --fresh (LLM answers are kept)"
        raise other_configuration(self.path, f"stage {name}", differences(old, own), fix)


def never(work: Path) -> None:
    """Build nothing: of a stage that is finished, and visited again so that it checks what it was made from."""
    raise AssertionError("a finished stage is not built again")
