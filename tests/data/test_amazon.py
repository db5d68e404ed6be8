import gzip
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from omegaconf import OmegaConf

from lit_rec.config import configs_dir, instantiate
from lit_rec.data import amazon
from lit_rec.data.amazon import AmazonBooks2018, AmazonVideoGames2018, core
from lit_rec.data.session_cuts import SessionsOf
from lit_rec.errors import UserError


def review(user: str, item: str, rating: float = 5.0, time: int = 1) -> dict:
    return {
        "overall": rating,
        "verified": True,
        "reviewTime": "01 1, 2010",
        "reviewerID": user,
        "asin": item,
        "style": {"Format:": " Kindle Edition"},
        "reviewText": 'Fine:\n"a"',
        "unixReviewTime": time,
    }


def book(item: str, title: str, brand: str = "Visit Amazon's Jane Doe Page", category: tuple = ()) -> dict:
    return {"category": list(category), "description": [], "title": title, "brand": brand, "asin": item}


def write(folder: Path, reviews: list[dict], books: list[dict], stem: str = "Books") -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in ((f"{stem}_5.json.gz", reviews), (f"meta_{stem}.json.gz", books)):
        with gzip.open(folder / name, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


pytestmark = pytest.mark.filterwarnings("ignore:.*have no title")
REVIEWS = [
    review(u, i, r, t)
    for t, (u, i, r) in enumerate(
        [("U2", "B", 4.0), ("U1", "A", 5.0), ("U2", "A", 3.0), ("U1", "B", 1.0), ("U1", "C", 5.0)], 100
    )
]
BOOKS = [
    book("Z", "not rated"),
    book("A", "War &amp; Peace", category=("Books", "Literature &amp; Fiction", "Classics")),
    book("A", "a second line for the same book"),
    book("B", "Emma", brand="", category=("Books",)),
]
DUNE = book("C", "Dune", brand="V. Hugo &amp; Sons")


def load(folder: Path, **cores: int):
    return AmazonBooks2018(root=str(folder), **({"user_core": 1, "item_core": 1} | cores)).load()


def test_reads_reviews_and_books(tmp_path):
    data = load(write(tmp_path, REVIEWS, BOOKS))
    assert (data.n_users, data.n_items, data.positive_above, data.item_noun) == (2, 2, 4, "book")
    assert data.users["user_id"].to_list() == ["U2", "U1"]
    assert data.items["item_id"].to_list() == ["", "A", "B"]
    assert data.items["title"].to_list() == ["", "War & Peace", "Emma"]
    assert data.items["category"].to_list() == [[], ["Literature & Fiction"], []]
    assert data.items["brand"].to_list() == [[], ["Visit Amazon's Jane Doe Page"], []]
    assert data.interactions.rows() == [(0, 2, 4, 100), (1, 1, 5, 101), (0, 1, 3, 102), (1, 2, 1, 103)]


@pytest.mark.parametrize(
    "rows", [[], [book("C", "")], [book("C", "var aPageStart = (new Date()).getTime();")], [{"asin": "C"}]]
)
def test_books_without_a_title_are_left_out_with_a_warning(tmp_path, rows):
    with pytest.warns(UserWarning, match="1 books have no title"):
        data = load(write(tmp_path, REVIEWS, [*BOOKS, *rows]))
    assert "C" not in data.items["item_id"].to_list()


def test_the_filter_is_applied_again_to_what_has_a_title(tmp_path):
    assert load(write(tmp_path, REVIEWS, [*BOOKS, DUNE]), user_core=2).n_items == 3
    assert load(tmp_path, user_core=3).users.rows() == [("U1",)]
    write(tmp_path, REVIEWS, BOOKS)
    with pytest.warns(UserWarning, match="no title"), pytest.raises(UserError, match="no users with 3 reviews"):
        load(tmp_path, user_core=3)


def test_only_descriptions_of_books_that_are_left_are_parsed(tmp_path, monkeypatch):
    parsed = []
    monkeypatch.setattr(amazon.json, "loads", lambda s, _loads=json.loads: parsed.append(s) or _loads(s))
    load(write(tmp_path, REVIEWS, [*BOOKS, DUNE]), user_core=2, item_core=2)
    assert len(parsed) == len(REVIEWS) + 3  # A, A again, B; not Z, without a review, nor C, with one


def test_of_several_reviews_the_latest_counts(tmp_path):
    again = [*REVIEWS, review("U1", "A", 2.0, 999), review("U2", "B", 1.0, 1)]
    rows = load(write(tmp_path, again, BOOKS)).interactions.rows()
    assert len(rows) == 4
    assert {(0, 2, 4, 100), (1, 1, 2, 999)} <= set(rows)


def brute_core(rows: list[tuple], users: int, items: int) -> list[tuple]:
    while True:
        kept = [
            r for r in rows if sum(q[0] == r[0] for q in rows) >= users and sum(q[1] == r[1] for q in rows) >= items
        ]
        if kept == rows:
            return rows
        rows = kept


@pytest.mark.parametrize("seed", range(5))
def test_core_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    rows = list(zip(rng.integers(12, size=90).tolist(), rng.geometric(0.2, size=90).tolist(), strict=True))
    table = pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row")
    assert core(table, user_core=5, item_core=4).rows() == brute_core(rows, 5, 4)


def test_an_empty_core_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no users with 4 reviews"):
        load(write(tmp_path, REVIEWS, BOOKS), user_core=4)


@pytest.mark.parametrize(
    "line",
    [
        '{"overall": 5.0,',
        "",
        "[]",
        '{"reviewerID": "U", "asin": "A", "overall": 5.0}',
        '{"reviewerID": "U", "asin": "A", "overall": "five", "unixReviewTime": 1}',
    ],
)
def test_a_malformed_line_is_named(tmp_path, line):
    write(tmp_path, REVIEWS, BOOKS)
    lines = [json.dumps(r) for r in REVIEWS]
    lines.insert(3, line)
    with gzip.open(tmp_path / "Books_5.json.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert error.value.where == f"{tmp_path / 'Books_5.json.gz'}:4"
    assert repr(line) in error.value.what


@pytest.mark.parametrize(
    "line", ['{"title": "no id"}', '{"asin": "A", "title": ["War"]}', '{"asin": "A", "category": 3}', "{", '"A"', ""]
)
def test_a_malformed_description_is_named(tmp_path, line):
    write(tmp_path, REVIEWS, BOOKS)
    with gzip.open(tmp_path / "meta_Books.json.gz", "at") as file:
        file.write(line + "\n")
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert error.value.where == f"{tmp_path / 'meta_Books.json.gz'}:5"


@pytest.mark.parametrize("spoil", [lambda b: b[:-12], lambda b: b"not gzip at all", lambda b: b[:30] + b"xx" + b[32:]])
def test_a_broken_gzip_file_is_an_error(tmp_path, spoil):
    path = write(tmp_path, REVIEWS, BOOKS) / "Books_5.json.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match="not a whole gzip file|malformed line"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["Books_5.json.gz", "meta_Books.json.gz"])
def test_a_missing_file_is_named(tmp_path, name):
    (write(tmp_path, REVIEWS, BOOKS) / name).unlink()
    with pytest.raises(UserError, match=name) as error:
        load(tmp_path)
    assert "Amazon review data 2018" in error.value.fix


def test_describe_identifies_the_source(tmp_path):
    reader = AmazonBooks2018(root=str(write(tmp_path, REVIEWS, BOOKS)))
    described = json.loads(json.dumps(reader.describe()))
    assert described["user_core"] == 60
    assert [f["file"] for f in described["files"]] == ["Books_5.json.gz", "meta_Books.json.gz"]


GAMES = [
    book(
        "A", "Journey", brand="Sony", category=("Video Games", "PlayStation 4", "Games", "</span></span>", "Long text")
    ),
    book("B", "Headset", brand="", category=("Video Games", "<span>", "PC")),
    book("C", "Doom", brand="id &amp; co", category=("Video Games", "PC")),
]


def test_video_games(tmp_path):
    folder = write(tmp_path, REVIEWS, GAMES, "Video_Games")
    data = AmazonVideoGames2018(root=str(folder), user_core=1, item_core=1).load()
    assert (data.name, data.item_noun, data.n_users, data.n_items) == ("amazon-games", "video game", 2, 3)
    assert data.item_attributes == ("brand", "category")
    assert data.items["category"].to_list() == [[], ["PlayStation 4", "Games"], ["PC"], ["PC"]]
    assert data.items["brand"].to_list() == [[], ["Sony"], [], ["id & co"]]
    with pytest.raises(UserError, match="no users with 5 reviews of video games"):
        AmazonVideoGames2018(root=str(folder)).load()
    with pytest.raises(UserError, match="Books_5"):
        AmazonBooks2018(root=str(folder)).load()
    assert AmazonVideoGames2018(root=str(folder)).describe()["name"] == "amazon-games"


def test_the_config_of_games_sessions(tmp_path):
    cfg = OmegaConf.load(configs_dir() / "data" / "amazon_games_sessions.yaml")
    cfg.reader.root = str(write(tmp_path, REVIEWS, GAMES, "Video_Games"))
    cfg.reader.user_core = cfg.reader.item_core = 1
    made = instantiate(cfg, "data")
    assert isinstance(made, SessionsOf)
    assert (made.verb, made.min_length, made.candidates) == ("purchased", 4, 50)
    assert made.reader.load().n_items == 3
