"""MovieLens-1M and MovieLens-100K."""

from pathlib import Path
from typing import Any

import polars as pl

from lit_rec.data.assets import cache_dir, fetch_url, fetch_wheel, unpacked_zip
from lit_rec.data.atomic import AtomicFiles
from lit_rec.data.canonical import RatingsData, bad_line, canonical, need_file, split_title, stat_of
from lit_rec.errors import UserError

ML1M_URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
ML1M_MD5 = "md5:c4d9eecfca2ab87c1945afe126590906"
ML100K_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
ML100K_MD5 = "md5:0e33842e24a9c977be4e0107933c0723"
RECBOLE = ("recbole", "1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407")
RECBOLE_MEMBER = "recbole/dataset_example/ml-100k/"

GENDERS = {"F": "female", "M": "male"}
AGES = {
    "1": "under 18",
    "18": "18-24",
    "25": "25-34",
    "35": "35-44",
    "45": "45-49",
    "50": "50-55",
    "56": "56 or older",
}
OCCUPATIONS = (
    "",
    "academic or educator",
    "artist",
    "clerical or admin",
    "college or graduate student",
    "customer service",
    "doctor or health care",
    "executive or managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales or marketing",
    "scientist",
    "self-employed",
    "technician or engineer",
    "tradesman or craftsman",
    "unemployed",
    "writer",
)


def _folder(root: str | None, url: str, known_hash: str, marker: str) -> Path:
    """The folder with the official files: a folder, a zip file, or a checked download."""
    if root is None:
        path = fetch_url(url, cache_dir() / "downloads" / url.rsplit("/", 1)[1], known_hash=known_hash)
    else:
        path = Path(root).expanduser()
        if not path.exists():
            raise UserError(
                f"{path} does not exist",
                where="config key data.root",
                fix=f"name the folder with {marker}, the zip file, or null to download it",
            )
    folder = unpacked_zip(path) if path.is_file() else path
    found = next((p.parent for p in (folder / marker, *sorted(folder.glob(f"*/{marker}"))) if p.is_file()), None)
    if found is None:
        raise UserError(f"{marker} not found in {path}", where="config key data.root", fix=f"get the data from {url}")
    return found


