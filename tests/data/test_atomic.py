import json
from pathlib import Path

import polars as pl
import pytest

from lit_rec.data.atomic import AtomicFiles, read_atomic
from lit_rec.errors import UserError

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\ta\t4\t30\n7\tb\t2\t10\n8\ta\t5\t20\n"
ITEM = (
    "item_id:token\tname:token_seq\tkind:token\ttags:token_seq\tv:float_seq\n"
    "a\tThe First\tx\tp q\t0.5 1\nb\tMatrix\t\t\t\nc\tUnrated\ty\tp\t2\n"
)
USER = "user_id:token\tage:token\tgender:token\n7\t24\tM\n8\t\tF\n"


def write(folder: Path, inter: str = INTER, item: str | None = ITEM, user: str | None = USER) -> Path:
    for kind, text in (("inter", inter), ("item", item), ("user", user)):
        if text is not None:
            (folder / f"shop.{kind}").write_text(text, encoding="utf-8")
    return folder


def load(folder: Path, **options):
    return AtomicFiles(root=str(folder), name="shop", **options).load()


def test_all_three_files(tmp_path):
    data = load(write(tmp_path), title="name", attributes=["kind", "tags"], positive_above=3, item_noun="thing")
    assert (data.name, data.n_users, data.n_items, data.rating_max, data.item_noun) == ("shop", 2, 2, 5, "thing")
    assert data.interactions.rows() == [(0, 1, 4, 30), (0, 2, 2, 10), (1, 1, 5, 20)]
    assert data.items["title"].to_list() == ["", "The First", "Matrix"]
    assert data.items["kind"].to_list() == [[], ["x"], []]
    assert data.items["tags"].to_list() == [[], ["p", "q"], []]
    assert data.item_attributes == ("kind", "tags")
    assert data.users.rows() == [("7", "24", "male"), ("8", "", "female")]


def test_interactions_alone(tmp_path):
    inter = "user_id:token\titem_id:token\n7\ta\n7\tb\n8\ta\n"
    data = load(write(tmp_path, inter, None, None), rating=None, timestamp=None)
    assert data.interactions["rating"].to_list() == [4, 4, 4]
    assert data.interactions["timestamp"].to_list() == [0, 1, 2]
    assert data.items["title"].to_list() == ["", "a", "b"]
    assert data.users["user_id"].to_list() == ["7", "8"]


def test_other_column_names(tmp_path):
    inter = INTER.replace("user_id", "who").replace("item_id", "what").replace("rating", "stars")
    data = load(write(tmp_path, inter, None, None), user="who", item="what", rating="stars")
    assert data.interactions["rating"].to_list() == [4, 2, 5]


def test_types(tmp_path):
    table = read_atomic(write(tmp_path) / "shop.item")
    assert table.schema == {
        "item_id": pl.String,
        "name": pl.List(pl.String),
        "kind": pl.String,
        "tags": pl.List(pl.String),
        "v": pl.List(pl.Float64),
    }
    assert table["v"].to_list() == [[0.5, 1.0], [], [2.0]]


@pytest.mark.parametrize(
    ("kind", "text", "line"),
    [
        ("inter", INTER + "9\ta\t4\n", 5),
        ("inter", INTER + "9\ta\tgood\t4\n", 5),
        ("inter", INTER + "9\ta\t\t4\n", 5),
        ("inter", INTER + "9\ta\tnan\t4\n", 5),
        ("inter", INTER + "9\ta\t4\tinf\n", 5),
        ("inter", INTER.replace("rating:float", "rating"), 1),
        ("inter", INTER.replace("rating:float", "rating:double"), 1),
        ("inter", "", 1),
        ("item", ITEM + "d\tD\tx\tp\tone 2\n", 5),
        ("item", ITEM + "d\tD\n", 5),
        ("user", USER + "9\n", 4),
    ],
)
def test_a_malformed_line_is_named(tmp_path, kind, text, line):
    with pytest.raises(UserError) as error:
        load(write(tmp_path, **{kind: text}))
    assert error.value.where == f"{tmp_path / 'shop'}.{kind}:{line}"


def test_ids_must_be_tokens(tmp_path):
    with pytest.raises(UserError, match="'user_id' is not a token column") as error:
        load(write(tmp_path, INTER.replace("user_id:token", "user_id:float"), user=None))
    assert error.value.where == f"{tmp_path / 'shop.inter'}:1"


def test_attributes_may_be_numbers(tmp_path):
    data = load(write(tmp_path), attributes=["v"])
    assert data.items["v"].to_list() == [[], ["0.5", "1.0"], []]


def test_year_and_article(tmp_path):
    item = "item_id:token\tname:token_seq\tyear:float\na\tMatrix, The\t1999\nb\tÉté\t\n"
    data = load(write(tmp_path, item=item), title="name", year="year", article_last=True)
    assert data.items["title"].to_list() == ["", "The Matrix", "Été"]
    assert data.items["year"].to_list() == [None, 1999, None]
    assert data.item_attributes == ()


def test_windows_line_ends(tmp_path):
    assert len(load(write(tmp_path, INTER.replace("\n", "\r\n").rstrip())).interactions) == 3


def test_users_who_are_not_described_come_last(tmp_path):
    data = load(write(tmp_path, user="user_id:token\tgender:token\n8\tF\n"))
    assert data.users.rows() == [("8", "female"), ("7", "")]


def test_no_interaction_is_an_error(tmp_path):
    with pytest.raises(UserError, match="shop holds no rating"):
        load(write(tmp_path, INTER.split("\n")[0] + "\n"))


