"""Whatever a data file holds, a reader reads it right or says what is wrong with it."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rec.data.amazon import AmazonBooks2018
from lit_rec.data.atomic import AtomicFiles
from lit_rec.data.canonical import RatingsData
from lit_rec.data.movielens import MovieLens1M, MovieLens100K
from lit_rec.data.session_files import SessionFiles, TitleFile
from tests.fuzz.cases import FEW, amounts, cases, spoiled, told

ML1M = {
    "ratings.dat": "1::20::5::978300760\n1::10::3::978302109\n2::20::1::978298413\n",
    "movies.dat": "10::Shawshank Redemption, The (1994)::Drama\n20::Cité, La (1995)::Adventure|Sci-Fi\n",
    "users.dat": "1::F::1::10::48067\n2::M::56::16::70072\n",
}
ML100K = {
    "u.data": "2\t1\t3\t881250949\n1\t2\t5\t891717742\n",
    "u.item": "1|Toy Story (1995)|01-Jan-1995||http://x/?T%20(1995)|0|1\n2|Les (1995)|1||http://x|0|1\n",
    "u.genre": "unknown|0\nAnimation|1\n\n",
    "u.user": "1|24|M|technician|85711\n2|53|F|other|94043\n",
}
ATOMIC = {
    "s.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "a\tx\t4\t1000\nb\ty\t2.5\t1001\na\ty\t5\t7\n",
    "s.item": "item_id:token\ttitle:token\tyear:token\tgenres:token_seq\nx\tX, The\t1999\tdrama war\ny\tY\t\t\n",
    "s.user": "user_id:token\tage:token\tgender:token\na\t20\tF\nb\t\tM\n",
}
CSV = {
    "s.csv": 'user_id,item_id,rating,timestamp\na,x,4,1000\nb,"y, z",2.5,1001\n',
    "s.item.csv": 'item_id,title,year,genres:token_seq\nx,"X ""1""",1999,drama war\n"y, z",Y,,\n',
}
REVIEWS = [
    {"reviewerID": u, "asin": i, "overall": r, "unixReviewTime": t}
    for t, (u, i, r) in enumerate([("U2", "B", 4.0), ("U1", "A", 5.0), ("U2", "A", 3.0), ("U1", "B", 1.0)], 100)
]
BOOKS = [
    {"asin": "A", "title": "War &amp; Peace", "brand": "T", "category": ["Books", "Classics"]},
    {"asin": "B", "title": "Emma", "brand": "", "category": ["Books"]},
]
SESSIONS = [{"session": [1, 2], "target": n, "candidates": [n, 3, 4]} for n in (5, 6, 7, 8)]
TITLES = {str(n): f"T{n}" for n in range(1, 9)}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def check(data: RatingsData) -> None:
    """What every data set that was read has to be."""
    table = data.interactions
    assert table.null_count().row(0) == (0,) * 4
    assert len(table) > 0
    assert table["user"].is_between(0, data.n_users - 1).all()
    assert table["item"].is_between(1, data.n_items).all()
    assert np.isfinite(table["rating"].to_numpy()).all()
    assert data.users["user_id"].is_unique().all()
    assert data.items["item_id"].is_unique().all()
    assert data.items.select("title", *data.item_attributes).null_count().sum_horizontal().item() == 0
    assert np.isfinite(data.rating_max)


def fuzz(folder: Path, files: dict[str, str], load: Callable[[], RatingsData], many: int, encoding: str) -> None:
    """Spoil one file after the other; some of many cases can still be read, others cannot."""
    for name, text in files.items():
        (folder / name).write_bytes(text.encode(encoding))
    check(load())
    read = 0

    def put(name: str, content: bytes) -> None:
        (folder / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)

    @cases(many)
    @given(st.one_of(*(st.tuples(st.just(name), spoiled(text.encode(encoding))) for name, text in files.items())))
    def holds(case: tuple[str, bytes]) -> None:
        nonlocal read
        name, content = case
        put(name, content)
        data = told(load)
        put(name, files[name].encode(encoding))
        if data is not None:
            check(data)
            read += 1

    holds()
    assert read < many
    assert read > 0 or many == FEW


@amounts(1500)
def test_movielens_1m(tmp_path: Path, many: int) -> None:
    load = MovieLens1M(root=str(tmp_path)).load
    fuzz(tmp_path, ML1M, load, many, "latin-1")


