import json
import os
import zipfile
from pathlib import Path

import polars as pl
import pytest

from lit_rec.data import movielens
from lit_rec.data.canonical import canonical, natural_title, sample_users, split_title
from lit_rec.data.lists import build_lists
from lit_rec.data.movielens import MovieLens1M, MovieLens100K
from lit_rec.errors import UserError

ML1M = {
    "ratings.dat": "1::20::5::978300760\n1::10::3::978302109\n2::20::1::978298413\n",
    "movies.dat": "10::Shawshank Redemption, The (1994)::Drama\n"
    "15::Never Rated (1990)::Comedy\n"
    "20::Cité des enfants perdus, La (1995)::Adventure|Sci-Fi\n",
    "users.dat": "1::F::1::10::48067\n2::M::56::16::70072\n3::M::25::15::55117\n",
}
ML100K = {
    "u.data": "2\t1\t3\t881250949\n1\t2\t5\t891717742\n",
    "u.item": "1|Toy Story (1995)|01-Jan-1995||http://x/?T%20(1995)|0|1|0\n"
    "2|Misérables, Les (1995)|01-Jan-1995||http://x|0|1|1\n",
    "u.genre": "unknown|0\nAnimation|1\nDrama|2\n\n",
    "u.user": "1|24|M|technician|85711\n2|53|F|other|94043\n",
}


def write(folder: Path, files: dict[str, str], **changed: str) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for name, text in files.items():
        (folder / name).write_bytes(changed.get(name.split(".")[0], text).encode("latin-1"))
    return folder


def read1m(folder: Path):
    return MovieLens1M(root=str(folder)).load()


def test_1m(tmp_path):
    data = read1m(write(tmp_path, ML1M))
    assert (data.name, data.n_users, data.n_items) == ("ml-1m", 2, 2)  # one movie and one user have no rating
    assert (data.rating_max, data.positive_above, data.item_noun) == (5, 3, "movie")
    assert data.interactions.rows() == [(0, 2, 5, 978300760), (0, 1, 3, 978302109), (1, 2, 1, 978298413)]
    assert data.interactions.dtypes == [pl.Int32, pl.Int32, pl.Float32, pl.Int64]
    assert data.items["title"].to_list() == ["", "The Shawshank Redemption", "La Cité des enfants perdus"]
    assert data.items["year"].to_list() == [None, 1994, 1995]
    assert data.items["genres"].to_list() == [[], ["Drama"], ["Adventure", "Sci-Fi"]]
    assert data.users.rows() == [
        ("1", "female", "under 18", "K-12 student"),
        ("2", "male", "56 or older", "self-employed"),
    ]


def test_1m_from_a_zip_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_REC_CACHE", str(tmp_path / "cache"))
    folder = write(tmp_path / "ml-1m", ML1M)
    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
        for name in ML1M:
            archive.write(folder / name, f"ml-1m/{name}")
    assert read1m(tmp_path / "ml-1m.zip").interactions.equals(read1m(folder).interactions)


