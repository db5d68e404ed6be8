"""`predict`: known users, people who are new, and sessions, each against what the run itself has kept."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from lit_rec.agent.hints import HintBase
from lit_rec.agent.policy import HintPolicy
from lit_rec.cli import main
from lit_rec.config import load_config
from lit_rec.data.atomic import AtomicFiles
from lit_rec.data.canonical import RatingsData
from lit_rec.errors import UserError
from lit_rec.llm.sampler import Sampler
from lit_rec.llm.scoring import TitleScorer
from lit_rec.recipes.ground import Ground
from lit_rec.run.candidates import Given, read_table
from lit_rec.run.commands import COMMANDS
from lit_rec.run.export import check_finished
from lit_rec.run.folder import RunFolder
from lit_rec.run.newcomers import Newcomers, check_asked, newcomers_of, pick_hints, prompts_about
from lit_rec.run.predict import UserPredictor, predict
from lit_rec.run.predict_sessions import SessionPredictor, read_sessions
from tests.session_worlds import LEAN, TEST, make_session_world
from tests.worlds import BARE, World, make_unified_world, make_world

PLAIN = "u5"  # of whom nothing but the ratings is known, as of somebody new
RUNS: dict[str, list[str]] = {
    "kar": ["knowledge.encode=kar", "evaluation.inputs=[]", "lists.protocol=kar", "+reranker=mir"],
    "history": ["policy.rounds=0", "evaluation.controls.history_only=true"],
    "zero_shot": ["policy.rounds=0", "evaluation.controls.zero_shot=true"],
    "hinted": ["knowledge.encode=both", "evaluation.inputs=[]"],
}


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the LLM was asked")


def forget(world: World) -> World:
    """Take what is told of one user out of the file of users."""
    file = world.root / "data" / "tiny.user"
    file.write_text("".join(line for line in file.open() if not line.startswith(f"{PLAIN}\t")))
    return world


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    """A world without hints and one with them; their runs are made when they are first asked for."""
    plain, hinted = (tmp_path_factory.mktemp(name) for name in ("plain", "hinted"))
    return {"plain": forget(make_world(plain)), "hinted": forget(make_unified_world(hinted))}


def test_a_server_may_move_and_another_model_may_not_come(tmp_path: Path) -> None:
    server = ["llm=server", "llm.server.urls=[http://old:8000/v1]", "llm.server.model=m", "llm.hub=x"]
    (tmp_path / "adapter").mkdir()

    def configured(*more: str) -> Any:
        return load_config("quickstart.yaml", [*server, *more, f"run.dir={tmp_path}"])

    def checked(cfg: Any) -> None:
        loop: Any = SimpleNamespace(run=SimpleNamespace(path=tmp_path), cfg=cfg)
        check_asked(loop)
        check_finished(cfg, loop.run, "adapter")

    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(configured()))
    checked(configured("llm.server.urls=[https://new/v1]", "llm.server.key_env=MINE", "llm.server.timeout=9"))
    for change in ("llm.server.model=other", "llm.server.revision=2", "llm.temperature=0.5"):
        with pytest.raises(UserError, match="another configuration") as caught:
            checked(configured(change))
        assert change.split("=")[0] in str(caught.value)


class Runs:
    """Runs of both worlds, each made once."""

    def __init__(self, worlds: dict[str, World]) -> None:
        self.worlds, self.made = worlds, set[str]()

    def line(self, name: str) -> list[str]:
        world = self.worlds["hinted" if name == "hinted" else "plain"]
        places = [f"run.dir={world.root}/{name}", f"run.answers={world.root}/answers"]
        return ["--config", world.config, *BARE, *RUNS[name], *places]

    def config(self, name: str, *more: str) -> Any:
        line = self.line(name)
        if name not in self.made:
            assert main(["fit", *line]) == 0
            self.made.add(name)
        return load_config(line[1], [*line[2:], *more])


@pytest.fixture(scope="module")
def runs(worlds: dict[str, World]) -> Runs:
    return Runs(worlds)


def csv(path: Path, header: str, lines: list[Any]) -> str:
    path.write_text("\n".join([header, *(",".join(map(str, line)) for line in lines)]) + "\n")
    return str(path)


def twin_history(cfg: Any, who: str = "new") -> list[tuple[Any, ...]]:
    """The history of the plain user as somebody else's, the last line first: its times put it in order."""
    with RunFolder(cfg.run.dir) as run:
        ground = Ground(cfg, run)
        ids, row = ground.data.items["item_id"], ground.data.users["user_id"].to_list().index(PLAIN)
        items, ratings = (h[row].tolist() for h in (ground.lists.history_items, ground.lists.history_ratings))
    lines = [(who, ids[i], r, time) for time, (i, r) in enumerate(zip(items, ratings, strict=True)) if i]
    return lines[::-1]


