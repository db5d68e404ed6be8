"""Sweeps: which runs they are made of, how those are started and stopped, and what is done again."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rec.cli import main
from lit_rec.config import quoted
from lit_rec.errors import UserError
from lit_rec.run.sweep import NAME, expand, folder_name, make_plan
from tests.pages import EVIL
from tests.session_worlds import make_session_world
from tests.worlds import BARE, EXPERIMENT, World, assert_told, make_world, write_data

ROOT = str(Path(__file__).parents[2])


def values(overrides: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """What Hydra reads in overrides."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {o.get_key_element(): repr(o.value()) for o in parsed}


class TestExpansion:
    @pytest.mark.parametrize(
        "overrides",
        [
            ["seed=1,2"],
            ["seed=1,2", "policy.beta=0.1,0.5", "llm.name=tiny"],
            ["evaluation.ks=[1,2],[3,4]", "seed=1"],
            ["name='a,b',c", 'run.cache="x=1,y"'],
            ["seed=choice(3,4)", "policy.rounds=range(0,3)"],
            ["policy.beta=range(0.5,2,0.5)"],
            ["+reranker=dlcm,prm", "++seed=1"],
            ["seed=1,2", "seed=5,6", "users=3"],
            ["seed=1,2", "policy.rounds=1,2", "seed=7"],
            ["llm.name=a b,'c d'", "+data.x={a:1,b:2},{a:3}"],
            ["users=null,5", "policy.keep_optimizer=true,false"],
        ],
    )
    def test_as_hydras_own_sweeper(self, overrides: list[str]) -> None:
        parsed = OverridesParser.create().parse_overrides(overrides)
        wanted = [values(chosen) for batch in BasicSweeper.split_arguments(parsed, None) for chosen in batch]
        found = expand(overrides)
        assert [values(one.overrides) for one in found] == wanted
        assert len({one.name for one in found}) == len(found)

    def test_a_value_given_twice_is_one_run_and_a_list_is_one_value(self) -> None:
        assert [one.overrides for one in expand(["seed=1,1,2", "evaluation.ks=[1,2]"])] == [
            ("seed=1", "evaluation.ks=[1,2]"),
            ("seed=2", "evaluation.ks=[1,2]"),
        ]

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (["policy.lr=interval(0,1)", "seed=1,2"], ["policy.lr=interval", "quote"]),
            (["llm=glob(*)"], ["llm=glob"]),
            (["seed=1,[2"], ["seed=1,[2", "commas"]),
            (["seed=1"], ["nothing to sweep", "fit"]),
            (["seed=1,2", "seed=3"], ["nothing to sweep"]),
            (["seed=range(0,100)", "users=range(2,100)"], ["1,000"]),
        ],
    )
    def test_what_cannot_be_swept(self, overrides: list[str], words: list[str]) -> None:
        with pytest.raises(UserError) as told:
            expand(overrides)
        assert all(word in str(told.value) for word in words), told.value

    def test_folders_do_not_depend_on_the_order_of_keys(self) -> None:
        names = {frozenset(one.name for one in expand(keys)) for keys in (["a=1,2", "b=x,y"], ["b=x,y", "a=1,2"])}
        assert names == {frozenset({"a=1,b=x", "a=1,b=y", "a=2,b=x", "a=2,b=y"})}

    @given(st.lists(st.text(max_size=300), min_size=1, max_size=2, unique=True))
    @settings(max_examples=200, deadline=None)
    def test_names_are_safe_and_differ(self, parts: list[str]) -> None:
        names = [folder_name([f"k={part}"]) for part in parts]
        assert len({name.lower() for name in names}) == len(parts)
        for name in names:
            assert len(name) <= NAME
            assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._=,+-")
            assert name[0] not in ".-"

    @given(st.text(alphabet=" abc'\"\\,=/[]{}()~$#é", max_size=20))
    @settings(max_examples=200, deadline=None)
    def test_quoted_is_read_back(self, text: str) -> None:
        override = OverridesParser.create().parse_override(f"run.dir={quoted(text)}")
        assert not override.is_sweep_override()
        assert override.value() == text


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> World:
    """An experiment that can be composed; its models are not there."""
    root = tmp_path_factory.mktemp("config")
    write_data(root / "data")
    (root / "tiny.yaml").write_text(EXPERIMENT.format(root=root))
    return World(root)


