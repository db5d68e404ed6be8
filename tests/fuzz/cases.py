"""How many cases a fuzz test has, and what may come of one: a correct parse or one clear message."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from lit_rec.errors import UserError

T = TypeVar("T")
FEW = 50


def amounts(many: int, few: int = FEW) -> pytest.MarkDecorator:
    """A few cases in every suite, many in the long one."""
    return pytest.mark.parametrize("many", [few, pytest.param(many, marks=pytest.mark.slow)])


def cases(many: int) -> Callable[[Any], Any]:
    """Settings of a fuzz test with so many cases, the same ones every time."""
    unhealthy = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=many, deadline=None, database=None, derandomize=True, suppress_health_check=unhealthy)


def told(call: Callable[[], T]) -> T | None:
    """What a call returns; None where it ends in a message that says something, and not too much."""
    try:
        return call()
    except UserError as told:
        error = told
    assert error.what.strip()
    assert len(str(error)) < 2500, str(error)
    return None


def spoiled(whole: bytes) -> st.SearchStrategy[bytes]:
    """A file after an accident: cut, bytes changed, lines lost or repeated, numbers that are none."""
    places = st.integers(0, max(len(whole), 1))
    marks = [b"\n", b"\r\n", b"\t", b"::", b"|", b",", b'"', b"\x00", b"\xff\xfe"]
    numbers = [b"nan", b"-1", b"1e300", b"9" * 25, b"\\ud800"]
    junk = st.sampled_from([*marks, *numbers]) | st.binary(max_size=6)
    edits = st.lists(st.tuples(places, st.integers(0, 12), junk), min_size=1, max_size=4)

    def apply(found: Sequence[tuple[int, int, bytes]]) -> bytes:
        content = whole
        for at, length, new in found:
            content = content[:at] + new + content[at + length :]
        return content

    lines = whole.split(b"\n")
    shuffled = st.lists(st.sampled_from(lines), max_size=len(lines) + 2).map(b"\n".join)
    return st.one_of(edits.map(apply), places.map(lambda n: whole[:n]), shuffled, st.binary(max_size=60))
