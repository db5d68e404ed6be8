"""Several runs side by side: every number against plain numpy on the runs' own metrics, and what is refused."""

import inspect
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file

from lit_rec.cli import main
from lit_rec.metrics.sessions import rank_metrics
from lit_rec.run import commands, session_commands
from lit_rec.run.comparisons import compare_rows
from lit_rec.run.differing import group_configs
from lit_rec.run.finished import FinishedRun, read_run, run_folders
from lit_rec.run.many import Section, Setting, against, sections
from lit_rec.run.many_report import section_table, section_title, write_page
from lit_rec.run.many_verdict import told_of
from lit_rec.run.results import result_rows, write_results
from lit_rec.run.stories import RERANKING, SESSIONS
from tests.pages import EVIL, Page
from tests.worlds import assert_told

CONFIG: dict[str, Any] = {
    "recipe": "rlrf",
    "name": "small",
    "seed": 1,
    "run": {"dir": "x"},
    "llm": {"name": "tiny", "hub": "a/b"},
    "knowledge": {"encode": "answer"},
    "policy": {"beta": 0.1, "rounds": 1},
    "lists": {"protocol": "strict"},
    "evaluation": {"folds": 1, "only_folds": None, "seeds": 1, "ks": [5]},
    "agent": {"rounds": 1},
}
ENVIRONMENT = {"seconds": 3.0, "peak_memory_gb": 1.5, "device": "cpu", "threads": 2, "commit": "abc"}
ROWS = ("history_only", "zero_shot", "round_1")
USERS_60 = [f"user {n}" for n in range(60)]


