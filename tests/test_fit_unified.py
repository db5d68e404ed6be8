"""Whole runs of the unified recipe on a tiny world: hints in the prompts, and an agent paid by the reranker."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lit_rec.agent.hints import HintBase
from lit_rec.agent.policy import HintPolicy
from lit_rec.cli import main
from lit_rec.config import load_config
from lit_rec.llm.sampler import Sampler
from lit_rec.recipes.ground import Ground
from lit_rec.recipes.unified import UnifiedLoop
from lit_rec.recipes.user_hints import UserHints
from lit_rec.rerankers.rewards import score_lists
from lit_rec.run.folder import RunFolder
from tests.worlds import BARE, USERS, World, assert_told, make_unified_world, make_world

CONTROLS = ["no_knowledge", "item_only", "history_only"]
STATES = ["zero_shot", "hinted_1", "round_1", "hinted_2", "round_2"]
LEAN = [*BARE, "policy.rounds=2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_unified_world(tmp_path_factory.mktemp("unified"))
    assert main(["fit", "--config", made.config]) == 0
    return made


@pytest.fixture(scope="module")
def loop(world: World) -> Iterator[UnifiedLoop]:
    """A copy of the finished run, opened again: an open run is locked."""
    shutil.copytree(world.run, world.root / "opened", ignore=shutil.ignore_patterns(".lock"))
    cfg = load_config(world.config, [f"run.dir={world.root}/opened"])
    with RunFolder(cfg.run.dir) as run:
        ground = Ground(cfg, run)
        yield UnifiedLoop(ground, ground.keep_split(0), 0)


def stages(world: World) -> Path:
    return world.run / "stages/fold_0"


def results(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "results.json").read_text())


def base(world: World, number: int) -> HintBase:
    return HintBase.load(stages(world) / f"hints/round_{number}/hints/hints.json")


def picked(world: World, number: int, users: list[int]) -> list[str]:
    """What the kept agent picks by the users' history vectors, as words behind the prompt."""
    policy = HintPolicy.load(stages(world) / f"hints/round_{number}/agent")
    history = load_file(world.run / "stages/knowledge/vectors.safetensors")["history"]
    texts = ["", *(f" Hint: {text}" for text in base(world, number).texts)]
    return [texts[action] for action in policy.greedy(history[users]).tolist()]


class TestWhatARunLeaves:
    def test_every_part_of_the_loop_has_a_row(self, world: World) -> None:
        found = results(world.run)
        states = ["shuffled", *STATES, "random_pairs"]
        assert {r["row"] for r in found} == {*CONTROLS, *(f"{s}{kind}" for s in states for kind in ("", "_both"))}
        assert {r["task"] for r in found} == {"reranking"}

    def test_rounds(self, world: World) -> None:
        rounds = json.loads((world.run / "rounds.json").read_text())
        assert [(one["round"], one["name"]) for one in rounds] == [
            (0, "zero_shot"),
            (0, "hinted_1"),
            (1, "round_1"),
            (1, "hinted_2"),
            (2, "round_2"),
            (1, "random_pairs"),
        ]
        assert [("pairs" in one) for one in rounds] == [name.startswith("hinted") for _, name in _named(rounds)]

    def test_the_base_grows(self, world: World) -> None:
        first, second = base(world, 1), base(world, 2)
        assert first.kept
        assert len(second.kept) > len(first.kept)
        assert second.texts[: len(first.kept)] == first.texts
        assert {h.round for h in second.hints} == {1, 2}
        assert (world.run / "hints.json").read_bytes() == (
            stages(world) / "hints/round_2/hints/hints.json"
        ).read_bytes()

    def test_prompts_hold_the_hint_that_the_agent_picks(self, world: World, loop: UnifiedLoop) -> None:
        ids = dict(loop.ground.data.users.with_row_index("row").select("user_id", "row").rows())
        several = set()
        for number in (1, 2):
            pairs = pl.read_parquet(stages(world) / f"hinted_{number}/pairs_best_worst/pairs.parquet")
            users = [int(ids[name]) for name in pairs["user_id"]]
            wanted = picked(world, number, users)
            for user, prompt, words in zip(users, pairs["prompt"], wanted, strict=True):
                assert prompt[-1]["content"] == loop.ground.prompts.user(user)[-1]["content"] + words
            several |= set(wanted)
        assert len(several) > 1

    def test_answers(self, world: World) -> None:
        for state in STATES:
            answers = pl.read_parquet(stages(world) / f"{state}/answers/answers.parquet")
            counts = answers.group_by("user", "split").len()
            assert len(counts) == USERS
            wanted = 3 if state.startswith("hinted") else 1  # pairs are made of those alone
            assert set(counts.filter(pl.col("split") == "train")["len"]) == {wanted}
            assert set(counts.filter(pl.col("split") != "train")["len"]) == {1}
            rewards = pl.read_parquet(stages(world) / f"{state}/rewards/rewards.parquet")
            assert "test" not in rewards["split"].to_list()

    def test_hints_and_policy_both_change_the_answers(self, world: World) -> None:
        texts = [
            pl.read_parquet(stages(world) / f"{state}/answers/answers.parquet").filter(pl.col("sample") == 0)["text"]
            for state in STATES
        ]
        assert all((before != after).any() for before, after in zip(texts, texts[1:], strict=False))

    def test_curves(self, world: World) -> None:
        def tags(name: str) -> set[str]:
            events = EventAccumulator(str(world.run / "tensorboard" / name))
            events.Reload()
            return set(events.Tags()["scalars"])

        assert {"losses/policy_loss", "losses/approx_kl", "val/reward", "hints/kept"} <= tags("fold_0/hints/ppo")
        assert "rounds/heldout_reward" in tags("fold_0")
        assert {"rounds/heldout_reward", "rounds/tie_rate"} <= tags("fold_0_hinted")


