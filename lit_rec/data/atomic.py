"""RecBole's atomic files: tables whose header names the type of every column; the same as CSV or Parquet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from lit_rec.data.canonical import RatingsData, bad_line, canonical, natural_title, need_file, stat_of
from lit_rec.data.tables import TYPES, read_csv, read_parquet, typed
from lit_rec.errors import UserError

FORMS = ("", ".csv", ".parquet")


def read_atomic(path: Path, separator: str = " ") -> pl.DataFrame:
    """Read one atomic file.

    Args:
        path: The file; its first line is `name:type` fields, type token, token_seq, float or float_seq.
        separator: Between the values of a sequence.

    Returns:
        token as String, token_seq as List[String], float as Float64, float_seq as List[Float64].

    Raises:
        UserError: The header or a line is malformed; the line is named.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    lines = [line.removesuffix("\r") for line in lines]
    header = [field.split(":") for field in lines[0].split("\t")] if lines else []
    if not header or any(len(h) != 2 or h[1] not in TYPES for h in header):
        raise bad_line(path, 1, lines[0] if lines else "", "fields like user_id:token, rating:float")
    body = pl.Series("line", lines[1:], dtype=pl.String)
    parts = body.str.split("\t")
    wrong = (parts.list.len() != len(header)).arg_true()
    if len(wrong):
        raise bad_line(path, int(wrong[0]) + 2, body[int(wrong[0])], f"{len(header)} fields split by tabs")
    columns = {name: parts.list.get(i).alias(name) for i, (name, _) in enumerate(header)}
    return pl.DataFrame({name: typed(path, columns[name], kind, separator) for name, kind in header})


