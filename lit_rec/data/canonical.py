"""The one form every data set is read into."""

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from lit_rec.errors import UserError

NUMBERED = ("user_id", "item_id")


@dataclass(frozen=True)
class RatingsData:
    """Ratings with what is known of users and items. Items are numbered from 1; row 0 of `items` is padding.

    Attributes:
        name: Of the data set.
        interactions: user Int32 (0-based row), item Int32 (1-based row), rating Float32, timestamp in seconds (Int64,
            or Float64 where the source tells fractions of them); in the order of the file.
        users: user_id and attribute columns of readable text ("" when unknown); row i is user i.
        items: item_id, title and List[String] attribute columns, and year (Int32) where known; row i is item i.
        item_attributes: Which columns of `items` are categorical attributes.
        rating_max: Highest rating.
        positive_above: A rating above this is a positive label.
        item_noun: "movie", "book", ...
        rated: Whether the source tells ratings; where it does not, every interaction is a positive one and has the
            same rating, `rating_max`, which is said to nobody.
    """

    name: str
    interactions: pl.DataFrame
    users: pl.DataFrame
    items: pl.DataFrame
    item_attributes: tuple[str, ...]
    rating_max: float
    positive_above: float
    item_noun: str
    rated: bool = True

    @property
    def n_users(self) -> int:
        """Number of users."""
        return len(self.users)

    @property
    def n_items(self) -> int:
        """Number of items, padding not counted."""
        return len(self.items) - 1


def canonical(
    name: str,
    ratings: pl.DataFrame,
    users: pl.DataFrame,
    items: pl.DataFrame,
    *,
    item_attributes: Sequence[str],
    rating_max: float,
    positive_above: float,
    item_noun: str,
    rated: bool = True,
) -> RatingsData:
    """Number users and items and check that the tables belong together.

    Args:
        name: Of the data set.
        ratings: user_id, item_id (String, or whole numbers, which are faster), rating, timestamp; file order.
        users: user_id and attributes; users without a rating are left out, missing ones get empty attributes.
        items: item_id, title and attributes; items without a rating are left out.
        item_attributes: Attribute columns of `items`.
        rating_max: Highest rating of the scale.
        positive_above: A rating above this is a positive label.
        item_noun: What an item is called.
        rated: Whether the source tells ratings.

    Raises:
        UserError: An id occurs twice, an item is rated and not described, or there is no rating.
    """
    if ratings.is_empty():
        raise UserError(f"{name} holds no rating", where="config key data", fix="check the ratings file")
    for table, key in ((users, "user_id"), (items, "item_id")):
        twice = table.filter(table[key].is_duplicated())[key].unique(maintain_order=True)
        if len(twice):
            raise UserError(
                f"{name}: {key} {twice[0]!r} is described {int((table[key] == twice[0]).sum())} times",
                where=f"{key.split('_')[0]} file",
                why=f"{len(twice)} ids occur more than once",
                fix="keep one line per id",
            )
    named = {key: ratings.select(pl.col(key).unique(maintain_order=True).cast(pl.String)) for key in NUMBERED}
    unknown = named["item_id"].join(items, on="item_id", how="anti", maintain_order="left")["item_id"]
    if len(unknown):
        raise UserError(
            f"{name}: {len(unknown)} rated items are not described, among them {', '.join(unknown[:3])}",
            where="item file",
            fix="add them to the item file, or remove their ratings",
        )
    # In the order of the files that describe them: `kar` splits users by id, and ids are in file order there.
    kept_users = users.join(named["user_id"], on="user_id", how="semi", maintain_order="left")
    undescribed = named["user_id"].join(users, on="user_id", how="anti", maintain_order="left")
    kept_users = pl.concat([kept_users, undescribed], how="diagonal").with_columns(pl.col(pl.String).fill_null(""))
    kept_items = items.join(named["item_id"], on="item_id", how="semi", maintain_order="left")
    padding = pl.DataFrame({"item_id": [""], "title": [""]})
    kept_items = pl.concat([padding, kept_items], how="diagonal").with_columns(
        pl.col("title").fill_null(""), *(pl.col(a).fill_null([]) for a in item_attributes)
    )
    interactions = ratings.select(
        _numbered(ratings["user_id"], kept_users["user_id"]).alias("user"),
        _numbered(ratings["item_id"], kept_items["item_id"]).alias("item"),
        pl.col("rating").cast(pl.Float32),
        pl.col("timestamp").cast(pl.Int64 if _whole(ratings["timestamp"]) else pl.Float64),
    )
    return RatingsData(
        name,
        interactions,
        kept_users,
        kept_items,
        tuple(item_attributes),
        rating_max,
        positive_above,
        item_noun,
        rated,
    )


def _whole(times: pl.Series) -> bool:
    """Whether times are whole seconds: of others the fractions say what came first."""
    return times.dtype.is_integer() or bool((times == times.floor()).all())


