from dataclasses import replace

import polars as pl
import pytest
import torch

from lit_rec.data.canonical import attribute_table, sample_users
from lit_rec.errors import UserError


def test_sampled_users_keep_their_ratings_and_items_their_numbers(make_ratings):
    data = make_ratings()
    few = sample_users(data, 10, seed=3)
    assert few.n_users == 10
    assert few.items.equals(data.items)
    named = {}
    for source in (data, few):
        ids = source.users["user_id"].to_list()
        named[source.n_users] = [(ids[u], i, r, t) for u, i, r, t in source.interactions.iter_rows()]
    chosen = set(few.users["user_id"].to_list())
    assert named[10] == [row for row in named[40] if row[0] in chosen]  # file order too
    assert few.users.equals(sample_users(data, 10, seed=3).users)
    assert not few.users.equals(sample_users(data, 10, seed=4).users)


@pytest.mark.parametrize("n", [0, 41])
def test_impossible_samples(make_ratings, n):
    with pytest.raises(UserError, match=f"a sample of {n} users"):
        sample_users(make_ratings(), n, seed=0)


def test_attribute_table(make_ratings):
    data = make_ratings()
    rows = [[]] + [["a", "b"] if i % 2 else ["b"] for i in range(data.n_items)]
    items = data.items.with_columns(
        pl.Series("tags", rows), pl.Series("none", [[]] * len(rows), dtype=pl.List(pl.String))
    )
    table, widths = attribute_table(replace(data, items=items, item_attributes=("tags", "none")))
    assert table.shape == (data.n_items + 1, 2)
    assert widths == [2]
    assert table[0].tolist() == [0, 0]
    assert table[1].tolist() == [2, 0]
    assert table[2].tolist() == [1, 2]
    assert table.dtype == torch.int64
    nothing, widths = attribute_table(data)
    assert nothing.shape == (data.n_items + 1, 0)
    assert widths == []


def test_values_of_different_attributes_are_numbered_apart(make_ratings):
    data = make_ratings()
    rows = [[]] + [["same"]] * data.n_items
    items = data.items.with_columns(pl.Series("a", rows), pl.Series("b", rows))
    table, widths = attribute_table(replace(data, items=items, item_attributes=("a", "b")))
    assert table[1].tolist() == [1, 2]
    assert widths == [1, 1]