def _lines(path: Path) -> list[str]:
    """Lines of a latin-1 file without the empty ones at its end (u.genre has one).

    `str.splitlines` would also split at the bytes 0x85 and 0x1c, which are part of a text here.
    """
    lines = [line.removesuffix("\r") for line in path.read_bytes().decode("latin-1").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_separated(path: Path, separator: str, names: list[str], expected: str) -> pl.DataFrame:
    """Read a file whose fields are split by a string (`::`), all as text.

    Raises:
        UserError: A line has another number of fields; the first one is named.
    """
    lines = pl.Series("line", _lines(path), dtype=pl.String)
    parts = lines.str.split(separator)
    wrong = (parts.list.len() != len(names)).arg_true()
    if len(wrong):
        raise bad_line(path, int(wrong[0]) + 1, lines[int(wrong[0])], expected)
    return pl.DataFrame({name: parts.list.get(i) for i, name in enumerate(names)})


class MovieLens1M:
    """MovieLens-1M in GroupLens' own layout.

    Args:
        root: Folder with ratings.dat, movies.dat and users.dat, or the zip file; None: download and check it.
    """

    def __init__(self, *, root: str | None = None) -> None:
        self.root = root

    def _path(self) -> Path:
        return _folder(self.root, ML1M_URL, ML1M_MD5, "ratings.dat")

    def describe(self) -> dict[str, Any]:
        """What identifies the source."""
        folder = self._path()
        return {
            "name": "ml-1m",
            "files": [stat_of(folder / f) for f in ("ratings.dat", "movies.dat", "users.dat")],
        }

    def load(self) -> RatingsData:
        """Read the three files.

        Raises:
            UserError: A file is missing or a line is malformed.
        """
        folder = self._path()
        source = f"get the data from {ML1M_URL}"
        ratings = self._ratings(need_file(folder / "ratings.dat", "the ratings", source))
        movies = read_separated(
            need_file(folder / "movies.dat", "the movies", source),
            "::",
            ["item_id", "title", "genres"],
            "MovieID::Title::Genres",
        )
        title, year = split_title(movies["title"])
        items = movies.with_columns(title, year, pl.col("genres").str.split("|"))
        users = read_separated(
            need_file(folder / "users.dat", "the users", source),
            "::",
            ["user_id", "gender", "age", "occupation", "zip"],
            "UserID::Gender::Age::Occupation::Zip-code",
        )
        jobs = {str(i): job for i, job in enumerate(OCCUPATIONS)}
        users = users.with_columns(
            pl.col("gender").replace_strict(GENDERS, default=""),
            pl.col("age").replace_strict(AGES, default=""),
            pl.col("occupation").replace_strict(jobs, default=""),
        ).drop("zip")
        return canonical(
            "ml-1m",
            ratings,
            users,
            items,
            item_attributes=["genres"],
            rating_max=5,
            positive_above=3,
            item_noun="movie",
        )

    @staticmethod
    def _ratings(path: Path) -> pl.DataFrame:
        """`u::i::r::t` read as seven columns split by one colon: six times faster than splitting lines.

        Nothing may stand in the columns between, nor behind the last. A file as long as the numbers that were read has
        nothing there; only of another one (of numbers that begin with a zero, without a last line feed) are the columns
        between read as well, which takes half as long again.
        """
        size = path.stat().st_size
        if not size:
            raise UserError("the file of ratings is empty", where=str(path), fix="fetch or unpack the data set again")
        try:
            table = _split_by_colon(path, "uirt")
            if table.select(pl.any_horizontal(pl.all().is_null()).any()).item():
                raise ValueError("a field is empty")
            with path.open("rb") as file:
                file.seek(size - 1)
                last = file.read()
            if last != b"\n" or size != sum(map(_digits, table)) + len(table) * len("::::::\n"):
                between = _split_by_colon(path, "abcuirt").select("a", "b", "c")
                if between.select(pl.any_horizontal(pl.all().is_not_null()).any()).item():
                    raise ValueError("a single colon")
        except (pl.exceptions.PolarsError, ValueError):
            raise _first_bad_rating(path) from None
        return table.select(user_id="u", item_id="i", rating="r", timestamp="t")


def _split_by_colon(path: Path, wanted: str) -> pl.DataFrame:
    """Columns u, i, r, t of whole numbers, and a, b, c between them."""
    schema = {name: pl.Int8 if name in "abc" else pl.Int64 for name in "uaibrct"}
    columns = [place for place, name in enumerate(schema) if name in wanted]
    return pl.read_csv(path, separator=":", has_header=False, schema=schema, columns=columns, quote_char=None)


def _digits(numbers: pl.Series) -> int:
    """Characters of all numbers as they are written without a sign; of a negative one only 1 is counted."""
    most = len(str(numbers.max()))
    return len(numbers) + sum(int((numbers >= 10**place).sum()) for place in range(1, most))


def _first_bad_rating(path: Path) -> UserError:
    for number, line in enumerate(_lines(path), 1):
        fields = line.split("::")
        if len(fields) != 4 or not all(f.lstrip("-").isdigit() for f in fields):
            return bad_line(path, number, line, "UserID::MovieID::Rating::Timestamp, whole numbers")
    return UserError("the ratings cannot be read", where=str(path), fix="check that the file is whole")


class MovieLens100K:
    """MovieLens-100K, as RecBole's atomic files or in GroupLens' own layout.

    Args:
        root: A folder with u.data or ml-100k.inter, or GroupLens' zip file; None: fetch it from where `source` says.
        source: "recbole" (inside a Python wheel on the package index) or "grouplens" (its own server).
    """

    def __init__(self, *, root: str | None = None, source: str = "recbole") -> None:
        if source not in ("recbole", "grouplens"):
            raise UserError(
                f"data.source: {source} is not possible",
                where="config key data.source",
                fix="use recbole or grouplens",
            )
        self.root, self.source = root, source

    def _atomic(self) -> AtomicFiles | None:
        folder: Path | None = Path(self.root).expanduser() if self.root is not None else None
        if folder is None and self.source == "recbole":
            folder = fetch_wheel(*RECBOLE, RECBOLE_MEMBER) / RECBOLE_MEMBER
        if folder is None or not (folder / "ml-100k.inter").is_file():
            return None
        return AtomicFiles(
            root=str(folder),
            name="ml-100k",
            title="movie_title",
            year="release_year",
            attributes=["class"],
            positive_above=3,
            rating_max=5,
            item_noun="movie",
            article_last=True,
        )

    def _path(self) -> Path:
        return _folder(self.root, ML100K_URL, ML100K_MD5, "u.data")

    def describe(self) -> dict[str, Any]:
        """What identifies the source."""
        atomic = self._atomic()
        if atomic is not None:
            return atomic.describe()
        folder = self._path()
        return {"name": "ml-100k", "files": [stat_of(folder / f) for f in ("u.data", "u.item", "u.user")]}

    def load(self) -> RatingsData:
        """Read the files.

        Raises:
            UserError: A file is missing or a line is malformed.
        """
        atomic = self._atomic()
        return atomic.load() if atomic is not None else self._grouplens(self._path())

    @staticmethod
    def _grouplens(folder: Path) -> RatingsData:
        source = f"get the data from {ML100K_URL}"
        path = need_file(folder / "u.data", "the ratings", source)
        ratings = read_separated(path, "\t", ["user_id", "item_id", "rating", "timestamp"], "user, item, rating, time")
        numbers = ratings.select(pl.col("rating", "timestamp").cast(pl.Int64, strict=False))
        wrong = numbers.select(pl.any_horizontal(pl.all().is_null()).alias("w"))["w"].arg_true()
        if len(wrong):
            row = int(wrong[0])
            raise bad_line(path, row + 1, "\t".join(ratings.row(row)), "whole numbers as rating and time")
        ratings = ratings.with_columns(numbers)
        genres = read_separated(
            need_file(folder / "u.genre", "the genres", source), "|", ["genre", "n"], "genre|number"
        )
        flags = [f"g{i}" for i in range(len(genres))]
        movies = read_separated(
            need_file(folder / "u.item", "the movies", source),
            "|",
            ["item_id", "title", "date", "video", "url", *flags],
            f"{5 + len(flags)} fields split by |",
        )
        title, year = split_title(movies["title"])
        names = genres["genre"].to_list()
        listed = pl.concat_list([pl.when(pl.col(f) == "1").then(pl.lit(g)) for f, g in zip(flags, names, strict=True)])
        items = movies.with_columns(title, year, listed.list.drop_nulls().alias("genres")).select(
            "item_id", "title", "year", "genres"
        )
        users = read_separated(
            need_file(folder / "u.user", "the users", source),
            "|",
            ["user_id", "age", "gender", "occupation", "zip"],
            "user|age|gender|occupation|zip",
        )
        users = users.with_columns(pl.col("gender").replace_strict(GENDERS, default="")).drop("zip")
        return canonical(
            "ml-100k",
            ratings,
            users,
            items,
            item_attributes=["genres"],
            rating_max=5,
            positive_above=3,
            item_noun="movie",
        )