def _numbered(ids: pl.Series, known: pl.Series) -> pl.Series:
    """Rows [n] Int32 of ids [n] in `known`; only as many ids become text as are different."""
    different = ids.unique(maintain_order=True)  # the faster way, too
    rows = different.cast(pl.String).replace_strict(known, range(len(known)), return_dtype=pl.Int32)
    least, most = (int(bound) for bound in (different.min(), different.max())) if ids.dtype.is_integer() else (-1, -1)  # type: ignore[arg-type]
    if least < 0 or most > len(ids):
        return ids.replace_strict(different, rows, return_dtype=pl.Int32)
    table = np.zeros(most + 1, dtype=np.int32)
    table[different.to_numpy()] = rows.to_numpy()
    return pl.Series(table[ids.to_numpy()])


def sample_users(data: RatingsData, n: int, seed: int) -> RatingsData:
    """A random sample of users with all their ratings; items keep their numbers.

    Raises:
        UserError: There are fewer users than asked for.
    """
    if not 2 <= n <= data.n_users:
        raise UserError(
            f"a sample of {n} users is not possible: {data.name} has {data.n_users}",
            where="config key users",
            fix=f"use null for all, or a number from 2 to {data.n_users}",
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(data.n_users)[:n])
    number = pl.DataFrame({"user": chosen.astype(np.int32), "new": np.arange(n, dtype=np.int32)})
    interactions = (
        data.interactions.with_row_index("line")
        .join(number, on="user")
        .sort("line")
        .select(pl.col("new").alias("user"), "item", "rating", "timestamp")
    )
    return replace(data, interactions=interactions, users=data.users[chosen.tolist()])


def attribute_table(data: RatingsData) -> tuple[Tensor, list[int]]:
    """Attribute values as numbers, for embeddings.

    Returns:
        ([n_items + 1, A] int64, 0 = padding, values of different attributes numbered apart; columns per attribute).
    """
    tables, widths, used = [], [], 0
    for name in data.item_attributes:
        lists = data.items[name].to_list()
        values = {v: i + 1 + used for i, v in enumerate(sorted({v for row in lists for v in row}))}
        width = max(map(len, lists), default=0)
        if not width:
            continue
        table = np.zeros((len(lists), width), dtype=np.int64)
        for row, found in enumerate(lists):
            table[row, : len(found)] = [values[v] for v in found]
        tables.append(table)
        widths.append(width)
        used += len(values)
    if not tables:
        return torch.zeros(len(data.items), 0, dtype=torch.long), []
    return torch.from_numpy(np.concatenate(tables, axis=1)), widths


_ARTICLES = "The|A|An|Le|La|Les|L'|Il|El|Das|Der|Die|Los|Las"
ARTICLE = re.compile(rf"(?P<before>^|\()(?P<rest>[^()]+), (?P<article>{_ARTICLES})\s*(?P<after>$|\)| \()")


def natural_title(title: str) -> str:
    """GroupLens writes the article last, in other names of a film too.

    >>> natural_title("Tin Drum, The (Blechtrommel, Die)")
    'The Tin Drum (Die Blechtrommel)'
    """

    def first(found: re.Match[str]) -> str:
        space = "" if found["article"].endswith("'") else " "
        return f"{found['before']}{found['article']}{space}{found['rest']}{found['after']}"

    # Twice, because a match that ends with " (" hides the name in the brackets from the search that follows.
    return ARTICLE.sub(first, ARTICLE.sub(first, title))


def split_title(titles: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Split a column of titles: "Matrix, The (1999)" -> ("The Matrix", 1999); "(V)", a video, may follow the year."""
    parts = titles.to_frame("t").select(
        pl.col("t").str.extract(r"^(.*?)\s*(?:\(\d{4}\)\s*(?:\(V\))?)?\s*$").alias("title"),
        pl.col("t").str.extract(r"\((\d{4})\)\s*(?:\(V\))?\s*$").cast(pl.Int32).alias("year"),
    )
    natural = [natural_title(title) if title and ", " in title else title for title in parts["title"]]
    return pl.Series("title", natural, dtype=pl.String), parts["year"]


def need_file(path: Path, what: str, source: str) -> Path:
    """The path, when the file is there.

    Raises:
        UserError: It is not.
    """
    if not path.is_file():
        raise UserError(f"{what} not found: {path}", where="config key data.root", fix=source)
    return path


def bad_line(path: Path, number: int, line: str, expected: str) -> UserError:
    """The error for a line that is not as the format says."""
    shown = line if len(line) <= 120 else line[:117] + "..."
    return UserError(
        f"malformed line: {shown!r}",
        where=f"{path}:{number}",
        why=f"expected {expected}",
        fix="correct or remove the line",
    )


def stat_of(path: Path) -> dict[str, object]:
    """What identifies a source file in a manifest: its name, size, and a hash of what stands in it.

    Size alone would not tell a file whose lines were sorted from what a run was trained on.
    """
    found = path.stat()
    return {"file": path.name, "bytes": found.st_size, "sha256": _hash(path, found.st_mtime_ns, found.st_size)}


@functools.cache
def _hash(path: Path, modified: int, size: int) -> str:
    """SHA-256 of a file, read once per process as long as its time (ns) and size (bytes) stay."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
