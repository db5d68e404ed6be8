"""What every finished run has: its versions, machine and cost, and a folder that can be opened again."""

import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from lit_rec import __version__
from lit_rec.errors import UserError
from lit_rec.run.folder import LIBRARIES, RunFolder, publish


@cache
def commit() -> str:
    """The commit of this code when it was first asked for: `fit` asks at its start, for a tree may change under it."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def describe_environment(seconds: float) -> dict[str, Any]:
    """Versions, machine and cost of a run; nothing secret, no environment variables."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "lit_rec": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "threads_wait": os.environ.get("OMP_WAIT_POLICY", "as OpenMP does"),
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(usage / 2**20, 2),
    }


def finished_run(cfg: DictConfig, *, wait: float = 0) -> RunFolder:
    """Open a run folder that `fit` has finished; wait so many seconds for another run that uses it.

    Raises:
        UserError: There is no finished run.
    """
    if not (Path(cfg.run.dir) / "results.json").is_file():
        raise UserError(
            f"{cfg.run.dir} holds no finished run",
            where="config key run.dir",
            fix="run `python -m lit_rec fit` with the same configuration first",
        )
    return RunFolder(cfg.run.dir, wait=wait)


def replace_folder(source: Path, target: Path, more: Mapping[str, Path | str] | None = None) -> None:
    """Copy a folder over another, which is there whole or not at all.

    Args:
        source: The folder.
        target: Where its copy goes.
        more: Files beside what is in it: name -> a file to copy, or its text.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    for name, content in (more or {}).items():
        if isinstance(content, Path):
            shutil.copy2(content, temporary / name)
        else:
            (temporary / name).write_text(content)
    publish(temporary, target)