def configured(**changes: Any) -> dict[str, Any]:
    """The configuration with other values; `policy__beta=1` is policy.beta."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in changes.items():
        *parts, last = key.split("__")
        node = config
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = value
    return config


def list_frames(
    draw: int, users: list[int], rows: tuple[str, ...] = ROWS, shift: float = 0.0, fold: int = 0
) -> pl.DataFrame:
    """Per-list metrics, two lists a user; every row is a little better than the one before."""
    rng = np.random.default_rng(draw)
    owner = np.repeat(users, 2)
    base = np.random.default_rng(7).random(1000)[owner] * 0.5
    parts = []
    for n, row in enumerate(rows):
        metrics = {
            f"{m}@5|{c}": np.clip(base + 0.02 * n + shift + rng.normal(0, 0.05, len(owner)), 0, 1).astype("float32")
            for m in ("ndcg", "map")
            for c in ("kar", "standard")
        }
        about = {"row": row, "reranker": "dlcm", "seed": 0, "fold": fold, "split": "test"}
        parts.append(pl.DataFrame({**about, "user": owner, "list": np.arange(len(owner)), **metrics}))
    return pl.concat(parts)


def write_run(
    folder: Path,
    frames: pl.DataFrame,
    *,
    config: dict[str, Any] = CONFIG,
    data: str = "ml-1m",
    ground: int = 0,
    protocol: str = "strict",
    users: list[str] | None = None,
) -> Path:
    """A run folder of recipe rlrf, as `fit` leaves it, as far as reports read it."""
    stages = folder / "stages"
    for (fold, row), part in frames.group_by("fold", "row", maintain_order=True):
        stage = stages / f"fold_{fold}" / "rows" / str(row)
        stage.mkdir(parents=True)
        part.write_parquet(stage / "metrics.parquet")
        (stage / "manifest.json").write_text(json.dumps({"seconds": 2.5, "counts": {}}))
    (stages / "lists").mkdir()
    if users is not None:
        (stages / "lists" / "users.json").write_text(json.dumps(users))
    key = {"data": {"name": data}, "users": len(users) if users else None, "seed": config["seed"]}
    (stages / "lists" / "manifest.json").write_text(json.dumps({"key": key, "seconds": 1, "counts": {}}))
    save_file({"items": torch.tensor([ground])}, stages / "lists" / "lists.safetensors")
    answers = stages / "fold_0" / "zero_shot" / "answers"
    answers.mkdir(parents=True)
    table = pl.DataFrame({"sample": [0, 1] * 6, "tokens": [3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 2, 2]})
    table.write_parquet(answers / "answers.parquet")
    (answers / "manifest.json").write_text(
        json.dumps({"seconds": 1, "counts": {"answers": 12, "tokens": 34, "tokens_written": 34}})
    )
    for fold in frames["fold"].unique():
        for state in ("zero_shot", "round_1", "random_pairs"):
            write_rewards(folder, state, reward_table(fold), fold=fold)
    write_results(folder / "results.json", result_rows(frames, dataset=data, protocol=protocol, resamples=50))
    return finish(folder, config)


def reward_table(draw: int, users: int = 8, samples: int = 4) -> pl.DataFrame:
    """Rewards of answers to training users, as a stage keeps them."""
    rng, count = np.random.default_rng(draw), users * samples
    return pl.DataFrame(
        {
            "user": np.repeat(np.arange(users, dtype="int64"), samples),
            "sample": np.tile(np.arange(samples), users),
            "text": ["a text of the model"] * count,
            "tokens": rng.integers(5, 40, count),
            "split": ["train"] * count,
            "reward": rng.random(count).astype("float32"),
        }
    )


def write_rewards(folder: Path, state: str, table: pl.DataFrame, *, fold: int = 0) -> None:
    """The rewards of a state, as its stage keeps them."""
    stage = folder / "stages" / f"fold_{fold}" / state / "rewards"
    stage.mkdir(parents=True, exist_ok=True)
    table.write_parquet(stage / "rewards.parquet")


def write_states(folder: Path, *states: str) -> None:
    """Which states the LLM had, as `fit` tells it; no reward of held-out users is known."""
    (folder / "rounds.json").write_text(json.dumps([{"round": 0, "name": state} for state in states]))


def finish(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    reward = {"heldout_reward": {"mean": 0.5, "ci95": [0.4, 0.6]}}
    states = [
        {"round": n, "name": name, **reward} for n, name in ((0, "zero_shot"), (1, "round_1"), (1, "random_pairs"))
    ]
    (folder / "rounds.json").write_text(json.dumps(states))
    return folder


def write_session_run(folder: Path, *, draw: int = 0, config: dict[str, Any] | None = None) -> Path:
    """A run folder of recipe re2llm: 30 sessions, some with fewer candidates, 20 of which are test sessions."""
    config = config or configured(recipe="re2llm", evaluation={"ks": [5, 10], "test": None})
    candidates = torch.ones(30, 12, dtype=torch.long)
    candidates[::3, 9:] = 0
    parts = {"train": torch.arange(5), "validation": torch.arange(5, 10), "test": torch.arange(10, 30)}
    sessions = folder / "stages" / "sessions"
    sessions.mkdir(parents=True)
    save_file(parts, sessions / "parts.safetensors")
    save_file({"items": candidates}, sessions / "lists.safetensors")
    rng, frames = np.random.default_rng(draw), []
    for row in ("random", "no_hint", "ppo"):
        seeds = 2 if row == "ppo" else 1
        ranks = {s: torch.from_numpy(rng.integers(1, 10, (seeds, 1, len(parts[s])))) for s in ("validation", "test")}
        if row != "random":
            (folder / "stages" / "rows" / row).mkdir(parents=True)
            save_file(ranks, folder / "stages" / "rows" / row / "ranks.safetensors")
        for split, found in ranks.items():
            for seed in range(seeds):
                metrics = {k: v.mean(0) for k, v in rank_metrics(found[seed], [5, 10], 12).items()}
                if row == "random":  # the mean over every place the target could take
                    real = [int((candidates[s] > 0).sum()) for s in parts[split]]
                    each = [rank_metrics(torch.arange(1, n + 1), [5, 10], 12) for n in real]
                    metrics = {k: torch.tensor([float(one[k].double().mean()) for one in each]) for k in each[0]}
                about = {"row": row, "reranker": "tiny", "seed": seed, "fold": 0, "split": split}
                columns = {f"{k}|standard": v.float().numpy() for k, v in metrics.items()}
                frames.append(
                    pl.DataFrame({**about, "user": parts[split].numpy(), "list": parts[split].numpy(), **columns})
                )
    lines = result_rows(pl.concat(frames), dataset="films", protocol="next_item", story=SESSIONS)
    write_results(folder / "results.json", lines)
    curves = folder / "stages" / "round_1" / "agent"
    curves.mkdir(parents=True)
    (curves / "curves.json").write_text(json.dumps([{"epoch": n, "val/reward": 0.1 * n} for n in range(3)]))
    return finish(folder, config)


def by_user(frames: list[pl.DataFrame], row: str, column: str = "ndcg@5|standard") -> dict[int, float]:
    """Plain Python: a user's mean over lists, then over runs."""
    found: dict[int, list[float]] = {}
    for frame in frames:
        mine = frame.filter(pl.col("row") == row)
        for user in mine["user"].unique():
            found.setdefault(user, []).append(
                float(np.mean(mine.filter(pl.col("user") == user)[column].to_numpy(), dtype=float))
            )
    return {user: float(np.mean(values)) for user, values in found.items()}


