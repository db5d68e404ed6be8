"""Kernels with vectors of every width that this processor has."""

import shutil
from collections.abc import Iterator

import pytest
import torch

from lit_rec.kernels.library import library

LANES = {"AVX512": 16, "AVX2": 8, "DEFAULT": 4}


@pytest.fixture(params=LANES)
def _processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("no C compiler")
    own = torch.backends.cpu.get_cpu_capability()
    if list(LANES).index(own if own in LANES else "DEFAULT") > list(LANES).index(request.param):
        pytest.skip("this processor cannot do so")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    library.cache_clear()
    found = library()
    assert found is not None
    assert found.lanes() == LANES[request.param]
    yield
    library.cache_clear()
