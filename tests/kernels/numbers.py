"""What tests of kernels compare."""

import torch
from torch import Tensor

CLOSE = 2e-5  # of single precision, relative to the largest number


def padded(lists: int, candidates: int) -> Tensor:
    """A mask of lists of every length, those without a candidate too."""
    lengths = torch.arange(lists) % (candidates + 1)
    lengths[0] = candidates
    return torch.arange(candidates) < lengths.unsqueeze(1)


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        scale = max(1.0, theirs.detach().abs().max().item()) if theirs.numel() else 1.0
        assert ours.shape == theirs.shape
        assert ((ours.double() - theirs).abs() < CLOSE * scale).all()