def _named(rounds: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(one["round"], one["name"]) for one in rounds]


# --- against counting by hand -----------------------------------------------------------------------------------------


def reward_by_hand(loop: UnifiedLoop, user: int, text: str) -> tuple[float, list[Tensor]]:
    """Mean NDCG@5 of a user's lists with this text as the knowledge, and every list's order of candidates."""
    model, lists = loop.judge.model(), loop.ground.lists
    module = model.fitted[int(model.reranker_of(torch.tensor([user])))].module
    held = module.knowledge.user_vectors.clone()
    module.knowledge.user_vectors[user] = loop.ground.encoder.encode([text])[0]
    index = lists.of_users(torch.tensor([user]))
    logits = score_lists(module, lists, index)
    module.knowledge.user_vectors = held
    values, orders = [], []
    for row, scores in zip(index.tolist(), logits, strict=True):
        order = scores.argsort(descending=True, stable=True)
        gains = lists.labels[row][order].tolist()
        best = sorted(gains, reverse=True)
        dcg, ideal = (sum(g / math.log2(n + 2) for n, g in enumerate(one[:5])) for one in (gains, best))
        values.append(dcg / ideal if ideal else 0.0)
        orders.append(order)
    return sum(values) / len(values), orders


def test_rewards_of_hints_are_what_the_reranker_gains(world: World, loop: UnifiedLoop) -> None:
    found = load_file(stages(world) / "hints/round_1/rewards/matrix.safetensors")
    users, gains = found["sessions"], found["gains"]
    assert set(users.tolist()) <= {*loop.splits.train.tolist(), *loop.splits.validation.tolist()}
    assert gains.shape == (len(users), 1 + len(base(world, 1).kept))
    assert (gains[:, 0] == 0).all()
    loop.llm.reset_adapter()
    for row in (0, 3, len(users) - 1):
        user = int(users[row])
        values = []
        for hint in (None, *base(world, 1).texts):
            prompt = loop.ground.prompts.user(user)
            prompt[-1]["content"] += f" Hint: {hint}" if hint else ""
            values.append(reward_by_hand(loop, user, loop.llm.answers([prompt], [1])[0][0].text)[0])
        expected = torch.tensor([value - values[0] for value in values])
        torch.testing.assert_close(gains[row], expected, atol=1e-5, rtol=0)
    assert loop.ground.store.generated == 0  # the very prompts of the run, so all was in the store
    assert (gains[:, 1:] != 0).any()


def test_reflection_is_on_the_users_who_are_served_worst(world: World) -> None:
    for number, state in ((1, "zero_shot"), (2, "round_1")):
        rewards = pl.read_parquet(stages(world) / f"{state}/rewards/rewards.parquet")
        train = rewards.filter((pl.col("split") == "train") & (pl.col("sample") == 0)).sort("reward", "user")
        hints = [hint for hint in base(world, number).hints if hint.round == number]
        assert {hint.session for hint in hints} <= set(train["user"].head(8).to_list())
        talks = json.loads((stages(world) / f"hints/round_{number}/hints/conversations.json").read_text())
        made = json.loads((stages(world) / f"hints/round_{number}/hints/manifest.json").read_text())
        assert made["counts"]["errors"] == len(train.filter(pl.col("reward") < 1))  # every list holds something liked
        assert "errors" not in made["key"]
        said = dict(train.select("user", "text").rows())
        assert [talk[1]["content"] for talk in talks] == [
            said[user] for user in sorted(train["user"].head(8).to_list())
        ]


