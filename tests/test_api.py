"""Finished runs in a program of one's own: the words of the documentation, and what it answers."""

import doctest
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import polars as pl
import pytest
from safetensors.torch import load_file

import lit_rec
import lit_rec.api
from lit_rec.cli import main
from lit_rec.data.atomic import AtomicFiles
from lit_rec.errors import UserError
from lit_rec.run.folder import RunFolder
from tests.session_worlds import LEAN, make_session_world
from tests.worlds import BARE, World, make_world

TEXTS = [*BARE, "policy.rounds=0", "evaluation.controls.zero_shot=true"]  # of the LLM as it is


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"))
    assert main(["fit", "--config", made.config, *TEXTS]) == 0
    return made


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_session_world(tmp_path_factory.mktemp("sessions"))
    assert main(["fit", "--config", made.config, *LEAN]) == 0
    return made


@pytest.fixture(scope="module")
def recommender(world: World) -> lit_rec.api.Recommender:
    return lit_rec.load(world.run)


def test_the_documentation_runs(world: World, sessions: World) -> None:
    names = {"run": str(world.run), "session_run": str(sessions.run)}
    found = doctest.testmod(lit_rec.api, extraglobs=names)
    assert found.attempted > 10
    assert found.failed == 0


def test_importing_costs_nothing() -> None:
    code = "import sys, lit_rec; print(sorted({'torch', 'polars', 'lightning'} & {*sys.modules}))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_reranks_as_predict_does(world: World, recommender: lit_rec.api.Recommender, tmp_path: Path) -> None:
    out = tmp_path / "ranked.parquet"
    assert main(["predict", "--config", world.config, *TEXTS, "--output", str(out)]) == 0
    wanted = pl.read_parquet(out)
    ids = AtomicFiles(root=str(world.root / "data"), name="tiny", title="title").load().items["item_id"]
    lists = load_file(world.run / "stages/lists/lists.safetensors")["items"]
    shown = [
        {"list_id": name, "user_id": user, "item_id": ids[item]}
        for name, user in wanted.select("list_id", "user_id").unique(maintain_order=True).rows()
        for item in lists[int(name)].tolist()
        if item
    ]
    found = recommender.rerank_many(pl.DataFrame(shown))
    assert found.drop("score").equals(wanted.drop("score"))
    assert found["score"].to_list() == pytest.approx(wanted["score"].to_list(), abs=1e-6)
    user, name = wanted.row(0, named=True)["user_id"], wanted["list_id"][0]
    first = wanted.filter(pl.col("list_id") == name)
    one = recommender.rerank(user, [line["item_id"] for line in shown if line["list_id"] == name])
    assert [item for item, _ in one] == first["item_id"].to_list()
    assert [score for _, score in one] == pytest.approx(first["score"].to_list(), abs=1e-5)
    assert recommender.describe(user) == first["knowledge"][0] != ""


def test_ids_come_back_as_they_were_given(recommender: lit_rec.api.Recommender) -> None:
    text, numbers = (recommender.rerank("u3", ids) for ids in (["7", "19", "44"], [7, 19, 44]))
    assert [(str(item), score) for item, score in numbers] == text
    assert {item for item, _ in numbers} == {7, 19, 44}
    assert [score for _, score in text] == sorted((score for _, score in text), reverse=True)


def test_a_run_that_was_moved(world: World, recommender: lit_rec.api.Recommender, tmp_path: Path) -> None:
    shutil.copytree(world.run, tmp_path / "elsewhere", ignore=shutil.ignore_patterns(".lock"))
    other = lit_rec.load(str(tmp_path / "elsewhere"))
    assert other.config.run.answers == f"{tmp_path}/elsewhere/answers"
    assert other.rerank("u3", ["7", "19"]) == recommender.rerank("u3", ["7", "19"])


def test_the_folder_is_free_while_a_run_is_open(world: World, recommender: lit_rec.api.Recommender) -> None:
    assert lit_rec.load(world.run).describe("u3") == recommender.describe("u3")


def test_a_session(sessions: World) -> None:
    opened = lit_rec.load(sessions.run)
    alone = opened.rerank_session([1, 2, 3], [9, 4, 30])
    assert [score for _, score in alone.items] == sorted((score for _, score in alone.items), reverse=True)
    lines = [("s", i, "history") for i in (1, 2, 3)] + [("s", i, "candidate") for i in (9, 4, 30)]
    table = opened.rerank_many(pl.DataFrame(lines, schema=["session_id", "item_id", "role"], orient="row"))
    assert table.columns == ["session_id", "rank", "item_id", "title", "score", "hint"]
    assert [(int(item), score) for item, score in table.select("item_id", "score").rows()] == alone.items
    assert set(table["hint"]) == {alone.hint}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: r.rerank("nobody", ["7"]), ["unknown user_id 'nobody'", "rerank"]),
        (lambda r: r.rerank("u3", ["7", "999"]), ["unknown item_id '999'", "row 2"]),
        (lambda r: r.rerank("u3", ["7", "7"]), ["twice"]),
        (lambda r: r.rerank("u3", []), ["no line in rerank(user_id, item_ids)"]),
        (lambda r: r.describe("nobody"), ["unknown user_id 'nobody'"]),
        (lambda r: r.rerank_session(["1"], ["2"]), ["rlrf has no rerank_session", "rerank("]),
        (lambda r: r.rerank_many(pl.DataFrame({"user_id": ["u3"]})), ["no column item_id"]),
    ],
)
def test_mistakes(recommender: lit_rec.api.Recommender, call: object, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        call(recommender)  # type: ignore[operator]
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_mistakes_with_sessions(sessions: World) -> None:
    opened = lit_rec.load(sessions.run)
    for call, word in (
        (lambda: opened.rerank("u3", ["7"]), "re2llm has no rerank"),
        (lambda: opened.describe("u3"), "rerank_session"),
        (lambda: opened.rerank_session([], [1]), "empty history"),
        (lambda: opened.rerank_session([1], []), "no candidates"),
        (lambda: opened.rerank_session([1], [2, 2]), "twice"),
        (lambda: opened.rerank_session([1], [2, 777]), "unknown item '777'"),
    ):
        with pytest.raises(UserError, match=word):
            call()


def test_no_run(tmp_path: Path, world: World) -> None:
    with pytest.raises(UserError, match="no run folder"):
        lit_rec.load(tmp_path / "none")
    (tmp_path / "config.yaml").write_text((world.run / "config.yaml").read_text())
    with pytest.raises(UserError, match="no finished run"):
        lit_rec.load(tmp_path)


def test_several_programs_open_a_run_at_once(world: World) -> None:
    """One waits while another one reads."""
    held = threading.Event()

    def other() -> None:  # a lock belongs to the thread that holds it
        with RunFolder(world.run):
            held.set()
            time.sleep(1)

    reader = threading.Thread(target=other)
    reader.start()
    assert held.wait(10)
    with pytest.raises(UserError, match="another run is using"):
        RunFolder(world.run)
    assert lit_rec.load(world.run).describe("u3") != ""
    reader.join()
