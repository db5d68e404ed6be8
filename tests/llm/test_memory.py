"""Too little memory: the batch is halved, nothing is lost, and what worked is kept to."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lit_rec.errors import UserError
from lit_rec.llm.memory import Halving, out_of_memory
from lit_rec.llm.store import Answer, AnswerStore

CPU = "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to get 8 bytes"
ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError(CPU), MemoryError()]


class Fake:
    """Draws answers into a store, as long as there are few enough at a time."""

    def __init__(self, store: AnswerStore, most: int, error: BaseException) -> None:
        self.store, self.most, self.error = store, most, error
        self.sizes: list[int] = []

    def draw(self, keys: Sequence[str]) -> None:
        self.sizes.append(len(keys))
        if len(keys) > self.most:
            raise self.error
        self.store.add([(key, Answer(f"answer to {key}", 1, "stop")) for key in keys])


@pytest.mark.parametrize(("error", "most"), [(ERRORS[1], 1), (ERRORS[0], 5), (ERRORS[2], 100)])
def test_all_keys_have_the_same_answers(
    tmp_path: Path, error: BaseException, most: int, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = [[f"{b}-{i}" for i in range(n)] for b, n in enumerate((16, 5, 3))]
    fake, free = Fake(AnswerStore(tmp_path / "a"), most, error), Fake(AnswerStore(tmp_path / "b"), 1000, error)
    halving = Halving("answers", "llm.batch_size")
    for batch in batches:
        halving(fake.draw, batch)
        free.draw(batch)
    keys = [key for batch in batches for key in batch]
    assert [fake.store[key] for key in keys] == [free.store[key] for key in keys]
    assert fake.store.generated == len(keys)  # none of them twice
    failed = [size for size in fake.sizes if size > most]
    assert failed == {1: [16, 8, 4, 2], 5: [16, 8], 100: []}[most]  # learnt once, not in every batch
    told = capsys.readouterr().out
    assert told.count("too little memory") == len(failed)


def test_a_single_one_that_is_too_much_is_told(tmp_path: Path) -> None:
    fake = Fake(AnswerStore(tmp_path), 0, RuntimeError(CPU))
    with pytest.raises(UserError, match="too little memory for one of the answers") as caught:
        Halving("answers", "llm.batch_size")(fake.draw, ["a", "b", "c"])
    assert caught.value.where == "config key llm.batch_size"
    assert "nf4" in caught.value.fix


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("no"), KeyboardInterrupt()])
def test_other_errors_are_left_alone(tmp_path: Path, error: BaseException) -> None:
    fake = Fake(AnswerStore(tmp_path), 1, error)
    with pytest.raises(type(error)):
        Halving("answers", "llm.batch_size")(fake.draw, ["a", "b"])
    assert fake.sizes == [2]


def test_what_torch_says_when_memory_is_at_an_end_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert all(map(out_of_memory, ERRORS))
    assert not out_of_memory(RuntimeError("The size of tensor a (3) must match"))
