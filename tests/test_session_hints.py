"""Which sessions are reflected on, and which places earn something."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_rec.recipes.session_hints import SessionHints


def made(ranks: dict[int, list[int]], method: str = "likelihood", k: int | None = None) -> Any:
    """A loop of six training sessions; `ranks` are their targets' with each action."""
    cfg = SimpleNamespace(
        seed=1,
        agent=SimpleNamespace(k=k),
        ranking=SimpleNamespace(method=method, top=10),
        reflection=SimpleNamespace(error_rank=10, sessions=6),
    )
    return SimpleNamespace(
        cfg=cfg,
        splits=SimpleNamespace(train=torch.arange(100, 106)),
        states=torch.zeros(200, 2),
        policy=lambda number: SimpleNamespace(greedy=lambda states: torch.tensor([0, 1, 1, 1, 0, 1])),
        base=lambda number: SimpleNamespace(texts=["a hint"]),
        ranks=lambda sessions, actions, what: torch.tensor(
            [ranks[action][place] for place, action in enumerate(actions.tolist())]
        ),
        _asked=SimpleNamespace(set_hints=lambda texts: None),
    )


RANKS = {0: [12, 3, 20, 30, 5, 40], 1: [9, 15, 18, 2, 50, 11]}  # without the hint, and with it


def test_in_the_first_round_errors_are_those_without_hints() -> None:
    errors, count = SessionHints.errors(made(RANKS), 1)
    assert (errors.tolist(), count) == ([100, 102, 103, 105], 4)


def test_what_a_hint_has_done_is_no_error_to_reflect_on() -> None:
    """Session 101 stands at 3 without the agent's hint and at 15 with it: no hint can be tried that mends it."""
    errors, count = SessionHints.errors(made(RANKS), 2)
    assert (errors.tolist(), count) == ([100, 102, 105], 3)


@pytest.mark.parametrize(
    ("method", "k", "cut"),
    [("likelihood", None, None), ("generate", None, 10), ("generate", 5, 5), ("likelihood", 20, 20)],
)
def test_what_is_not_listed_earns_nothing(method: str, k: int | None, cut: int | None) -> None:
    assert SessionHints.cut.fget(made(RANKS, method, k)) == cut  # type: ignore[attr-defined]
