"""Whole runs of the session recipe on a tiny world: what they leave behind, what they cost again, and every variant."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rec.agent.hints import HintBase
from lit_rec.agent.policy import HintPolicy
from lit_rec.cli import main
from lit_rec.config import load_config
from lit_rec.llm.sampler import Sampler
from lit_rec.llm.scoring import TitleScorer
from lit_rec.recipes import agents
from lit_rec.recipes.session_ground import SessionGround
from lit_rec.recipes.session_hints import SessionHints
from lit_rec.run.folder import RunFolder
from lit_rec.run.results import FIELDS
from tests.session_worlds import CANDIDATES, TEST, make_session_world
from tests.worlds import World, assert_told

ROWS = ("random", "popularity", "item_knn", "sasrec", "empty_prompt", "no_hint", "random_hint", "best_fixed_hint")
ROWS = (*ROWS, "ppo", "full_information", "oracle")
# One round, one seed, one way of asking: for variants of which only the middle matters.
BARE = ["agent.rounds=1", "agent.seeds=1", "ranking.templates=[favorites_v1]", "ranking.priors=[0.0]"]
BARE = [*BARE, "ranking.lengths=[0.0]", "evaluation.rows.sasrec=false"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_session_world(tmp_path_factory.mktemp("sessions"))
    assert main(["fit", "--config", made.config]) == 0
    return made


def results(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "results.json").read_text())


def means(run: Path, metric: str, split: str = "test") -> dict[str, float]:
    return {r["row"]: r["mean"] for r in results(run) if (r["metric"], r["split"]) == (metric, split)}


def stage(world: World, name: str, run: str = "run") -> Path:
    return world.root / run / "stages" / name


class TestWhatARunLeaves:
    def test_results(self, world: World) -> None:
        found = results(world.run)
        assert all(tuple(r) == FIELDS for r in found)
        assert {r["row"] for r in found} == {*ROWS}
        metrics = {"hr@2", "hr@5", "ndcg@2", "ndcg@5", f"mrr@{CANDIDATES}"}
        assert len(found) == len(ROWS) * len(metrics) * 2
        for r in found:
            assert (r["task"], r["dataset"], r["reranker"], r["convention"]) == (
                "session-ranking",
                "tiny",
                "tiny",
                "standard",
            )
            low, high = r["ci95"]
            assert low <= r["mean"] <= high
            assert 0 <= r["mean"] <= 1
            assert r["unit"] == "session"
            assert r["n"] == (TEST if r["split"] == "test" else 8)
            assert r["seeds"] == (2 if r["row"] in ("ppo", "full_information") else 1)

    def test_lines_that_must_hold(self, world: World) -> None:
        for metric in ("hr@2", "ndcg@5", f"mrr@{CANDIDATES}"):
            for split in ("validation", "test"):
                mean = means(world.run, metric, split)
                hinted = ("no_hint", "random_hint", "best_fixed_hint", "ppo", "full_information")
                assert mean["oracle"] >= max(mean[row] for row in hinted) - 1e-6
        assert means(world.run, "hr@2")["random"] == pytest.approx(2 / CANDIDATES, abs=1e-6)

    def test_hints(self, world: World) -> None:
        base = HintBase.load(world.run / "hints.json")
        assert base.kept
        assert {hint.round for hint in base.hints} == {1, 2}
        for hint in base.kept:
            assert hint.rank_before is not None
            assert hint.rank_after is not None
            assert hint.rank_after < hint.rank_before
            assert hint.others >= 3
        first = HintBase.load(stage(world, "round_1/hints") / "hints.json")
        assert base.texts[: len(first.texts)] == first.texts

    def test_agent(self, world: World) -> None:
        policy = HintPolicy.load(world.run / "agent")
        assert policy.n_actions == 1 + len(HintBase.load(world.run / "hints.json").kept)

    def test_rewards_are_the_gains_of_the_ranks(self, world: World) -> None:
        """The matrix from its ranks, by hand."""
        found = load_file(stage(world, "round_2/rewards") / "matrix.safetensors")
        value = 1 / torch.log2(found["ranks"].double() + 1)
        assert torch.allclose(found["gains"], (value - value[:, :1]).float())
        assert bool((found["gains"] != 0).any())
        assert bool((found["gains"][:, 0] == 0).all())

    def test_rows_from_the_matrix(self, world: World) -> None:
        """Random hint and oracle from the test sessions' ranks, by hand."""
        ranks = load_file(stage(world, "matrix/test") / "matrix.safetensors")["ranks"]
        mean = means(world.run, "hr@2")
        assert mean["oracle"] == pytest.approx((ranks.min(1).values <= 2).float().mean().item(), abs=1e-6)
        assert mean["random_hint"] == pytest.approx((ranks[:, 1:] <= 2).float().mean().item(), abs=1e-6)
        assert mean["no_hint"] == pytest.approx((ranks[:, 0] <= 2).float().mean().item(), abs=1e-6)
        rewards = load_file(stage(world, "round_2/rewards") / "matrix.safetensors")
        train = len(rewards["gains"]) - 8
        best = 1 + int(rewards["gains"][:train, 1:].mean(0).argmax())
        assert mean["best_fixed_hint"] == pytest.approx((ranks[:, best] <= 2).float().mean().item(), abs=1e-6)

    def test_report(self, world: World) -> None:
        text = (world.run / "report.html").read_text()
        assert all(row in text for row in ROWS)
        assert "http://" not in text.replace("http://www.w3.org", "")
        assert text.count("<script") == 1  # the page's own, see test_report_search.py

    def test_tensorboard(self, world: World) -> None:
        def tags(name: str) -> dict[str, Any]:
            events = EventAccumulator(str(world.run / "tensorboard" / name))
            events.Reload()
            return events.Tags()

        scalars = tags("ppo")["scalars"]
        names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance")
        assert {f"losses/{name}" for name in names} <= {*scalars}
        assert {"charts/reward", "val/reward", "hints/kept", "hints/written"} <= {*scalars}
        assert "test/hr@5" in tags("rows/oracle")["scalars"]