def one_section(*folders: Path) -> Section:
    (section,) = sections([read_run(folder) for folder in folders], resamples=4000)
    return section


def line_of(section: Section, row: str, letter: str) -> dict[str, Any]:
    return next(line for line in section.picked() if (line["row"], line["setting"]) == (row, letter))


class TestNumbers:
    @pytest.fixture
    def grid(self, tmp_path: Path) -> tuple[dict[tuple[float, int], pl.DataFrame], list[Path]]:
        """Two values of beta, two seeds; the seeds test different, overlapping users."""
        frames, folders = {}, []
        for beta in (0.1, 0.5):
            for seed in (1, 2):
                users = list(range(40 * (seed - 1), 40 * (seed - 1) + 60))
                frames[beta, seed] = list_frames(int(beta * 10) + 100 * seed, users, shift=beta / 2)
                config = configured(policy__beta=beta, seed=seed)
                folders.append(write_run(tmp_path / f"{beta}_{seed}", frames[beta, seed], config=config, ground=seed))
        return frames, folders

    def test_means_over_seeds_with_users_as_the_unit(self, grid: Any) -> None:
        frames, folders = grid
        section = one_section(*folders)
        assert [one.label for one in section.settings] == ["beta=0.1", "beta=0.5"]
        assert section.headline.column() == "ndcg@5|standard"
        for letter, beta in (("A", 0.1), ("B", 0.5)):
            for row in ROWS:
                values = np.array([*by_user([frames[beta, 1], frames[beta, 2]], row).values()])
                line = line_of(section, row, letter)
                assert line["mean"] == pytest.approx(values.mean(), abs=2e-6)
                half = 1.984 * values.std(ddof=1) / math.sqrt(100)  # t with 99 degrees of freedom
                assert line["ci95"] == pytest.approx([values.mean() - half, values.mean() + half], abs=2e-4)
                assert (line["n"], line["seeds"]) == (100, 2)

    def test_a_user_in_two_samples_counts_once(self, tmp_path: Path) -> None:
        """Each sample numbers its users anew; their ids tell which of them are the same."""
        frames, folders = [], []
        for seed in (1, 2):
            frame = list_frames(seed, list(range(60)))
            ids = [f"user {40 * seed - n}" for n in range(60)]  # 20 of them in both, under other numbers
            path = tmp_path / str(seed)
            folders.append(write_run(path, frame, config=configured(seed=seed, users=60), ground=seed, users=ids))
            number = {n: 40 * seed - n for n in range(60)}
            frames.append(frame.with_columns(pl.col("user").replace_strict(number)))
        line = line_of(one_section(*folders), "round_1", "A")
        values = np.array([*by_user(frames, "round_1").values()])
        half = 1.984 * values.std(ddof=1) / math.sqrt(100)
        assert line["mean"] == pytest.approx(values.mean(), abs=2e-6)
        assert line["ci95"] == pytest.approx([values.mean() - half, values.mean() + half], abs=2e-4)
        assert (line["n"], line["seeds"]) == (100, 2)

    def test_differences_are_paired_and_holm_corrected(self, grid: Any) -> None:
        frames, folders = grid
        section = one_section(*folders)
        assert {(gap.reranker, gap.against) for gap in section.gaps} == {("B", "A")}
        for gap in section.gaps:
            a, b = (by_user([frames[beta, 1], frames[beta, 2]], gap.row) for beta in (0.1, 0.5))
            each = np.array([b[user] - a[user] for user in a])
            half = 1.984 * each.std(ddof=1) / math.sqrt(len(each))
            assert gap.difference.mean == pytest.approx(each.mean(), abs=1e-9)
            assert (gap.difference.high - gap.difference.low) / 2 == pytest.approx(half, rel=0.08)
            assert gap.difference.n == 100
        order = sorted(section.gaps, key=lambda gap: gap.difference.p)
        running = 0.0
        for n, gap in enumerate(order):
            running = max(running, min(1.0, gap.difference.p * (len(order) - n)))
            assert gap.p_holm == pytest.approx(running)
        assert section.verdict()[0].startswith("B is better than A: round_1 with beta=0.5 against beta=0.1")

    def test_rows_of_one_setting_are_another_family(self, grid: Any) -> None:
        frames, folders = grid
        found = {(gap.reranker, gap.row, gap.against): gap for gap in one_section(*folders).within}
        assert {key[1:] for key in found} == {
            ("zero_shot", "history_only"),
            ("round_1", "history_only"),
            ("round_1", "zero_shot"),
        }
        mine = [frames[0.5, 1], frames[0.5, 2]]
        a, b = by_user(mine, "round_1"), by_user(mine, "history_only")
        wanted = np.mean([a[user] - b[user] for user in a])
        assert found["B", "round_1", "history_only"].difference.mean == pytest.approx(wanted, abs=1e-9)

    def test_only_common_seeds_are_compared(self, grid: Any) -> None:
        frames, folders = grid
        section = one_section(*folders[:3])  # beta 0.5 with seed 1 alone
        gap = next(gap for gap in section.gaps if gap.row == "round_1")
        a, b = by_user([frames[0.1, 1]], "round_1"), by_user([frames[0.5, 1]], "round_1")
        assert gap.difference.n == 60
        assert gap.difference.mean == pytest.approx(np.mean([b[user] - a[user] for user in a]), abs=1e-9)
        assert "A and B are compared on the data of the seeds that both have." in section.notes

    def test_rows_that_a_setting_does_not_touch_make_nothing_harder(self, tmp_path: Path) -> None:
        users = list(range(50))
        first, second = list_frames(1, users), list_frames(2, users)
        same = pl.concat([first.filter(pl.col("row") != "round_1"), second.filter(pl.col("row") == "round_1")])
        section = one_section(
            write_run(tmp_path / "a", first), write_run(tmp_path / "b", same, config=configured(policy__beta=1.0))
        )
        found = {gap.row: gap for gap in section.gaps}
        assert found["round_1"].p_holm == found["round_1"].difference.p < 1
        assert found["zero_shot"].p_holm == 1.0

    def test_a_seed_that_one_setting_alone_has_finished_is_left_out(self, tmp_path: Path) -> None:
        """Both settings do the same; one has measured half of the users under a second, luckier seed too."""
        users, rows = list(range(40)), ("zero_shot",)
        first, luckier = list_frames(1, users, rows), list_frames(1, users[:20], rows, shift=0.1)
        line = configured(policy__beta=1.0)
        runs = [
            write_run(tmp_path / "a", first),
            write_run(tmp_path / "b", first, config=line),
            write_run(tmp_path / "b2", luckier, config={**line, "seed": 2}),
        ]
        section = one_section(*runs)
        (gap,) = section.gaps
        assert (gap.difference.mean, gap.difference.n) == (0.0, 40)
        assert line_of(section, "zero_shot", "B")["seeds"] == 2  # its own mean is over both

    def test_seeds_count_between_settings_too(self, tmp_path: Path) -> None:
        """B stands far above A with one reranker seed, and below it with the other."""
        users, rows = list(range(60)), ("zero_shot",)
        runs = []
        for name, shifts in (("a", (0.0, 0.0)), ("b", (0.08, -0.02))):
            parts = [list_frames(7 + n, users, rows, shift=shift) for n, shift in enumerate(shifts)]
            parts = [part.with_columns(seed=pl.lit(n)) for n, part in enumerate(parts)]
            config = configured(evaluation__seeds=2, policy__beta=0.1 if name == "a" else 1.0)
            runs.append(write_run(tmp_path / name, pl.concat(parts), config=config))
        section = one_section(*runs)
        (gap,) = section.gaps
        assert [len(gaps) for gaps in gap.by_seed] == [2]
        assert not gap.sure
        assert "is not shown to differ" in section.verdict()[0]

    def test_where_seeds_are_not_counted_is_told(self, tmp_path: Path) -> None:
        """Three runs, each on users of its own, with one reranker seed."""
        for n in range(3):
            frames = list_frames(n, list(range(40 * n, 40 * n + 40)))
            write_run(tmp_path / str(n), frames, config=configured(seed=n), ground=n)
        section = one_section(*(tmp_path / str(n) for n in range(3)))
        assert [line for line in section.notes if line.startswith("In A no users were measured under two")]

    def test_folds_of_an_array_job_are_one_setting(self, tmp_path: Path) -> None:
        parts = [list_frames(n, list(range(30 * n, 30 * n + 30)), fold=n) for n in range(2)]
        folders = []
        for n, part in enumerate(parts):
            config = configured(evaluation__folds=2, evaluation__only_folds=[n])
            folders.append(write_run(tmp_path / str(n), part, config=config))
        section = one_section(*folders)
        line = line_of(section, "round_1", "A")
        assert (len(section.settings), line["n"], line["seeds"]) == (1, 60, 1)
        assert line["mean"] == pytest.approx(np.mean([*by_user(parts, "round_1").values()]), abs=2e-6)

    def test_published_numbers_stand_beside_comparable_ones(self, tmp_path: Path) -> None:
        config = configured(lists__protocol="kar")
        frames = list_frames(0, list(range(20)), rows=("no_knowledge", "zero_shot"))
        write_run(tmp_path / "a", frames, config=config, protocol="kar")
        section = one_section(tmp_path / "a")
        assert section.headline.convention == "kar"
        write_page(tmp_path / "page.html", [section], title="x")
        assert "0.77053" in Page((tmp_path / "page.html").read_text()).text

    def test_published_numbers_do_not_stand_beside_a_sample_of_users(self, tmp_path: Path) -> None:
        config = configured(lists__protocol="kar", users=20)
        frames = list_frames(0, list(range(20)), rows=("no_knowledge", "zero_shot"))
        write_run(tmp_path / "a", frames, config=config, protocol="kar", users=USERS_60[:20])
        assert [line["published"] for line in one_section(tmp_path / "a").lines if line["published"]] == []

    def test_one_comparison_is_the_same_alone_and_beside_others(self, tmp_path: Path) -> None:
        """The run's own page, whatever its seed, and the joint one draw the same bootstrap samples."""
        frames = list_frames(3, list(range(60)))
        run = write_run(tmp_path / "a", frames, config=configured(seed=5))
        (section,) = sections([read_run(run)])
        alone = compare_rows(RERANKING.with_layouts(frames, configured()), section.headline)
        assert [(c.row, c.difference, c.p_holm) for c in alone] == [
            (c.row, c.difference, c.p_holm) for c in section.within
        ]
        for file in (commands, session_commands):
            assert "seed=cfg.seed" not in inspect.getsource(file)

    def test_sessions_are_made_of_their_ranks(self, tmp_path: Path) -> None:
        run = read_run(write_session_run(tmp_path / "a"))
        kept = {(r["row"], r["split"], r["metric"]): r["mean"] for r in run.results}
        section = sections([run], resamples=200)[0]
        for line in section.lines:
            assert line["mean"] == pytest.approx(kept[line["row"], "test", line["metric"]], abs=2e-6)
        assert run.curve == [(1, 0.0), (2, 0.1), (3, 0.2)]
        assert {(gap.row, gap.against) for gap in section.within} >= {("ppo", "no_hint"), ("no_hint", "random")}


