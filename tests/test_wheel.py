"""The wheel: everything is in it, and it works where no checkout is."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.registry
def test_a_wheel_runs_outside_the_checkout(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True, capture_output=True)
    wheel = next(tmp_path.glob("lit_rec-*.whl"))
    held = set(zipfile.ZipFile(wheel).namelist())
    shipped = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "lit_rec", "callbacks", "configs"], check=True, capture_output=True, text=True
    ).stdout.split()
    wanted = {f"lit_rec/{name}" if name.startswith("configs/") else name for name in shipped}
    assert wanted <= held
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    (tmp_path / "elsewhere").mkdir()
    config = tmp_path / "site" / "lit_rec" / "configs" / "quickstart.yaml"
    shown = subprocess.run(
        [sys.executable, "-m", "lit_rec", "show-config", "--config", config, "reranker=prm"],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "architecture: prm" in shown
