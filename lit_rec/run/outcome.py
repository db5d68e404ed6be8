"""What every finished run has: its versions, machine and cost, and a folder that can be opened again."""

import json
import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from lit_rec import __version__
from lit_rec.errors import UserError
from lit_rec.kernels.library import library as kernels
from lit_rec.run.folder import LIBRARIES, RunFolder, publish, write_atomic
from lit_rec.run.headline import Headline
from lit_rec.run.progress import console, tell_results
from lit_rec.run.results import write_results


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
        "kernels": "none" if kernels() is None else "compiled",
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(usage / 2**20, 2),
    }


def leave_results(
    cfg: DictConfig, run: RunFolder, rows: list[dict[str, Any]], keep: Callable[[], None], started: float
) -> dict[str, Any]:
    """Write what every finished run has at the top of its folder.

    Args:
        cfg: The configuration.
        run: The run folder.
        rows: The lines of results.json.
        keep: Copies the final models there.
        started: `time.perf_counter()` when the command began.

    Returns:
        The lines of environment.json.
    """
    (run.path / "report.html").unlink(missing_ok=True)  # a folder that has everything is of one configuration
    write_atomic(run.path / "config.yaml", OmegaConf.to_yaml(cfg))
    keep()
    write_results(run.path / "results.json", rows)  # last: a folder that has it is a finished run's
    environment = describe_environment(time.perf_counter() - started)
    write_atomic(run.path / "environment.json", json.dumps(environment, indent=1))
    return environment


def tell_finished(
    run: RunFolder, rows: list[dict[str, Any]], headline: Headline, answers: str, environment: Mapping[str, Any]
) -> None:
    """Print what a run did in numbers and where everything lies; `answers`: what was asked of the LLM."""
    curves = run.path / "tensorboard"
    lines = [
        f"{answers} {environment['seconds']:.0f} s, {environment['peak_memory_gb']:.1f} GB at most.",
        f"Report: {run.path / 'report.html'}",
        *([f"Curves: tensorboard --logdir {curves}"] if curves.is_dir() else []),
    ]
    console.print("\n".join(lines), highlight=False)
    tell_results(rows, headline.counts, command="fit", results=str(run.path / "results.json"))


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
