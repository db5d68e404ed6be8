"""Amazon reviews 2018: Books, the dense core that KAR works on (METHODS 1.5), and Video Games (METHODS 2.4)."""

import gzip
import html
import json
import re
import warnings
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl

from lit_rec.data.canonical import RatingsData, bad_line, canonical, need_file, stat_of
from lit_rec.errors import UserError
from lit_rec.texts import whole_text

SCRIPT = re.compile(r"^var \w+ ?=|<script|<style", re.IGNORECASE)  # parts of the page that were taken for a title
ASIN = re.compile(rb'"asin"\s*:\s*"([^"\\]*)"')  # inside a text the quotes would be escaped
RATING_MAX = 5
LONGEST_LINE = 1 << 26  # bytes; a gzip file of a few MB may unpack to more than any memory holds


class AmazonReviews2018:
    """One category of the Amazon reviews 2018: users and items with enough reviews, brand and category as attributes.

    Reviews are read a line at a time: two ids, a rating and a time are kept of each, never its text. Of several
    reviews of one item by one user the latest counts. Items that the meta file does not describe, or gives no
    title, cannot be shown to anybody: they are left out, with a warning, and the filter is applied once more.

    Args:
        root: Folder with the category's two files, such as Books_5.json.gz and meta_Books.json.gz.
        user_core: Fewest reviews of a user.
        item_core: Fewest reviews of an item.

    Attributes:
        name: Of the data set.
        stem: What the category is called in the names of the files.
        item_noun: What an item is called.
        levels: Which of an item's categories count; the first is the same for all.
    """

    name: ClassVar[str]
    stem: ClassVar[str]
    item_noun: ClassVar[str]
    levels: ClassVar[slice]

    def __init__(self, *, root: str, user_core: int, item_core: int) -> None:
        self.root, self.user_core, self.item_core = Path(root).expanduser(), user_core, item_core

    def _files(self) -> tuple[Path, Path]:
        names = f"{self.stem}_5.json.gz", f"meta_{self.stem}.json.gz"
        source = f"get {names[0]} and {names[1]} (Amazon review data 2018) and set data.root to their folder"
        reviews = need_file(self.root / names[0], "the reviews", source)
        return reviews, need_file(self.root / names[1], f"the descriptions of {self.item_noun}s", source)

    def describe(self) -> dict[str, Any]:
        """What identifies the source."""
        cores = {"user_core": self.user_core, "item_core": self.item_core}
        return {"name": self.name, "files": [stat_of(path) for path in self._files()], **cores}

    def load(self) -> RatingsData:
        """Read and filter the files; minutes for the official ones.

        Raises:
            UserError: A file is missing or broken, a line is malformed, or the filter leaves nothing.
        """
        reviews, meta = self._files()
        ratings = self._core(read_reviews(reviews))
        items = read_meta(meta, set(ratings["item_id"].unique()), self.levels)
        described = ratings.join(items, on="item_id", how="semi", maintain_order="left")
        if len(described) < len(ratings):
            left_out = ratings["item_id"].n_unique() - described["item_id"].n_unique()
            warnings.warn(f"{left_out} {self.item_noun}s have no title in {meta.name}: left out", stacklevel=2)
            ratings = self._core(described)
        return canonical(
            self.name,
            ratings,
            ratings.select("user_id").unique(maintain_order=True),
            items,
            item_attributes=["brand", "category"],
            rating_max=RATING_MAX,
            positive_above=4,
            item_noun=self.item_noun,
        )

    def _core(self, ratings: pl.DataFrame) -> pl.DataFrame:
        kept = core(ratings, self.user_core, self.item_core)
        if kept.is_empty():
            raise UserError(
                f"no users with {self.user_core} reviews of {self.item_noun}s with {self.item_core} reviews are left",
                where="config keys data.user_core and data.item_core",
                why=f"{len(ratings)} reviews before the filter",
                fix="use smaller cores, or the whole files",
            )
        return kept


class AmazonBooks2018(AmazonReviews2018):
    """Books, filtered to the core that KAR works on; the category is the second one."""

    name, stem, item_noun, levels = "amazon-books", "Books", "book", slice(1, 2)

    def __init__(self, *, root: str, user_core: int = 60, item_core: int = 40) -> None:
        super().__init__(root=root, user_core=user_core, item_core=item_core)