@pytest.mark.parametrize("name", RUNS)
def test_a_new_user_with_a_known_users_history_is_ranked_alike(
    name: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt, adapter and hint are the same, so the LLM's answer is in the store; so are the vectors and scores."""
    cfg = runs.config(name)
    history = csv(tmp_path / "history.csv", "user_id,item_id,rating,timestamp", twin_history(cfg))
    shown = [7, 19, 44, 2, 31, 60]
    lists = [(user, item) for user in ("u3", "new", PLAIN) for item in shown]
    given, out = csv(tmp_path / "given.csv", "user_id,item_id", lists), tmp_path / "ranked.parquet"
    monkeypatch.setattr(Sampler, "sample", never)
    predict(cfg, given, out, history)
    found = pl.read_parquet(out)
    assert found["list_id"].unique(maintain_order=True).to_list() == ["u3", "new", PLAIN]
    new, known, other = (found.filter(pl.col("user_id") == user) for user in ("new", PLAIN, "u3"))
    assert new["score"].to_list() == pytest.approx(known["score"].to_list(), abs=1e-5)
    assert new["item_id"].to_list() == known["item_id"].to_list()
    assert new["score"].to_list() != pytest.approx(other["score"].to_list(), abs=1e-5)
    assert new["knowledge"].to_list() == known["knowledge"].to_list()
    assert (new["knowledge"][0] == "") == (name == "history")
    # Known users do not depend on who stands beside them.
    predict(cfg, csv(tmp_path / "given.csv", "user_id,item_id", lists[:6]), out)
    alone = pl.read_parquet(out)
    assert alone["score"].to_list() == pytest.approx(other["score"].to_list(), abs=1e-5)


def test_somebody_really_new_is_written_about_once(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = runs.config("zero_shot")
    rated = csv(tmp_path / "history.csv", "user_id,item_id,rating,age,gender", [("me", 3, 5, 25, "female")])
    given, out = csv(tmp_path / "given.csv", "user_id,item_id", [("me", 7), ("me", 19)]), tmp_path / "ranked.parquet"
    args = argparse.Namespace(input=given, output=str(out), history=rated)
    COMMANDS["predict"](cfg, args)
    first = pl.read_parquet(out)
    assert first["knowledge"][0] != ""
    last = json.loads((Path(cfg.run.answers) / "answers.jsonl").read_text().splitlines()[-1])
    assert {answer["text"] for answer in last.values()} == {*first["knowledge"]}
    monkeypatch.setattr(Sampler, "sample", never)
    COMMANDS["predict"](cfg, args)
    assert pl.read_parquet(out).equals(first)


def test_the_prompt_of_somebody_new(runs: Runs) -> None:
    cfg = runs.config("zero_shot")
    table = pl.DataFrame({"user_id": ["me"] * 2, "item_id": [3, 8], "rating": [5, 1], "gender": ["female"] * 2})
    with RunFolder(cfg.run.dir) as run:
        opened = UserPredictor(cfg, run)
        prompts = prompts_about(opened.loop, opened.newcomers(Given(table, "t", "t")))
    asked = prompts.user(0)[1]["content"]
    told = 'A user with gender female. Ratings out of 5: "film3", 5 stars; "film8", 1 star.'
    assert asked == f"{told} Which movies does this user like?"


@pytest.mark.parametrize("pick", ["best_fixed", "random", "ppo"])
def test_who_picks_the_hint_of_somebody_new(pick: str, runs: Runs) -> None:
    cfg = runs.config("hinted", f"agent.pick={pick}")
    stages = Path(cfg.run.dir) / "stages/fold_0/hints/round_1"
    with RunFolder(cfg.run.dir) as run:
        loop = UserPredictor(cfg, run).loop
        states = loop.ground.history_vectors
        ids = [f"n{i}" for i in range(len(states))]
        picked = pick_hints(loop, ids, states)
        again = pick_hints(loop, ids[::-1], states.flip(0))[::-1]
    assert picked == again
    known = [None, *HintBase.load(stages / "hints/hints.json").texts]
    if pick == "random":
        assert set(picked) == {*known[1:]}
        return
    matrix = load_file(stages / "rewards/matrix.safetensors")
    train = loop.splits.train  # the training users stand first
    best = matrix["gains"][torch.isin(matrix["sessions"], train), 1:].mean(0).argmax()
    actions = torch.full((len(ids),), 1 + int(best))
    if pick == "ppo":
        actions = HintPolicy.load(stages / "agent").greedy(states)
    assert picked == [known[action] for action in actions.tolist()]


def test_the_own_lists_stand_in_the_order_of_the_scores(runs: Runs, tmp_path: Path) -> None:
    """The module's own forward pass, list by list."""
    cfg = runs.config("zero_shot")
    out = tmp_path / "ranked.parquet"
    predict(cfg, None, out)
    found = pl.read_parquet(out)
    with RunFolder(cfg.run.dir) as run:
        opened = UserPredictor(cfg, run)
    lists, ids = opened.base, opened.data.items["item_id"]
    names = found["list_id"].unique(maintain_order=True).to_list()
    assert sorted(map(int, names)) == lists.of_users(opened.loop.splits.test).tolist()
    for name in names:
        n = int(name)
        with torch.no_grad():
            scores = opened.module({"user": lists.user[n : n + 1], "items": lists.items[n : n + 1]})[0]
        wanted = [ids[int(lists.items[n, c])] for c in scores.argsort(descending=True) if lists.items[n, c]]
        assert found.filter(pl.col("list_id") == name)["item_id"].to_list() == wanted


@pytest.mark.parametrize(
    ("lists", "history", "more", "words"),
    [
        ([("new", 7)], None, [], ["unknown user_id 'new'", "given.csv:2", "--history"]),
        ([("u3", 7), ("new", 7)], [("me", 3, 4)], [], ["unknown user_id 'new'", "given.csv:3", "nor in the history"]),
        ([("new", 7)], [("new", 3, 4), ("u3", 3, 4)], [], ["'u3' is in tiny", "history.csv:3"]),
        ([("new", 7)], [("new", 99, 4)], [], ["unknown item_id '99'", "history.csv:2"]),
        ([("new", 7)], [("new", 3, 6)], [], ["rating '6'", "from 0 to 5", "history.csv:2"]),
        ([("new", 7)], [("new", 3, "good")], [], ["rating 'good'", "history.csv:2"]),
        ([("new", 7), ("new", 7)], [("new", 3, 4)], [], ["item '7' stands twice in list 'new'", "given.csv:3"]),
        (None, [("new", 3, 4)], [], ["--history without lists", "--input"]),
        ([("new", 7)], [("new", 3, 4)], ["prompt.template=preferences_v1"], ["another configuration", "template"]),
        ([("new", 7)], [("new", 3, 4)], ["knowledge.encode=both"], ["another configuration", "knowledge.encode"]),
        ([("new", 7)], [("new", 3, 4)], ["policy.rounds=1"], ["another configuration", "policy.rounds"]),
    ],
)
def test_what_makes_no_sense_is_told(
    lists: list[Any] | None,
    history: list[Any] | None,
    more: list[str],
    words: list[str],
    runs: Runs,
    tmp_path: Path,
) -> None:
    cfg = runs.config("zero_shot", *more)
    given = None if lists is None else csv(tmp_path / "given.csv", "user_id,item_id", lists)
    told = None if history is None else csv(tmp_path / "history.csv", "user_id,item_id,rating", history)
    with pytest.raises(UserError) as caught:
        predict(cfg, given, tmp_path / "out.parquet", told)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out.parquet").exists()


def test_data_that_changed_and_kept_its_size_is_refused(runs: Runs, tmp_path: Path) -> None:
    cfg = runs.config("zero_shot")
    path = runs.worlds["plain"].root / "data" / "tiny.item"
    kept = path.read_bytes()
    head, *lines = kept.splitlines(keepends=True)
    try:
        path.write_bytes(head + b"".join(reversed(lines)))
        with pytest.raises(UserError, match=r"data\.files"):
            predict(cfg, None, tmp_path / "out.parquet")
    finally:
        path.write_bytes(kept)


class TestHistories:
    """`newcomers_of`, by hand."""

    @pytest.fixture(scope="class")
    def data(self, worlds: dict[str, World]) -> RatingsData:
        return AtomicFiles(root=str(worlds["plain"].root / "data"), name="tiny", title="title").load()

    def read(self, path: Path, data: RatingsData, length: int = 3, once: bool = True) -> Newcomers:
        return newcomers_of(read_table(path, "--history"), data, length=length, once=once)

    def test_in_time_order_the_last_ones_repeated_once(self, data: RatingsData, tmp_path: Path) -> None:
        lines = [("b", 5, 3, 9), ("a", 1, 5, 40), ("a", 2, 4, 10), ("a", 3, 3, 20), ("a", 2, 1, 50), ("a", 4, 2, 30)]
        path = Path(csv(tmp_path / "h.csv", "user_id,item_id,rating,timestamp", lines))
        rows = {item: n for n, item in enumerate(data.items["item_id"])}
        found = self.read(path, data)
        assert found.users["user_id"].to_list() == ["b", "a"]
        assert found.users.columns == data.users.columns
        assert found.users["age"].to_list() == ["", ""]
        assert found.items.tolist() == [[rows["5"], 0, 0], [rows["3"], rows["4"], rows["1"]]]
        assert found.ratings.tolist() == [[3, 0, 0], [3, 2, 5]]
        twice = self.read(path, data, once=False)
        assert twice.items[1].tolist() == [rows["4"], rows["1"], rows["2"]]
        assert twice.ratings[1].tolist() == [2, 5, 1]

    def test_without_times_in_the_order_of_the_lines(self, data: RatingsData, tmp_path: Path) -> None:
        table = pl.DataFrame({"user_id": [1, 1], "item_id": [9, 8], "rating": [1.5, 4.0], "age": [None, "18"]})
        table.write_parquet(tmp_path / "h.parquet")
        found = self.read(tmp_path / "h.parquet", data, length=2)
        assert [data.items["item_id"][i] for i in found.items[0].tolist()] == ["9", "8"]
        assert found.users.row(0, named=True) == {"user_id": "1", "age": "18", "gender": ""}

    @pytest.mark.parametrize(
        ("header", "line", "words"),
        [
            ("user_id,item_id", "a,1", ["no column rating", "--history"]),
            ("user_id,item_id,rating", None, ["no line"]),
            ("user_id,item_id,rating", ",1,4", ["no user_id", "h.csv:2"]),
            ("user_id,item_id,rating", "a,1,", ["rating None", "h.csv:2"]),
            ("user_id,item_id,rating", "a,1,nan", ["rating 'nan'", "h.csv:2"]),
            ("user_id,item_id,rating,timestamp", "a,1,4,noon", ["timestamp 'noon'", "h.csv:2"]),
            ("user_id,item_id,rating,timestamp", "a,1,4,", ["timestamp None", "h.csv:2"]),
        ],
    )
    def test_mistakes(self, header: str, line: str | None, words: list[str], data: RatingsData, tmp_path: Path) -> None:
        path = Path(csv(tmp_path / "h.csv", header, [] if line is None else [[line]]))
        with pytest.raises(UserError) as caught:
            self.read(path, data)
        assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_session_world(tmp_path_factory.mktemp("sessions"))
    assert main(["fit", "--config", made.config, *LEAN]) == 0
    return made


class TestSessions:
    def test_the_test_sessions_rank_as_the_kept_row(self, sessions: World, tmp_path: Path) -> None:
        cfg, out = load_config(sessions.config, LEAN), tmp_path / "ranked.parquet"
        predict(cfg, None, out)
        own = pl.read_parquet(out)
        predict(cfg, str(sessions.root / "data/test.jsonl"), out)
        found = pl.read_parquet(out)
        assert found.drop("session_id").equals(own.drop("session_id"))
        assert found["session_id"].unique(maintain_order=True).to_list() == [str(n) for n in range(1, TEST + 1)]
        stages = sessions.run / "stages"
        kept = load_file(stages / "rows/ppo/ranks.safetensors")["test"][0, 0]
        test = load_file(stages / "sessions/parts.safetensors")["test"]
        actions = HintPolicy.load(sessions.run / "agent").greedy(
            load_file(stages / "states/states.safetensors")["states"][test]
        )
        hints = ["", *HintBase.load(sessions.run / "hints.json").texts]
        lines = [json.loads(line) for line in (sessions.root / "data/test.jsonl").open()]
        for n, line in enumerate(lines):
            one = found.filter(pl.col("session_id") == str(n + 1))
            assert sorted(one["item_id"].cast(int)) == sorted(line["candidates"])
            assert one["rank"].to_list() == [*range(1, len(one) + 1)]
            assert one["score"].n_unique() == len(one)  # without ties a rank is no matter of chance
            assert one.filter(pl.col("item_id") == str(line["target"]))["rank"].item() == int(kept[n])
            assert set(one["hint"]) == {hints[int(actions[n])]}
            assert one["title"].to_list() == [f"film{item}" for item in one["item_id"]]

    def test_the_same_sessions_as_tables(
        self, sessions: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cfg, out = load_config(sessions.config, LEAN), tmp_path / "ranked.parquet"
        made = [("b", [9, 4], [1, 30, 17]), ("a", [9, 9], [17, 30])]  # of different lengths
        lines = [json.dumps({"session_id": n, "session": s, "candidates": c}) for n, s, c in made]
        (tmp_path / "s.jsonl").write_text("\n".join(lines) + "\n")
        predict(cfg, str(tmp_path / "s.jsonl"), out)
        wanted = pl.read_parquet(out)
        monkeypatch.setattr(TitleScorer, "_forward", never)  # the store has it all now
        assert wanted["session_id"].to_list() == ["b"] * 3 + ["a"] * 2
        rows = [(n, i, role) for n, s, c in made for role, ids in (("history", s), ("candidate", c)) for i in ids]
        table = pl.DataFrame(rows, schema=["session_id", "item_id", "role"], orient="row")
        table.write_csv(tmp_path / "s.csv")
        table.write_parquet(tmp_path / "s.parquet")
        for name in ("s.csv", "s.parquet"):
            predict(cfg, str(tmp_path / name), out)
            assert pl.read_parquet(out).equals(wanted)

    def test_where_a_session_stands_in_the_file_does_not_matter(self, sessions: World, tmp_path: Path) -> None:
        """Where the prompt shows the candidates, their order matters: it is the session's own. No hint is used here."""
        shown = ["ranking.templates=[list_v1]", "ranking.priors=[0.0]", "ranking.lengths=[0.0]"]
        line = [*LEAN, *shown, "evaluation.rows.ppo=false", f"run.dir={sessions.root}/shown"]
        assert main(["fit", "--config", sessions.config, *line]) == 0
        with RunFolder(sessions.root / "shown") as run:
            opened = SessionPredictor(load_config(sessions.config, line), run)
        lines = [json.dumps({"session": [n, n + 1], "candidates": [40, 50, 30, 20, 55, 60]}) for n in range(1, 5)]
        found = []
        for order in (1, -1):
            (tmp_path / "s.jsonl").write_text("\n".join(lines[::order]))
            found.append(opened.rank(read_sessions(tmp_path / "s.jsonl", opened.items)))
        parts = [[one for _, one in table.group_by("session_id", maintain_order=True)] for table in found]
        for one, other in zip(parts[0], parts[1][::-1], strict=True):
            assert one["item_id"].to_list() == other["item_id"].to_list()
            assert one["score"].to_list() == pytest.approx(other["score"].to_list(), abs=1e-4)
        assert set(found[0]["hint"]) == {""}

    def test_a_history_beside_them_is_refused(self, sessions: World, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="--history is for"):
            predict(load_config(sessions.config, LEAN), None, tmp_path / "x.parquet", "history.csv")

    @pytest.mark.parametrize(
        ("name", "text", "words"),
        [
            ("s.jsonl", "", ["no session", "s.jsonl"]),
            ("s.jsonl", '{"session": [1], "candidates": [2]}\n{broken', ["malformed", "s.jsonl:2"]),
            ("s.jsonl", "[1, 2]", ["malformed", "s.jsonl:1"]),
            ("s.jsonl", '{"session": [1]}', ["malformed", "s.jsonl:1", "candidates"]),
            ("s.jsonl", '{"session": [1.5], "candidates": [2]}', ["malformed", "s.jsonl:1"]),
            ("s.jsonl", '{"session": [], "candidates": [2]}', ["empty history", "s.jsonl:1"]),
            ("s.jsonl", '{"session": [1], "candidates": []}', ["no candidates", "s.jsonl:1"]),
            ("s.jsonl", '{"session": [77], "candidates": [2]}', ["unknown item '77'", "s.jsonl:1"]),
            ("s.jsonl", '{"session": [""], "candidates": [2]}', ["unknown item ''", "s.jsonl:1"]),
            ("s.jsonl", '{"session": [1], "candidates": [2, 3, "2"]}', ["'2' stands there twice", "s.jsonl:1"]),
            (
                "s.jsonl",
                '{"session_id": "a", "session": [1], "candidates": [2]}\n' * 2,
                ["taken", "jsonl:2", "jsonl:1"],
            ),
            ("s.csv", "session_id,item_id\na,1", ["no column role", "--input"]),
            ("s.csv", "session_id,item_id,role\na,1,history\na,2,target", ["unknown role 'target'", "s.csv:3"]),
            ("s.csv", "session_id,item_id,role\na,1,history\na,77,candidate", ["unknown item '77'", "s.csv:3"]),
            ("s.csv", "session_id,item_id,role\na,1,history\na,,candidate", ["unknown item ''", "s.csv:3"]),
            ("s.csv", "session_id,item_id,role\na,1,history", ["no candidates", "s.csv:2"]),
            ("s.csv", "session_id,item_id,role\nb,2,candidate", ["empty history", "s.csv:2"]),
            ("s.csv", "session_id,item_id,role\na,1,history\na,2,candidate\na,2,candidate", ["twice", "s.csv:4"]),
            ("none.jsonl", None, ["not found", "--input"]),
            ("none.csv", None, ["not found", "--input"]),
        ],
    )
    def test_mistakes(self, name: str, text: str | None, words: list[str], tmp_path: Path) -> None:
        items = pl.DataFrame({"item_id": ["", "1", "2", "3"], "title": ["", "a", "b", "c"]})
        if text is not None:
            (tmp_path / name).write_text(text + "\n")
        with pytest.raises(UserError) as caught:
            read_sessions(tmp_path / name, items)
        assert all(word in str(caught.value) for word in words), str(caught.value)