class TestPlan:
    def test_a_mistake_in_one_combination_is_told_before_anything_starts(self, config: World, capsys: Any) -> None:
        command = ["sweep", "--config", config.config]
        assert_told(capsys, main([*command, "policy.beta=0.1,-1"]), "policy.beta=-1", "combination", "above 0")
        assert_told(capsys, main([*command, "seed=1,2", "polcy.beta=3"]), "policy.beta", "seed=1")
        assert_told(capsys, main([*command, "run.dir=a,b"]), "one folder", "run.dir=runs/my_sweep")
        assert_told(capsys, main([*command, "seed=1"]), "nothing to sweep")
        assert not config.run.exists()

    def test_runs_without_a_common_metric_are_refused_before_anything_starts(self, config: World, capsys: Any) -> None:
        line = ["sweep", "--config", config.config, "evaluation.ks=[1],[2,5]"]
        assert_told(capsys, main(line), "no metric in common", "config key evaluation.ks", "[2, 5]")

    @pytest.mark.parametrize("jobs", ["0", "-1", "x"])
    def test_jobs(self, config: World, jobs: str, capsys: Any) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["sweep", "--config", config.config, "seed=1,2", "--jobs", jobs])
        assert stop.value.code == 2
        assert jobs in capsys.readouterr().err

    def test_every_run_has_its_folder_and_shares_the_store_and_the_threads(
        self, config: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lit_rec.cores.usable", lambda: 8)
        plan = make_plan(config.config, ["seed=1,2", "trainer.threads=null"], jobs=3)
        assert plan.folder == config.run
        for child, seed in zip(plan.children, (1, 2), strict=True):
            read = values([word for word in child.command[6:] if "=" in word])
            assert child.folder == config.run / f"seed={seed}"
            assert read["seed"] == str(seed)
            assert read["run.dir"] == repr(str(child.folder))
            assert read["run.answers"] == repr(str(config.run / "answers"))
            assert read["trainer.threads"] == "2"
        own = make_plan(config.config, ["seed=1,2", "run.answers=/elsewhere", "run.dir='a,b/c=d'"])
        assert [str(child.folder) for child in own.children] == ["a,b/c=d/seed=1", "a,b/c=d/seed=2"]
        for child in own.children:
            read = values([word for word in child.command[6:] if "=" in word])
            assert (read["run.answers"], "trainer.threads" in read) == ("'/elsewhere'", False)


# A process that imports everything once; what a sweep starts are forks of it. The second run of the first sweep is
# killed in the middle of a stage.
DRIVER = """
    import json, os, signal, subprocess, sys, traceback
    from types import SimpleNamespace

    os.environ["OMP_NUM_THREADS"] = "1"
    from lit_rec.cli import main
    from lit_rec.run import children, commands

    steps, started, death = json.loads(sys.argv[1]), [], json.loads(sys.argv[2])


    class Fork:
        def __init__(self, command, *, stdout, start_new_session, **_):
            started.append(command[6:])
            doomed = [number, len(started)] == death
            self.code, self.pid = None, os.fork()
            if self.pid == 0:
                os.setsid()
                for descriptor in (1, 2):
                    os.dup2(stdout.fileno(), descriptor)
                if doomed:
                    replace = os.replace
                    def patched(source, target, **kwargs):
                        if str(target).endswith("rows/zero_shot"):
                            os.kill(os.getpid(), signal.SIGKILL)
                        replace(source, target, **kwargs)
                    os.replace = patched
                code = 1
                try:
                    code = main(command[3:])
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush(), sys.stderr.flush()
                    os._exit(code)

        def poll(self):
            if self.code is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.code = os.waitstatus_to_exitcode(status) if pid else None
            return self.code


    children.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": Fork})
    for number, step in enumerate(steps):
        pid = os.fork()  # a step's report starts threads that no later fork would have
        if pid == 0:
            try:
                code = main(step)
            except BaseException:
                traceback.print_exc()
                code = 99
            print("STEP " + json.dumps({"code": code, "started": len(started)}), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
"""
QUICK = [text for text in BARE if "zero_shot" not in text and "no_knowledge" not in text and "rounds" not in text]
QUICK = [*QUICK, "policy.rounds=0"]
SWEPT = ["reranker.lr=0.001,0.01", "seed=3,4", *QUICK]


@dataclass(frozen=True)
class Swept:
    world: World
    sessions: World
    steps: list[dict[str, int]]
    said: str


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    world = make_world(tmp_path_factory.mktemp("world"))
    sessions = make_session_world(tmp_path_factory.mktemp("sessions"))
    off = ("sasrec", "random_hint", "best_fixed_hint", "ppo", "full_information", "oracle")
    few = [f"evaluation.rows.{row}=false" for row in off]
    one = ["ranking.templates=[favorites_v1]", "ranking.priors=[0.0]", "ranking.lengths=[0.0]", "evaluation.test=20"]
    base = ["sweep", "--config", world.config]
    steps = [
        [*base, *SWEPT],
        [*base, *SWEPT],
        [*base, *SWEPT],
        [*base, *QUICK, "prompt.template=short_v1,no_such_v1", f"run.dir={world.root}/failing", "--jobs", "2"],
        ["fit", "--config", sessions.config, *few, *one],
        ["report", str(world.run), str(sessions.run), "--output", str(world.root / "mixed.html")],
        ["report", str(sessions.run), "--output", str(world.root / "one.html")],
    ]
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), json.dumps(steps), "[0, 2]"]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=420)
    said = done.stdout + done.stderr
    found = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("STEP ")]
    assert len(found) == len(steps), said[-6000:]
    return Swept(world, sessions, found, said)