class AmazonVideoGames2018(AmazonReviews2018):
    """Video games and what is played on; the categories are the platform and the kind of thing.

    The time of a review is its day: what one user reviewed on one day stays in the order of the file.
    """

    name, stem, item_noun, levels = "amazon-games", "Video_Games", "video game", slice(1, 3)

    def __init__(self, *, root: str, user_core: int = 5, item_core: int = 5) -> None:
        super().__init__(root=root, user_core=user_core, item_core=item_core)


def core(ratings: pl.DataFrame, user_core: int, item_core: int) -> pl.DataFrame:
    """Drop users and items with too few ratings, again and again until none has; the order of lines is kept."""
    while True:
        before = len(ratings)
        ratings = ratings.filter(pl.len().over("user_id") >= user_core)
        ratings = ratings.filter(pl.len().over("item_id") >= item_core)
        if len(ratings) == before:
            return ratings


def read_reviews(path: Path) -> pl.DataFrame:
    """Read the reviews, the latest of every user and item.

    Returns:
        user_id, item_id, rating, timestamp; file order.

    Raises:
        UserError: A line is malformed.
    """
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    u, i, rating, timestamp = array("i"), array("i"), array("f"), array("q")
    for number, line in _lines(path):
        try:
            review = json.loads(line)
            user, item, stars, time = (review[k] for k in ("reviewerID", "asin", "overall", "unixReviewTime"))
            user, item = whole_text(user), whole_text(item)
            if not (isinstance(user, str) and isinstance(item, str) and 0 <= stars <= RATING_MAX):
                raise ValueError
            rating.append(stars)
            timestamp.append(time)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            expected = f"JSON with reviewerID, asin, overall (0 to {RATING_MAX}) and unixReviewTime (seconds)"
            raise bad_line(path, number, line.decode(errors="replace").strip(), expected) from None
        u.append(users.setdefault(user, len(users)))
        i.append(items.setdefault(item, len(items)))
    columns = {"u": u, "i": i, "rating": rating, "timestamp": timestamp}
    table = pl.DataFrame({name: np.asarray(values) for name, values in columns.items()}).with_row_index("line")
    table = table.sort("timestamp", "line")
    latest = table.unique(["u", "i"], keep="last", maintain_order=True).sort("line")
    names = {"u": pl.Series(list(users), dtype=pl.String), "i": pl.Series(list(items), dtype=pl.String)}
    return latest.select(
        names["u"].gather(latest["u"]).alias("user_id"),
        names["i"].gather(latest["i"]).alias("item_id"),
        "rating",
        "timestamp",
    )


def read_meta(path: Path, wanted: set[str], levels: slice) -> pl.DataFrame:
    """Read title, brand and categories of the wanted items; those without a title are left out.

    The file describes some items twice: the first description with a title counts.

    Raises:
        UserError: The line of a wanted item is malformed.
    """
    rows: dict[str, tuple[str, list[str], list[str]]] = {}
    for number, line in _lines(path):
        ids = [m.decode(errors="replace") for m in ASIN.findall(line)]
        if ids and wanted.isdisjoint(ids):  # nine lines in ten need not be parsed
            continue
        try:
            meta = json.loads(line)
            item, title, brand = whole_text(meta["asin"]), _text(meta.get("title")), _text(meta.get("brand"))
            title = "" if SCRIPT.search(title) else title
            category = [_text(c) for c in (meta.get("category") or [])[levels]]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            expected = "JSON with asin, title, brand and a list as category"
            raise bad_line(path, number, line.decode(errors="replace").strip(), expected) from None
        if item in wanted and title:
            rows.setdefault(
                item, (title, [brand] if brand else [], [c for c in category if c and not c.startswith("<")])
            )
    columns = [[row[i] for row in rows.values()] for i in range(3)]
    return pl.DataFrame(
        {"item_id": list(rows), "title": columns[0], "brand": columns[1], "category": columns[2]},
        schema={
            "item_id": pl.String,
            "title": pl.String,
            "brand": pl.List(pl.String),
            "category": pl.List(pl.String),
        },
    )


def _text(value: str | None) -> str:
    """Readable text: no HTML entities, no runs of blanks."""
    return " ".join(whole_text(html.unescape(value or "")).split())


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a gzip file."""
    number = 0
    try:
        with gzip.open(path, "rb") as file:
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE:
                    raise bad_line(path, number, line[:99].decode(errors="replace"), f"at most {LONGEST_LINE:,} bytes")
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            "this is not a whole gzip file",
            where=f"{path}:{number + 1}",
            why=str(error),
            fix="fetch it again from the official source",
        ) from error
