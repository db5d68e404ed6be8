"""Numbers of texts against counting by hand and numpy."""

import numpy as np
import polars as pl
import pytest

from lit_rec.metrics.texts import distinct_n, within_user_correlation


@pytest.mark.parametrize(
    ("texts", "n", "wanted"),
    [
        (["a b c", "a b d"], 2, 3 / 4),
        (["a b c", "a b d"], 1, 4 / 6),
        (["a b", "a  b\n"], 2, 1 / 2),
        (["a"], 2, 0.0),
        (["", "a b a b"], 2, 2 / 3),
        ([], 1, 0.0),
    ],
)
def test_distinct_ngrams_counted_by_hand(texts: list[str], n: int, wanted: float) -> None:
    assert distinct_n(texts, n) == pytest.approx(wanted)


def answers(user: list[int], reward: list[float], tokens: list[int]) -> pl.DataFrame:
    schema = {"user": pl.Int64, "reward": pl.Float32, "tokens": pl.Int64}
    return pl.DataFrame({"user": user, "reward": reward, "tokens": tokens}, schema=schema)


def test_correlation_as_numpys_after_taking_off_means() -> None:
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(10), 5)
    tokens = rng.integers(5, 60, 50)
    reward = (10 * user - 0.2 * tokens + rng.normal(0, 1, 50)).astype("float32")  # users and lengths pull apart
    centred = [x - np.array([x[user == u].mean(dtype=float) for u in user]) for x in (reward, tokens)]
    table = answers(user.tolist(), reward.tolist(), tokens.tolist())
    found = within_user_correlation(table, "reward", "tokens")
    assert found == pytest.approx(np.corrcoef(*centred)[0, 1], abs=1e-9)
    assert found == pytest.approx(within_user_correlation(table, "tokens", "reward"))


def test_users_of_several_columns() -> None:
    """Both runs number their users alike; taken for one user, the runs' own levels would make length pay."""
    table = answers([0] * 4, [1.0, 0.9, 2.0, 1.9], [10, 11, 20, 21]).with_columns(run=pl.Series([0, 0, 1, 1]))
    assert within_user_correlation(table, "reward", "tokens", user=("run", "user")) == pytest.approx(-1)
    assert within_user_correlation(table, "reward", "tokens") > 0.9  # type: ignore[operator]


@pytest.mark.parametrize(
    "table",
    [
        answers([], [], []),
        answers([0, 0], [0.1, 0.2], [1, 2]),
        answers([0, 1, 2], [0.1, 0.2, 0.3], [1, 2, 3]),  # one answer each
        answers([0] * 3 + [1] * 3, [0.1] * 3 + [0.7] * 3, [1, 2, 3, 4, 5, 6]),  # ties: no rounding is a difference
        answers([0] * 3 + [1] * 3, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [7] * 3 + [9] * 3),
    ],
)
def test_no_correlation(table: pl.DataFrame) -> None:
    assert within_user_correlation(table, "reward", "tokens") is None
