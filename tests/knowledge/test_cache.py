"""Vectors that runs share, against the encoder itself."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_rec.knowledge.cache import LEAST, SharedVectors

TEXTS = [f"text {n % (LEAST - 3)} \udc80" for n in range(LEAST)]


class Encoder:
    """Vectors that differ from call to call, so that it shows which call they come from."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], bool]] = []

    def encode(
        self, texts: Sequence[str], *, cut: bool = False, progress: Callable[[int], None] | None = None
    ) -> Tensor:
        self.calls.append((list(texts), cut))
        if progress is not None:
            progress(len(set(texts)))
        return torch.full((len(texts), 3), float(len(self.calls)))


def test_a_second_run_reads_what_the_first_has_encoded(tmp_path: Path) -> None:
    first, second = Encoder(), Encoder()
    done: list[int] = []
    made = SharedVectors(tmp_path / "vectors", {"model": "a"}, lambda: first).encode(TEXTS, progress=done.append)
    assert done == [LEAST - 3]
    loads: list[int] = []
    other = SharedVectors(tmp_path / "vectors", {"model": "a"}, lambda: loads.append(1) or second)  # type: ignore
    assert torch.equal(other.encode(TEXTS), made)
    assert (loads, second.calls) == ([], [])  # the encoder was not even loaded
    assert [p.name.startswith(".") for p in (tmp_path / "vectors").iterdir()] == [False]


@pytest.mark.parametrize("changed", ["key", "cut", "order", "text"])
def test_another_request_is_encoded_whole(tmp_path: Path, changed: str) -> None:
    encoder = Encoder()
    SharedVectors(tmp_path, {"model": "a"}, lambda: encoder).encode(TEXTS)  # type: ignore[arg-type, return-value]
    texts = {"order": TEXTS[::-1], "text": ["other", *TEXTS[1:]]}.get(changed, TEXTS)
    key = {"model": "b" if changed == "key" else "a"}
    again = SharedVectors(tmp_path, key, lambda: encoder)  # type: ignore[arg-type, return-value]
    assert (again.encode(texts, cut=changed == "cut") == 2).all()
    assert encoder.calls[1] == (texts, changed == "cut")


def test_few_texts_and_no_folder_leave_nothing_behind(tmp_path: Path) -> None:
    encoder = Encoder()
    shared = SharedVectors(tmp_path / "vectors", {}, lambda: encoder)  # type: ignore[arg-type, return-value]
    assert (shared.encode(TEXTS[:-1]) == 1).all()
    assert (SharedVectors(None, {}, lambda: encoder).encode(TEXTS) == 2).all()  # type: ignore[arg-type, return-value]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"half a file"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: bytes) -> None:
    encoder = Encoder()
    shared = SharedVectors(tmp_path, {}, lambda: encoder)  # type: ignore[arg-type, return-value]
    shared.encode(TEXTS)
    next(tmp_path.iterdir()).write_bytes(damage)
    assert (shared.encode(TEXTS) == 2).all()
    assert (shared.encode(TEXTS) == 2).all()
    assert len(encoder.calls) == 2
