"""Whose a folder is: a run may be written into an empty one or into its own, and into nobody else's."""

import os
import re
from pathlib import Path

from lit_rec.errors import UserError

# What may lie in a run folder before its configuration does: answers, what was said, what a first start has fetched.
BEFORE = ("answers", "cache", "processes", "log.txt")
SAID = (".log", ".out", ".err")  # what a shell or a scheduler writes down
RECIPE = re.compile(rb"^recipe: ['\"]?(rlrf|re2llm|unified)\b", re.MULTILINE)


def check_run_dir(path: Path) -> None:
    """Refuse a folder in which a run would write over files of somebody's own, before anything is written.

    Args:
        path: What run.dir says; it need not be there.

    Raises:
        UserError: It is the working directory or above it, the home folder, or holds files that no run wrote.
    """
    here, home, work = path.resolve(), Path(os.path.expanduser("~")).resolve(), Path.cwd()
    where, fix = "config key run.dir", "name a folder for this run alone: run.dir=runs/NAME"
    at_home, at_work = here in (home, *home.parents), here in (work, *work.parents)
    if at_home or (at_work and not is_run_folder(here)):  # whoever stands in a run folder may go on with it
        raise UserError(
            f"{str(path)!r} is no place for a run",
            where=where,
            why=f"it is the {'home folder' if at_home else 'working directory'}, or above it: the run's files would "
            "lie among others, and --fresh removes what has their names",
            fix=fix,
        )
    if not path.is_dir() or is_run_folder(here):
        return
    others = sorted(p.name for p in path.iterdir() if _foreign(p))
    if others:
        raise UserError(
            f"{path} is no run folder, and not empty",
            where=where,
            why=f"it holds {', '.join(others[:5])}, which no run wrote, and would be written over",
            fix=fix,
        )


def is_run_folder(path: Path) -> bool:
    """Whether a run has written here: its configuration is there, damaged or not, or a stage, whole or not."""
    config = path / "config.yaml"
    if config.is_file() and RECIPE.search(config.read_bytes()):
        return True
    stages = (p.name for p in (path / "stages").rglob("*"))
    return any(name == "manifest.json" or (name.startswith(".") and name.endswith(".tmp")) for name in stages)


def _foreign(path: Path) -> bool:
    """Whether something is neither hidden nor of a run that has just begun, nor an empty `stages`."""
    if path.name.startswith(".") or path.name in BEFORE or path.suffix in SAID:
        return False
    return path.name != "stages" or any(p.is_file() for p in path.rglob("*"))