@pytest.mark.parametrize("key", ["title", "year", "rating", "timestamp", "user", "item"])
def test_a_missing_column_names_its_key(tmp_path, key):
    with pytest.raises(UserError, match="there is no column 'nope'") as error:
        load(write(tmp_path), **{key: "nope"})
    assert f"data.{key}" in error.value.fix


def test_a_missing_file_and_a_missing_column(tmp_path):
    with pytest.raises(UserError, match="shop.inter"):
        load(tmp_path)
    with pytest.raises(UserError, match="'label'") as error:
        load(write(tmp_path), title="label")
    assert "name" in error.value.why


def test_duplicates_and_unknown_items(tmp_path):
    with pytest.raises(UserError, match="item_id 'a' is described 2 times"):
        load(write(tmp_path, item=ITEM + "a\tAgain\tx\tp\t1\n"))
    with pytest.raises(UserError, match="user_id '7' is described 2 times"):
        load(write(tmp_path, user=USER + "7\t1\tM\n"))
    with pytest.raises(UserError, match="not described, among them z"):
        load(write(tmp_path, INTER + "8\tz\t3\t9\n"))


def test_describe_names_files_and_options(tmp_path):
    reader = AtomicFiles(root=str(write(tmp_path)), name="shop", positive_above=2)
    described = reader.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["positive_above"] == 2
    assert [f["file"] for f in described["files"]] == ["shop.inter", "shop.item", "shop.user"]


CSV = {
    "inter": "user_id,item_id,rating,timestamp\n7,a,4,30\n7,b,2,10\n8,a,5,20\n",
    "item": "item_id,name:token_seq,kind,tags:token_seq,v:float_seq\n"
    'a,The First,x,p q,0.5 1\nb,Matrix,,,\nc,"Un, rated",y,p,2\n',
    "user": "user_id,age,gender\n7,24,M\n8,,F\n",
}


def tables() -> dict[str, pl.DataFrame]:
    """The same tables with the types a data frame would have: whole numbers as ids, moments as times, nulls."""
    inter = pl.DataFrame(
        {"user_id": [7, 7, 8], "item_id": ["a", "b", "a"], "rating": [4, 2, 5], "timestamp": [30, 10, 20]}
    )
    item = {"item_id": ["a", "b", "c"], "name": ["The First", "Matrix", "Un, rated"], "kind": ["x", None, "y"]}
    return {
        "inter": inter.with_columns(pl.from_epoch("timestamp"), pl.col("item_id").cast(pl.Categorical)),
        "item": pl.DataFrame(item | {"tags": [["p", "q"], None, ["p"]]}),
        "user": pl.DataFrame({"user_id": [7, 8], "age": ["24", None], "gender": ["M", "F"]}),
    }


@pytest.mark.parametrize("form", ["csv", "parquet", "mixed"])
@pytest.mark.parametrize("short", [True, False], ids=["NAME.csv", "NAME.inter.csv"])
def test_csv_and_parquet_are_read_as_atomic_files_are(form, short, tmp_path):
    options = {"title": "name", "attributes": ["kind", "tags"]}
    (tmp_path / "atomic").mkdir()
    wanted = load(write(tmp_path / "atomic"), **options)
    for kind in ("inter", "item", "user"):
        suffix = form if form != "mixed" else {"inter": "csv", "item": "parquet", "user": ""}[kind]
        name = "shop" if short and kind == "inter" else f"shop.{kind}"
        if suffix == "csv":
            (tmp_path / f"{name}.csv").write_text(CSV[kind])
        elif suffix == "parquet":
            tables()[kind].write_parquet(tmp_path / f"{name}.parquet")
        else:
            (tmp_path / "shop.user").write_text(USER)
    found = load(tmp_path, **options)
    assert found.interactions.equals(wanted.interactions)
    assert found.items.equals(wanted.items)
    assert found.users.equals(wanted.users)
    assert (found.rating_max, found.item_attributes) == (wanted.rating_max, wanted.item_attributes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("user_id,item_id,rating,timestamp\n7,a,4,30\n7,b,good,10\n", ["shop.csv:3", "good", "number as rating"]),
        ("user_id,item_id,rating,timestamp\n7,a,4,30\n7,,4,10\n", ["shop.csv:3", "a user, an item"]),
        ("user_id,item_id,rating,timestamp\n7,a,4,30\n7,b,,10\n", ["shop.csv:3", "a user, an item"]),
        ("user_id,item_id,rating,timestamp\n7,a,4,30,5,6\n", ["shop.csv", "cannot be read"]),
        ("user_id,item_id,rating,rating\n7,a,4,30\n", ["shop.csv:1", "different names"]),
        ("user_id:tokn,item_id,rating,timestamp\n7,a,4,30\n", ["shop.csv:1", "different names"]),
        ("user_id,item_id,rating\n7,a,4\n", ["shop.csv:1", "timestamp"]),
        ("", ["shop.csv", "cannot be read"]),
    ],
)
def test_csv_that_is_wrong(text, words, tmp_path):
    (tmp_path / "shop.csv").write_text(text)
    with pytest.raises(UserError) as told:
        load(tmp_path)
    for word in words:
        assert word in str(told.value)


def test_parquet_that_is_wrong(tmp_path):
    path = tmp_path / "shop.inter.parquet"
    path.write_text("no parquet")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)
    tables()["inter"].with_columns(pl.col("user_id") / 2).write_parquet(path)
    with pytest.raises(UserError, match="not ids"):
        load(tmp_path)


def test_two_files_of_one_table(tmp_path):
    write(tmp_path)
    (tmp_path / "shop.csv").write_text(CSV["inter"])
    with pytest.raises(UserError, match=r"shop.inter and shop.csv are the same table"):
        load(tmp_path)
