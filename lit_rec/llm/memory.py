"""Too little memory for a batch: it is halved and tried again."""

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from lit_rec.errors import UserError
from lit_rec.run.progress import console

T = TypeVar("T")


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what CUDA, torch's CPU allocator or Python say when memory is at an end."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in said or "CUDA out of memory" in said)


class Halving:
    """Does batches one after the other, in parts as large as memory has turned out to allow.

    What was too much once is not tried again: later batches begin with the size that worked.

    Args:
        what: What a batch is made of, for messages: "answers".
        where: The configuration key that sets the size of a batch.
    """

    def __init__(self, what: str, where: str) -> None:
        self.what, self.where = what, where
        self.most: int | None = None

    def __call__(self, do: Callable[[Sequence[T]], None], batch: Sequence[T]) -> None:
        """Do all of a batch.

        Args:
            do: Does a part of the batch, and keeps what came of it; it may fail for want of memory.
            batch: What is to be done, in order.

        Raises:
            UserError: There is too little memory for a single one.
        """
        done = 0
        while done < len(batch):
            part = batch[done : done + (self.most or len(batch))]
            if self._fits(do, part):
                done += len(part)
                continue
            self.most = len(part) // 2
            gc.collect()  # the failed attempt's tensors hang on its frames, which may hang on each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            told = f"warning: too little memory for {len(part)} {self.what} at a time: going on with {self.most}"
            console.print(told, highlight=False, markup=False)

    def _fits(self, do: Callable[[Sequence[T]], None], part: Sequence[T]) -> bool:
        try:
            do(part)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(part) == 1:
                raise UserError(
                    f"there is too little memory for one of the {self.what}",
                    where=f"config key {self.where}",
                    why=" ".join(str(error).split())[:300],
                    fix="a smaller model, llm.quantization=nf4, shorter prompts or answers, or a machine with more",
                ) from None
            return False
        return True
