"""What calls of kernels need: whether there is one for these tensors, where they lie, how lists are shared out."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_rec.kernels.library import library

ROWS = 120  # candidates taken at a time: what is made of them stays in the cache


def usable(x: Tensor, *widths: int, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> bool:
    """Whether kernels can compute with x, and layers of these widths."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    if x.device.type != "cpu" or x.dtype not in dtypes or not x.numel() or torch.is_autocast_enabled("cpu"):
        return False
    found = library()
    return found is not None and all(width and width % found.lanes() == 0 for width in widths)


def lengths_of(mask: Tensor) -> Tensor | None:
    """How many places of every row of a bool mask [B, C] are no padding: [B] int32; None where some stand behind it."""
    mask, found = mask.contiguous(), mask.new_empty(len(mask), dtype=torch.int32)
    return found if needed().lengths_of(*mask.shape, *addresses(mask, found)) else None


def comes_back(*tensors: Tensor) -> bool:
    """Whether there will be a way back, for which has to be kept what is made on the way."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def chunk_of(candidates: int) -> int:
    """Lists taken at a time: a multiple of the rows that products take at once."""
    tall: int = needed().tall()
    return max(tall, ROWS // candidates // tall * tall)


def needed() -> ctypes.CDLL:
    """The kernels, where `usable` has said that there are some."""
    found = library()
    assert found is not None, "asked of by `usable` before"
    return found


def addresses(*tensors: Tensor) -> list[int]:
    """Where the numbers of tensors lie."""
    return [tensor.data_ptr() for tensor in tensors]


def numbers_in(weights: Sequence[Tensor]) -> int:
    """How many numbers weights have together."""
    return sum(weight.numel() for weight in weights)


def parts_of(grads: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The gradients of weights, which lie one behind the other, in the weights' shapes."""
    parts = grads.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
