"""Candidate lists in and ranked lists out, as tables with the data set's own ids."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from lit_rec.data.canonical import RatingsData
from lit_rec.data.lists import ListSet
from lit_rec.errors import UserError
from lit_rec.recipes.loop import Loop


@dataclass(frozen=True)
class Candidates:
    """Lists to rank: user [L], items [L, C] (0 = padding), and the lists' names."""

    user: Tensor
    items: Tensor
    names: list[str]


def test_lists(loop: Loop) -> Candidates:
    """The test users' own lists."""
    lists = loop.ground.lists
    index = lists.of_users(loop.splits.test)
    return Candidates(lists.user[index], lists.items[index], [str(i) for i in index.tolist()])


def read_lists(path: Path, data: RatingsData) -> Candidates:
    """Read candidate lists: one line per candidate.

    Args:
        path: Parquet or CSV with user_id and item_id; candidates of one list share a list_id, or, without that
            column, a user.
        data: Names the ids.

    Raises:
        UserError: The file or a column is missing, it has no line, or an id is unknown.
    """
    if not path.is_file():
        raise UserError(f"input not found: {path}", where="--input", fix="name a parquet or CSV file")
    try:
        table = pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"{path} cannot be read",
            where="--input",
            why=str(error).splitlines()[0],
            fix="write parquet, or CSV with a header",
        ) from error
    for column in ("user_id", "item_id"):
        if column not in table.columns:
            raise UserError(
                f"{path} has no column {column}",
                where="--input",
                why=f"columns are {', '.join(table.columns)}",
                fix="name the columns user_id, item_id and, for several lists per user, list_id",
            )
    if not len(table):
        raise UserError("there is no candidate to rank", where=f"{path}", fix="write one line per candidate")
    if "list_id" not in table.columns:
        table = table.with_columns(pl.col("user_id").alias("list_id"))
    table = table.select(pl.col("list_id", "user_id", "item_id").cast(pl.String)).with_row_index("line")
    users = data.users.select("user_id").with_row_index("user")
    items = data.items.select("item_id").with_row_index("item").filter(pl.col("item") > 0)
    for other, column in ((users, "user_id"), (items, "item_id")):
        unknown = table.join(other, on=column, how="anti").sort("line")
        if len(unknown):
            first = unknown.row(0, named=True)
            raise UserError(
                f"unknown {column} {first[column]!r}",
                where=f"{path}:{first['line'] + 2}",
                why=f"{unknown[column].n_unique()} ids do not occur in {data.name}",
                fix="rank users and items of the data the run was trained on",
            )
    table = table.join(users, on="user_id").join(items, on="item_id").sort("line")
    grouped = table.group_by("list_id", maintain_order=True).agg(
        "item", pl.col("user").first(), pl.col("user").n_unique().alias("n")
    )
    mixed = grouped.filter(pl.col("n") > 1)
    if len(mixed):
        raise UserError(
            f"list {mixed['list_id'][0]!r} belongs to several users", where=f"{path}", fix="give every list one user"
        )
    width = int(grouped["item"].list.len().max() or 0)  # type: ignore[arg-type]
    matrix = np.zeros((len(grouped), width), dtype=np.int64)
    for row, found in enumerate(grouped["item"].to_list()):
        matrix[row, : len(found)] = found
    return Candidates(grouped["user"].to_torch().long(), torch.from_numpy(matrix), grouped["list_id"].to_list())


def rank_table(
    lists: ListSet, scores: Tensor, names: list[str], data: RatingsData, texts: dict[int, str]
) -> pl.DataFrame:
    """The lists in the order of their scores, in the order they came in.

    Returns:
        list_id, user_id, rank (from 1), item_id, title, score, knowledge.
    """
    scores = scores.masked_fill(lists.items == 0, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    items, ranked = lists.items.gather(1, order), scores.gather(1, order)
    row, column = (items > 0).nonzero(as_tuple=True)
    chosen, owner = items[row, column].tolist(), lists.user[row].tolist()
    columns: dict[str, Any] = {
        "list_id": [names[r] for r in row.tolist()],
        "user_id": data.users["user_id"].gather(owner),
        "rank": (column + 1).numpy(),
        "item_id": data.items["item_id"].gather(chosen),
        "title": data.items["title"].gather(chosen),
        "score": ranked[row, column].numpy(),
        "knowledge": [texts.get(u, "") for u in owner],
    }
    return pl.DataFrame(columns)