class TestVerdict:
    """What a setting shows by itself stands above what differs between settings."""

    def seeds_of(self, tmp_path: Path, **changes: Any) -> list[Path]:
        """Three runs of one setting; DPO helps in all of them."""
        runs = []
        for seed in (1, 2, 3):
            frames = list_frames(seed, list(range(60)), shift=0.0)
            better = pl.when(pl.col("row") == "round_1").then(0.05).otherwise(0.0)
            frames = frames.with_columns(pl.col("ndcg@5|standard") + better.cast(pl.Float32))
            folder = tmp_path / f"{len(changes)}{seed}"
            runs.append(write_run(folder, frames, config=configured(seed=seed, **changes), users=USERS_60))
        return runs

    def test_seeds_of_one_setting_say_whether_dpo_helped(self, tmp_path: Path, capsys: Any) -> None:
        runs = self.seeds_of(tmp_path)
        section = one_section(*runs)
        (one,) = told_of(section)
        gap = next(c for c in section.within if (c.row, c.against) == ("round_1", "zero_shot"))
        assert gap.sure
        assert one.lines[0].startswith(
            f"DPO helped: with DLCM, round_1 against zero_shot is {gap.difference.mean:+.4f}"
        )
        assert "sampled and tuned once in each of these 3 runs" in one.lines[-1]
        assert one.cost == (
            "DPO cost 51 tokens and 1.5 s (1 round in each of 3 runs), of 102 tokens and 28 s for all 3 runs."
        )
        output = tmp_path / "page.html"
        assert main(["report", *map(str, runs), "--output", str(output)]) == 0
        page = Page(output.read_text()).text
        told = " ".join(capsys.readouterr().out.split())
        for words in ("DPO helped: with DLCM, round_1 against zero_shot is", one.cost):
            assert words in page
            assert words in told
        assert page.index("DPO helped") < page.index("Results")
        assert "cannot be told from chance" not in told  # in brief

    def test_every_setting_is_told_before_they_are_compared(self, tmp_path: Path, capsys: Any) -> None:
        runs = [*self.seeds_of(tmp_path), *self.seeds_of(tmp_path, policy__beta=1.0)]
        section = one_section(*runs)
        assert [one.setting.letter for one in told_of(section)] == ["A", "B"]
        output = tmp_path / "page.html"
        assert main(["report", *map(str, runs), "--output", str(output)]) == 0
        page, told = Page(output.read_text()).text, " ".join(capsys.readouterr().out.split())
        assert page.count("DPO helped:") == 2
        assert page.index("DPO helped") < page.index("Setting against setting") < page.index("What differs")
        assert "A: beta=0.1: DPO helped; Better than the raw history (history_only) with DLCM" in told

    def test_runs_without_an_llm_say_nothing_of_one(self, tmp_path: Path) -> None:
        frames = list_frames(1, list(range(40)), rows=("history_shuffled", "history_only"))
        frames = pl.concat([frames, frames.with_columns(seed=1)])
        (one,) = told_of(one_section(write_run(tmp_path / "a", frames)))
        assert one.lines
        assert "LLM was" not in " ".join(one.lines)


