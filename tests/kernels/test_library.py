"""How the kernels are compiled, and what happens where they cannot be."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_rec.kernels import library, recurrent

needs_compiler = pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="no C compiler")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LIT_REC_KERNELS", raising=False)
    library.library.cache_clear()
    yield
    library.library.cache_clear()


def compilers(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_it_is_compiled_once_and_kept_where_nobody_else_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.which("cc") or shutil.which("gcc")
    monkeypatch.setenv("CC", compilers(tmp_path, f'echo called >> "{tmp_path}/calls"; exec {real} "$@"'))
    assert library.library() is not None
    folder = tmp_path / ".cache" / "lit_rec" / "kernels"
    assert [path.suffix for path in folder.iterdir()] == [".so"]
    assert folder.stat().st_mode & 0o077 == 0
    library.library.cache_clear()
    assert library.library() is not None
    assert (tmp_path / "calls").read_text() == "called\n"


@needs_compiler
def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "lit_rec" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert library.library() is not None
    assert not list(folder.iterdir())


@needs_compiler
def test_a_compiler_without_openmp_makes_kernels_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which("cc") or shutil.which("gcc")
    monkeypatch.setenv("CC", compilers(tmp_path, f'case "$*" in *-fopenmp*) exit 1;; esac; exec {real} "$@"'))
    assert library.library() is not None
    layer, x = nn.GRU(32, 16, batch_first=True), torch.randn(7, 3, 32)
    torch.testing.assert_close(recurrent.states(layer, x), layer(x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["off", "failing", "nonsense"])
def test_without_them_torch_computes(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "off":
        monkeypatch.setenv("LIT_REC_KERNELS", "0")
    else:  # a compiler that fails, and one whose result cannot be loaded
        script = "exit 1" if how == "failing" else 'for last; do :; done; echo nonsense > "$last"'
        monkeypatch.setenv("CC", compilers(tmp_path, script))
    assert library.library() is None
    layer, x = nn.GRU(32, 16, batch_first=True), torch.randn(7, 3, 32)
    assert torch.equal(recurrent.states(layer, x), layer(x)[0])
    assert not list(tmp_path.glob(".cache/lit_rec/kernels/*.??*.*"))  # nothing half-made
