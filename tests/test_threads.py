"""Calls side by side: their order, and how many threads each of them has."""

import pytest
import torch

from lit_rec.threads import MOST, side_by_side


@pytest.mark.parametrize(
    ("cores", "calls", "each"), [(1, 4, 1), (4, 9, 1), (4, 2, 2), (4, 1, 4), (4, 0, 4), (2 * MOST, 9 * MOST, 2)]
)
def test_cores_are_divided_among_the_calls(cores: int, calls: int, each: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(cores)
        found = list(side_by_side(lambda n: (n, torch.get_num_threads()), range(calls)))
        assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(before)
    assert found == [(n, each) for n in range(calls)]
