"""The parts that the README shows how to write, word for word: each is short, and each works in a run."""

import json
import re
from pathlib import Path

import polars as pl
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import callbacks
from lit_rec.cli import main
from lit_rec.config import instantiate, load_config
from lit_rec.data.canonical import sample_users
from tests.worlds import BARE, World, assert_told, make_world

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PARTS = dict(re.findall(r"```python\n# callbacks/(\w+)\.py\n(.*?)```", README, re.DOTALL))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("parts"))


@pytest.fixture(autouse=True)
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts as files of the package callbacks."""
    folder = tmp_path / "callbacks"
    folder.mkdir()
    for name, code in PARTS.items():
        (folder / f"{name}.py").write_text(code)
    monkeypatch.setattr(callbacks, "__path__", [*callbacks.__path__, str(folder)])


def test_ones_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder and the configuration of the README, word for word, as far as no model is needed."""
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n# make_teas.py\n(.*?)```", README, re.DOTALL)
    config = re.search(r"```yaml\n# teas.yaml\n(.*?)```", README, re.DOTALL)
    assert code is not None
    assert config is not None
    exec(compile(code[1], "make_teas.py", "exec"), {})
    Path("teas.yaml").write_text(config[1])
    assert main(["validate-data", "--config", "teas.yaml"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    wanted = ["users 60", "items 60 teas", "ratings 1,440", "2024-05-01 to 2024-05-24", "train 48 users"]
    wanted += ["You know teas well.", "Consider kind, notes,", "user's tea preferences?", "none failed"]
    for words in wanted:
        assert words in out, out
    assert "FAIL" not in out
    with Path("teas/interactions.csv").open("a") as file:
        file.write("u1,t1,9,2024-06-01\n")
    where = "item t1 in teas/interactions.csv:1442"
    assert_told(capsys, main(["validate-data", "--config", "teas.yaml"]), "ratings outside the scale", where)
    assert main(["show-config", "--config", "teas.yaml"]) == 0
    assert "item_noun: tea\n" in capsys.readouterr().out


@pytest.mark.registry
def test_who_is_asked_about_takes_part_in_the_quickstart() -> None:
    """It has a sample of the users, and `lit_rec.load` knows nobody else."""
    calls = re.findall(r"recommender\.\w+\(\"(\d+)\"(?:, (\[.*?\]))?\)", README)
    assert len(calls) == 2
    cfg = load_config(Path(__file__).parents[1] / "configs/quickstart.yaml")
    data = sample_users(instantiate(cfg.data, "data").load(), cfg.users, cfg.seed)
    for user, items in calls:
        assert user in set(data.users["user_id"])
        assert set(json.loads(items or "[]")) <= set(data.items["item_id"])


def test_the_parts_are_short() -> None:
    assert {*PARTS} == {"pointwise", "first_hit", "answer_words", "my_shop"}
    assert max(code.count("\n") for code in PARTS.values()) < 30


def test_reranker_reward_and_callback_in_one_run(world: World) -> None:
    own = ["reranker.architecture=callbacks.pointwise.Pointwise", "+reranker.args.hidden=8"]
    own += ["reward.metric=callbacks.first_hit.first_hit", "reward.k=3"]
    own += ["+callbacks.words._target_=callbacks.answer_words.AnswerWords"]
    line = ["--config", world.config, *BARE, *own]
    assert main(["fit", *line]) == 0
    assert {r["reranker"] for r in json.loads((world.run / "results.json").read_text())} == {"pointwise"}
    rewards = pl.read_parquet(world.run / "stages/fold_0/zero_shot/rewards/rewards.parquet")["reward"]
    possible = {0.0, 1.0, 1 / 2, 1 / 3}  # of one list; a user's reward is the mean over the lists
    assert rewards.is_between(0, 1).all()
    assert len(set(rewards) - possible) > 0
    events = EventAccumulator(str(world.run / "tensorboard/fold_0"))
    events.Reload()
    texts = pl.read_parquet(world.run / "stages/fold_0/round_1/answers/answers.parquet")["text"]
    expected = sum(len(text.split(" ")) for text in texts) / len(texts)
    assert [(e.step, e.value) for e in events.Scalars("rounds/words")] == [(1, pytest.approx(expected))]
    assert main(["predict", *line, "--output", str(world.root / "ranked.parquet")]) == 0  # the reranker loads again


def test_the_reward_is_what_it_says() -> None:
    from lit_rec.extensions import find

    first_hit = find("callbacks.first_hit.first_hit", "reward.metric")
    logits = torch.tensor([[3.0, 2, 1, 9], [1, 2, 3, 0], [1, 2, 3, 4]])
    labels = torch.tensor([[0.0, 1, 0, 1], [1, 0, 0, 0], [1, 0, 0, 0]])
    mask = torch.tensor([[True, True, True, False], [True] * 4, [True] * 4])
    assert first_hit(logits, labels, mask, 3).tolist() == pytest.approx([1 / 2, 1 / 3, 0])


def test_a_data_set(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = world.root / "data"
    read = {"separator": "\t", "infer_schema": False}
    ratings = pl.read_csv(source / "tiny.inter", **read)
    ratings.rename(lambda c: c.partition(":")[0]).write_csv(tmp_path / "ratings.csv")
    items = pl.read_csv(source / "tiny.item", **read).rename(lambda c: c.partition(":")[0])
    items.select("item_id", "title", kinds=pl.col("genres").str.replace_all(" ", "|")).write_csv(tmp_path / "items.csv")
    experiment = Path(world.config).read_text()
    data = f"data:\n  _target_: callbacks.my_shop.MyShop\n  root: {tmp_path}\n"
    mine = re.sub(r"data:\n(  .*\n)+", data, experiment)
    (tmp_path / "mine.yaml").write_text(mine)
    run = [f"run.dir={tmp_path}/run", "policy.rounds=0"]
    off = [f"evaluation.controls.{name}=false" for name in ("shuffled", "zero_shot")]
    assert main(["fit", "--config", str(tmp_path / "mine.yaml"), *run, *off]) == 0
    assert {r["dataset"] for r in json.loads((tmp_path / "run/results.json").read_text())} == {"my_shop"}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("reranker.architecture=callbacks.pointwise.Pointwize", ["Pointwize", "reranker.architecture"]),
        ("reranker.architecture=callbacks.nowhere.Mine", ["callbacks.nowhere", "callbacks/nowhere.py"]),
        ("reranker.architecture=callbacks.pointwise.Tensor", ["nothing of your own"]),
        ("reranker.architecture=os.path.join", ["os.path.join", "dlcm", "callbacks.mine"]),
        ("reward.metric=callbacks.first_hit.torch", ["nothing of your own", "reward.metric"]),
        ("reward.metric=callbacks.first_hit.first_hitt", ["first_hitt", "reward.metric"]),
        ("reward.metric=subprocess.run", ["subprocess.run", "ndcg"]),
    ],
)
def test_what_is_not_there_or_not_ones_own_is_told(
    world: World, override: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["fit", "--config", world.config, *BARE, override, f"run.dir={tmp_path}/run"]
    assert_told(capsys, main(line), *words)
    assert not (tmp_path / "run" / "answers").exists()  # told before anything is paid for
