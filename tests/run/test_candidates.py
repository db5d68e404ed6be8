"""Candidate lists in, ranked lists out."""

from pathlib import Path

import polars as pl
import pytest
import torch

from lit_rec.data.canonical import RatingsData
from lit_rec.data.lists import ListSet
from lit_rec.errors import UserError
from lit_rec.run.candidates import rank_table, read_lists


@pytest.fixture
def data() -> RatingsData:
    return RatingsData(
        name="three",
        interactions=pl.DataFrame(),
        users=pl.DataFrame({"user_id": ["7", "ann"]}),
        items=pl.DataFrame({"item_id": ["", "10", "20", "30"], "title": ["", "Alien", "Brazil", "Clue"]}),
        item_attributes=(),
        rating_max=5.0,
        positive_above=3.0,
        item_noun="movie",
    )


def csv(folder: Path, *lines: str) -> Path:
    path = folder / "lists.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_lists_by_user_or_by_name(data: RatingsData, tmp_path: Path) -> None:
    found = read_lists(csv(tmp_path, "user_id,item_id", "ann,30", "7,10", "ann,20"), data)
    assert found.names == ["ann", "7"]
    assert found.user.tolist() == [1, 0]
    assert found.items.tolist() == [[3, 2], [1, 0]]
    found = read_lists(csv(tmp_path, "list_id,user_id,item_id,more", "b,7,10,x", "a,7,30,x", "b,7,20,x"), data)
    assert found.names == ["b", "a"]
    assert found.user.tolist() == [0, 0]
    assert found.items.tolist() == [[1, 2], [3, 0]]


def test_people_whose_history_is_known_come_behind_the_users(data: RatingsData, tmp_path: Path) -> None:
    new = pl.Series(["zoe", "bob"])
    path = csv(tmp_path, "user_id,item_id", "bob,30", "ann,30", "zoe,10")
    assert read_lists(path, data, new).user.tolist() == [3, 1, 2]
    with pytest.raises(UserError, match="nor in the history"):
        read_lists(path, data, new[:1])


def test_a_row_of_a_parquet_file_is_named(data: RatingsData, tmp_path: Path) -> None:
    path = tmp_path / "lists.parquet"
    pl.DataFrame({"user_id": ["7", "bob"], "item_id": ["10", "20"]}).write_parquet(path)
    with pytest.raises(UserError) as caught:
        read_lists(path, data)
    assert caught.value.where == f"{path}, row 2"


def test_parquet_with_numbers_for_ids(data: RatingsData, tmp_path: Path) -> None:
    path = tmp_path / "lists.parquet"
    pl.DataFrame({"user_id": [7, 7], "item_id": [30, 10]}).write_parquet(path)
    assert read_lists(path, data).items.tolist() == [[3, 1]]


@pytest.mark.parametrize(
    ("lines", "what", "where"),
    [
        (["user_id,item", "7,10"], "no column item_id", "--input"),
        (["user,item_id", "7,10"], "no column user_id", "--input"),
        (["user_id,item_id", "7,10", "bob,20"], "unknown user_id 'bob'", ":3"),
        (["user_id,item_id", "7,10", "7,99"], "unknown item_id '99'", ":3"),
        (["user_id,item_id", "7,"], "unknown item_id", ":2"),
        (["list_id,user_id,item_id", "a,7,10", "a,ann,20"], "several users", "lists.csv"),
        (["user_id,item_id"], "no line in", "--input"),
        (["user_id,item_id", "7,10", "ann,10", "7,20", "7,10"], "item '10' stands twice in list '7'", ":5"),
        (["user_id,item_id", "7,10,11"], "cannot be read", "lists.csv"),
        ([""], "cannot be read", "lists.csv"),
    ],
)
def test_what_is_wrong_with_the_input(
    data: RatingsData, tmp_path: Path, lines: list[str], what: str, where: str
) -> None:
    with pytest.raises(UserError, match=what) as caught:
        read_lists(csv(tmp_path, *lines), data)
    assert where in caught.value.where


def test_missing_and_damaged_files_are_told(data: RatingsData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        read_lists(tmp_path / "no.csv", data)
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="cannot be read"):
        read_lists(tmp_path / "bad.parquet", data)


def test_ranked_by_score_padding_left_out_ties_in_the_order_they_came(data: RatingsData) -> None:
    items = torch.tensor([[1, 2, 3], [3, 1, 0]])
    nothing = torch.zeros(2, 1)
    lists = ListSet(torch.tensor([1, 0]), items, torch.zeros(2, 3), nothing.long(), nothing)
    scores = torch.tensor([[0.5, 0.5, 2.0], [-3.0, -1.0, 9.0]])
    table = rank_table(lists, scores, ["x", "y"], data, {1: "likes fish"})
    assert table.columns == ["list_id", "user_id", "rank", "item_id", "title", "score", "knowledge"]
    assert table.rows() == [
        ("x", "ann", 1, "30", "Clue", 2.0, "likes fish"),
        ("x", "ann", 2, "10", "Alien", 0.5, "likes fish"),
        ("x", "ann", 3, "20", "Brazil", 0.5, "likes fish"),
        ("y", "7", 1, "10", "Alien", -1.0, ""),
        ("y", "7", 2, "30", "Clue", -3.0, ""),
    ]
