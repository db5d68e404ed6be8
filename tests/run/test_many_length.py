"""Reward against answer length over several runs: which answers count, the correlation by numpy, and the page."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from lit_rec.cli import main
from lit_rec.run import many_lengths
from lit_rec.run.figures import length_means
from lit_rec.run.finished import FinishedRun, read_run
from lit_rec.run.many import sections
from lit_rec.run.many_lengths import length_context, rewards_of
from lit_rec.run.many_report import section_title, write_page
from tests.pages import Page
from tests.run.test_many import (
    configured,
    list_frames,
    one_section,
    reward_table,
    write_rewards,
    write_run,
    write_session_run,
    write_states,
)
from tests.worlds import assert_told

HEADING = "Reward against answer length"
TABLE = "Correlation of reward and tokens within users"


def make_run(folder: Path, states: dict[str, pl.DataFrame], **changes: Any) -> Path:
    """A run whose LLM had these states."""
    write_run(folder, list_frames(0, list(range(20))), config=configured(**changes))
    write_states(folder, *states)
    for state, table in states.items():
        write_rewards(folder, state, table)
    return folder


def by_numpy(tables: list[pl.DataFrame]) -> float:
    """Every table's users are users of their own."""
    parts: list[list[np.ndarray]] = [[], []]
    for table in tables:
        for user in table["user"].unique():
            mine = table.filter(pl.col("user") == user)
            for part, name in zip(parts, ("reward", "tokens"), strict=True):
                values = mine[name].to_numpy().astype(float)
                part.append(values - values.mean())
    return float(np.corrcoef(*(np.concatenate(part) for part in parts))[0, 1])


def page_of(tmp_path: Path, *runs: Path) -> str:
    write_page(tmp_path / "page.html", [one_section(*runs)], title="x")
    text = (tmp_path / "page.html").read_text()
    assert text.startswith("<!doctype html>")
    assert Page(text).open == []
    return text


def part_of(page: str) -> str:
    return page.split(f"<h3>{HEADING}</h3>")[1].split("</section>")[0]


