"""Candidate lists in and ranked lists out, as tables with the data set's own ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from lit_rec.data.canonical import RatingsData
from lit_rec.data.columns import texts
from lit_rec.data.files import csv_frame, csv_line
from lit_rec.data.lists import ListSet
from lit_rec.data.tables import parquet_frame
from lit_rec.errors import UserError
from lit_rec.recipes.loop import Loop


@dataclass(frozen=True)
class Given:
    """A table that somebody hands in, and how its lines are called in messages.

    Attributes:
        table: The lines.
        name: Of the file, or of what stands for it.
        option: What the table was named by: "--input".
        lines: Whether a line of the table is a line of a text file, below a header.
    """

    table: pl.DataFrame
    name: str
    option: str
    lines: bool = False

    def place(self, number: int) -> str:
        """Where line `number`, from 0, is found."""
        return f"{self.name}:{csv_line(Path(self.name), number)}" if self.lines else f"{self.name}, row {number + 1}"

    def texts(self, column: str) -> pl.Series:
        """A column as text.

        Raises:
            UserError: It holds lists or the like.
        """
        return texts(self.table[column], f"{self.name}, {self.option}" if self.lines else self.name)

    def need(self, columns: Sequence[str], fix: str) -> None:
        """Refuse what is no table, lacks a column, or has no line.

        Raises:
            UserError: The first one that is missing.
        """
        if not isinstance(self.table, pl.DataFrame):
            raise UserError(
                f"{self.name} is given a {type(self.table).__name__}, which is no table",
                where=self.option,
                fix="give a polars.DataFrame: pl.DataFrame(...) makes one, and collect() one of a LazyFrame",
            )
        for column in columns:
            if column not in self.table.columns:
                raise UserError(
                    f"{self.name} has no column {column}",
                    where=self.option,
                    why=f"columns are {', '.join(self.table.columns)}",
                    fix=fix,
                )
        if not len(self.table):
            raise UserError(f"there is no line in {self.name}", where=self.option, fix=fix)

    def known(self, column: str, ids: pl.Series, why: str, fix: str) -> pl.Series:
        """The rows, in `ids`, of a column of ids.

        Args:
            column: Its name.
            ids: What there is; String.
            why: Completes "3 ids ..." where some are not there.
            fix: What to do about it.

        Raises:
            UserError: An id is not there: the first one, with its line.
        """
        asked = pl.DataFrame({"id": self.texts(column)})
        numbers = pl.DataFrame({"id": ids, "row": np.arange(len(ids))})
        found = asked.join(numbers, on="id", how="left", maintain_order="left")["row"]
        missing = found.is_null().arg_true()
        if len(missing):
            first = int(missing[0])
            raise UserError(
                f"unknown {column} {asked['id'][first]!r}",
                where=self.place(first),
                why=f"{asked['id'].gather(missing).n_unique()} ids {why}",
                fix=fix,
            )
        return found


@dataclass(frozen=True)
class Candidates:
    """Lists to rank: user [L], items [L, C] (0 = padding), and the lists' names.

    A user is a row of the data set; behind the last one come the people who are new.
    """

    user: Tensor
    items: Tensor
    names: list[str]


def not_among(data: RatingsData) -> str:
    """Completes "3 ids ...": whom a run does not know, which may have taken a sample of the data set's users."""
    return f"are not among the {data.n_users:,} users that the run has of {data.name}"


def test_lists(loop: Loop) -> Candidates:
    """The test users' own lists."""
    lists = loop.ground.lists
    index = lists.of_users(loop.splits.test)
    return Candidates(lists.user[index], lists.items[index], [str(i) for i in index.tolist()])


def read_table(path: Path, option: str) -> Given:
    """Read Parquet, or CSV with a header, every column of which is text.

    Raises:
        UserError: The file is missing or is neither.
    """
    if not path.is_file():
        raise UserError(f"input not found: {path}", where=option, fix="name a parquet or CSV file")
    parquet = path.suffix == ".parquet"
    table = parquet_frame(path) if parquet else csv_frame(path)
    return Given(table, str(path), option, lines=not parquet)