class TestSettings:
    def test_few_keys_tell_settings_apart(self) -> None:
        tiny = configured()
        large = configured(llm__name="large", llm__hub="c/d", llm__revision="r")
        keys, differing, groups = group_configs([tiny, large, configured(seed=2, name="other"), large])
        assert keys == ("llm.name",)
        assert groups == {("tiny",): [0, 2], ("large",): [1, 3]}
        assert dict(differing) == {
            "llm.name": ["tiny", "large"],
            "llm.hub": ["a/b", "c/d"],
            "llm.revision": ["not set", "r"],
        }

    def test_keys_that_determine_each_other_never_merge_settings(self) -> None:
        """The third key is the parity of the others: any two of them will do, one will not."""
        grid = [configured(a=a, b=b, c=a ^ b) for a in (0, 1) for b in (0, 1)]
        keys, _, groups = group_configs(grid)
        assert len(keys) == 2
        assert len(groups) == 4

    def test_neighbours_in_a_grid(self) -> None:
        run = FinishedRun(Path(), CONFIG, {}, [], pl.DataFrame(), "p", "g")
        grid = [Setting("", "", (a, b), [run], pl.DataFrame()) for a in "12" for b in "xyz"]
        assert against(grid) == [(1, 0), (2, 0), (3, 0), (4, 1), (4, 3), (5, 2), (5, 3)]
        apart = [replace(one, runs=[replace(run, ground=str(n))]) for n, one in enumerate(grid)]
        assert against(apart) == []