def test_a_download_is_checked(tmp_path, monkeypatch):
    calls = []

    def fetch(url, target, *, known_hash):
        calls.append((url, known_hash))
        with zipfile.ZipFile(tmp_path / "got.zip", "w") as archive:
            for name, text in ML1M.items():
                archive.writestr(f"ml-1m/{name}", text.encode("latin-1"))
        return tmp_path / "got.zip"

    monkeypatch.setenv("LIT_REC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(movielens, "fetch_url", fetch)
    assert MovieLens1M().load().n_users == 2
    assert calls == [
        ("https://files.grouplens.org/datasets/movielens/ml-1m.zip", "md5:c4d9eecfca2ab87c1945afe126590906")
    ]


@pytest.mark.parametrize(
    "line",
    [
        "1::20::5",
        "1::20::5::978300760::9",
        "1::20::five::978300760",
        "",
        "1:20:5:978300760",
        "1::20::5:978300760::1",
        "1::::5::978300760",
        "1::2:x:5::978300760",
    ],
)
def test_1m_names_a_malformed_rating(tmp_path, line):
    lines = ML1M["ratings.dat"].splitlines()
    folder = write(tmp_path, ML1M, ratings="\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(UserError) as error:
        read1m(folder)
    assert error.value.where == f"{folder / 'ratings.dat'}:3"
    assert repr(line) in error.value.what


@pytest.mark.parametrize(
    "files",
    [
        {"ratings": ML1M["ratings.dat"].rstrip("\n")},
        {"ratings": ML1M["ratings.dat"].replace("1::20::5", "1::020::5")},
    ],
)
def test_1m_reads_ratings_however_they_end_or_begin(tmp_path, files):
    """A file that is not as long as its numbers is looked at more closely, and is not wrong for that."""
    assert read1m(write(tmp_path / "a", ML1M, **files)).interactions.equals(
        read1m(write(tmp_path / "b", ML1M)).interactions
    )


def test_1m_does_not_set_one_line_off_against_another(tmp_path):
    """As many characters as there should be: a digit stands between two colons, and no line feed at the end."""
    folder = write(tmp_path, ML1M, ratings="1:1:20::5::978300760\n1::10::3::978302109\n2::20::1::978298413")
    with pytest.raises(UserError) as error:
        read1m(folder)
    assert error.value.where == f"{folder / 'ratings.dat'}:1"


def test_1m_says_that_a_file_of_ratings_is_empty(tmp_path):
    folder = write(tmp_path, ML1M, ratings="")
    with pytest.raises(UserError, match="the file of ratings is empty") as error:
        read1m(folder)
    assert error.value.where == str(folder / "ratings.dat")


def test_ids_that_are_numbers_or_text_are_numbered_alike():
    """Whole numbers may be far apart and below zero; rows follow the files that describe users and items."""
    users = pl.DataFrame({"user_id": ["-7", "3", "4000000000"], "gender": ["", "male", ""]})
    items = pl.DataFrame({"item_id": ["10", "20", "30"], "title": ["A", "B", "C"]})
    ratings = pl.DataFrame({"user_id": [4_000_000_000, 3, -7, 5], "item_id": [30, 10, 30, 10]})
    ratings = ratings.with_columns(rating=pl.lit(5), timestamp=pl.lit(1))
    about = {"item_attributes": [], "rating_max": 5, "positive_above": 3, "item_noun": "movie"}
    numbers = canonical("n", ratings, users, items, **about)
    text = canonical("n", ratings.with_columns(pl.col("user_id", "item_id").cast(pl.String)), users, items, **about)
    assert numbers.interactions.rows() == [(2, 2, 5.0, 1), (1, 1, 5.0, 1), (0, 2, 5.0, 1), (3, 1, 5.0, 1)]
    assert numbers.interactions.equals(text.interactions)
    assert numbers.users.equals(text.users)
    with pytest.raises(UserError, match="1 rated items are not described, among them 30"):
        canonical("n", ratings, users, items[:2], **about)


@pytest.mark.parametrize(("file", "bad"), [("movies", "10::Drama"), ("users", "1::F::1")])
def test_1m_names_other_malformed_lines(tmp_path, file, bad):
    text = ML1M[f"{file}.dat"]
    folder = write(tmp_path, ML1M, **{file: text.split("\n")[0] + "\n" + bad + "\n"})
    with pytest.raises(UserError) as error:
        read1m(folder)
    assert error.value.where == f"{folder / file}.dat:2"


def test_only_line_feeds_end_a_line(tmp_path):
    """0x85 is a character in files written on Windows, and a line end to str.splitlines."""
    folder = write(tmp_path, ML1M, movies=ML1M["movies.dat"].replace("Never Rated", "Never\x85 \x1cRated"))
    assert read1m(folder).n_items == 2
    folder = write(tmp_path, ML1M, **{f[:-4]: t.replace("\n", "\r\n") for f, t in ML1M.items() if f != "ratings.dat"})
    assert read1m(folder).items["genres"].to_list()[1] == ["Drama"]


@pytest.mark.parametrize("name", list(ML1M))
def test_1m_names_a_missing_file(tmp_path, name):
    (write(tmp_path, ML1M) / name).unlink()
    with pytest.raises(UserError, match=name) as error:
        read1m(tmp_path)
    assert "grouplens.org" in error.value.fix


def test_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read1m(tmp_path / "nowhere")


def test_ids_must_fit_together(tmp_path):
    with pytest.raises(UserError, match="rated items are not described, among them 10"):
        read1m(write(tmp_path, ML1M, movies=ML1M["movies.dat"].split("\n", 1)[1]))
    with pytest.raises(UserError, match="item_id '10' is described 2 times"):
        read1m(write(tmp_path, ML1M, movies=ML1M["movies.dat"] + "10::Again (1999)::Drama\n"))
    with pytest.raises(UserError, match="user_id '1' is described 2 times"):
        read1m(write(tmp_path, ML1M, users=ML1M["users.dat"] + "1::F::1::10::48067\n"))


def test_100k_in_grouplens_layout(tmp_path):
    data = MovieLens100K(root=str(write(tmp_path, ML100K))).load()
    assert data.interactions.rows() == [(1, 1, 3, 881250949), (0, 2, 5, 891717742)]
    assert data.items["title"].to_list() == ["", "Toy Story", "Les Misérables"]
    assert data.items["genres"].to_list() == [[], ["Animation"], ["Animation", "Drama"]]
    assert data.items["year"].to_list() == [None, 1995, 1995]
    assert data.users.select("user_id", "gender", "age", "occupation").rows() == [
        ("1", "male", "24", "technician"),
        ("2", "female", "53", "other"),
    ]


@pytest.mark.parametrize(
    ("file", "bad", "line"),
    [
        ("genre", "Drama", 4),
        ("data", "2\t1\t3", 3),
        ("data", "2\t1\tx\t881250949", 3),
        ("item", "3|A|B", 3),
        ("user", "3|24", 3),
    ],
)
def test_100k_names_a_malformed_line(tmp_path, file, bad, line):
    write(tmp_path, ML100K)
    path = tmp_path / f"u.{file}"
    path.write_bytes(path.read_bytes() + bad.encode() + b"\n")
    with pytest.raises(UserError) as error:
        MovieLens100K(root=str(tmp_path)).load()
    assert error.value.where == f"{path}:{line}"


@pytest.mark.parametrize("name", list(ML100K))
def test_100k_names_a_missing_file(tmp_path, name):
    (write(tmp_path, ML100K) / name).unlink()
    with pytest.raises(UserError, match=name):
        MovieLens100K(root=str(tmp_path)).load()


def test_100k_takes_atomic_files_too(tmp_path):
    files = {
        "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n",
        "ml-100k.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "242\tMatrix, The\t1999\tAction Sci-Fi\n",
        "ml-100k.user": "user_id:token\tage:token\tgender:token\n196\t49\tF\n",
    }
    data = MovieLens100K(root=str(write(tmp_path, files))).load()
    assert data.items.select("title", "year", "class").row(1) == ("The Matrix", 1999, ["Action", "Sci-Fi"])
    assert data.users["gender"].to_list() == ["female"]


def test_100k_source_must_exist():
    with pytest.raises(UserError, match="kaggle"):
        MovieLens100K(source="kaggle")


@pytest.mark.parametrize("reader", ["1m", "100k"])
def test_describe_is_plain_and_names_the_files(tmp_path, reader):
    folder = write(tmp_path, ML1M if reader == "1m" else ML100K)
    made = (MovieLens1M if reader == "1m" else MovieLens100K)(root=str(folder)).describe()
    assert json.loads(json.dumps(made)) == made
    assert made["name"] == f"ml-{reader}"
    assert all(f["bytes"] for f in made["files"])


def test_describe_tells_files_of_one_size_apart(tmp_path):
    folder = write(tmp_path, ML1M)
    made = MovieLens1M(root=str(folder)).describe()
    path = folder / "ratings.dat"
    found, lines = path.stat(), path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(reversed(lines)))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert path.stat().st_size == found.st_size
    assert MovieLens1M(root=str(folder)).describe()["files"][1:] == made["files"][1:]
    assert MovieLens1M(root=str(folder)).describe()["files"][0] != made["files"][0]


@pytest.mark.parametrize(
    ("written", "natural"),
    [
        ("Matrix, The", "The Matrix"),
        ("Heat", "Heat"),
        ("L.A. Confidential", "L.A. Confidential"),
        ("Affair of Love, An", "An Affair of Love"),
        ("Good, the Bad and the Ugly, The", "The Good, the Bad and the Ugly"),
        ("Eau froide, L'", "L'Eau froide"),
        ("Crying, Laughing", "Crying, Laughing"),
        ("Tin Drum, The (Blechtrommel, Die)", "The Tin Drum (Die Blechtrommel)"),
        ("Hate (Haine, La)", "Hate (La Haine)"),
        ("Slingshot, The (Kådisbellan )", "The Slingshot (Kådisbellan )"),
        ("Wonderful, Horrible Life, The (Die Macht)", "The Wonderful, Horrible Life (Die Macht)"),
        ("", ""),
    ],
)
def test_natural_title(written, natural):
    assert natural_title(written) == natural
    assert natural_title(natural) == natural


def test_titles_and_years():
    titles = ["2001: A Space Odyssey (1968)", "1984", "Associate, The (L'Associe)(1982)", "Tom (1995) (V)", "M (1931) "]
    title, year = split_title(pl.Series(titles))
    assert title.to_list() == ["2001: A Space Odyssey", "1984", "The Associate (L'Associe)", "Tom", "M"]
    assert year.to_list() == [1968, None, 1982, 1995, 1931]


@pytest.mark.shared_data
def test_the_real_1m(shared_data):
    data = MovieLens1M(root=str(shared_data / "ml-1m")).load()
    assert (data.n_users, data.n_items, len(data.interactions)) == (6040, 3706, 1_000_209)
    assert not (data.items["title"][1:] == "").any()
    assert data.items["year"][1:].null_count() == 0
    assert not (data.users.select("gender", "age") == "").to_numpy().any()
    titles = set(data.items["title"].to_list())
    assert {"The Shawshank Redemption", "The Matrix", "The Tin Drum (Die Blechtrommel)", "Les Misérables"} <= titles
    assert not [t for t in titles if t.endswith((", The", ", A", ", An")) or ", The (" in t]
    kar = build_lists(data, protocol="kar")
    assert kar.report["lists"] == 213_092
    assert kar.report["users_without_a_list"] == 0
    assert build_lists(data).report["repeated_interactions_dropped"] == 0
    assert bool((kar.items > 0).all())
    few = sample_users(data, 100, seed=1)
    assert (few.n_users, few.n_items) == (100, 3706)
    strict = build_lists(few)
    assert strict.report["lists"] + strict.report["lists_without_positive_dropped"] > 1000


@pytest.mark.registry
def test_the_real_100k_from_the_package_index(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_REC_CACHE", str(tmp_path))
    data = MovieLens100K().load()
    assert (data.n_users, data.n_items, len(data.interactions)) == (943, 1682, 100_000)
    assert data.item_attributes == ("class",)
    assert "The Godfather" in data.items["title"].to_list()
    assert set(data.users["gender"].to_list()) == {"male", "female"}
