"""The run folder: named stages that are there whole or not at all, and that know what they were made from."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lit_rec import __version__, distributed
from lit_rec.errors import FULL, UserError
from lit_rec.run.claim import check_run_dir

MANIFEST = "manifest.json"
HOLDER = ".holder.json"  # who uses the folder; the lock itself is the system's, and goes with the process
WANDB_RUN = "wandb_run"  # the id of its W&B run
MLFLOW_RUNS = "mlflow_runs.json"  # which MLflow run goes on when this one is resumed
FORMAT = 3
TRAINED = ("/policy", "/divergence", "/agent")  # what one fit over all rounds leaves: none can be made again alone
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
            file.write(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
        publish(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def publish(work: Path, target: Path) -> None:
    """Give a finished file or folder its name, once every byte of it is on disk.

    A name that survives a power cut must not outlive what it stands for: files are synced first, then the folders that
    name them, then the new name is. An old file of that name is replaced; an old folder is set aside and removed.
    """
    for path in [*work.rglob("*"), work] if work.is_dir() else [work]:
        if not path.is_symlink():
            sync(path)
    old = target.with_name(f".{target.name}.old")
    if work.is_dir() and target.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(work, target)
    sync(target.parent)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file or the names in a folder on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems sync no folders
            raise
    finally:
        os.close(number)


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


class RunFolder:
    """A folder of stages.

    Args:
        path: The folder; made when missing.
        fresh: Remove what an earlier run left there (answers stay: they are paid for).
        wait: Seconds to wait for another run that uses it.

    Raises:
        UserError: The folder cannot be written, another run uses it, or it is another's, see
            `check_run_dir`.
    """

    def __init__(self, path: str | Path, *, fresh: bool = False, wait: float = 0) -> None:
        self.path = Path(path)
        self.log: list[dict[str, Any]] = []
        self._keys: dict[str, str] = {}
        self._lock: FileLock | None = None
        if not distributed.main():  # process 0 holds the folder for all of them
            distributed.barrier()
            return
        try:
            check_run_dir(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(str(self.path / ".lock"))
            self._lock.acquire(timeout=wait)
            self._sign()
        except Timeout:
            raise UserError(
                f"another run is using {self.path}",
                where="config key run.dir",
                why=self._held_by(),
                fix="wait for it to end, or choose another run.dir",
            ) from None
        except NotImplementedError as error:  # some network file systems, unless they are mounted with it
            raise UserError(
                f"the file system of {self.path} has no locks",
                where="config key run.dir",
                why="nothing would stop two runs from writing into one folder",
                fix="choose a run.dir on another file system, or have this one mounted with flock",
            ) from error
        except OSError as error:
            if error.errno in FULL:
                raise
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
                "agent",
                "hints.json",
                "csv",
                MLFLOW_RUNS,
                WANDB_RUN,
            ):
                target = self.path / name
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        distributed.barrier()

    def _sign(self) -> None:
        """Note who holds the lock, for whoever finds it held."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            write_atomic(
                self.path / HOLDER, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since})
            )
        except BaseException:
            assert self._lock is not None
            self._lock.release()
            raise

    def _held_by(self) -> str:
        try:
            held = json.loads((self.path / HOLDER).read_bytes())
            return f"process {held['pid']} on {held['host']} has held it since {held['since']}"
        except (OSError, ValueError, KeyError, TypeError):  # it has just begun, or just ended
            return ""

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            (self.path / HOLDER).unlink(missing_ok=True)
        self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def stage(self, name: str) -> Path:
        """Where a stage lies (it may not exist yet)."""
        return self.path / "stages" / name

    def done(self, name: str) -> bool:
        """Whether a stage is finished; all processes ask, and hear the same."""
        return distributed.agreed(distributed.main() and (self.stage(name) / MANIFEST).is_file())

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
        if self.done(name):
            manifest = self._manifest(name)
            self._compare(name, manifest, own)
            self._keys[name] = digest(own)
            self.log.append({**manifest, "reused": True})
            return folder
        if distributed.main():
            self._build(name, build, own)
        else:  # takes part in the work; what comes of it process 0 keeps
            with tempfile.TemporaryDirectory() as work:
                build(Path(work))
        distributed.barrier()
        self._keys[name] = digest(own)
        return folder

    def _build(self, name: str, build: Callable[[Path], Mapping[str, Any] | None], own: dict[str, Any]) -> None:
        """Build a stage beside its place, and put it there when it is whole."""
        started, folder = time.perf_counter(), self.stage(name)
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
                "versions": {"lit_rec": __version__, **{library: version(library) for library in LIBRARIES}},
                "files": {str(p.relative_to(work)): p.stat().st_size for p in sorted(work.rglob("*")) if p.is_file()},
            }
            write_atomic(work / MANIFEST, json.dumps(manifest, indent=1))
            publish(work, folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        self.log.append({**manifest, "reused": False})

    def _manifest(self, name: str) -> dict[str, Any]:
        """What a finished stage was made from.

        Raises:
            UserError: Another version wrote it, or not all of the stage is there.
        """
        folder = self.stage(name)
        try:
            manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
            found = manifest["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(name, f"{MANIFEST} cannot be read: {error}") from error
        if found != FORMAT:
            by = (manifest.get("versions") or {}).get("lit_rec")
            raise UserError(
                f"{self.path} was written by another version of lit_rec",
                where=f"stage {name}",
                why=f"its format is {found}{f', of lit_rec {by}' if by else ''}; lit_rec {__version__} reads {FORMAT}",
                fix="start anew with --fresh (LLM answers are kept), choose another run.dir, or install the version "
                "that wrote it",
            )
        if not isinstance(manifest.get("key"), dict):
            raise self._damaged(name, f"{MANIFEST} holds no key")
        for file, size in manifest.get("files", {}).items():
            path = folder / file
            has = path.stat().st_size if path.is_file() else None
            if has != size:
                raise self._damaged(name, f"{file} {'is missing' if has is None else f'has {has} bytes, not {size}'}")
        return manifest

    def _damaged(self, name: str, why: str) -> UserError:
        return UserError(
            f"a stage of {self.path} is damaged",
            where=f"stage {name}",
            why=why[:300],
            fix="restore it from a copy, or start anew with --fresh (LLM answers are kept)"
            if name.endswith(TRAINED)
            else f"delete {self.stage(name)}: it is made again, and no LLM answer is asked for twice",
        )

    def _compare(self, name: str, manifest: dict[str, Any], own: dict[str, Any]) -> None:
        if (old := manifest["key"]) == own:
            return
        # A changed value shows in the stage that uses it first; later stages would only repeat it.
        fix = "restore the value, choose another run.dir, or start anew with --fresh (LLM answers are kept)"
        raise other_configuration(self.path, f"stage {name}", differences(old, own), fix)


def never(work: Path) -> None:
    """Build nothing: of a stage that is finished, and visited again so that it checks what it was made from.

    Raises:
        UserError: It is not there any more.
    """
    raise UserError(
        "a trained policy or agent is missing, or what was measured of it",
        where=str(work.parent),
        why="it was deleted, while what was made after it is still there: training does not go back to it",
        fix="restore it from a copy, or start anew with --fresh (LLM answers are kept)",
    )
