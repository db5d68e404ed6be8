"""HetRec 2011 MovieLens: MovieLens ratings with directors, actors and countries of the films (METHODS 2.4)."""

import re
from pathlib import Path
from typing import Any

import polars as pl

from lit_rec.data.canonical import RatingsData, bad_line, canonical, natural_title, need_file, stat_of
from lit_rec.data.movielens import _folder, read_separated
from lit_rec.data.session_sets import ItemTable
from lit_rec.errors import UserError

URL = "https://files.grouplens.org/datasets/hetrec2011/hetrec2011-movielens-2k-v2.zip"
SOURCE = f"get the data from {URL}"
RATINGS = "user_ratedmovies-timestamps.dat"
ACTORS = "movie_actors.dat"
TOP_ACTORS = 4  # Re2LLM's state text names so many

# The columns of the official files, as their first line names them.
MOVIES = (
    "id title imdbID spanishTitle imdbPictureURL year rtID rtAllCriticsRating rtAllCriticsNumReviews "
    "rtAllCriticsNumFresh rtAllCriticsNumRotten rtAllCriticsScore rtTopCriticsRating rtTopCriticsNumReviews "
    "rtTopCriticsNumFresh rtTopCriticsNumRotten rtTopCriticsScore rtAudienceRating rtAudienceNumRatings "
    "rtAudienceScore rtPictureURL"
)
# Attribute: file, its columns, the column that holds the attribute.
ATTRIBUTES = {
    "genres": ("movie_genres.dat", "movieID genre", "genre"),
    "directors": ("movie_directors.dat", "movieID directorID directorName", "directorName"),
    "actors": (ACTORS, "movieID actorID actorName ranking", "actorName"),
    "countries": ("movie_countries.dat", "movieID country", "country"),
}


class HetRecItems:
    """The films of HetRec 2011 with genres, directors, countries and, where their file is, the four first actors.

    Args:
        root: Folder with movies.dat and the other official files, or the zip file; None: download it.
        sha256: Of the zip file, to check a download by. Its publisher states none, so that you have to.
    """

    def __init__(self, *, root: str | None = None, sha256: str | None = None) -> None:
        self.root, self.sha256 = root, sha256

    def folder(self) -> Path:
        """Where the official files are.

        Raises:
            UserError: They are to be downloaded, and nothing is known to check them by.
        """
        if self.root is None and not re.fullmatch("[0-9a-f]{64}", self.sha256 or ""):
            raise UserError(
                "nothing is downloaded without a checksum",
                where="config keys root and sha256 of the reader of HetRec 2011",
                why="the publisher of this data set states none",
                fix=f"get {URL} and name the folder or zip file (root), or state the sha256 you trust (sha256)",
            )
        return _folder(self.root, URL, f"sha256:{self.sha256}", "movies.dat")

    def _files(self) -> list[Path]:
        folder = self.folder()
        names = ["movies.dat", *(name for name, _, _ in ATTRIBUTES.values())]
        return [
            need_file(folder / name, "a file of the films", SOURCE)
            for name in names
            if name != ACTORS or (folder / name).is_file()
        ]

    def describe(self) -> dict[str, Any]:
        """What identifies the source."""
        made: dict[str, Any] = {"name": "hetrec2011", "files": [stat_of(path) for path in self._files()]}
        if self.root is None:
            made["sha256"] = self.sha256
        return made

    def load(self) -> ItemTable:
        """Read the films.

        Raises:
            UserError: A file is missing or a line is malformed.
        """
        paths = {path.name: path for path in self._files()}
        movies = _table(paths["movies.dat"], MOVIES)
        items = movies.select(
            pl.col("id").alias("item_id"),
            pl.col("title").map_elements(natural_title, return_dtype=pl.String),
            pl.col("year").cast(pl.Int32, strict=False),
        )
        found = [name for name, (file, _, _) in ATTRIBUTES.items() if file in paths]
        for name in found:
            file, columns, value = ATTRIBUTES[name]
            table = _table(paths[file], columns)
            if file == ACTORS:
                table = _ranked(table, paths[file])
            named = table.filter(pl.col(value) != "").group_by("movieID", maintain_order=True)
            first = pl.col(value).unique(maintain_order=True).head(TOP_ACTORS if file == ACTORS else len(table))
            listed = named.agg(first.alias(name))
            items = items.join(listed, left_on="item_id", right_on="movieID", how="left", maintain_order="left")
        items = items.with_columns(pl.col(name).fill_null([]) for name in found)
        return ItemTable(items, tuple(found), "movie", "watched")


class HetRec2011:
    """HetRec 2011 MovieLens: 2,113 users, 10,197 films, 855,598 ratings with their second.

    Args:
        root: Folder with user_ratedmovies-timestamps.dat and the files of the films, or the zip file; None: download
            it, which takes `sha256`.
        sha256: As of `HetRecItems`.
    """

    def __init__(self, *, root: str | None = None, sha256: str | None = None) -> None:
        self.films = HetRecItems(root=root, sha256=sha256)

    def _path(self) -> Path:
        return need_file(self.films.folder() / RATINGS, "the ratings", SOURCE)

    def describe(self) -> dict[str, Any]:
        """What identifies the source."""
        films = self.films.describe()
        return films | {"files": [stat_of(self._path()), *films["files"]]}

    def load(self) -> RatingsData:
        """Read ratings and films.

        Raises:
            UserError: A file is missing, a line is malformed, or a download is not the file it should be.
        """
        path, films = self._path(), self.films.load()
        text = _table(path, "userID movieID rating timestamp")
        numbers = text.select(
            pl.col("rating").cast(pl.Float64, strict=False),
            pl.col("timestamp").cast(pl.Int64, strict=False) // 1000,  # milliseconds in the file
        )
        wrong = numbers.select(pl.any_horizontal(pl.all().is_null()).alias("w"))["w"].arg_true()
        if len(wrong):
            row = int(wrong[0])
            raise bad_line(path, row + 2, "\t".join(text.row(row)), "numbers as rating and timestamp")
        ratings = text.select(pl.col("userID").alias("user_id"), pl.col("movieID").alias("item_id")).hstack(numbers)
        users = ratings.select("user_id").unique(maintain_order=True)
        return canonical(
            "hetrec2011",
            ratings,
            users,
            films.items,
            item_attributes=films.attributes,
            rating_max=5,
            positive_above=3,
            item_noun=films.item_noun,
        )


def _table(path: Path, columns: str) -> pl.DataFrame:
    """A tab-separated file whose first line names its columns, all as text.

    Raises:
        UserError: The first line names others, or a line has another number of fields.
    """
    names = columns.split()
    table = read_separated(path, "\t", names, f"{len(names)} fields split by tabs")
    if table.is_empty() or list(table.row(0)) != names:
        raise bad_line(path, 1, "\t".join(table.row(0)) if len(table) else "", f"the columns {', '.join(names)}")
    return table.slice(1)


def _ranked(actors: pl.DataFrame, path: Path) -> pl.DataFrame:
    """The actors by their ranking."""
    ranking = actors["ranking"].cast(pl.Int64, strict=False)
    wrong = ranking.is_null().arg_true()
    if len(wrong):
        row = int(wrong[0])
        raise bad_line(path, row + 2, "\t".join(actors.row(row)), "a whole number as ranking")
    return actors.with_columns(ranking).sort("ranking", maintain_order=True)