def ticks(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([\d.]+)</text>", svg)


class TestWhichAnswers:
    def test_training_users_in_the_states_that_made_pairs(self, tmp_path: Path) -> None:
        names = ("round_2", "best_of_n", "hinted_2", "round_1", "hinted_1", "zero_shot", "random_pairs")
        states = {name: reward_table(n) for n, name in enumerate(names)}
        held_out = reward_table(9).with_columns(split=pl.lit("validation"), user=pl.col("user") + 100)
        states["hinted_1"] = pl.concat([held_out, states["hinted_1"]])
        run = read_run(make_run(tmp_path / "a", states, recipe="unified"))
        found = {at: part for (at,), part in run.rewards.group_by("round")}
        assert set(found) == {0.0, 0.5, 1.5, 2.0}
        for at, name in ((0.0, "zero_shot"), (0.5, "hinted_1"), (1.5, "hinted_2"), (2.0, "round_2")):
            wanted = states[name].filter(pl.col("split") == "train")
            for column in ("user", "tokens", "reward"):
                assert found[at][column].to_list() == wanted[column].to_list()

    def test_every_fold(self, tmp_path: Path) -> None:
        parts = [list_frames(n, list(range(30 * n, 30 * n + 30)), fold=n) for n in (1, 3)]
        config = configured(evaluation__folds=4, evaluation__only_folds=[1, 3])
        run = write_run(tmp_path / "a", pl.concat(parts), config=config)
        found = read_run(run).rewards
        counts = {key: len(part) for key, part in found.group_by("fold", "round")}
        assert counts == dict.fromkeys([(1, 0.0), (1, 1.0), (3, 0.0), (3, 1.0)], 32)
        assert found.filter(pl.col("fold") == 3)["tokens"].to_list() == reward_table(3)["tokens"].to_list() * 2

    def test_rewards_that_are_gone(self, tmp_path: Path, capsys: Any) -> None:
        run = make_run(tmp_path / "a", {"zero_shot": reward_table(0), "round_1": reward_table(1)})
        (run / "stages/fold_0/round_1/rewards/rewards.parquet").unlink()
        output = str(tmp_path / "x.html")
        assert_told(capsys, main(["report", str(run), "--output", output]), "single users", "round_1/rewards")


class TestMeans:
    def test_ten_groups_of_equal_size(self) -> None:
        order = np.random.default_rng(0).permutation(50)
        reward = np.random.default_rng(1).random(50).astype("float32")
        found = length_means(pl.DataFrame({"tokens": order, "reward": reward}))
        wanted = [reward[np.argsort(order)][n : n + 5].mean(dtype=float) for n in range(0, 50, 5)]
        assert found["tokens"].to_list() == [2.0 + n for n in range(0, 50, 5)]
        assert found["reward"].to_list() == pytest.approx(wanted)

    def test_answers_of_one_length_stay_together(self) -> None:
        tokens, reward = [32] * 14 + [3, 4, 5, 6, 7, 8], [*range(14), *range(100, 106)]
        found = length_means(pl.DataFrame({"tokens": tokens, "reward": reward}))
        assert found.rows() == [(3.5, 100.5), (5.5, 102.5), (7.5, 104.5), (32.0, 6.5)]
        assert length_means(pl.DataFrame({"tokens": [9, 9, 9], "reward": [1.0, 2.0, 6.0]})).rows() == [(9.0, 3.0)]


class TestPage:
    def test_figures_and_correlations_of_every_setting(self, tmp_path: Path) -> None:
        """Two seeds of A, whose levels differ: taken for one run they would tell of the level, not of length."""
        first, second, other = (reward_table(n) for n in range(3))
        second = second.with_columns(pl.col("tokens") + 500, pl.col("reward") + 5)
        single = reward_table(3, samples=1)
        runs = [
            make_run(tmp_path / "1", {"zero_shot": first, "round_1": single}, seed=1),
            make_run(tmp_path / "2", {"zero_shot": second, "round_1": single}, seed=2),
            make_run(tmp_path / "3", {"zero_shot": other, "hinted_1": first, "round_1": single}, policy__beta=1.0),
        ]
        part = part_of(page_of(tmp_path, *runs))
        assert re.findall(r"<h3>(.*?)</h3>", part) == ["A: beta=0.1", "B: beta=1.0", TABLE]
        assert part.count("<svg") == 2
        body = part.split(TABLE)[1].split("</table>")[0]
        lines = [re.findall(r">([^<>]*)</t[hd]>", line) for line in body.split("<tr>")[1:]]
        assert lines == [
            ["Setting", "zero-shot", "hints 1"],  # round 1 has one answer a user
            ["A: beta=0.1", f"{by_numpy([first, second]):+.2f}", ""],
            ["B: beta=1.0", f"{by_numpy([other]):+.2f}", f"{by_numpy([first]):+.2f}"],
        ]
        joined = pl.concat([first, second])
        assert abs(by_numpy([first, second]) - by_numpy([joined])) > 0.5
        legends = ["hints, before DPO" in svg for svg in part.split("<svg")[1:]]
        assert legends == [False, True]

    def test_the_axes_are_one_where_rewards_are_counted_alike(self, tmp_path: Path) -> None:
        small = reward_table(0)
        large = small.with_columns(pl.col("tokens") * 10, pl.col("reward") + 3)
        states = [{"zero_shot": table, "round_1": table} for table in (small, large)]
        alike = [make_run(tmp_path / f"a{n}", one, policy__beta=float(n)) for n, one in enumerate(states)]
        a, b = (ticks(svg) for svg in part_of(page_of(tmp_path, *alike)).split("<svg")[1:])
        assert a == b
        assert "4" in a or "4.0" in a
        apart = [make_run(tmp_path / f"b{n}", one, reward__metric=str(n)) for n, one in enumerate(states)]
        a, b = (ticks(svg) for svg in part_of(page_of(tmp_path, *apart)).split("<svg")[1:])
        assert not {"300", "4", "4.0"} & set(a)
        assert "300" in b

    def test_points_are_few_and_texts_stay_away(self, tmp_path: Path) -> None:
        table = reward_table(0, users=500)
        part = part_of(page_of(tmp_path, make_run(tmp_path / "a", {"zero_shot": table, "round_1": table})))
        assert 290 <= part.count("<use") <= 340  # 300 points, the ticks and the legend
        assert "a text of the model" not in part

    def test_no_more_figures_than_the_most(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(many_lengths, "MOST_LINES", 3)
        tables = {"zero_shot": reward_table(0, users=2)}
        runs = [make_run(tmp_path / str(n), tables, policy__beta=float(n)) for n in range(2)]
        section = one_section(*runs)
        context = length_context(replace(section, settings=section.settings * 4))
        assert context is not None
        assert len(context["figures"]) == len(context["table"]["lines"]) == 3

    def test_runs_without_rewards_have_no_such_part(self, tmp_path: Path) -> None:
        none = make_run(tmp_path / "none", {}, policy__rounds=0)
        assert read_run(none).rewards.is_empty()
        page = page_of(tmp_path, none)
        assert HEADING not in page
        assert TABLE not in page
        tuned = make_run(tmp_path / "tuned", {"zero_shot": reward_table(0), "round_1": reward_table(1)})
        part = part_of(page_of(tmp_path, none, tuned))
        assert re.findall(r"<h3>(.*?)</h3>", part) == ["B: rounds=1", TABLE]
        output = tmp_path / "s.html"
        assert main(["report", str(write_session_run(tmp_path / "s")), "--output", str(output)]) == 0
        text = output.read_text()
        assert HEADING not in text
        assert "While the agent learned" in text

    def test_answers_of_one_length_have_no_correlation(self, tmp_path: Path) -> None:
        same = reward_table(0).with_columns(tokens=pl.lit(32))
        part = part_of(page_of(tmp_path, make_run(tmp_path / "a", {"zero_shot": same, "round_1": same})))
        assert part.count("<svg") == 1
        assert TABLE not in part

    def test_rewards_that_are_no_numbers_do_not_count(self, tmp_path: Path) -> None:
        table = reward_table(0)
        broken = pl.concat([table, table.head(6).with_columns(reward=pl.lit(float("nan"), pl.Float32))])
        runs = [read_run(make_run(tmp_path / str(n), {"zero_shot": one})) for n, one in enumerate((table, broken))]
        found = [length_context(sections([run], resamples=50)[0]) for run in runs]
        assert found[0] is not None
        assert found[1] is not None
        assert found[0]["table"]["lines"][0]["cells"] == found[1]["table"]["lines"][0]["cells"]


class TestTitles:
    @pytest.mark.parametrize(
        ("recipes", "wanted"),
        [
            (["rlrf"], "Reranking (RLRF4Rec)"),
            (["unified"], "Reranking (RLRF4Rec with hints)"),
            (["unified", "rlrf"], "Reranking (RLRF4Rec with hints, RLRF4Rec)"),
        ],
    )
    def test_the_recipes_are_named(self, tmp_path: Path, recipes: list[str], wanted: str) -> None:
        tables = {"zero_shot": reward_table(0)}
        section = one_section(*(make_run(tmp_path / recipe, tables, recipe=recipe) for recipe in recipes))
        assert section_title(section) == wanted

    def test_sessions(self, tmp_path: Path) -> None:
        section = sections([read_run(write_session_run(tmp_path / "s"))], resamples=50)[0]
        assert section_title(section) == "Session ranking (Re2LLM)"


def test_rewards_of_a_setting_keep_its_runs_apart(tmp_path: Path) -> None:
    tables = {"zero_shot": reward_table(0)}
    setting = one_section(*(make_run(tmp_path / str(n), tables, seed=n) for n in range(2))).settings[0]
    found = rewards_of(setting)
    assert found.group_by("run", "user").len()["len"].to_list() == [4] * 16
    bare = FinishedRun(Path(), {}, {}, [], pl.DataFrame(), "p", "g")
    assert rewards_of(replace(setting, runs=[*setting.runs, bare])).shape == found.shape


def test_a_report_loads_neither_transformers_nor_lightning() -> None:
    code = "import sys, lit_rec.run.many_report; print({'transformers', 'lightning', 'peft', 'trl'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
