"""Rewards to pairs: what is counted on the way, and what a state of the LLM amounts to."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from lit_rec.policy.pairs import make_pairs
from lit_rec.recipes.summary import summarise

ANSWERS = {  # user -> (text, reward) of each answer
    1: [("a", 0.5), ("b", 0.5), ("a", 0.5)],  # a tie
    2: [("a", 0.5), ("b", 0.51), ("c", 0.5)],  # a small gap
    3: [("a", 0.2), ("b", 0.9), ("c", 0.4)],
    4: [("d", 0.1), ("b", 0.3), ("d", 0.1)],
}


def table(answers: dict[int, list[tuple[str, float]]], split: str = "train") -> pl.DataFrame:
    rows = [(u, n, text, 5, split, reward) for u, mine in answers.items() for n, (text, reward) in enumerate(mine)]
    return pl.DataFrame(rows, schema=["user", "sample", "text", "tokens", "split", "reward"], orient="row")


def test_ties_are_told_from_small_gaps() -> None:
    _, plain = make_pairs(table(ANSWERS))
    assert (plain["pairs"], plain["tie_rate"]) == (3, 0.25)
    assert "small_gap_rate" not in plain
    _, wide = make_pairs(table(ANSWERS), min_gap=0.05)
    assert (wide["pairs"], wide["tie_rate"], wide["small_gap_rate"]) == (2, 0.25, 0.25)
    assert wide["unique_in_user_rate"] == pytest.approx(10 / 12)


class FakeLoop:
    """A state with answers and rewards."""

    def __init__(self, train: pl.DataFrame, samples: int, paired: set[int]) -> None:
        held_out = table({9: [("z", 0.6)], 8: [("y", 0.8)]}, "validation")
        self.table = pl.concat([train, held_out])
        self.samples, self.paired = samples, paired
        wanted = SimpleNamespace(min_gap=0.0, max_pairs=None)
        self.cfg = SimpleNamespace(reward=SimpleNamespace(refresh=True), pairs=wanted)
        self.run = SimpleNamespace(stage=Path)

    def rewards(self, state: str) -> pl.DataFrame:
        return self.table

    def answers(self, state: str) -> pl.DataFrame:
        return self.table.with_columns(finish=pl.lit("stop"))

    def flattered(self, state: str) -> bool:
        return False

    def samples_of(self, state: str) -> int:
        return self.samples

    def name(self, stage: str) -> str:
        return stage


def told(train: pl.DataFrame, samples: int, paired: set[int]) -> dict[str, Any]:
    loop: Any = FakeLoop(train, samples, paired)
    return summarise(loop, "zero_shot")


def test_states_are_counted_alike_however_many_answers_make_pairs() -> None:
    """The same knowledge of the same users; in one state two of them have further answers, which are worth more."""
    first = {user: answers[:1] for user, answers in ANSWERS.items()}
    one = told(table(first), 1, set())
    more = told(table({**first, 3: ANSWERS[3], 4: ANSWERS[4]}), 3, {3, 4})
    for number in ("train_reward_mean", "unique_answer_rate"):
        assert one[number] == more[number]
    assert one["train_reward_mean"] == pytest.approx((0.5 + 0.5 + 0.2 + 0.1) / 4)
    assert one["unique_answer_rate"] == pytest.approx(4 / 6)
    assert more["unique_in_user_rate"] == pytest.approx(5 / 6)
    assert "unique_in_user_rate" not in one
