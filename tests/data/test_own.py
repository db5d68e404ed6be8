"""One's own folder of tables: what it may hold, and what is told of its mistakes."""

from pathlib import Path

import polars as pl
import pytest

from lit_rec.data.own import Folder
from lit_rec.errors import UserError

INTERACTIONS = "user_id,item_id,rating,timestamp\n7,a,4,2024-05-01\n7,b,2,2024-05-01T12:00:00+02:00\n8,a,5,1714521600\n"
ITEMS = 'item_id,title,kind,notes:token_seq\na,"First, the",x,p|q\nb,Second,,\n'
USERS = "user_id,age\n7,24\n8,\n"
DAY = 1714521600  # 2024-05-01


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "shop"
    root.mkdir()
    for name, text in (("interactions", INTERACTIONS), ("items", ITEMS), ("users", USERS)):
        (root / f"{name}.csv").write_text(text)
    return root


def read(folder: Path, **options: object) -> Folder:
    return Folder(root=str(folder), separator="|", **options)


def test_csv(folder: Path) -> None:
    data = read(folder, item_noun="tea", rating_max=5).load()
    assert (data.name, data.item_noun, data.item_attributes) == ("shop", "tea", ("kind", "notes"))
    assert data.interactions.rows() == [(0, 1, 4, DAY), (0, 2, 2, DAY + 10 * 3600), (1, 1, 5, DAY)]
    assert data.items["title"].to_list() == ["", "First, the", "Second"]
    assert data.items["notes"].to_list() == [[], ["p", "q"], []]
    assert data.users.rows() == [("7", "24"), ("8", "")]


def test_parquet_and_atomic_files_say_the_same(folder: Path, tmp_path: Path) -> None:
    wanted = read(folder).load()
    table = pl.read_csv(folder / "interactions.csv").drop("timestamp")
    (tmp_path / "atomic").mkdir()
    tabs = "user_id:token\titem_id:token\trating:float\n" + "".join(f"{u}\t{i}\t{r}\n" for u, i, r in table.rows())
    (tmp_path / "atomic/beer.inter").write_text(tabs)
    found = Folder(root=str(tmp_path / "atomic"), timestamp=None).load()
    assert found.name == "atomic"
    columns = ["user", "item", "rating"]
    assert found.interactions.select(columns).equals(wanted.interactions.select(columns))
    (tmp_path / "parquet").mkdir()
    stamped = table.with_columns(timestamp=pl.datetime(2024, 5, 1))
    stamped.write_parquet(tmp_path / "parquet/interactions.parquet")
    found = Folder(root=str(tmp_path / "parquet"), name="mine").load()
    assert (found.name, found.items["title"].to_list()) == ("mine", ["", "a", "b"])  # without items, ids are titles
    assert found.interactions.select(columns).equals(wanted.interactions.select(columns))
    assert set(found.interactions["timestamp"]) == {DAY}


@pytest.mark.parametrize(
    ("table", "line", "words"),
    [
        ("interactions", "8,b,good,0", ["interactions.csv:5", "'good'", "a number as rating"]),
        ("interactions", "8,b,3,May", ["interactions.csv:5", "'May'", "2024-05-31"]),
        ("interactions", "8,c,3,0", ["interactions.csv:5", "item 'c' is not in items.csv"]),
        ("interactions", ",b,3,0", ["interactions.csv:5", "a user, an item"]),
        ("items", "a,Again,,", ["items.csv:4", "item_id 'a' is described twice"]),
        ("users", "8,1", ["users.csv:4", "user_id '8' is described twice"]),
    ],
)
def test_what_is_wrong_is_told_with_its_line(folder: Path, table: str, line: str, words: list[str]) -> None:
    with (folder / f"{table}.csv").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError) as caught:
        read(folder).load()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_folder_without_interactions_or_with_two(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no interactions in .*none"):
        read(tmp_path / "none").load()
    (folder / "shop.inter").write_text("user_id:token\titem_id:token\n")
    with pytest.raises(UserError, match=r"interactions.csv and shop.inter are both the interactions"):
        read(folder).load()
    (folder / "shop.inter").unlink()
    (folder / "interactions.csv").rename(folder / "sales.csv")
    with pytest.raises(UserError, match="it holds items.csv, sales.csv, users.csv"):
        read(folder).load()


def test_where_something_is_said(folder: Path) -> None:
    found = read(folder)
    assert found.find("item", {"item_id": "b"}) == f"{folder}/items.csv:3"
    assert found.find("inter", {"user_id": "8", "item_id": "a"}) == f"{folder}/interactions.csv:4"
    assert found.find("inter", {"item_id": "a"}, 1) == f"{folder}/interactions.csv:4"
    assert found.find("inter", {"item_id": "a"}, 2) == ""