class TestMistakes:
    def tell(self, capsys: Any, tmp_path: Path, *runs: Path, words: tuple[str, ...]) -> None:
        output = tmp_path / "out.html"
        assert_told(capsys, main(["report", *map(str, runs), "--output", str(output)]), *words)
        assert not output.exists()

    def test_no_run_and_an_unfinished_one(self, tmp_path: Path, capsys: Any) -> None:
        run = write_run(tmp_path / "run", list_frames(0, [1, 2, 3]))
        (tmp_path / "empty").mkdir()
        (tmp_path / "begun" / "stages").mkdir(parents=True)
        self.tell(capsys, tmp_path, run, tmp_path / "nowhere", words=("nowhere is no run folder",))
        self.tell(capsys, tmp_path, tmp_path / "empty", words=("empty is no run folder", "results.json"))
        self.tell(capsys, tmp_path, tmp_path / "begun", words=("unfinished", "again"))
        self.tell(capsys, tmp_path, run / "results.json", words=("is no run folder",))
        (run / "environment.json").unlink()
        self.tell(capsys, tmp_path, run, words=("unfinished", "environment.json"))

    def test_older_format(self, tmp_path: Path, capsys: Any) -> None:
        run = write_run(tmp_path / "run", list_frames(0, [1, 2, 3]))
        lines = json.loads((run / "results.json").read_text())
        for broken in (
            [{k: v for k, v in lines[0].items() if k != "unit"}],
            {"rows": lines},
            [{**lines[0], "row": "../x"}],
        ):
            (run / "results.json").write_text(json.dumps(broken))
            self.tell(capsys, tmp_path, run, words=("another version of lit_rec", "results.json"))
        (run / "results.json").write_text("[")
        self.tell(capsys, tmp_path, run, words=("cannot be read", "results.json"))

    def test_stages_that_are_gone_or_do_not_belong(self, tmp_path: Path, capsys: Any) -> None:
        run = write_run(tmp_path / "run", list_frames(0, [1, 2, 3]))
        stage = run / "stages/fold_0/rows/round_1/metrics.parquet"
        list_frames(5, [1, 2, 3], rows=("round_1",), shift=0.2).write_parquet(stage)
        self.tell(capsys, tmp_path, run, words=("do not belong together", "round_1"))
        stage.unlink()
        self.tell(capsys, tmp_path, run, words=("metrics of single users", "round_1"))

    def test_no_common_metric(self, tmp_path: Path, capsys: Any) -> None:
        frames = list_frames(0, [1, 2, 3])
        other = frames.rename({c: c.replace("@5", "@3") for c in frames.columns})
        runs = [
            write_run(tmp_path / "a", frames),
            write_run(tmp_path / "b", other, config=configured(evaluation__ks=[3])),
        ]
        self.tell(capsys, tmp_path, *runs, words=("no metric in common", "evaluation.ks"))

    def test_output(self, tmp_path: Path, capsys: Any) -> None:
        run = write_run(tmp_path / "run", list_frames(0, [1, 2, 3]))
        for output in (tmp_path, tmp_path / "none" / "x.html"):
            assert_told(capsys, main(["report", str(run), "--output", str(output)]), "cannot write", "--output")
        kept = (run / "results.json").read_bytes()
        for name in ("results.json", "report.html", "config.yaml"):
            assert_told(capsys, main(["report", str(run), "--output", str(run / name)]), "--output", name)
        assert (run / "results.json").read_bytes() == kept

    @pytest.mark.parametrize("content", ["{}", "[1]", '{"runs": 5}'])
    def test_a_sweep_without_its_runs_is_told(self, content: str, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "sweep.json").write_text(content)
        line = ["report", str(tmp_path), "--output", str(tmp_path / "all.html")]
        assert_told(capsys, main(line), "a sweep cannot be read", "sweep.json")

    def test_a_sweep_stands_for_its_finished_runs(self, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "sweep.json").write_text(json.dumps({"runs": ["a", "b"]}))
        self.tell(capsys, tmp_path, tmp_path, words=("no run of the sweep",))
        run = write_run(tmp_path / "a", list_frames(0, [1, 2, 3]))
        assert run_folders([tmp_path, run, run]) == [run]