class TestWholeSweeps:
    def test_what_is_finished_is_not_started_again(self, swept: Swept) -> None:
        assert [(step["code"], step["started"]) for step in swept.steps[:3]] == [(1, 4), (0, 1), (0, 0)]
        assert "reranker.lr=0.001,seed=4: killed by signal 9" in swept.said

    def test_every_combination_ran_with_its_values(self, swept: Swept) -> None:
        for lr in ("0.001", "0.01"):
            for seed in (3, 4):
                run = swept.world.run / f"reranker.lr={lr},seed={seed}"
                kept = yaml.safe_load((run / "config.yaml").read_text())
                assert (kept["reranker"]["lr"], kept["seed"]) == (float(lr), seed)
                assert json.loads((run / "results.json").read_text())
                assert not (run / "answers").exists()

    def test_equal_questions_are_asked_once(self, swept: Swept) -> None:
        """Both learning rates need the same texts of the untrained LLM."""
        lines = (swept.world.run / "answers" / "answers.jsonl").read_text().splitlines()
        keys = [key for line in lines for key in json.loads(line)]
        assert len(keys) == len(set(keys)) == 2 * 24
        log = (swept.world.run / "reranker.lr=0.01,seed=3" / "log.txt").read_text()
        assert "0 LLM answers written" in log

    def test_a_failing_combination_is_told_and_the_others_are_reported(self, swept: Swept) -> None:
        assert swept.steps[3] == {"code": 2, "started": 2}
        assert "prompt.template=no_such_v1: exit code 2" in swept.said
        assert "| error:" in swept.said
        page = (swept.world.root / "failing" / "report.html").read_text()
        assert "prompt.template=short_v1" in page
        assert "no_such_v1" not in page

    def test_the_joint_report_has_the_means_of_the_runs_own_metrics(self, swept: Swept) -> None:
        page = (swept.world.run / "report.html").read_text()
        for lr in ("0.001", "0.01"):
            of_user: dict[int, list[float]] = {}
            for seed in (3, 4):
                file = swept.world.run / f"reranker.lr={lr},seed={seed}/stages/fold_0/rows/zero_shot/metrics.parquet"
                frame = pl.read_parquet(file).filter(pl.col("split") == "test")
                for user in frame["user"].unique():
                    mine = frame.filter(pl.col("user") == user)["ndcg@5|standard"].to_list()
                    of_user.setdefault(user, []).append(sum(mine) / len(mine))
            means = [sum(found) / len(found) for found in of_user.values()]
            assert f"{sum(means) / len(means):.4f} [" in page

    def test_mixed_recipes_have_a_section_each(self, swept: Swept) -> None:
        assert [step["code"] for step in swept.steps[4:]] == [0, 0, 0]
        page = (swept.world.root / "mixed.html").read_text()
        assert page.index("Reranking (RLRF4Rec)") < page.index("Session ranking (Re2LLM)")
        one = (swept.world.root / "one.html").read_text()
        kept = json.loads((swept.sessions.run / "results.json").read_text())
        shown = [r for r in kept if (r["split"], r["metric"]) == ("test", "ndcg@5")]
        assert {r["row"] for r in shown} == {"random", "popularity", "item_knn", "empty_prompt", "no_hint"}
        assert all(f"{r['mean']:.4f}" in page and f"{r['mean']:.4f}" in one for r in shown)
        assert {r["n"] for r in shown} == {20}


@pytest.mark.parametrize("evil", EVIL)
def test_hostile_values_stay_values(config: World, evil: str, tmp_path: Path) -> None:
    name = quoted("".join(c for c in evil if c.isprintable() and c not in "${}"))
    plan = make_plan(config.config, [f"name={name},plain", f"run.dir={tmp_path}/never"])
    assert [child.folder.parent for child in plan.children] == [tmp_path / "never"] * 2
    assert values([plan.children[0].command[6]])["name"] == repr(
        "".join(c for c in evil if c.isprintable() and c not in "${}")
    )