@amounts(1500)
def test_movielens_1m_ratings_are_those_of_the_lines(tmp_path: Path, many: int) -> None:
    """What was read equals what a slow parser of one line reads."""
    for name, text in ML1M.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    reader = MovieLens1M(root=str(tmp_path))

    @cases(many)
    @given(spoiled(ML1M["ratings.dat"].encode()))
    def holds(content: bytes) -> None:
        (tmp_path / "ratings.dat").write_bytes(content)
        if (data := told(reader.load)) is None:
            return
        rows = [line.removesuffix("\r") for line in content.decode("latin-1").split("\n")]
        number = r"[ \t]*([+-]?\d+)[ \t]*"
        found = [re.fullmatch("::".join([number] * 4), row) for row in rows if row]
        users, items = data.users["user_id"].to_list(), data.items["item_id"].to_list()
        read = [(users[u], items[i], float(r), t) for u, i, r, t in data.interactions.rows()]
        assert read == [(str(int(m[1])), str(int(m[2])), float(m[3]), int(m[4])) for m in found if m is not None]
        assert None not in found

    holds()


@amounts(1500)
def test_movielens_100k(tmp_path: Path, many: int) -> None:
    load = MovieLens100K(root=str(tmp_path)).load
    fuzz(tmp_path, ML100K, load, many, "latin-1")


@amounts(1500)
def test_atomic_files(tmp_path: Path, many: int) -> None:
    load = AtomicFiles(root=str(tmp_path), name="s", title="title", year="year", article_last=True).load
    fuzz(tmp_path, ATOMIC, load, many, "utf-8")


@amounts(1000)
def test_csv_files(tmp_path: Path, many: int) -> None:
    load = AtomicFiles(root=str(tmp_path), name="s", title="title", year="year").load
    fuzz(tmp_path, CSV, load, many, "utf-8")


@pytest.mark.filterwarnings("ignore:.*have no title")
@amounts(1000)
def test_amazon_reviews(tmp_path: Path, many: int) -> None:
    files = {"Books_5.json.gz": lines(REVIEWS), "meta_Books.json.gz": lines(BOOKS)}
    for name, text in files.items():
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    load = AmazonBooks2018(root=str(tmp_path), user_core=1, item_core=1).load
    check(load())
    whole = {name: (tmp_path / name).read_bytes() for name in files}

    @cases(many)
    @given(
        st.one_of(
            *(st.tuples(st.just(n), spoiled(t.encode()).map(lambda c: gzip.compress(c, 1))) for n, t in files.items()),
            *(st.tuples(st.just(n), spoiled(b)) for n, b in whole.items()),
        )
    )
    def holds(case: tuple[str, bytes]) -> None:
        (tmp_path / case[0]).write_bytes(case[1])
        data = told(load)
        (tmp_path / case[0]).write_bytes(whole[case[0]])
        if data is not None:
            check(data)

    holds()


@pytest.mark.filterwarnings("ignore:sessions of")
@amounts(1000)
def test_session_files(tmp_path: Path, many: int) -> None:
    whole = {
        "titles.json": json.dumps(TITLES).encode(),
        "train.jsonl": lines(SESSIONS).encode(),
        "test.jsonl": lines([{"session": [5], "target": 6, "candidates": [6, 7, 8]}]).encode(),
    }
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)

    def load(on_bad: str) -> Any:
        items = TitleFile(path=str(tmp_path / "titles.json"))
        return SessionFiles(root=str(tmp_path), items=items, validation=1, on_bad=on_bad).load()

    @cases(many)
    @given(
        st.sampled_from(["refuse", "skip"]),
        st.one_of(*(st.tuples(st.just(name), spoiled(content)) for name, content in whole.items())),
    )
    def holds(on_bad: str, case: tuple[str, bytes]) -> None:
        (tmp_path / case[0]).write_bytes(case[1])
        data = told(lambda: load(on_bad))
        (tmp_path / case[0]).write_bytes(whole[case[0]])
        if data is not None:
            assert (data.lists.labels.sum(1) == 1).all()  # every session has its one target among the candidates
            assert ((data.lists.items > 0).sum(1) >= 2).all()
            assert (data.lists.history_items[:, 0] > 0).all()
            assert int(data.lists.items.max()) < len(data.items)

    holds()
