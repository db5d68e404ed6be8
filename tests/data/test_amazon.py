import gzip
import json
from pathlib import Path

import polars as pl
import pytest

from lit_rec.data import amazon
from lit_rec.data.amazon import AmazonBooks2018, core
from lit_rec.errors import UserError


def review(user: str, item: str, rating: float = 5.0, time: int = 1) -> dict:
    return {
        "overall": rating,
        "verified": True,
        "reviewTime": "01 1, 2010",
        "reviewerID": user,
        "asin": item,
        "style": {"Format:": " Kindle Edition"},
        "reviewText": "Fine:\n\"a\"",
        "unixReviewTime": time,
    }


def book(item: str, title: str, brand: str = "Visit Amazon's Jane Doe Page", category: tuple = ()) -> dict:
    return {"category": list(category), "description": [], "title": title, "brand": brand, "asin": item}


def write(folder: Path, reviews: list[dict], books: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in (("Books_5.json.gz", reviews), ("meta_Books.json.gz", books)):
        with gzip.open(folder / name, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


REVIEWS = [review(u, i, r, t) for t, (u, i, r) in enumerate(
    [("U2", "B", 4.0), ("U1", "A", 5.0), ("U2", "A", 3.0), ("U1", "B", 1.0), ("U1", "C", 5.0)], 100
)]
BOOKS = [
    book("Z", "not rated"),
    book("A", "War &amp; Peace", category=("Books", "Literature &amp; Fiction", "Classics")),
    book("A", "a second line for the same book"),
    book("B", "var aPageStart = (new Date()).getTime();", brand="", category=("Books",)),
]


def load(folder: Path, **cores: int):
    return AmazonBooks2018(root=str(folder), **({"user_core": 1, "item_core": 1} | cores)).load()


def test_reads_reviews_and_books(tmp_path):
    data = load(write(tmp_path, REVIEWS, BOOKS))
    assert (data.n_users, data.n_items, data.positive_above, data.item_noun) == (2, 3, 4, "book")
    assert data.users["user_id"].to_list() == ["U2", "U1"]
    assert data.items["item_id"].to_list() == ["", "B", "A", "C"]
    assert data.items["title"].to_list() == ["", "", "War & Peace", ""]  # page script and no metadata: no title
    assert data.items["category"].to_list() == [[], [], ["Literature & Fiction"], []]
    assert data.items["brand"].to_list() == [[], [], ["Visit Amazon's Jane Doe Page"], []]
    assert data.interactions.rows() == [(0, 1, 4, 100), (1, 2, 5, 101), (0, 2, 3, 102), (1, 1, 1, 103), (1, 3, 5, 104)]


@pytest.mark.parametrize("block", [1, 300, 1 << 20])
def test_the_block_size_changes_nothing(tmp_path, monkeypatch, block):
    write(tmp_path, REVIEWS, BOOKS)
    expected = load(tmp_path)
    monkeypatch.setattr(amazon.read_json_lines, "__kwdefaults__", {"block": block})
    found = load(tmp_path)
    assert found.interactions.equals(expected.interactions)
    assert found.items.equals(expected.items)


def test_a_review_that_is_there_twice_counts_once(tmp_path):
    again = [*REVIEWS, REVIEWS[1], review("U1", "A", 5.0, 999)]
    assert len(load(write(tmp_path, again, BOOKS)).interactions) == len(REVIEWS) + 1


def brute_core(rows: list[tuple], users: int, items: int) -> list[tuple]:
    while True:
        kept = [
            r for r in rows
            if sum(q[0] == r[0] for q in rows) >= users and sum(q[1] == r[1] for q in rows) >= items
        ]
        if kept == rows:
            return rows
        rows = kept


@pytest.mark.parametrize("seed", range(5))
def test_core_against_brute_force(seed):
    import numpy as np

    rng = np.random.default_rng(seed)
    rows = list(zip(rng.integers(12, size=90).tolist(), rng.geometric(0.2, size=90).tolist(), strict=True))
    table = pl.DataFrame(rows, schema=["user", "item"], orient="row")
    assert core(table, user_core=5, item_core=4).rows() == brute_core(rows, 5, 4)


def test_an_empty_core_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no rating is left of 5"):
        load(write(tmp_path, REVIEWS, BOOKS), user_core=4)


@pytest.mark.parametrize(
    "line",
    ['{"overall": 5.0,', "", "[]", '{"reviewerID": "U", "asin": "A", "overall": 5.0}',
     '{"reviewerID": "U", "asin": "A", "overall": "five", "unixReviewTime": 1}'],
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


def test_line_numbers_count_over_blocks(tmp_path, monkeypatch):
    write(tmp_path, REVIEWS, [*BOOKS, {"title": "no id"}])
    monkeypatch.setattr(amazon.read_json_lines, "__kwdefaults__", {"block": 1})
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
    assert "amazon" in error.value.fix


def test_describe_identifies_the_source(tmp_path):
    reader = AmazonBooks2018(root=str(write(tmp_path, REVIEWS, BOOKS)))
    described = json.loads(json.dumps(reader.describe()))
    assert described["user_core"] == 60
    assert [f["file"] for f in described["files"]] == ["Books_5.json.gz", "meta_Books.json.gz"]
