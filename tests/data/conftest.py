from collections.abc import Callable

import numpy as np
import polars as pl
import pytest

from lit_rec.data.canonical import RatingsData, canonical


@pytest.fixture(scope="session")
def make_ratings() -> Callable[..., RatingsData]:
    """A synthetic data set with skewed popularity, unsorted time and many ratings on one day."""

    def make(users: int = 40, items: int = 120, seed: int = 0, shortest: int = 2, longest: int = 60) -> RatingsData:
        rng = np.random.default_rng(seed)
        rows = []
        for user in range(users):
            count = int(rng.integers(shortest, longest + 1))
            start = int(rng.integers(10**9))
            for item in rng.choice(items, count, replace=False, p=_skewed(items)):
                rows.append((str(user), str(item), int(rng.integers(1, 6)), start + int(rng.integers(3 * 86400))))
        rng.shuffle(rows)
        ratings = pl.DataFrame(
            [(str(u), str(i), float(r), int(t)) for u, i, r, t in rows],
            schema={"user_id": pl.String, "item_id": pl.String, "rating": pl.Float64, "timestamp": pl.Int64},
            orient="row",
        )
        return canonical(
            "synthetic",
            ratings,
            pl.DataFrame({"user_id": [str(u) for u in range(users)]}),
            pl.DataFrame({"item_id": [str(i) for i in range(items)], "title": [f"t{i}" for i in range(items)]}),
            item_attributes=[],
            rating_max=5,
            positive_above=3,
            item_noun="item",
        )

    return make


def _skewed(items: int) -> np.ndarray:
    weight = 1 / np.arange(5, items + 5)
    return weight / weight.sum()
