"""`validate-data` on tiny worlds with planted faults: every one must be told."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rec.cli import main
from lit_rec.data.atomic import AtomicFiles
from lit_rec.data.lists import ListSet, build_lists
from lit_rec.data.splits import Splits
from lit_rec.run.data_checks import Check, histogram, list_checks, session_checks
from lit_rec.run.validate_data import token_count
from tests.few_sessions import few_sessions
from tests.session_worlds import make_session_world
from tests.worlds import World, assert_told, make_world, write_data


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_session_world(tmp_path_factory.mktemp("sessions"))


def told(capsys: Any, world: World, *overrides: str, code: int = 0) -> tuple[str, dict[str, tuple[str, str]]]:
    """What was printed, and the checks: what -> (status, found)."""
    capsys.readouterr()
    assert main(["validate-data", "--config", world.config, *overrides]) == code
    printed = capsys.readouterr().out
    lines = re.findall(r"^ *(PASS|WARN|FAIL) +(\S.*?)  +(\S.*?) *$", printed, re.MULTILINE)
    return printed, {what: (status, found) for status, what, found in lines}


def edited(world: World, folder: Path, kind: str, edit: Any) -> str:
    """The override that names a copy of the data with one file changed."""
    write_data(folder)
    path = folder / f"tiny.{kind}"
    path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")
    return f"data.root={folder}"


class TestRatings:
    def test_sound_data(self, world: World, capsys: Any) -> None:
        printed, checks = told(capsys, world)
        assert checks.pop("times before 1971")[0] == "WARN"  # the world's clock starts there
        assert {status for status, _ in checks.values()} == {"PASS"}
        for words in ("users +24", "ratings +720", "items +60 movies", "train +12 users", "test +6 users"):
            assert re.search(words, printed), words
        assert "1970-01-01" in printed
        bars = dict(re.findall(r"^ *([1-5]) +(\d+) +#+ *$", printed, re.MULTILINE))
        ratings = [line.split("\t")[2] for line in (world.root / "data/tiny.inter").read_text().splitlines()[1:]]
        assert {value: int(n) for value, n in bars.items()} == {value: ratings.count(value) for value in "12345"}
        assert re.search(r"genres +6 +0 ", printed)
        assert re.search(r"An example prompt \(user u\d+; \d+ tokens\)", printed)
        assert "You know movies well" in printed
        assert not world.run.exists()
        assert not list(world.root.glob("**/answers.jsonl"))

    def test_tokens_are_the_tokenizers(self, world: World) -> None:
        from lit_rec.config import load_config

        messages = [{"role": "system", "content": "movies"}, {"role": "user", "content": "film1 film2"}]
        # <|im_start|>system is one word and unknown; so is every other piece between blanks
        text = "<|im_start|>system movies <|im_end|> <|im_start|>user film1 film2 <|im_end|> <|im_start|>assistant"
        assert token_count(load_config(world.config), messages) == f"{len(text.split())} tokens"
        elsewhere = load_config(world.config, ["llm.hub=nobody/has-this-model"])
        assert "not on this machine" in token_count(elsewhere, messages)

    def test_the_data_is_shown_as_it_stands(self, world: World, tmp_path: Path, capsys: Any) -> None:
        """Neither Rich nor a terminal obeys it."""

        def edit(lines: list[str]) -> list[str]:
            cut = [line.rsplit("\t", 1)[0].replace("film1", "film1\x1b[2J") for line in lines[1:]]
            return [lines[0], *(f"{line}\t[red] [/b]" for line in cut)]

        printed, _ = told(capsys, world, edited(world, tmp_path / "data", "item", edit))
        assert "[red] (60)" in printed
        assert "[/b] (60)" in printed
        assert "\x1b[2J" not in printed

    def test_duplicates(self, world: World, tmp_path: Path, capsys: Any) -> None:
        root = edited(world, tmp_path, "inter", lambda lines: [*lines, *lines[1:4]])
        printed, checks = told(capsys, world, root)
        assert checks["repeated ratings of one item by one user"][0] == "WARN"
        assert checks["repeated ratings of one item by one user"][1].startswith("3 of 723 ratings")
        assert re.search("repeated interactions dropped +3", printed)

    def test_titles(self, world: World, tmp_path: Path, capsys: Any) -> None:
        def edit(lines: list[str]) -> list[str]:
            rows = [line.split("\t") for line in lines]
            rows[1][1] = rows[2][1] = ""
            rows[4][1] = rows[5][1]
            rows[7][2] = ""
            return ["\t".join(row) for row in rows]

        root = edited(world, tmp_path, "item", edit)
        _, checks = told(capsys, world, root)
        assert checks["items without a title"][0] == "WARN"
        assert checks["items without a title"][1].startswith("2 of 60 items (3.3%); a prompt shows them as nothing")
        assert checks["items that share a title"][1].startswith("2 of 60")
        assert checks["items without genres"][1].startswith("1 of 60")
        _, checks = told(capsys, world, "data.title=null")
        assert checks["items whose title is their id"][1].startswith("60 of 60")

    def test_no_title_at_all_must_be_mended(self, world: World, tmp_path: Path, capsys: Any) -> None:
        def edit(lines: list[str]) -> list[str]:
            return [lines[0], *(re.sub(r"film\d+", "", line) for line in lines[1:])]

        root = edited(world, tmp_path, "item", edit)
        code = main(["validate-data", "--config", world.config, root])
        assert_told(capsys, code, "checks of the data failed", "items without a title", "60 of 60")

    def test_leakage(self, world: World, tmp_path: Path, capsys: Any) -> None:
        """An item rated first and last: kar has it in the history and in a list; strict keeps the first alone."""

        def edit(lines: list[str]) -> list[str]:
            mine = [line for line in lines if line.startswith("u0\t")]
            late = mine[0].split("\t")
            return [*lines, "\t".join([*late[:2], "5", "9000000"])]

        root = edited(world, tmp_path, "inter", edit)
        _, checks = told(capsys, world, root, "lists.protocol=kar")
        assert checks["positives in the user's own history"][0] == "WARN"
        assert checks["positives in the user's own history"][1].startswith("1 of ")
        _, checks = told(capsys, world, root)
        assert checks["positives in the user's own history"][0] == "PASS"

    def test_all_at_one_time(self, world: World, tmp_path: Path, capsys: Any) -> None:
        def edit(lines: list[str]) -> list[str]:
            return [lines[0], *("\t".join([*line.split("\t")[:3], "77"]) for line in lines[1:])]

        _, checks = told(capsys, world, edited(world, tmp_path, "inter", edit))
        assert checks["users whose ratings are all of one time"][1].startswith("24 of 24")
        assert checks["histories that end in the second of a target"][0] == "WARN"

    def test_no_positive(self, world: World, capsys: Any) -> None:
        code = main(["validate-data", "--config", world.config, "+data.positive_above=5"])
        assert_told(capsys, code, "positive ratings", "none is above 5")

    def test_scale(self, world: World, capsys: Any) -> None:
        code = main(["validate-data", "--config", world.config, "+data.rating_max=4"])
        assert_told(capsys, code, "ratings outside the scale", "data.rating_max")

    def test_readers_errors_come_through(self, world: World, tmp_path: Path, capsys: Any) -> None:
        root = edited(world, tmp_path, "inter", lambda lines: [*lines[:9], "u1\t3\tgood\t5", *lines[9:]])
        assert_told(
            capsys, main(["validate-data", "--config", world.config, root]), "tiny.inter:10", "number as rating"
        )

    def test_folds(self, world: World, capsys: Any) -> None:
        printed, _ = told(capsys, world, "evaluation.folds=3")
        assert all(f"Parts of fold {fold}" in printed for fold in range(3))


def statuses(checks: list[Check]) -> dict[str, str]:
    return {check.what: check.status for check in checks}


@pytest.fixture(scope="module")
def built(world: World) -> tuple[Any, ListSet, Splits]:
    data = AtomicFiles(root=str(world.root / "data"), name="tiny", title="title").load()
    third = data.n_users // 3
    rows = torch.arange(data.n_users)
    splits = Splits(rows[: -2 * third], rows[-2 * third : -third], rows[-third:])
    return data, build_lists(data, history=8), splits


class TestPlantedInLists:
    """Faults that no reader lets through: what the checks are for when a protocol is changed."""

    def checks(self, built: Any, splits: Splits | None = None, **changed: Any) -> dict[str, str]:
        data, lists, own = built
        return statuses(list_checks(data, ListSet(**{**vars(lists), **changed}), splits or own, protocol="strict"))

    def test_sound(self, built: Any) -> None:
        assert set(self.checks(built).values()) == {"PASS"}

    def test_target_in_the_history(self, built: Any) -> None:
        _, lists, _ = built
        history = lists.history_items.clone()
        history[lists.user[0], 0] = lists.items[0][lists.labels[0].argmax()]
        found = self.checks(built, history_items=history)
        assert found["positives in the user's own history"] == "FAIL"

    def test_future_in_the_history(self, built: Any) -> None:
        data, lists, _ = built
        mine = data.interactions.filter(data.interactions["user"] == int(lists.user[0])).sort("timestamp")
        history = lists.history_items.clone()
        future = [item for item in mine["item"][-4:].to_list() if item not in set(lists.items[0].tolist())]
        history[lists.user[0], -1] = future[-1]
        found = self.checks(built, history_items=history)
        assert found["histories that hold items from after a target"] == "FAIL"

    def test_a_negative_from_the_history(self, built: Any) -> None:
        _, lists, _ = built
        items = lists.items.clone()
        place = int((lists.labels[0] == 0).nonzero()[0])
        items[0, place] = lists.history_items[lists.user[0], 0]
        assert self.checks(built, items=items)["other candidates in the user's own history"] == "FAIL"

    def test_an_item_twice(self, built: Any) -> None:
        _, lists, _ = built
        items = lists.items.clone()
        items[3, 0] = items[3, 1]
        assert self.checks(built, items=items)["lists that hold an item twice"] == "FAIL"

    def test_users_in_two_parts(self, built: Any) -> None:
        _, _, own = built
        both = Splits(own.train, own.validation, torch.cat([own.test, own.train[:1]]))
        assert self.checks(built, both)["users in more than one part"] == "FAIL"
        none = Splits(own.train, own.validation, own.test[:0])
        assert self.checks(built, none)["test users"] == "FAIL"


class TestSessions:
    def test_sound_data(self, sessions: World, capsys: Any) -> None:
        printed, checks = told(capsys, sessions)
        assert {status for status, _ in checks.values()} == {"PASS"}
        assert re.search("train +22 sessions", printed)
        assert re.search("sessions read +54", printed)
        assert re.search(r"An example prompt \(session 0; \d+ tokens\)", printed)
        assert not sessions.run.exists()

    def test_overlap(self, sessions: World, tmp_path: Path, capsys: Any) -> None:
        data = sessions.root / "data"
        own = (data / "train.jsonl").read_text().splitlines()
        tested = (data / "test.jsonl").read_text().splitlines()
        (tmp_path / "more.jsonl").write_text("\n".join([*own, *tested[:2]]) + "\n")
        train = f"data.train={tmp_path}/more.jsonl"
        _, checks = told(capsys, sessions, train, "data.overlap=keep", "data.validation=0.1")
        assert checks["test sessions among what sequence models learn from"][0] == "WARN"
        assert checks["test sessions among what sequence models learn from"][1].startswith("2 of 24")
        printed, checks = told(capsys, sessions, train, "data.validation=0.1")
        assert checks["test sessions among what sequence models learn from"][0] == "PASS"
        assert checks["the reader's own words"][0] == "WARN"
        assert "that a later part holds too left out" in " ".join(printed.split())

    def test_bad_lines(self, sessions: World, tmp_path: Path, capsys: Any) -> None:
        lines = (sessions.root / "data/train.jsonl").read_text().splitlines()
        bad = json.loads(lines[4])
        bad["session"].append(bad["target"])
        lines[4] = json.dumps(bad)
        (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
        line = ["validate-data", "--config", sessions.config, f"data.train={tmp_path}/bad.jsonl"]
        assert_told(capsys, main(line), "bad.jsonl:5", "target in session")
        printed, checks = told(capsys, sessions, f"data.train={tmp_path}/bad.jsonl", "data.on_bad=skip")
        assert re.search("refused +target in session 1", printed)
        assert "1 bad lines left out" in checks["the reader's own words"][1]

    def test_planted(self) -> None:
        data = few_sessions(6)
        rows = torch.arange(6)
        object.__setattr__(data, "splits", Splits(rows[:3], rows[3:4], rows[4:]))
        assert set(statuses(session_checks(data)).values()) == {"PASS"}
        target = int(data.lists.labels[1].argmax())
        data.lists.history_items[1, 0] = data.lists.items[1, target]
        data.lists.labels[2] = 0
        data.lists.items[4, 0] = data.lists.items[4, 1]
        found = statuses(session_checks(data, split="random"))
        assert found["targets that stand in their session"] == "FAIL"
        assert found["sessions without exactly one target"] == "FAIL"
        assert found["sessions that show a candidate twice"] == "FAIL"
        assert found["time between the parts"] == "WARN"
        assert statuses(session_checks(data, split="time"))["time between the parts"] == "PASS"


def test_histogram() -> None:
    import numpy as np

    assert histogram(np.array([1.0, 0.5, 1.0])) == [("0.5", 1), ("1", 2)]
    assert histogram(np.arange(3, 13), bins=4) == [("3 to 5", 3), ("6 to 8", 3), ("9 to 11", 3), ("12 to 14", 1)]
    assert [count for _, count in histogram(np.arange(100) / 8, bins=4)] == [25, 25, 25, 25]