class TestPage:
    def test_hints_stand_between_the_rounds_of_a_curve(self, tmp_path: Path) -> None:
        runs = [
            write_run(tmp_path / name, list_frames(n, list(range(20))), config=configured(recipe=name))
            for n, name in enumerate(("rlrf", "unified"))
        ]
        order = ("random_pairs", "round_1", "hinted_1", "zero_shot")  # any order
        states = [{"round": 0, "name": name, "heldout_reward": {"mean": len(name)}} for name in order]
        (runs[1] / "rounds.json").write_text(json.dumps(states))
        write_rewards(runs[1], "hinted_1", reward_table(1))
        assert read_run(runs[0]).curve == [(0, 0.5), (1, 0.5)]
        assert read_run(runs[1]).curve == [(0, 9), (0.5, 8), (1, 7)]
        write_page(tmp_path / "page.html", [one_section(*runs)], title="x")
        text = (tmp_path / "page.html").read_text().split("Round by round")[1].split("</svg>")[0]
        ticks = re.findall(r"<text[^>]*>((?:zero|hints|round)[^<]*)", text)
        assert ticks == ["zero-shot", "hints 1", "round 1"]

    def test_costs_stand_part_by_part_in_every_run(self, tmp_path: Path) -> None:
        runs = [
            write_run(tmp_path / str(n), list_frames(n, list(range(20))), config=configured(policy__beta=float(n)))
            for n in range(2)
        ]
        manifest = {"seconds": 0.5, "counts": {"training_seconds": 41.5}}
        (runs[1] / "stages/fold_0/round_1/policy").mkdir(parents=True)
        (runs[1] / "stages/fold_0/round_1/policy/manifest.json").write_text(json.dumps(manifest))
        assert [read_run(run).cost["seconds"] for run in runs] == [9.5, 51.5]
        write_page(tmp_path / "page.html", [one_section(*runs)], title="x")
        body = (tmp_path / "page.html").read_text().split("Part by part")[1].split("</table>")[0]
        lines = [re.findall(r">([^<>]*)</t[hd]>", line) for line in body.split("<tr>")[1:]]
        assert lines == [
            ["Part", "Part of", "A (seed 1)", "B (seed 1)"],
            ["Data, items and histories", "", "1.0 s", "1.0 s"],
            ["Zero-shot knowledge", "", "17 tokens and 0.5 s", "17 tokens and 0.5 s"],
            ["Answers of round 1", "DPO", "17 tokens and 0.5 s", "17 tokens and 0.5 s"],
            ["DPO training", "DPO", "", "42 s"],
            ["Final rerankers", "", "7.5 s", "7.5 s"],
        ]

    def test_different_data_stand_side_by_side(self, tmp_path: Path) -> None:
        a = write_run(tmp_path / "a", list_frames(0, list(range(20))))
        other = configured(policy__beta=1.0)
        b = write_run(tmp_path / "b", list_frames(1, list(range(20))), config=other, data="books", ground=9)
        section = one_section(a, b)
        assert section.gaps == []
        assert section.verdict() == []
        write_page(tmp_path / "page.html", [section], title="x")
        cells = re.findall(
            r'<td data-label="(data|protocol|test users)">([^<]*)</td>', (tmp_path / "page.html").read_text()
        )
        wanted = [("protocol", "strict"), ("test users", "20")]
        assert cells == [("data", "ml-1m"), *wanted, ("data", "books"), *wanted]
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(section_table(section))
        assert "B: beta=1.0 (1 run; books, strict, 20 test users)" in console.export_text()
        assert "Not compared: A and B" in section.notes[0]
        assert {line["setting"] for line in section.picked()} == {"A", "B"}

    def test_hints_are_named_only_where_an_agent_picks_them(self, tmp_path: Path) -> None:
        frames = list_frames(0, list(range(20)))
        for pick, title in (("none", "Reranking (RLRF4Rec)"), ("ppo", "Reranking (RLRF4Rec with hints)")):
            run = write_run(tmp_path / pick, frames, config=configured(recipe="unified", agent__pick=pick))
            assert section_title(one_section(run)) == title

    def test_one_two_and_mixed_runs(self, tmp_path: Path, capsys: Any) -> None:
        runs = [
            write_run(tmp_path / "a", list_frames(0, list(range(20)))),
            write_run(tmp_path / "b", list_frames(1, list(range(20))), config=configured(policy__beta=1.0)),
            write_session_run(tmp_path / "s"),
        ]
        for count in (1, 2, 3):
            output = tmp_path / f"{count}.html"
            assert main(["report", *map(str, runs[:count]), "--output", str(output)]) == 0
            text = output.read_text()
            page = Page(text)
            assert page.open == []
            assert not {"script", "link", "iframe", "img", "a"} & set(page.tags)
            assert "http://" not in text.replace("http://www.w3.org", "")
            assert ("What differs" in page.text) == (count > 1)
            assert ("Session ranking" in page.text) == (count > 2)
            assert "12" in page.text
            assert "34" in page.text  # answers and tokens
            assert "Part by part" in page.text
            # 3 rows and 2.5 s each, and two more stages of 1 s
            assert "9.5 s" in page.text
            # On a phone a row is a block without a head, so a cell has to say what its number is.
            assert set(re.findall(r"<table[^>]*>", text)) <= {'<table class="results">', '<table class="results many">'}
            cells = re.findall(r'<td class="num"[^>]*>', text)
            assert cells
            assert all(re.search(r'data-label="[^"]+"', cell) for cell in cells), cells
        assert "ppo" in capsys.readouterr().out

    @pytest.mark.parametrize("evil", EVIL)
    def test_nothing_becomes_markup(self, tmp_path: Path, evil: str) -> None:
        tags = []
        for number, word in enumerate(("plain", evil)):
            folder = tmp_path / str(number)
            frames = list_frames(0, list(range(20)))
            runs = [
                read_run(
                    write_run(folder / str(n), frames.with_columns(pl.col("user")), config=configured(llm__name=name))
                )
                for n, name in enumerate(("first", f"second {word}"))
            ]
            environment = {**ENVIRONMENT, "device": word, "commit": word}
            runs = [
                replace(run, environment=environment, path=Path(word.replace("\x00", "")) / str(run.path))
                for run in runs
            ]
            found = sections(runs, resamples=200)
            write_page(folder / "page.html", found, title=word)
            section_table(found[0])
            text = (folder / "page.html").read_text(encoding="utf-8")
            page = Page(text)
            assert page.open == []
            assert not [a for a in page.attributes if a[1].startswith("on")]
            tags.append(sorted(page.tags))
        assert tags[0] == tags[1]
        assert "script" not in tags[1]

    def test_equal_runs_write_equal_pages(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "a", list_frames(0, list(range(20))))
        pages = [tmp_path / "1.html", tmp_path / "2.html"]
        for page in pages:
            assert main(["report", str(run), "--output", str(page)]) == 0
        assert pages[0].read_bytes() == pages[1].read_bytes()
