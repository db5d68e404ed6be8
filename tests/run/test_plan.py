"""The plan of a run against the run itself: the stages it leaves, and what the LLM wrote for each."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from lit_rec.cli import main
from lit_rec.config import configs_dir, load_config, load_run
from lit_rec.errors import UserError
from lit_rec.run.folder import MANIFEST
from lit_rec.run.plan import (
    AHEAD,
    BEGUN,
    FINISHED,
    PlannedRun,
    by_name,
    in_words,
    make_plan,
    places,
    render_plan,
    seconds_left,
    total,
)
from lit_rec.run.plan_parts import Sizes, Work
from lit_rec.run.rates import rates, remember
from tests.session_worlds import make_session_world
from tests.worlds import make_unified_world, make_world

FEW_ROWS = [
    *(f"evaluation.controls.{name}=false" for name in ("no_knowledge", "item_only", "history_only", "shuffled")),
    "evaluation.inputs=[answer]",
    "evaluation.rounds=false",
    "reranker.max_epochs=1",
]
RUNS: dict[str, tuple[Any, list[str]]] = {
    "rlrf": (make_world, [*FEW_ROWS, "evaluation.controls.history_shuffled=true", "reward.refresh=true"]),
    "unified": (make_unified_world, [*FEW_ROWS, "evaluation.controls.random_pairs=false", "agent.pick=best_fixed"]),
    "re2llm": (make_session_world, ["evaluation.rows.sasrec=false", "agent.epochs=1"]),
}


def load(name: str, *overrides: str) -> Any:
    return load_config(configs_dir() / name, list(overrides))


def shown(renderable: Any) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module", params=list(RUNS))
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """A finished run's configuration and what its manifests count."""
    make, overrides = RUNS[request.param]
    world = make(tmp_path_factory.mktemp(request.param))
    assert main(["fit", "--config", world.config, "--quiet", *overrides]) == 0
    stages = world.run / "stages"
    found = {str(p.parent.relative_to(stages)): json.loads(p.read_text())["counts"] for p in stages.rglob(MANIFEST)}
    return load_run(world.run), found


def sizes_of(made: dict[str, Any]) -> Sizes:
    counts = made.get("fold_0/split") or made["sessions"]
    return Sizes(counts["train"], counts["validation"], counts["test"], counts.get("candidates", 0))


def test_a_plan_names_the_stages_that_a_run_leaves(finished: tuple[Any, dict[str, Any]]) -> None:
    cfg, made = finished
    planned = [stage for part in make_plan(cfg, sizes_of(made)) for stage in part.stages]
    assert set(planned) == set(made)


