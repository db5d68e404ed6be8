"""Tables as people have them: what is read all the same, and what is told where it cannot be."""

import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from lit_rec.data.atomic import AtomicFiles
from lit_rec.data.lists import build_lists
from lit_rec.data.own import Folder
from lit_rec.data.session_cuts import SessionsOf
from lit_rec.data.splits import split_users
from lit_rec.errors import UserError
from lit_rec.run.data_checks import FAIL, WARN, list_checks, rating_checks, user_checks

HEAD = "user_id,item_id,rating,timestamp\n"
ROWS = "".join(f"u{n // 4},i{n % 4},{n % 5},{1714521600 + n}\n" for n in range(12))
ITEMS = "item_id,title\n" + "".join(f"i{n},Title {n}\n" for n in range(4))
USERS = "user_id,age\n" + "".join(f"u{n},{20 + n}\n" for n in range(3))


def folder(root: Path, **files: str | bytes | pl.DataFrame) -> Path:
    """Files by what they are called, `.` written as `__`."""
    for name, content in files.items():
        path = root / name.replace("__", ".")
        if isinstance(content, pl.DataFrame):
            content.write_parquet(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def told(root: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        Folder(root=str(root), **options).load()
    return str(caught.value)


def inter(**columns: Any) -> pl.DataFrame:
    return pl.DataFrame({"user_id": ["a", "b"], "item_id": ["x", "y"], "rating": [4, 2], "timestamp": [1, 2]} | columns)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ((HEAD + ROWS).encode("utf-16"), ["UTF-16", "interactions.csv:1", "save it as UTF-8"]),
        ((HEAD + ROWS).encode().replace(b"u1,i2", b"Jos\xe9,i2"), ["not UTF-8", "interactions.csv:8", "0xe9"]),
        (HEAD.replace(",", ";") + ROWS.replace(",", ";"), ["semicolons", "interactions.csv:1"]),
        (HEAD.replace(",", "\t") + ROWS.replace(",", "\t"), ["tabs", "interactions.csv:1"]),
        (HEAD + "a,x,1,2\n\na,x,1,2,3\n", ["interactions.csv:4", "5 fields, and the header has 4"]),
        (HEAD + 'a,x,1,2\na,"x,1,2\n', ["interactions.csv:3", "quote"]),
        ("\n\n" + HEAD + "a,x,1,2\n\na,x,bad,2\n", ["interactions.csv:6", "bad"]),
        (HEAD + 'a,"x\ny",1,2\na,x,bad,2\n', ["interactions.csv:4", "bad"]),
        (HEAD + "a,x,1,20240501\nb,x,1,20240502\n", ["20240501", "2024-05-01", "1970"]),
        (HEAD + "a,x,1,1e30\n", ["interactions.csv:2", "a time"]),
        ("user_id,item_id,rating\na,x,1\n", ["data.timestamp=null"]),
        ("user_id,item_id,timestamp\na,x,1\n", ["data.rating=null"]),
    ],
)
def test_what_cannot_be_read_is_told(content: str | bytes, words: list[str], tmp_path: Path) -> None:
    found = told(folder(tmp_path, interactions__csv=content))
    assert all(word in found for word in words), found
    assert "polars" not in found


def test_empty_lines_are_left_out(tmp_path: Path) -> None:
    found = Folder(root=str(folder(tmp_path, interactions__csv=HEAD + "\na,x,1,2\n\n,,,\nb,y,2,3\n\n"))).load()
    assert found.interactions.rows() == [(0, 1, 1, 2), (1, 2, 2, 3)]