class TestAgain:
    def test_asks_the_llm_nothing(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither when all stages are there, nor when only the answers are."""

        def never(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("the LLM was asked")

        monkeypatch.setattr(Sampler, "sample", never)
        monkeypatch.setattr(TitleScorer, "_forward", never)
        before = (world.run / "results.json").read_bytes()
        for arguments in ([], ["--fresh"]):
            assert main(["fit", "--config", world.config, *arguments]) == 0
            assert (world.run / "results.json").read_bytes() == before

    def test_another_configuration_is_refused(self, world: World, capsys: pytest.CaptureFixture[str]) -> None:
        for override, key in (
            ("reflection.hints=2", "hints"),
            ("agent.lr=1e-2", "lr"),
            ("ranking.history=3", "history"),
        ):
            assert_told(capsys, main(["fit", "--config", world.config, override]), "another configuration", key)

    @pytest.mark.parametrize("command", ["validate", "test"])
    def test_measures_the_kept_agent(self, world: World, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([command, "--config", world.config]) == 0
        told = capsys.readouterr().out
        assert "ppo" in told
        assert "oracle" in told
        split = "validation" if command == "validate" else "test"
        assert f"{means(world.run, 'ndcg@5', split)['ppo']:.4f}" in told


class TestAgents:
    """All agents of a row are the same procedure: the bases of all rounds in turn, as the first agent had them."""

    def test_the_first_one_is_what_the_others_procedure_gives(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copytree(world.run, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
        monkeypatch.setattr(TitleScorer, "_forward", None)  # nothing new is asked
        cfg = load_config(world.config, [f"run.dir={tmp_path}/run"])
        with RunFolder(cfg.run.dir) as run:
            ground = SessionGround(cfg, run)
            ground.keep_sessions()
            loop = SessionHints(ground)
            agents.train(loop, loop.rounds)
            assert 0 < len(loop.base(1).kept) < len(loop.base(2).kept)
            agents.trained(loop, "ppo", range(1, loop.rounds + 1))(tmp_path)
        again, kept = HintPolicy.load(tmp_path), HintPolicy.load(world.run / "agent")
        assert all(torch.equal(weight, kept.state_dict()[name]) for name, weight in again.state_dict().items())
        curves = (tmp_path / "curves.json").read_text()
        assert json.loads(curves) == json.loads((stage(world, "round_2/agent") / "curves.json").read_text())

    @pytest.mark.parametrize("name", ["ppo_1", "full_information_0", "full_information_1"])
    def test_others_train_as_long(self, world: World, name: str) -> None:
        folder = stage(world, f"agents/{name}")
        assert len(json.loads((folder / "curves.json").read_text())) == 2 * 3


VARIANTS = {
    "online": ["agent.rewards=online", "evaluation.rows.full_information=false"],
    "online_cheap": [
        "agent.rewards=online",
        "evaluation.rows.full_information=false",
        "evaluation.matrix=false",
        "evaluation.rows.oracle=false",
    ],
    "whole_list": ["ranking.shortlist=null", "agent.reward=soft"],
    "mrr": ["agent.reward=mrr", "agent.k=3"],
    "candidates_shown": ["ranking.templates=[list_v1]", "ranking.rotations=2"],
    "baselines": [f"evaluation.rows.{row}=false" for row in ROWS[4:]],
    "no_hints": [f"evaluation.rows.{row}=false" for row in ROWS[6:]],
    "part": ["evaluation.test=10"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(world: World, name: str) -> None:
    run = world.root / f"variant_{name}"
    code = main(["fit", "--config", world.config, *BARE, *VARIANTS[name], f"run.dir={run}"])
    assert code == 0
    found = {r["row"] for r in results(run)}
    off = {o.split(".")[2].split("=")[0] for o in [*BARE, *VARIANTS[name]] if o.startswith("evaluation.rows.")}
    assert found == {*ROWS} - off
    if name == "part":
        assert {r["n"] for r in results(run) if r["split"] == "test"} == {10}
    if name == "no_hints":
        assert not (run / "hints.json").exists()


def test_lists_of_garbage_are_counted_and_rank_last(world: World) -> None:
    """The tiny LLM writes words in a row, which is no list of candidates."""
    run = world.root / "generate"
    generate = ["ranking.method=generate", "ranking.templates=[list_v1]", "ranking.shortlist=null"]
    off = [f"evaluation.rows.{row}=false" for row in ROWS[6:]]
    assert main(["fit", "--config", world.config, *BARE, *generate, *off, f"run.dir={run}"]) == 0
    assert means(run, f"mrr@{CANDIDATES}")["no_hint"] == pytest.approx(1 / CANDIDATES, abs=1e-6)
    assert means(run, "hr@5")["no_hint"] == 0
    assert "100.0%" in (run / "report.html").read_text()


def test_without_a_kept_hint_the_other_rows_stand(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    run = world.root / "no_hint_helps"
    line = ["--config", world.config, *BARE, "agent.rounds=2", "reflection.min_gain=10", f"run.dir={run}"]
    assert main(["fit", *line]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "no hint of round 2 was kept" in told
    assert "these rows are left out: random_hint, best_fixed_hint, ppo, full_information, oracle" in told
    assert {r["row"] for r in results(run)} == {"random", "popularity", "item_knn", "empty_prompt", "no_hint"}
    assert {hint["fate"] for hint in json.loads((run / "hints.json").read_text())["hints"]} != {"kept"}
    assert "does not help" in (run / "report.html").read_text()
    assert main(["test", *line]) == 0
    out = world.root / "exported"
    assert_told(capsys, main(["export", *line, "--output", str(out)]), "no hints to export", "min_gain")
    assert not out.exists()


def test_only_rows_that_need_a_hint_and_none_kept(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    run = world.root / "nothing_left"
    off = [f"evaluation.rows.{row}=false" for row in ROWS[:6] if row != "sasrec"]
    code = main(["fit", "--config", world.config, *BARE, *off, "reflection.min_gain=10", f"run.dir={run}"])
    assert_told(capsys, code, "no hint was kept", "reflection.min_gain")
    assert (run / "answers" / "answers.jsonl").stat().st_size > 0  # nothing that was asked is lost


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", ["train.jsonl:31"]),
        ('{"session": [1, 2], "target": 3, "candidates": []}', ["train.jsonl:31", "candidates"]),
        ('{"session": [1, 2], "target": 3, "candidates": [4, 5]}', ["train.jsonl:31", "target"]),
        ('{"session": [1, 999], "target": 3, "candidates": [3, 5]}', ["train.jsonl:31", "999"]),
    ],
)
def test_a_bad_session_line_is_told(
    tmp_path: Path, world: World, line: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for file in (world.root / "data").iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    with (data / "train.jsonl").open("a") as out:
        out.write(line + "\n")
    arguments = ["fit", "--config", world.config, f"data.root={data}", f"run.dir={tmp_path / 'run'}"]
    assert_told(capsys, main(arguments), *words)
    assert not (tmp_path / "run" / "stages" / "sessions").exists()


def test_choices_are_those_of_the_policy(world: World) -> None:
    """What the report counts as the agent's choices, from the kept policy and the states, by hand."""
    states = load_file(stage(world, "states") / "states.safetensors")["states"]
    parts = load_file(stage(world, "sessions") / "parts.safetensors")
    actions = HintPolicy.load(world.run / "agent").greedy(states[parts["test"]])
    ranks = load_file(stage(world, "matrix/test") / "matrix.safetensors")["ranks"]
    kept = load_file(stage(world, "rows/ppo") / "ranks.safetensors")["test"]
    assert torch.equal(kept[0, 0], ranks.gather(1, actions[:, None]).squeeze(1))
    assert kept.shape == (2, 1, TEST)


def test_agents_of_several_runs_have_seeds_of_their_own() -> None:
    made = [agents.seed_of(DictConfig({"seed": seed}), number) for seed in (1, 2, 3) for number in range(3)]
    assert made[::3] == [1, 2, 3]  # the first agent of a run has the run's
    assert len(set(made)) == 9