class AtomicFiles:
    """Any data set as RecBole atomic files: NAME.inter, and NAME.item and NAME.user where they exist.

    Each may be a CSV or a Parquet file instead, with the same names of columns: NAME.inter.csv or NAME.csv,
    NAME.item.parquet, ... In a CSV file all columns are text but rating and timestamp; a type behind the name of a
    column, as in atomic files, says otherwise (`genres:token_seq`).

    Args:
        root: Folder of the files.
        name: Their common name.
        title: Item column that holds the title; None: the item's id is its title.
        year: Item column that holds the year.
        attributes: Item columns that are categorical attributes; None: every token and token_seq column left.
        rating: Interaction column that holds the rating; None: every interaction counts as a positive one.
        timestamp: Interaction column that holds the time in seconds; None: file order.
        user: Interaction and user column that holds the user's id.
        item: Interaction and item column that holds the item's id.
        positive_above: A rating above this is a positive label.
        rating_max: Highest rating; None: the highest one found.
        item_noun: What an item is called in prompts.
        article_last: Titles are written "Matrix, The".
        separator: Between the values of a sequence.
    """

    def __init__(
        self,
        *,
        root: str,
        name: str,
        title: str | None = None,
        year: str | None = None,
        attributes: Sequence[str] | None = None,
        rating: str | None = "rating",
        timestamp: str | None = "timestamp",
        user: str = "user_id",
        item: str = "item_id",
        positive_above: float = 3,
        rating_max: float | None = None,
        item_noun: str = "item",
        article_last: bool = False,
        separator: str = " ",
    ) -> None:
        self.root, self.name = Path(root).expanduser(), name
        self.title, self.year, self.attributes = title, year, attributes
        self.rating, self.timestamp, self.user, self.item = rating, timestamp, user, item
        self.positive_above, self.rating_max = positive_above, rating_max
        self.item_noun, self.article_last, self.separator = item_noun, article_last, separator

    def _file(self, kind: str) -> Path:
        """The file of a kind; where there is none, what an atomic file would be called."""
        names = [f"{self.name}.{kind}{form}" for form in FORMS]
        names += [f"{self.name}{form}" for form in FORMS if form and kind == "inter"]
        found = [self.root / name for name in names if (self.root / name).is_file()]
        if len(found) > 1:
            raise UserError(
                f"{' and '.join(path.name for path in found)} are the same table",
                where=str(self.root),
                fix="keep one of them",
            )
        return found[0] if found else self.root / names[0]

    def _read(self, path: Path) -> pl.DataFrame:
        numbers = [column for column in (self.rating, self.timestamp) if column]
        if path.suffix == ".csv":
            return read_csv(path, self.separator, numbers=numbers)
        if path.suffix == ".parquet":
            return read_parquet(path, ids=(self.user, self.item), numbers=numbers)
        return read_atomic(path, self.separator)

    def describe(self) -> dict[str, Any]:
        """What identifies the source."""
        files = [self._file(kind) for kind in ("inter", "item", "user")]
        options = {k: v for k, v in vars(self).items() if k not in ("root", "name")}
        return {"name": self.name, "files": [stat_of(f) for f in files if f.is_file()], **options}

    def _column(
        self, table: pl.DataFrame, column: str, kind: str, key: str, dtype: type[pl.DataType] | None = None
    ) -> pl.Series:
        if column not in table.columns:
            raise UserError(
                f"there is no column {column!r}",
                where=f"{self._file(kind)}:1",
                why=f"columns are {', '.join(table.columns)}",
                fix=f"set data.{key} to one of them",
            )
        if dtype is not None and table[column].dtype != dtype:
            raise UserError(
                f"column {column!r} is not a {'token' if dtype == pl.String else 'float'} column",
                where=f"{self._file(kind)}:1",
                fix=f"correct the header, or set data.{key} to another column",
            )
        return table[column]

    def load(self) -> RatingsData:
        """Read the files.

        Raises:
            UserError: The .inter file or a column is missing, or a line is malformed.
        """
        source = f"data.root names the folder, data.name the files: {self.name}.inter, .item and .user"
        inter = self._read(need_file(self._file("inter"), "the interactions", source))
        ratings = pl.DataFrame(
            {
                "user_id": self._column(inter, self.user, "inter", "user", pl.String),
                "item_id": self._column(inter, self.item, "inter", "item", pl.String),
                "rating": self._column(inter, self.rating, "inter", "rating", pl.Float64)
                if self.rating
                else pl.Series([self.positive_above + 1.0] * len(inter)),
                "timestamp": self._column(inter, self.timestamp, "inter", "timestamp", pl.Float64)
                if self.timestamp
                else pl.Series(range(len(inter))),
            }
        )
        finite = pl.col("rating", "timestamp").is_finite().fill_null(value=False)
        missing = pl.any_horizontal(pl.all().is_null(), pl.col("user_id", "item_id") == "", ~finite)
        empty = ratings.select(missing.alias("e"))["e"].arg_true()
        if len(empty):
            row = int(empty[0])
            raise bad_line(self._file("inter"), row + 2, str(inter.row(row)), "a user, an item, a rating and a time")
        items, attributes = self._items(ratings)
        return canonical(
            self.name,
            ratings,
            self._users(ratings),
            items,
            item_attributes=attributes,
            rating_max=self.rating_max if self.rating_max is not None else float(ratings["rating"].max() or 0),  # type: ignore[arg-type]
            positive_above=self.positive_above,
            item_noun=self.item_noun,
        )

    def _users(self, ratings: pl.DataFrame) -> pl.DataFrame:
        if not self._file("user").is_file():
            return ratings.select("user_id").unique(maintain_order=True)
        table = self._read(self._file("user"))
        self._column(table, self.user, "user", "user", pl.String)
        words = [c for c in table.columns if c != self.user and table[c].dtype == pl.String]
        table = table.select(pl.col(self.user).alias("user_id"), *words)
        if "gender" in words:
            table = table.with_columns(pl.col("gender").replace({"F": "female", "M": "male"}))
        return table

    def _items(self, ratings: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
        if not self._file("item").is_file():
            ids = ratings["item_id"].unique(maintain_order=True)
            return pl.DataFrame({"item_id": ids, "title": ids}), []
        table = self._read(self._file("item"))
        columns: dict[str, pl.Series] = {"item_id": self._column(table, self.item, "item", "item", pl.String)}
        title = self._column(table, self.title, "item", "title") if self.title else columns["item_id"]
        if title.dtype == pl.List:
            title = title.list.join(self.separator)
        columns["title"] = title.map_elements(natural_title, return_dtype=pl.String) if self.article_last else title
        if self.year:
            year = self._column(table, self.year, "item", "year").cast(pl.String)
            columns["year"] = year.str.extract(r"(\d{4})").cast(pl.Int32)
        taken = {self.item, self.title, self.year, "title"}  # one called so is not told from what an item is called
        kinds = (pl.String, pl.List(pl.String))
        chosen = (
            list(self.attributes)
            if self.attributes is not None
            else [c for c in table.columns if c not in taken and table[c].dtype in kinds]
        )
        for name in chosen:
            column = self._column(table, name, "item", "attributes")
            if column.dtype == pl.List:
                column = column.cast(pl.List(pl.String))
            else:  # a single value, or none
                text = column.cast(pl.String)
                column = text.to_frame("v").select(
                    pl.when((pl.col("v") == "") | pl.col("v").is_null())
                    .then(pl.lit([], pl.List(pl.String)))
                    .otherwise(pl.concat_list("v"))
                    .alias(name)
                )[name]
            columns[name] = column
        frame = pl.DataFrame(columns)
        return frame, chosen
