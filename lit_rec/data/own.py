"""One's own data: a folder of tables called interactions, items and users."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from lit_rec.data.atomic import AtomicFiles
from lit_rec.data.canonical import RatingsData
from lit_rec.data.files import place
from lit_rec.errors import UserError

TABLES = {"inter": "interactions", "item": "items", "user": "users"}
FORMS = (".csv", ".parquet")
NEAR = {"item": ("item", "items"), "user": ("user", "users")}  # what somebody may have called a table, case apart


class Folder(AtomicFiles):
    """Interactions, items and users in a folder, each as CSV, Parquet or RecBole's atomic file.

    `interactions.csv` (user_id, item_id, rating, timestamp), and where they exist `items.csv` (item_id, title and what
    else is known) and `users.csv` (user_id and what else is known); `.parquet` in place of `.csv`; or RecBole's atomic
    files, whatever their name: `interactions.inter`, `shop.item`. Times are seconds, or dates and times (UTC where
    they do not say).

    Args:
        root: The folder.
        name: Of the data set; None: the folder's name.
        title: Item column that holds the title; without a table of items the id is the title.
        more: As of `AtomicFiles`.
    """

    def __init__(self, *, root: str, name: str | None = None, title: str | None = "title", **more: Any) -> None:
        called = name or Path(root).expanduser().resolve().name
        super().__init__(root=root, name=called, title=title, **more)

    def _file(self, kind: str) -> Path:
        """The file of a kind; where there is none, what it would be called as CSV."""
        table = TABLES[kind]
        named = [self.root / f"{table}{form}" for form in (*FORMS, f".{kind}")]
        found = [path for path in named if path.is_file()]
        found += sorted(path for path in self.root.glob(f"*.{kind}") if path not in found)
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            raise UserError(f"{names} are both the {table}", where=str(self.root), fix="keep one of them")
        if not found and kind in NEAR and self.root.is_dir():
            near = [
                p.name
                for p in sorted(self.root.iterdir())
                if p.suffix.lower() in FORMS and p.stem.lower() in NEAR[kind]
            ]
            if near:
                suffix = Path(near[0]).suffix.lower()
                raise UserError(
                    f"{near[0]} is not read: the {table} are in {table}{suffix}",
                    where=str(self.root),
                    fix=f"call it {table}{suffix}, or take it out of the folder",
                )
        return found[0] if found else named[0]

    def load(self) -> RatingsData:
        """Read the files.

        Raises:
            UserError: There are no interactions, a column is missing, a line is malformed, an id is described twice, or
                an item is rated and not described; the line is named.
        """
        file = self._file("inter")
        if not file.is_file():
            held = ", ".join(sorted(path.name for path in self.root.iterdir())[:8]) if self.root.is_dir() else ""
            raise UserError(
                f"there are no interactions in {self.root}",
                where="config key data.root",
                why=f"it holds {held}" if held else "there is no such folder, or it is empty",
                fix="write interactions.csv with the columns user_id, item_id, rating, timestamp",
            )
        self._check_ids()
        return super().load()

    def _check_ids(self) -> None:
        """Refuse ids that are described twice, and rated items that are not described, where they stand."""
        inter = self._read(self._file("inter"))
        for kind, column in (("item", self.item), ("user", self.user)):
            path = self._file(kind)
            if not path.is_file():
                continue
            ids = self._column(self._read(path), column, kind, kind, pl.String)
            twice = (~ids.is_first_distinct()).arg_true()
            if len(twice):
                raise UserError(
                    f"{column} {ids[int(twice[0])]!r} is described twice",
                    where=place(path, int(twice[0])),
                    why=f"{len(twice)} lines describe an id again",
                    fix="keep one line per id",
                )
            if kind == "item":
                rated = self._column(inter, column, "inter", "item", pl.String)
                unknown = (~rated.is_in(ids.implode())).arg_true()
                if len(unknown):
                    raise UserError(
                        f"item {rated[int(unknown[0])]!r} is not in {path.name}",
                        where=place(self._file("inter"), int(unknown[0])),
                        why=f"{rated.gather(unknown).n_unique():,} items of {len(unknown):,} interactions are not",
                        fix=f"add them to {path.name}, or remove the interactions",
                    )

    def find(self, kind: str, ids: Mapping[str, str], number: int = 0) -> str:
        """Where something is said.

        Args:
            kind: "inter", "item" or "user".
            ids: user_id or item_id, or both.
            number: Of the lines that say it, from 0.

        Returns:
            FILE:LINE; "" where it is not said.
        """
        path = self._file(kind)
        if not path.is_file():
            return ""
        table = self._read(path)
        names = {"user_id": self.user, "item_id": self.item}
        said = pl.all_horizontal(pl.col(names[key]) == value for key, value in ids.items())
        lines = table.select(said.alias("said"))["said"].arg_true()
        return place(path, int(lines[number])) if len(lines) > number else ""
