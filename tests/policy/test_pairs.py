"""Pairs from rewards, and how a batch of them counts in an update."""

from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from lit_rec import distributed
from lit_rec.policy.pairs import PreferenceDataModule, make_pairs

REWARDS = pl.DataFrame(  # of user 5 both are as good, user 9 has one text twice
    {
        "user": [7, 7, 7, 7, 2, 2, 2, 5, 5, 9, 9],
        "sample": [0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1],
        "text": ["a", "b", "c", "a", "x", "y", "z", "p", "q", "s", "s"],
        "reward": [0.2, 0.9, 0.1, 0.2, 0.5, 0.2, 0.45, 0.3, 0.3, 0.1, 0.6],
    }
)


def test_the_best_answer_against_the_worst() -> None:
    pairs, counts = make_pairs(REWARDS)
    assert pairs.rows() == [(2, "x", "y", 0.5, 0.2), (7, "b", "c", 0.9, 0.1)]
    assert (counts["users"], counts["pairs"]) == (4, 2)
    assert counts["reward_mean"] == pytest.approx(REWARDS["reward"].sum() / 11)
    assert counts["reward_spread"] == pytest.approx((0.8 + 0.3 + 0 + 0.5) / 4)
    assert make_pairs(REWARDS, min_gap=0.4)[0]["user"].to_list() == [7]
    assert make_pairs(REWARDS, max_pairs=1)[0]["user"].to_list() == [7]  # the widest gap


def test_random_pairs_do_not_look_at_rewards() -> None:
    better = 0
    for seed in range(200):
        pairs, _ = make_pairs(REWARDS, rule="random", seed=seed)
        assert pairs["user"].to_list() == [2, 7]
        assert all(chosen != rejected for chosen, rejected in pairs.select("chosen", "rejected").rows())
        better += pairs["chosen_reward"][1] > pairs["rejected_reward"][1]
    assert 70 < better < 130


@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_update_is_the_mean_over_its_pairs(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Every pair weighs 1 / pairs of ITS update, in the short last one too, whatever the number of processes."""
    totals: dict[int, float] = {}
    for rank in range(size):
        monkeypatch.setattr(distributed, "_place", distributed.Place(rank, size, rank, size))
        nothing: Any = None
        data = PreferenceDataModule(nothing, batch_size=4, accumulate=3, max_length=9, seed=2)
        examples: list[Any] = [SimpleNamespace(length=n % 7) for n in range(23)]
        data.examples = examples
        every = data.batches_per_update
        batches: Any = data.train_dataloader().dataset
        for n, (cut, weight) in enumerate(batches):
            totals[n // every] = totals.get(n // every, 0) + len(cut) * weight / every / size
    assert totals == pytest.approx({0: 1.0, 1: 1.0})


def test_every_epoch_has_its_own_order() -> None:
    """Which a resumed fit finds again: it comes of the epoch's number alone."""
    nothing: Any = None
    data = PreferenceDataModule(nothing, batch_size=2, accumulate=2, max_length=9, seed=2)
    examples: list[Any] = [SimpleNamespace(length=5) for _ in range(40)]
    data.examples = examples

    def order(epoch: int) -> list[int]:
        trainer: Any = SimpleNamespace(current_epoch=epoch)
        data.trainer = trainer
        batches: Any = data.train_dataloader().dataset
        return [number for cut, _ in batches for number in cut]

    assert sorted(order(0)) == sorted(order(1)) == [*range(40)]
    assert order(0) != order(1)
    assert order(1) == order(1)


def test_rounding_makes_no_pair() -> None:
    rewards = pl.DataFrame(
        {
            "user": [0, 0, 1, 1, 2, 2],
            "sample": [0, 1] * 3,
            "text": ["a", "b"] * 3,
            "reward": [-1.2, -1.2 - 4e-7, -1.2, -1.21, -1.2, -1.2],
        }
    )
    for rule in ("best_worst", "random"):
        pairs, counts = make_pairs(rewards, rule=rule)
        assert pairs["user"].to_list() == [1]
        assert counts["pairs"] == 1