def test_what_is_planned_is_an_upper_bound_and_exact_where_it_can_be(finished: tuple[Any, dict[str, Any]]) -> None:
    cfg, made = finished
    parts = make_plan(cfg, sizes_of(made))
    told = {stage: work for part in parts for stage, work in part.stages.items()}
    written = {stage: counts for stage, counts in made.items() if "tokens" in counts and "answers" in counts}
    assert written or cfg.recipe == "re2llm"
    for stage, counts in written.items():
        if stage.endswith("/answers"):
            assert told[stage].answers == counts["answers"]
            assert told[stage].tokens == counts["answers"] * cfg.llm.max_new_tokens
        assert told[stage].answers >= counts["answers"] > 0
        assert told[stage].tokens >= counts["tokens"] > 0
    for stage in made:
        if cfg.recipe == "re2llm" and stage.endswith("/rewards"):  # 12 candidates without a hint, 9 with one
            most = (22 + 8) * (12 + 9 * cfg.reflection.size * int(stage[6]) // cfg.agent.rounds)
            assert told[stage] == Work(titles=most)


def test_a_finished_run_has_nothing_left(finished: tuple[Any, dict[str, Any]]) -> None:
    cfg, made = finished
    parts = make_plan(cfg, sizes_of(made), set(made))
    assert {part.state for part in parts} == {FINISHED}
    assert total(parts) == Work()
    assert "nothing left" in shown(render_plan(cfg, parts))


def test_quickstart_by_hand() -> None:
    """56 users, 31 + 8 + 17; 4 answers to a training user where pairs are made of them, 32 tokens each."""
    cfg = load("quickstart.yaml")
    parts = make_plan(cfg, Sizes(31, 8, 17))
    several, one = 31 * 4 + 25, 56
    answers = 2 * several + 2 * one  # zero_shot and round_1; random_pairs and round_2
    assert total(parts) == Work(answers, 32 * answers)
    assert all(part.state == AHEAD for part in parts)
    parts = make_plan(cfg, Sizes(31, 8, 17), ["lists", "fold_0/split", "fold_0/zero_shot/answers"])
    states = {part.name: part.state for part in parts}
    assert states["candidate lists and split"] == FINISHED
    assert states["zero_shot: the LLM describes every user"] == BEGUN
    assert total(parts).answers == answers - several


@pytest.mark.parametrize(
    ("overrides", "answers"),
    [
        (["policy.rounds=0"], 56),
        (["policy.rounds=1", "evaluation.controls.random_pairs=false"], 31 * 4 + 25 + 56),
        (["evaluation.controls.best_of_n=true"], 2 * (31 * 4 + 25) + 3 * 56),
        (["policy.rounds=0", "evaluation.controls.zero_shot=false", "evaluation.controls.shuffled=false"], 0),
        (["evaluation.folds=2", "evaluation.only_folds=[1]", "policy.rounds=0"], 56),
        (["evaluation.folds=3", "policy.rounds=0"], 3 * 56),
        # 56 - 8 - 18: the fewest test users that one of three folds has leave the most training users
        (["evaluation.folds=3", "policy.rounds=1", "pairs.samples=2"], 3 * (2 * (56 - 8 - 18) + 26 + 2 * 56)),
    ],
)
def test_what_switches_change(overrides: list[str], answers: int) -> None:
    cfg = load("quickstart.yaml", *overrides)
    assert total(make_plan(cfg, Sizes(31, 8, 17))).answers == answers


def test_hints_by_hand() -> None:
    """10 conversations of 3 answers; 10 hints tried on 4 sessions and their own; every base asks all sessions."""
    cfg = load("quickstart_re2llm.yaml", "ranking.lengths=[0.0]")
    stages = {s: w for part in make_plan(cfg, Sizes(16, 12, 40, 50)) for s, w in part.stages.items()}
    assert stages["scoring"] == Work()
    tried = Work(30 + 10, 30 * 40 + 10 * 8, 16 * 50 + 4 * 50 + 4 * 10 * 10 + 10 * 50 + 10 * 50)
    assert stages["round_1/hints"] == tried
    assert stages["round_1/rewards"] == Work(titles=28 * (50 + 4 * 10))
    assert stages["matrix/test"] == Work(titles=16 * (50 + 4 * 10))  # evaluation.test
    chosen = {
        s: w
        for part in make_plan(load("quickstart_re2llm.yaml"), Sizes(16, 12, 40, 50))
        for s, w in part.stages.items()
    }
    assert chosen["scoring"] == Work(titles=12 * 50)  # ranking.choose_on


def test_lists_are_written_where_the_llm_generates() -> None:
    more = ["ranking.method=generate", "ranking.templates=[list_v1]", "ranking.lengths=[0.0]", "ranking.shortlist=null"]
    cfg = load("quickstart_re2llm.yaml", *more, "ranking.rotations=2")
    stages = {s: w for part in make_plan(cfg, Sizes(16, 12, 40, 50)) for s, w in part.stages.items()}
    answers = 2 * 28 * (1 + 4)
    assert stages["round_1/rewards"] == Work(answers, answers * 200)
    assert total(make_plan(cfg, Sizes(16, 12, 40, 50))).titles == 0


def test_online_rewards_are_asked_for_by_the_agent() -> None:
    cfg = load("quickstart_unified.yaml", "agent.rewards=online")
    stages = {s: w for part in make_plan(cfg, Sizes(22, 9, 13)) for s, w in part.stages.items()}
    assert "fold_0/hints/round_1/rewards" not in stages
    answers = (22 + 9) * (1 + 4)  # both rounds' share of reflection.size
    assert stages["fold_0/hints/round_2/agent"] == Work(answers, answers * 32)


def test_folds_are_told_together() -> None:
    cfg = load("quickstart.yaml", "evaluation.folds=3", "policy.rounds=0")
    parts = make_plan(
        cfg, Sizes(31, 8, 17), [f"fold_{n}/zero_shot/{s}" for n in (0, 2) for s in ("answers", "vectors")]
    )
    together = {part.name: part for part in by_name(parts)}
    described = together["zero_shot: the LLM describes every user"]
    assert described.state == BEGUN
    assert described.left.answers == 56
    assert "4 of 6 stages" in shown(render_plan(cfg, parts))


def test_the_text_says_what_the_numbers_are() -> None:
    cfg = load("quickstart.yaml", "run.answers=/shared/answers")
    told = shown(render_plan(cfg, make_plan(cfg, Sizes(31, 8, 17))))
    for words in ("410 answers of 13,120 tokens", "upper bound", "at most", "runs/quickstart", "/shared/answers"):
        assert words in told
    assert in_words(Work(titles=1200), {}).startswith("For the LLM at most 1,200 titles to score")


@pytest.mark.parametrize(
    ("left", "known", "seconds", "said"),
    [
        (Work(2, 6000), {"tokens": 100.0}, 60.0, "that is 60 s at most"),
        (Work(2, 60_000), {"tokens": 100.0}, 600.0, "100 tokens/s of the last time that is 10 min at most"),
        (Work(2, 60_000, 900_000), {"tokens": 100.0, "titles": 50.0}, 18_600.0, "that is 5.2 h at most"),
        (Work(2, 60_000, 9), {"tokens": 100.0}, None, "is told once this LLM has worked here"),
        (Work(2, 60_000), {}, None, "is told once this LLM has worked here"),
    ],
)
def test_how_long(left: Work, known: dict[str, float], seconds: float | None, said: str) -> None:
    assert seconds_left(left, known) == seconds
    assert said in in_words(left, known)


def test_rates_of_the_last_time(tmp_path: Path) -> None:
    cfg = load("quickstart.yaml", f"run.cache={tmp_path}")
    assert rates(cfg) == {}
    remember(cfg, "tokens", 50, 1.0)  # too short to say anything
    assert rates(cfg) == {}
    remember(cfg, "tokens", 900, 9.0)
    remember(cfg, "titles", 30, 10.0)
    remember(cfg, "tokens", 800, 10.0)
    assert rates(cfg) == {"tokens": 80.0, "titles": 3.0}
    assert rates(load("quickstart.yaml", f"run.cache={tmp_path}", "trainer.threads=1")) == {}  # another rate
    (tmp_path / "rates.json").write_text("no JSON")
    assert rates(cfg) == {}


class TestPlannedRun:
    def test_keeps_its_configuration_until_it_is_finished(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        for seed in (1, 2):  # an unfinished run may go on with other values
            with PlannedRun(load("quickstart.yaml", f"run.dir={folder}", f"seed={seed}")) as run:
                run.run_stage("lists", lambda _: {}, key={"size": 10})
                run.run_stage(f"answers_{seed}", lambda _: {}, key={"seed": seed})
                assert load_run(folder).seed == seed
        with (
            PlannedRun(load("quickstart.yaml", f"run.dir={folder}", "seed=4")) as run,
            pytest.raises(UserError, match="another configuration"),
        ):
            run.run_stage("lists", lambda _: {}, key={"size": 20})
        assert load_run(folder).seed == 2  # a start that was refused has changed nothing
        with PlannedRun(load("quickstart.yaml", f"run.dir={folder}", "seed=5"), fresh=True):
            assert load_run(folder).seed == 5  # of what it was nothing is left
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(load("quickstart.yaml", f"run.dir={folder}", "seed=2")))
        (folder / "results.json").write_text("[]")
        with PlannedRun(load("quickstart.yaml", f"run.dir={folder}", "seed=3")):
            assert load_run(folder).seed == 2

    def test_is_told_once_with_the_sizes_of_the_data(self, tmp_path: Path, capsys: Any) -> None:
        cfg = load("quickstart.yaml", f"run.dir={tmp_path}/run")
        with PlannedRun(cfg) as run:
            run.run_stage("lists", lambda _: {}, key={})
            assert "Plan" not in capsys.readouterr().out
            counts = {"train": 31, "validation": 8, "test": 17}
            for fold in (0, 1):
                run.run_stage(f"fold_{fold}/split", lambda _: counts, key={})
        out = capsys.readouterr().out
        assert out.count("Plan") == 1
        assert "410 answers" in out


def test_descriptions_of_items_are_planned_once() -> None:
    alone = [f"evaluation.controls.{name}=false" for name in ("zero_shot", "shuffled")]
    more = ["knowledge.item_text=llm", "knowledge.item_tokens=40", "policy.rounds=0", "evaluation.folds=3", *alone]
    parts = make_plan(load("quickstart.yaml", *more), Sizes(31, 8, 17, items=300))
    assert total(parts) == Work(300, 300 * 40)


def test_curves_are_told_of_where_there_will_be_some() -> None:
    assert "Curves" in places(load("quickstart.yaml"))
    assert "Curves" not in places(load("quickstart.yaml", "logging.to=[csv]"))
    assert "Curves" not in places(load("history_ml1m.yaml"))