@pytest.mark.parametrize("metric", ["ndcg", "soft"])
def test_lists_without_anything_liked_say_nothing_of_who_is_served_badly(
    loop: UnifiedLoop, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    """As protocol kar keeps them: they count 0, or the best there is, and no text can change that."""
    lists, train = loop.ground.lists, loop.splits.train
    rewards = loop.rewards("zero_shot").filter((pl.col("split") == "train") & (pl.col("sample") == 0))
    said, labels = dict(rewards.select("user", "text").rows()), lists.labels.clone()
    of_user = {user: lists.of_users(torch.tensor([user])) for user in train.tolist()}
    for user in train[:6].tolist():  # most of their lists lose what was liked
        labels[of_user[user][1:]] = 0
    nothing, perfect = train[6:8].tolist()
    labels[of_user[nothing]] = 0
    _, orders = reward_by_hand(loop, perfect, said[perfect])
    labels[of_user[perfect]] = 0
    labels[of_user[perfect][0], orders[0][:2]] = 1  # what stands first is what is liked
    monkeypatch.setattr(loop.ground, "lists", replace(lists, labels=labels))
    cfg = loop.cfg.copy()
    cfg.reward.metric, cfg.reflection.sessions = metric, 4
    monkeypatch.setattr(loop.judge, "cfg", cfg)
    users = rewards["user"].to_torch().long()
    vectors = loop.user_vectors("zero_shot", "answer")[users]
    kept = rewards.with_columns(pl.Series("reward", loop.judge.score(loop.judge.model(), users, vectors)))
    hints = UserHints(loop)
    monkeypatch.setattr(hints, "cfg", cfg)
    monkeypatch.setattr(hints, "_present", lambda number: kept)

    means: dict[int, float] = {}
    for user, before in kept.select("user", "reward").rows():
        share = (labels[of_user[user]].sum(1) > 0).float().mean()
        if user not in (nothing, perfect) and (metric == "soft" or before / share < 1 - 1e-6):
            means[user] = float(before / share)  # lists without anything liked count 0 in both metrics
    found, count = hints.errors(1)
    assert count == len(means)
    assert found.tolist() == sorted(sorted(means, key=lambda user: means[user])[:4])
    liked = set(loop.ground.data.items["title"].gather(lists.items[labels > 0].tolist()))
    for mistake in (hints.mistake(user, 1) for user in means):
        assert mistake.answer
        assert mistake.target in liked


def test_a_mistake_is_the_worst_list_and_what_stood_above_a_better_item(loop: UnifiedLoop) -> None:
    users, _ = loop.hints.errors(1)
    lists, titles = loop.ground.lists, loop.ground.data.items["title"]
    for user in users.tolist():
        mistake = loop.hints.mistake(user, 1)
        _, orders = reward_by_hand(loop, user, mistake.said)
        index = lists.of_users(torch.tensor([user])).tolist()
        values = []
        for row, order in zip(index, orders, strict=True):
            liked = lists.labels[row][order].tolist()
            best = sorted(liked, reverse=True)
            dcg, ideal = (sum(g / math.log2(n + 2) for n, g in enumerate(one[:5])) for one in (liked, best))
            values.append(dcg / ideal if ideal else 2.0)
        worst = min(range(len(index)), key=lambda n: (round(values[n], 6), n))
        ranked = [titles[i] for i in lists.items[index[worst]][orders[worst]].tolist()]
        liked = lists.labels[index[worst]][orders[worst]].tolist()
        last = max(n for n, good in enumerate(liked) if good)
        assert mistake.target == ranked[last]
        assert list(mistake.answer) == [t for t, good in zip(ranked[:last], liked[:last], strict=True) if not good][:3]
        assert "".join(mistake.titles) == loop.ground.prompts.history_text(user).replace("; ", "")


# --- again, and otherwise ---------------------------------------------------------------------------------------------


def test_a_second_start_asks_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (world.run / name).read_bytes() for name in ("results.json", "hints.json", "rounds.json")}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the LLM was asked again")

    monkeypatch.setattr(Sampler, "sample", refuse)
    again = world.root / "again"
    assert main(["fit", "--config", world.config, f"run.dir={again}", f"run.answers={world.run}/answers"]) == 0
    for name in ("results.json", "hints.json"):
        assert (again / name).read_bytes() == before[name]
    assert main(["fit", "--config", world.config]) == 0
    assert {name: (world.run / name).read_bytes() for name in before} == before


