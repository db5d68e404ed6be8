"""RecBole's atomic files: tables whose header names the type of every column; the same as CSV or Parquet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from lit_rec.data.canonical import RatingsData, bad_line, canonical, natural_title, need_file, stat_of
from lit_rec.data.columns import LONGEST, TIMES, seconds, text_lists, texts, wrong_type
from lit_rec.data.files import bad_row, utf8
from lit_rec.data.tables import TYPES, read_csv, read_parquet, typed
from lit_rec.errors import UserError

FORMS = ("", ".csv", ".parquet")
OPTIONAL = ("rating", "timestamp", "title", "year")  # keys that may be null


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
    lines = utf8(path).decode().split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    lines = [line.removesuffix("\r") for line in lines]
    header = [field.split(":") for field in lines[0].split("\t")] if lines else []
    if not header or any(len(h) != 2 or h[1] not in TYPES for h in header):
        raise bad_line(path, 1, lines[0] if lines else "", "fields like user_id:token, rating:float")
    if len({name for name, _ in header}) < len(header):
        raise bad_line(path, 1, lines[0], "different names")
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
        timestamp: Interaction column that holds the time: seconds, or dates and times (UTC where they do not say);
            None: file order.
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
        if isinstance(attributes, str):
            raise UserError(
                f"data.attributes: {attributes!r} is no list",
                where="config key data.attributes",
                fix=f"write data.attributes=[{attributes}]",
            )

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
        numbers = [self.rating] if self.rating else []
        if path.suffix == ".csv":
            return self._timed(path, read_csv(path, self.separator, numbers=numbers))
        if path.suffix == ".parquet":
            return self._timed(path, read_parquet(path, ids=(self.user, self.item), numbers=numbers))
        return self._timed(path, read_atomic(path, self.separator))

    def _timed(self, path: Path, table: pl.DataFrame) -> pl.DataFrame:
        """The table of interactions with its times in seconds."""
        name = self.timestamp
        if name is None or name not in table.columns or path != self._file("inter"):
            return table
        times = seconds(table[name], str(path))
        if table[name].dtype == pl.String:
            bad = (times.is_null() & (table[name].fill_null("").str.strip_chars() != "")).arg_true()
            if len(bad):
                raise bad_row(path, int(bad[0]), table[name][int(bad[0])], f"{TIMES} as {name}")
        return table.with_columns(times)

    def describe(self) -> dict[str, Any]:
        """What identifies the source."""
        files = [self._file(kind) for kind in ("inter", "item", "user")]
        options = {k: v for k, v in vars(self).items() if k not in ("root", "name")}
        return {"name": self.name, "files": [stat_of(f) for f in files if f.is_file()], **options}

    def _column(
        self, table: pl.DataFrame, column: str, kind: str, key: str, dtype: type[pl.DataType] | None = None
    ) -> pl.Series:
        where = f"{self._file(kind)}:1"
        if column not in table.columns:
            none = f", or data.{key}=null where there is none" if key in OPTIONAL else ""
            raise UserError(
                f"there is no column {column!r}",
                where=where,
                why=f"columns are {', '.join(table.columns)}",
                fix=f"set data.{key} to one of them{none}",
            )
        if dtype is not None and table[column].dtype != dtype:
            if self._file(kind).suffix == ".parquet":
                wanted = "text or whole numbers" if dtype == pl.String else "numbers"
                raise wrong_type(table[column], where, f"write {wanted}, or set data.{key} to another column")
            raise UserError(
                f"column {column!r} is not a {'token' if dtype == pl.String else 'float'} column",
                where=where,
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
        chosen = float(self.positive_above) + 1
        ratings = pl.DataFrame(
            {
                "user_id": self._column(inter, self.user, "inter", "user", pl.String),
                "item_id": self._column(inter, self.item, "inter", "item", pl.String),
                "rating": self._column(inter, self.rating, "inter", "rating", pl.Float64)
                if self.rating
                else pl.Series([chosen] * len(inter), dtype=pl.Float64),
                "timestamp": self._column(inter, self.timestamp, "inter", "timestamp", pl.Float64)
                if self.timestamp
                else pl.Series(range(len(inter))),
            }
        )
        finite = pl.col("rating", "timestamp").is_finite().fill_null(value=False)
        never = pl.col("timestamp").abs() > LONGEST
        missing = pl.any_horizontal(pl.all().is_null(), pl.col("user_id", "item_id") == "", ~finite, never)
        empty = ratings.select(missing.alias("e"))["e"].arg_true()
        if len(empty):
            row = int(empty[0])
            raise bad_row(self._file("inter"), row, str(inter.row(row)), "a user, an item, a rating and a time")
        items, attributes = self._items(ratings)
        highest = self.rating_max if self.rating_max is not None else float(ratings["rating"].max() or 0)  # type: ignore[arg-type]
        return canonical(
            self.name,
            ratings,
            self._users(ratings),
            items,
            item_attributes=attributes,
            rating_max=highest if self.rating else chosen,
            positive_above=self.positive_above,
            item_noun=self.item_noun,
            rated=self.rating is not None,
        )

    def _users(self, ratings: pl.DataFrame) -> pl.DataFrame:
        path = self._file("user")
        if not path.is_file():
            return ratings.select("user_id").unique(maintain_order=True)
        table = self._read(path)
        self._column(table, self.user, "user", "user", pl.String)
        known = [texts(column, str(path)) for column in table if column.name != self.user and _single(column)]
        words = [column.name for column in known]
        table = table.with_columns(known).select(pl.col(self.user).alias("user_id"), *words)
        if "gender" in words:
            table = table.with_columns(pl.col("gender").replace({"F": "female", "M": "male"}))
        return table

    def _items(self, ratings: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
        path = self._file("item")
        if not path.is_file():
            self._refuse_undescribed()
            ids = ratings["item_id"].unique(maintain_order=True)
            return pl.DataFrame({"item_id": ids, "title": ids}), []
        table, where = self._read(path), str(path)
        columns: dict[str, pl.Series] = {"item_id": self._column(table, self.item, "item", "item", pl.String)}
        title = self._column(table, self.title, "item", "title") if self.title else columns["item_id"]
        if title.dtype == pl.List:
            title = text_lists(title, where).list.join(self.separator)
        title = texts(title, where).fill_null("")
        columns["title"] = title.map_elements(natural_title, return_dtype=pl.String) if self.article_last else title
        if self.year:
            year = texts(self._column(table, self.year, "item", "year"), where)
            columns["year"] = year.str.extract(r"(\d{4})").cast(pl.Int32)
        taken = {self.item, self.title, self.year, "title"}  # one called so is not told from what an item is called
        kinds = (pl.String, pl.List(pl.String))
        chosen = (
            list(self.attributes)
            if self.attributes is not None
            else [c for c in table.columns if c not in taken and table[c].dtype in kinds]
        )
        for name in chosen:
            columns[name] = text_lists(self._column(table, name, "item", "attributes"), where)
        return pl.DataFrame(columns), chosen

    def _refuse_undescribed(self) -> None:
        """Refuse to go on without the table of items that the configuration speaks of."""
        asked = [key for key in ("attributes", "year") if getattr(self, key)]
        if asked:
            held = sorted(path.name for path in self.root.iterdir())
            raise UserError(
                f"there is no table of items, and data.{asked[0]} names columns of it",
                where=f"config key data.{asked[0]}",
                why=f"{self.root} holds {', '.join(held[:8])}",
                fix=f"call it {self._file('item').name}, or set data.{asked[0]}=null",
            )


def _single(column: pl.Series) -> bool:
    """Whether a column holds one value in a row: lists about users are said nowhere."""
    return not column.dtype.is_nested()