@pytest.mark.parametrize(
    ("tables", "options", "words"),
    [
        ({"interactions__csv": HEAD + ROWS, "item__csv": ITEMS}, {}, ["item.csv is not read", "items.csv"]),
        ({"interactions__csv": HEAD + ROWS}, {"attributes": ["kind"]}, ["no table of items", "data.attributes"]),
        ({"interactions__csv": HEAD + ROWS, "User.csv": USERS}, {}, ["User.csv is not read", "users.csv"]),
        ({"interactions__parquet": inter(timestamp=[datetime.timedelta(1)] * 2)}, {}, ["'timestamp'", "Duration"]),
        ({"interactions__parquet": inter(timestamp=[datetime.time(1)] * 2)}, {}, ["'timestamp'", "Time"]),
        ({"interactions__parquet": inter(user_id=[["a"], ["b"]])}, {}, ["'user_id'", "List"]),
        (
            {
                "interactions__parquet": inter(),
                "items__parquet": pl.DataFrame({"item_id": ["x", "y"], "title": ["X", "Y"], "year": [[1], [2]]}),
            },
            {"year": "year"},
            ["'year'", "List"],
        ),
    ],
)
def test_tables_that_would_be_ignored_or_break(
    tables: dict[str, Any], options: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    found = told(folder(tmp_path, **tables), **options)
    assert all(word in found for word in words), found


def test_attributes_as_a_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.attributes=\[kind\]"):
        Folder(root=str(tmp_path), attributes="kind")  # type: ignore[arg-type]


def test_columns_become_text(tmp_path: Path) -> None:
    tags = pl.Series("tags", [["p", "q"], ["r", None]], dtype=pl.Array(pl.String, 2))
    items = pl.DataFrame({"item_id": ["x", "y"], "title": [7, 8], "tags": tags})
    users = pl.DataFrame({"user_id": ["a", "b"], "age": [24, None], "height": [1.5, 2.0]})
    times = ["2024-05-01", "2024-05-02 00:00:00.5"]
    root = folder(tmp_path, interactions__parquet=inter(timestamp=times), items__parquet=items, users__parquet=users)
    data = Folder(root=str(root)).load()
    assert data.items["title"].to_list() == ["", "7", "8"]
    assert data.items["tags"].to_list() == [[], ["p", "q"], ["r"]]
    assert data.users.rows() == [("a", "24", "1.5"), ("b", "", "2")]
    assert data.interactions["timestamp"].to_list() == [1714521600, 1714608000.5]


def test_atomic_files_have_marks_and_times_and_no_column_twice(tmp_path: Path) -> None:
    head = "\ufeffuser_id:token\titem_id:token\trating:float\ttimestamp:token\n"
    path = folder(tmp_path, s__inter=head + "a\tx\t1\t2024-05-01\n")
    assert AtomicFiles(root=str(path), name="s").load().interactions["timestamp"].to_list() == [1714521600]
    (path / "s.inter").write_text(head.replace("timestamp:token", "rating:float") + "a\tx\t1\t2\n")
    with pytest.raises(UserError, match="different names"):
        AtomicFiles(root=str(path), name="s").load()


def test_a_file_that_must_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    found = told(folder(tmp_path, interactions__csv=HEAD + ROWS))
    assert "interactions.csv cannot be read" in found
    assert "Permission denied" in found


def test_milliseconds_say_what_came_first(tmp_path: Path) -> None:
    items = [(user, item) for user in range(12) for item in range(20)]
    rows = [f"u{u},i{(i + u) % 40},5,2024-05-01T10:00:00.{i:03}" for u, i in items]
    data = Folder(root=str(folder(tmp_path, interactions__csv=HEAD + "\n".join(rows[::-1]) + "\n"))).load()
    row = {name: n for n, name in enumerate(data.items["item_id"])}
    lists = build_lists(data, history=5, list_size=6)
    for user, name in enumerate(data.users["user_id"]):
        first = [row[f"i{(i + int(name[1:])) % 40}"] for i in range(5)]
        assert lists.history_items[user].tolist() == first
    late = lists.history_items.flip(0)
    spoiled = type(lists)(**{**vars(lists), "history_items": late})
    checks = {c.what: c for c in list_checks(data, spoiled, split_users(12), protocol="strict")}
    assert checks["histories that hold items from after a target"].status == FAIL


def test_clicks_have_no_ratings(tmp_path: Path) -> None:
    root = folder(tmp_path, interactions__csv="user_id,item_id,timestamp\na,x,9000000000\nb,y,9000000001\n")
    data = Folder(root=str(root), rating=None, rating_max=10).load()
    assert not data.rated
    assert set(data.interactions["rating"]) == {data.rating_max}


def test_times_before_1971_are_told(tmp_path: Path) -> None:
    data = Folder(root=str(folder(tmp_path, interactions__csv=HEAD + "a,x,5,2023\na,y,4,2024\n"))).load()
    checks = {c.what: c.status for c in rating_checks(data)}
    assert checks["times before 1971"] == WARN


def test_users_who_are_described_under_other_ids(tmp_path: Path) -> None:
    files = folder(tmp_path, interactions__csv=HEAD + ROWS, users__csv=USERS.replace("u", "v").replace("vser", "user"))
    (check,) = user_checks(Folder(root=str(files)).load())
    assert check.status == FAIL
    files = folder(tmp_path, users__csv=USERS.replace("u1", "v1"))
    (check,) = user_checks(Folder(root=str(files)).load())
    assert check.status == WARN


def test_sessions_need_clocks(tmp_path: Path) -> None:
    root = str(folder(tmp_path, interactions__csv=HEAD + ROWS.replace(",17145216", ",17145216000")))
    with pytest.raises(UserError, match=r"without times"):
        SessionsOf(reader=Folder(root=root, timestamp=None))
    text = HEAD + "".join(f"u{n // 4},i{n % 4},5,{1714521600000 + 3600000 * n}\n" for n in range(12))
    root = str(folder(tmp_path, interactions__csv=text))
    with pytest.raises(UserError, match="milliseconds"):
        SessionsOf(reader=Folder(root=root), by="gap").load()