def read_lists(path: Path, data: RatingsData, new: pl.Series | None = None) -> Candidates:
    """Read candidate lists from a file; see `lists_of`."""
    return lists_of(read_table(path, "--input"), data, new)


def lists_of(given: Given, data: RatingsData, new: pl.Series | None = None) -> Candidates:
    """Candidate lists of a table: one line per candidate.

    Args:
        given: user_id and item_id; candidates of one list share a list_id, or, without that column, a user.
        data: Names the ids.
        new: Ids of people who are not in the data set, and whose history is known.

    Raises:
        UserError: A column is missing, there is no line, an id is unknown, a list has an item twice or several users.
    """
    given.need(("user_id", "item_id"), "name the columns user_id, item_id and, for several lists per user, list_id")
    people, why = data.users["user_id"], not_among(data)
    if new is not None:
        people, why = pl.concat([people, new]), f"{why}, nor in the history"
    table = pl.DataFrame(
        {
            "list_id": given.texts("list_id" if "list_id" in given.table.columns else "user_id"),
            "user": given.known(
                "user_id",
                people,
                why,
                "give what they have rated: --history FILE, in a program rerank_many(lists, history)",
            ),
            "item": given.known(
                "item_id",
                data.items["item_id"][1:],
                f"do not occur in {data.name}",
                "rank items of the data the run was trained on",
            )
            + 1,
        }
    )
    twice = (~table.select(pl.struct("list_id", "item").is_first_distinct()).to_series()).arg_true()
    if len(twice):
        again = int(twice[0])
        raise UserError(
            f"item {given.table['item_id'][again]!r} stands twice in list {table['list_id'][again]!r}",
            where=given.place(again),
            fix="name every candidate of a list once",
        )
    grouped = table.group_by("list_id", maintain_order=True).agg(
        "item", pl.col("user").first(), pl.col("user").n_unique().alias("n")
    )
    mixed = grouped.filter(pl.col("n") > 1)
    if len(mixed):
        raise UserError(
            f"list {mixed['list_id'][0]!r} belongs to several users", where=given.name, fix="give every list one user"
        )
    return Candidates(
        grouped["user"].to_torch().long(), padded(grouped["item"].to_list()), grouped["list_id"].to_list()
    )


def padded(rows: Sequence[Sequence[int]], width: int = 0) -> Tensor:
    """Lists of different lengths as one matrix, 0 behind each; as wide as the longest, or as `width`."""
    matrix = np.zeros((len(rows), max(width, *map(len, rows), 0)), dtype=np.int64)
    for number, row in enumerate(rows):
        matrix[number, : len(row)] = row
    return torch.from_numpy(matrix)


def ranked(items: Tensor, scores: Tensor, frame: pl.DataFrame) -> tuple[list[int], dict[str, Any]]:
    """Candidates [L, C] (0 = padding) in the order of their scores [L, C]; equal ones as they came.

    Args:
        items: Rows of the frame.
        scores: Higher is better; those of padding mean nothing.
        frame: item_id and title of every item.

    Returns:
        The list of every line, and its columns rank (from 1), item_id, title, score.
    """
    scores = scores.masked_fill(items == 0, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    items, scores = items.gather(1, order), scores.gather(1, order)
    row, column = (items > 0).nonzero(as_tuple=True)
    chosen = items[row, column].tolist()
    return row.tolist(), {
        "rank": (column + 1).numpy(),
        "item_id": frame["item_id"].gather(chosen),
        "title": frame["title"].gather(chosen),
        "score": scores[row, column].numpy(),
    }


def rank_table(
    lists: ListSet, scores: Tensor, names: list[str], data: RatingsData, texts: dict[int, str]
) -> pl.DataFrame:
    """The lists in the order of their scores, in the order they came in.

    Returns:
        list_id, user_id, rank (from 1), item_id, title, score, knowledge.
    """
    row, columns = ranked(lists.items, scores, data.items)
    owner = lists.user[row].tolist()
    return pl.DataFrame(
        {
            "list_id": [names[r] for r in row],
            "user_id": data.users["user_id"].gather(owner),
            **columns,
            "knowledge": [texts.get(u, "") for u in owner],
        }
    )