def test_hints_that_are_made_again_are_those_of_their_round(world: World) -> None:
    """The advice on a damaged stage, followed: the hints of round 2 are not written by the untrained LLM."""
    run = world.root / "damaged"
    line = ["fit", "--config", world.config, *LEAN, f"run.dir={run}", f"run.answers={run}/answers"]
    assert main(line) == 0
    folder = run / "stages/fold_0/hints/round_2"
    files = [folder / "hints/conversations.json", folder / "hints/hints.json", folder / "rewards/matrix.safetensors"]
    before = [file.read_bytes() for file in files]
    for made in (folder / "hints", folder / "rewards", run / "answers"):
        shutil.rmtree(made)
    assert main(line) == 0
    assert [file.read_bytes() for file in files] == before


def test_without_hints_it_is_the_single_recipe(world: World, tmp_path: Path) -> None:
    single = make_world(tmp_path)
    assert main(["fit", "--config", single.config, *LEAN]) == 0
    none = ["agent.pick=none", f"run.dir={tmp_path}/none"]
    assert main(["fit", "--config", world.config, *LEAN, *none]) == 0
    assert (tmp_path / "none" / "results.json").read_bytes() == (single.run / "results.json").read_bytes()
    assert not (tmp_path / "none" / "hints.json").exists()


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("random", ["agent.pick=random"]),
        ("best_fixed", ["agent.pick=best_fixed", "policy.rounds=1"]),
        ("full_information", ["agent.pick=full_information", "policy.rounds=1"]),
        ("online", ["agent.rewards=online", "knowledge.encode=both", "evaluation.folds=2", "policy.rounds=1"]),
        ("soft", ["reward.metric=soft", "knowledge.encode=kar", "evaluation.controls.best_of_n=true"]),
    ],
)
def test_variants(world: World, name: str, overrides: list[str]) -> None:
    run = world.root / name
    assert main(["fit", "--config", world.config, *LEAN, *overrides, f"run.dir={run}"]) == 0
    last = 1 if "policy.rounds=1" in overrides else 2
    found = {r["row"] for r in results(run)}
    assert {f"hinted_{last}", f"round_{last}"} <= found
    pairs = pl.concat(pl.read_parquet(file) for file in run.rglob(f"hinted_{last}/pairs_best_worst/pairs.parquet"))
    hints = {prompt[-1]["content"].partition(" Hint: ")[2] for prompt in pairs["prompt"]}
    kept = {text for file in run.rglob(f"round_{last}/hints/hints.json") for text in HintBase.load(file).texts}
    assert hints <= {*kept, ""}
    if name == "random":
        assert len(hints) > 1
        assert "" not in hints
    if name == "best_fixed":
        gains = load_file(run / f"stages/fold_0/hints/round_{last}/rewards/matrix.safetensors")["gains"]
        train = len(load_file(run / "stages/fold_0/split/users.safetensors")["train"])
        assert hints == {HintBase.load(run / "hints.json").texts[int(gains[:train, 1:].mean(0).argmax())]}
    if name == "online":
        assert not list(run.rglob("hints/round_1/rewards"))
        assert len(list(run.rglob("hints/round_1/agent"))) == 2  # one per fold
    if name == "soft":
        assert "best_of_n" in found


def test_without_a_kept_hint_the_loop_goes_on(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    run = world.root / "no_hint_helps"
    assert main(["fit", "--config", world.config, *BARE, "reflection.min_gain=10", f"run.dir={run}"]) == 0
    assert "no hint of round 1 was kept" in " ".join(capsys.readouterr().out.split())
    pairs = pl.read_parquet(run / "stages/fold_0/hinted_1/pairs_best_worst/pairs.parquet")
    assert all("Hint:" not in prompt[-1]["content"] for prompt in pairs["prompt"])


def test_predict_and_test_read_the_run(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    out = world.root / "ranked.parquet"
    assert main(["predict", "--config", world.config, "--output", str(out)]) == 0
    ranked = pl.read_parquet(out)
    texts = pl.read_parquet(stages(world) / "round_2/answers/answers.parquet")
    assert set(ranked["knowledge"]) <= set(texts["text"])
    assert main(["test", "--config", world.config]) == 0
    assert "final reranker: round_2" in capsys.readouterr().out


def test_an_agent_is_not_taken_for_one_of_another_kind(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["fit", "--config", world.config, "agent.pick=full_information"])
    assert_told(capsys, code, "another configuration", "agent.pick: ppo -> full_information")
