"""Sessions as JSON lines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lit_rec.config import configs_dir, instantiate
from lit_rec.data.hetrec import HetRecItems
from lit_rec.data.session_files import SessionFiles, TitleFile
from lit_rec.data.session_sets import SessionData
from lit_rec.errors import UserError

TITLES = {str(i): f"T{i}" for i in range(10, 100)}


def session(told: list, target: Any, shown: list) -> dict[str, Any]:
    return {"session": told, "target": target, "candidates": shown}


def many(n: int, start: int = 0) -> list[dict[str, Any]]:
    """Different sessions of two to four items with five candidates each."""
    made = []
    for k in range(start, start + n):
        items = [10 + (k * 7 + j * 11) % 90 for j in range(9)]
        made.append(session(items[: 1 + k % 3], items[8], [*items[4:6], items[8], *items[6:8]]))
    return made


def write(folder: Path, titles: dict | str = TITLES, **files: list) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "titles.json").write_text(titles if isinstance(titles, str) else json.dumps(titles))
    for name, lines in files.items():
        told = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (folder / f"{name}.jsonl").write_text("\n".join(told) + "\n")
    return folder


def reader(folder: Path, **options: Any) -> SessionFiles:
    return SessionFiles(root=str(folder), items=TitleFile(path=str(folder / "titles.json")), **options)


def back(made: SessionData, numbers: torch.Tensor) -> list[dict[str, Any]]:
    """Sessions as the files tell them, ids as numbers."""
    ids = made.items["item_id"].to_list()
    told = []
    for s in numbers.tolist():
        items, labels = made.lists.items[s], made.lists.labels[s]
        told.append(
            session(
                [int(ids[i]) for i in made.lists.history_items[s].tolist() if i],
                int(ids[int(items[labels > 0])]),
                [int(ids[i]) for i in items.tolist() if i],
            )
        )
    return told


def test_files_come_back_as_they_are(tmp_path):
    train, test = many(20), many(9, start=50)
    made = reader(write(tmp_path / "games", train=train, test=test), validation=0).load()
    assert back(made, made.splits.train) == train
    assert back(made, made.splits.test) == test
    assert made.lists.user.tolist() == list(range(29))
    assert made.lists.items.shape == (29, 5)
    assert not made.lists.history_ratings.any()
    assert made.items["item_id"][0] == made.items["title"][0] == ""
    assert made.items["title"][1:].to_list() == [f"T{i}" for i in made.items["item_id"][1:]]
    spoken = {i for s in train + test for i in [*s["session"], *s["candidates"]]}
    assert {int(i) for i in made.items["item_id"][1:]} == spoken  # those no session speaks of are left out
    assert (made.name, made.item_noun, made.verb, made.item_attributes) == ("games", "item", "selected", ())
    ids = made.items["item_id"].to_list()
    assert [[int(ids[i]) for i in row if i] for row in made.sequences.tolist()] == [
        [*s["session"], s["target"]] for s in train
    ]


def test_ids_are_matched_whether_numbers_or_text(tmp_path):
    line = session(["10", 11], 12, [13, "12", "aé"])
    folder = write(tmp_path, {**TITLES, "aé": "same title", "99": "same title"}, train=many(5), test=[line])
    made = reader(folder, validation=0, verb="played", item_noun="video game", name="mine").load()
    row = made.items["item_id"].to_list()
    assert [row[i] for i in made.lists.items[made.splits.test[0]].tolist() if i] == ["13", "12", "aé"]
    assert (made.verb, made.item_noun, made.name) == ("played", "video game", "mine")


def test_the_last_items_of_a_long_session_stay(tmp_path):
    long = session([*range(10, 40)], 40, [40, 41, 42])
    made = reader(write(tmp_path, train=[long, *many(3)], test=many(3, 50)), validation=0, max_history=4).load()
    assert back(made, made.splits.train)[0]["session"] == [36, 37, 38, 39]
    ids = made.items["item_id"].to_list()
    assert [ids[i] for i in made.sequences[0].tolist()] == ["36", "37", "38", "39", "40"]
    assert (made.report["histories_cut"], made.report["session_length_max"]) == (1, 31)


def test_validation_from_either_part_or_a_file(tmp_path):
    train, test, more = many(20), many(30, start=40), many(4, start=80)
    folder = write(tmp_path, train=train, test=test, valid=more)

    def parts(**options: Any) -> list[list[dict]]:
        made = reader(folder, **options).load()
        return [back(made, part) for part in vars(made.splits).values()]

    def ordered(told: list[dict]) -> list[str]:
        return sorted(map(json.dumps, told))

    a, b, c = parts()
    assert (len(a), len(b), c) == (16, 4, test)
    assert ordered(a + b) == ordered(train)
    a, b, c = parts(validation=12, validation_from="test")
    assert (a, len(b)) == (train, 12)
    assert ordered(b + c) == ordered(test)
    assert parts(validation="valid.jsonl") == [train, more, test]
    a, b, c = parts(test=0.25, validation=3)
    assert (len(a), len(b), len(c)) == (12, 3, 5)
    assert ordered(a + b + c) == ordered(train)
    assert parts(seed=1) == parts(seed=1) != parts(seed=2)


def test_few_shot(tmp_path):
    train = many(20)
    folder = write(tmp_path, train=train, test=many(5, start=50))
    made = reader(folder, few_shot=6, validation=4).load()
    few = back(made, made.splits.train)
    assert len(few) == 6
    assert all(s in train for s in few)
    assert (len(made.sequences), len(made.lists.items)) == (16, 15)
    assert made.report["train"] == 6
    with pytest.raises(UserError, match="few_shot: 17 training sessions"):
        reader(folder, few_shot=17, validation=4).load()


BAD = {
    "malformed": [
        "",
        "{",
        "[]",
        "7",
        '"text"',
        '{"session": [10], "target": 11}',
        '{"session": 10, "target": 11, "candidates": [11, 12]}',
        '{"session": [10], "target": [11], "candidates": [11, 12]}',
        '{"session": [10], "target": null, "candidates": [11, 12]}',
        '{"session": [10.0], "target": 11, "candidates": [11, 12]}',
        '{"session": [true], "target": 11, "candidates": [11, 12]}',
        '{"session": ["\\ud800',
        "[" * 100_000,
    ],
    "unknown_item": [
        session([10, 9], 11, [11, 12]),
        session([10], 9, [9, 12]),
        session([10], 11, [11, "T12"]),
    ],
    "empty_session": [session([], 11, [11, 12])],
    "too_few_candidates": [session([10], 11, []), session([10], 11, [11]), session([10], 11, [11, "11"])],
    "target_not_among_candidates": [session([10], 11, [12, 13])],
    "target_in_session": [session([10, 11, 12], 11, [11, 13])],
}


@pytest.mark.parametrize(("reason", "line"), [(reason, line) for reason, lines in BAD.items() for line in lines])
def test_a_bad_line_is_refused_or_skipped(tmp_path, reason, line):
    train = many(6)
    folder = write(tmp_path, train=[*train[:2], line, *train[2:]], test=many(5, start=50))
    with pytest.raises(UserError) as error:
        reader(folder).load()
    assert error.value.where == f"{folder / 'train.jsonl'}:3"
    assert reason.replace("_", " ") in error.value.what
    assert "data.on_bad=skip" in error.value.fix
    with pytest.warns(UserWarning, match="1 bad lines left out") as told:
        made = reader(folder, on_bad="skip", validation=0).load()
    assert len(told) == 1
    assert back(made, made.splits.train) == train
    assert made.report["refused"] == {reason: 1}
    assert made.report["sessions_read"] == 12


@pytest.mark.parametrize("lines", [["{"], [], [session([10], 11, [12, 13]), "{"]])
def test_a_file_of_bad_lines_alone_is_an_error(tmp_path, lines):
    folder = write(tmp_path, train=many(5), test=lines)
    with pytest.raises(UserError, match="lines are bad") as error:
        reader(folder, on_bad="skip").load()
    assert error.value.where == str(folder / "test.jsonl")


def test_a_repeated_candidate_is_shown_once(tmp_path):
    line = session([10, 12, 10], 11, [13, 11, 12, 11, 13])
    folder = write(tmp_path, train=[line, *many(3)], test=many(3, start=50))
    with pytest.warns(UserWarning, match="2 repeated candidates shown once"):
        made = reader(folder, validation=0).load()
    assert back(made, made.splits.train)[0] == session([10, 12, 10], 11, [13, 11, 12])
    assert made.report["repeated_candidates_dropped"] == 2
    assert bool((made.lists.labels.sum(1) == 1).all())


def test_sessions_of_two_parts(tmp_path):
    train, test = many(10), many(8, start=50)
    shuffled = test[3] | {"candidates": test[3]["candidates"][::-1]}  # the same session, other candidates
    other = test[4] | {"target": test[4]["candidates"][0]}
    folder = write(tmp_path, train=[*train, shuffled, other], valid=[test[0], train[0]], test=test)
    with pytest.warns(UserWarning, match="1 validation sessions .* left out; 2 train sessions .* left out"):
        made = reader(folder, validation="valid.jsonl").load()
    assert [back(made, part) for part in vars(made.splits).values()] == [[*train[1:], other], [train[0]], test]
    assert len(made.sequences) == 10
    assert made.report["overlap_drop"] == {"validation": 1, "train": 2}
    with pytest.warns(UserWarning, match="2 train sessions .* kept"):
        made = reader(folder, validation="valid.jsonl", overlap="keep").load()
    assert [len(part) for part in vars(made.splits).values()] == [12, 2, 8]
    assert made.report["overlap_keep"] == {"validation": 1, "train": 2}
    write(folder, train=test)
    with pytest.raises(UserError, match="every training session") as error:
        reader(folder, validation=0).load()
    assert "overlap=keep" in error.value.fix


@pytest.mark.parametrize(
    ("options", "where", "match"),
    [
        ({"on_bad": "ignore"}, "data.on_bad", "refuse, skip"),
        ({"overlap": "some"}, "data.overlap", "drop, keep"),
        ({"validation_from": "valid"}, "data.validation_from", "train, test"),
        ({"max_history": 0}, "data.max_history", "1 or more"),
        ({"test": 0}, "data.test", "0 of 5 sessions"),
        ({"validation": 5}, "data.validation", "5 of 5 sessions"),
        ({"validation": 1.0}, "data.validation", "1.0 of 5 sessions"),
        ({"train": "training.jsonl"}, "data.root", "training.jsonl"),
        ({"validation": "v.jsonl"}, "data.root", "v.jsonl"),
    ],
)
def test_what_is_not_possible_is_told(tmp_path, options, where, match):
    with pytest.raises(UserError, match=match) as error:
        reader(write(tmp_path, train=many(5), test=many(5, start=50)), **options).load()
    assert error.value.where == f"config key {where}"


@pytest.mark.parametrize(
    ("titles", "match"),
    [
        ("{", "not JSON"),
        ("[1]", "no JSON object"),
        ("{}", "no JSON object"),
        ('{"10": "A", "11": " "}', "item '11' has no title"),
        ('{"10": "A", "11": {"a": "b"}}', "item '11' has no title"),
        ('{"10": "A", "11": "B", "10": "C"}', "item '10' is described more than once"),
    ],
)
def test_titles_that_cannot_be_read(tmp_path, titles, match):
    folder = write(tmp_path, titles, train=many(5), test=many(5))
    with pytest.raises(UserError, match=match):
        reader(folder).load()


def test_missing_titles_and_items_that_are_no_reader(tmp_path):
    with pytest.raises(UserError, match="titles not found"):
        TitleFile(path=str(tmp_path / "t.json")).load()
    with pytest.raises(UserError, match=r"data\.items is no reader"):
        SessionFiles(root=str(tmp_path), items="titles.json")  # type: ignore[arg-type]


def test_describe_is_plain_and_names_the_files(tmp_path):
    folder = write(tmp_path, train=many(5), test=many(5, start=50))
    described = reader(folder).describe()
    assert json.loads(json.dumps(described)) == described
    assert [f["file"] for f in described["files"]] == ["train.jsonl", "test.jsonl"]
    assert described["items"]["file"] == "titles.json"
    assert str(folder) not in json.dumps({k: v for k, v in described.items() if k != "name"})


def test_the_config(tmp_path):
    folder = write(tmp_path, train=many(20), test=many(5, start=50))
    cfg = OmegaConf.create({"data": OmegaConf.load(configs_dir() / "data" / "session_files.yaml")})
    cfg.data.root = str(folder)
    OmegaConf.resolve(cfg)
    made = instantiate(cfg.data, "data").load()
    assert [len(part) for part in vars(made.splits).values()] == [16, 4, 5]


@pytest.mark.shared_data
def test_the_real_movie_sessions(shared_data):
    items = HetRecItems(root=str(shared_data / "hetrec2011-movielens-2k"))
    folder = shared_data / "re2llm" / "movie"
    options = {"root": str(folder), "items": items, "validation": 300, "validation_from": "test"}
    with pytest.warns(UserWarning, match="14 repeated candidates"):
        made = SessionFiles(**options, overlap="keep").load()
    assert [len(part) for part in vars(made.splits).values()] == [500, 300, 2095]
    told = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    expected = [{**s, "session": s["session"][-20:], "candidates": list(dict.fromkeys(s["candidates"]))} for s in told]
    assert back(made, made.splits.train) == expected
    assert made.lists.items.shape == (2895, 50)
    assert bool((made.lists.labels.sum(1) == 1).all())
    assert (made.item_noun, made.verb) == ("movie", "watched")
    with pytest.warns(UserWarning, match="sessions that a later part holds too left out"):
        apart = SessionFiles(**options).load()
    lines = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    tested = {(*s["session"], s["target"]) for s in lines}
    both = sum((*s["session"], s["target"]) in tested for s in told)
    assert both == 44
    assert len(apart.splits.train) == len(apart.sequences) == 500 - both


@pytest.mark.shared_data
def test_the_real_game_sessions(shared_data):
    folder = shared_data / "re2llm" / "game"
    items = TitleFile(path=str(folder / "titles.json"), item_noun="video game", verb="purchased")
    assert items.describe() != TitleFile(path=str(folder / "titles.json")).describe()  # prompts say these words
    with pytest.raises(UserError, match="target in session") as error:
        SessionFiles(root=str(folder), items=items, test=100).load()
    assert error.value.where == f"{folder / 'train.jsonl'}:2"
    with pytest.warns(UserWarning, match="10 bad lines left out"):
        made = SessionFiles(root=str(folder), items=items, test=100, validation=82, on_bad="skip").load()
    assert [len(part) for part in vars(made.splits).values()] == [300, 82, 100]
    assert not (made.items["title"][1:] == "").any()
    assert made.verb == "purchased"
