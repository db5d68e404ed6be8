import math
import random
from io import StringIO

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from lit_rec.run.comparisons import choose_headline, compare_rows, verdict
from lit_rec.run.headline import Headline
from lit_rec.run.results import render_table, result_rows
from lit_rec.run.stories import SESSIONS

ROWS = (
    "random",
    "popularity",
    "item_knn",
    "sasrec",
    "empty_prompt",
    "no_hint",
    "random_hint",
    "best_fixed_hint",
    "ppo",
    "full_information",
    "oracle",
)
HEADLINE = Headline(10, "standard", "session")
SHIFTS = {
    "random": 14,
    "popularity": 8,
    "item_knn": -4,
    "sasrec": 6,
    "empty_prompt": 9,
    "no_hint": 4,
    "random_hint": 4,
    "best_fixed_hint": 2,
    "ppo": 0,
    "full_information": 0,
    "oracle": -3,
}


def ranks_of(shifts: dict[str, int], sessions: int = 200) -> dict[str, np.ndarray]:
    """Every session's rank moves alike between rows, give or take one place."""
    rng = np.random.default_rng(0)
    base = rng.integers(5, 14, sessions)
    return {row: np.clip(base + shift + rng.integers(-1, 2, sessions), 1, 50) for row, shift in shifts.items()}


def frames_of(ranks: dict[str, np.ndarray], llm: str = "smol") -> pl.DataFrame:
    parts = []
    for row, rank in ranks.items():
        for seed in range(2 if row in ("ppo", "full_information") else 1):
            metrics = {"mrr@50|standard": 1 / rank}
            for k in (5, 10):
                metrics[f"hr@{k}|standard"] = (rank <= k) * 1.0
                metrics[f"ndcg@{k}|standard"] = np.where(rank <= k, 1 / np.log2(rank + 1), 0)
            number = np.arange(len(rank)) + 500
            about = {"row": row, "reranker": llm, "seed": seed, "fold": 0, "split": "test"}
            parts.append(
                pl.DataFrame(
                    {"user": number, "list": number, **{k: v.astype("float32") for k, v in metrics.items()}}
                ).with_columns(pl.lit(v).alias(k) for k, v in about.items())
            )
    return pl.concat(parts)


def judge(shifts: dict[str, int], sessions: int = 200) -> list[str]:
    frames = frames_of(ranks_of(shifts, sessions))
    rows = result_rows(frames, dataset="x", protocol="y", story=SESSIONS)
    return verdict(compare_rows(frames, story=SESSIONS), choose_headline(frames, story=SESSIONS), rows, SESSIONS)


def line_with(lines: list[str], part: str) -> str:
    found = [line for line in lines if part in line]
    assert len(found) == 1, lines
    return found[0]


def test_rows_stand_from_chance_to_the_oracle() -> None:
    mixed = random.Random(0).sample([*ROWS, "another"], len(ROWS) + 1)
    assert sorted(mixed, key=SESSIONS.row_order) == [*ROWS, "another"]


@pytest.mark.parametrize(
    ("row", "against"),
    [
        ("random", []),
        ("popularity", ["random"]),
        ("item_knn", ["random"]),
        ("sasrec", ["random"]),
        ("empty_prompt", ["random"]),
        ("no_hint", ["random", "empty_prompt"]),
        ("random_hint", ["no_hint"]),
        ("best_fixed_hint", ["no_hint"]),
        ("ppo", ["no_hint", "random_hint", "best_fixed_hint"]),
        ("full_information", ["no_hint", "best_fixed_hint"]),
        ("oracle", []),
    ],
)
def test_what_has_to_be_beaten(row: str, against: list[str]) -> None:
    assert SESSIONS.has_to_beat(row, ROWS) == against
    assert SESSIONS.has_to_beat(row, [row, *against[1:]]) == against[1:]


def test_every_comparison_is_made_once_on_the_same_sessions() -> None:
    ranks = ranks_of(SHIFTS)
    found = {(c.row, c.against): c for c in compare_rows(frames_of(ranks), story=SESSIONS)}
    assert set(found) == {(row, other) for row in ROWS for other in SESSIONS.has_to_beat(row, ROWS)}
    gain = {row: np.where(rank <= 10, 1 / np.log2(rank + 1), 0) for row, rank in ranks.items()}
    for (row, other), comparison in found.items():
        assert comparison.difference.mean == pytest.approx((gain[row] - gain[other]).mean(), abs=1e-6)
        assert comparison.difference.n == 200


def test_the_headline_is_at_ten_over_sessions_and_names_no_convention() -> None:
    headline = choose_headline(frames_of(ranks_of(SHIFTS)), story=SESSIONS)
    assert headline == HEADLINE
    assert choose_headline(pl.DataFrame(), story=SESSIONS) == HEADLINE
    assert headline.full_label() == "NDCG@10 (session mean)"
    assert headline.counting == "mean over test sessions"
    assert choose_headline(frames_of(ranks_of(SHIFTS)), k=4, story=SESSIONS).k == 5


def test_results_count_sessions_once() -> None:
    ranks = ranks_of(SHIFTS)
    rows = result_rows(frames_of(ranks), dataset="x", protocol="y", story=SESSIONS)
    assert len(rows) == len(ROWS) * 5
    assert {(r["unit"], r["task"], r["published"], r["n"]) for r in rows} == {("session", "session-ranking", None, 200)}
    assert list(dict.fromkeys(r["row"] for r in rows)) == list(ROWS)
    one = next(r for r in rows if (r["row"], r["metric"]) == ("sasrec", "hr@5"))
    assert one["mean"] == pytest.approx(np.mean(ranks["sasrec"] <= 5), abs=1e-6)
    assert {r["seeds"] for r in rows if r["row"] == "ppo"} == {2}


def test_verdict_of_a_run_in_which_everything_works() -> None:
    lines = judge(SHIFTS)
    assert [line.split(":")[0] for line in lines[:5]] == [
        "The LLM uses the session",
        "A hint helps",
        "The agent's hints help",
        "Choosing a hint for each session helps",
        "The agent chooses better than chance",
    ]
    assert all("NDCG@10 (session mean)" in line for line in lines)
    assert len(lines) == 7


def test_verdict_of_a_run_in_which_nothing_works() -> None:
    lines = judge({**dict.fromkeys(ROWS, 4), "oracle": -3}, sessions=60)
    assert lines[0].startswith("Whether the LLM uses the session is not shown: no_hint against empty_prompt")
    assert lines[1].startswith("Whether a hint helps is not shown")
    assert lines[3].startswith("Choosing a hint for each session is not shown to beat one hint for all")
    assert lines[4].startswith("The agent is not shown to choose better than chance")
    assert "With 60 sessions, effects below about" in lines[0]
    assert "users" not in " ".join(lines)


def test_an_agent_that_leaves_all_hints_out_is_not_said_to_choose_well() -> None:
    """Hints only hurt, and it has learnt to give nobody one."""
    lines = judge({"no_hint": 0, "random_hint": 6, "best_fixed_hint": 4, "ppo": 0})
    assert line_with(lines, "ppo against best_fixed_hint").startswith(
        "The agent does better than one hint for all, not surely by its hints"
    )
    assert line_with(lines, "ppo against random_hint").startswith("The agent does better than random hints, not")


def test_verdict_calls_harm_harm() -> None:
    lines = judge({**SHIFTS, "no_hint": 20, "best_fixed_hint": 30, "ppo": 40, "random_hint": -1, "empty_prompt": 0})
    assert lines[0].startswith("The LLM ranks worse with the session than without it")
    assert line_with(lines, "ppo against random_hint").startswith("The agent chooses worse than chance")
    assert line_with(lines, "oracle").startswith("The agent got none of what")
    lines = judge({"no_hint": 0, "best_fixed_hint": 6, "ppo": 12})
    assert lines[0].startswith("Even the best single hint hurts")
    assert lines[1].startswith("The agent's hints hurt")
    assert lines[2].startswith("Choosing a hint for each session is worse than one hint for all")


def test_the_share_of_the_oracle_is_that_of_the_means() -> None:
    ranks = ranks_of(SHIFTS)
    none, ppo, oracle = (
        np.where(ranks[row] <= 10, 1 / np.log2(ranks[row] + 1), 0).mean() for row in ("no_hint", "ppo", "oracle")
    )
    line = line_with(judge(SHIFTS), "The oracle sees the answers")
    assert f"The agent got {(ppo - none) / (oracle - none):.0%} of what" in line
    assert f"ppo gains {ppo - none:+.4f} over no_hint and oracle {oracle - none:+.4f}" in line
    same = ranks_of({"no_hint": 0})["no_hint"]
    frames = frames_of({"no_hint": same, "ppo": same, "oracle": same})
    rows = result_rows(frames, dataset="x", protocol="y", story=SESSIONS)
    lines = verdict(compare_rows(frames, story=SESSIONS), HEADLINE, rows, SESSIONS)
    assert "equal for every session" in lines[0]
    assert line_with(lines, "oracle").startswith("No hint in the base could have helped")


def test_rows_without_an_llm_are_named_when_they_stand_above_it() -> None:
    line = line_with(judge(SHIFTS), "not tested")
    assert line.startswith("Without an LLM and above it: item_knn 0.")
    assert "sasrec" not in line
    assert "against ppo 0." in line
    line = line_with(judge({**SHIFTS, "item_knn": 20}), "not tested")
    assert line.startswith("No row without an LLM stands above it: the nearest is sasrec 0.")
    assert "against no_hint 0." in line_with(judge({"random": 9, "no_hint": 0}), "not tested")


@pytest.mark.parametrize("missing", ROWS)
def test_any_row_may_be_missing(missing: str) -> None:
    lines = judge({row: shift for row, shift in SHIFTS.items() if row != missing}, sessions=30)
    assert lines
    # The noun "oracle" and the word "random" may stand in other rows' names, a row's figures may not.
    assert not [line for line in lines if f" {missing} against" in line or f"against {missing} " in line]
    assert not [line for line in lines if f" {missing} 0." in line]


def test_two_language_models_are_told_apart() -> None:
    frames = pl.concat([frames_of(ranks_of(SHIFTS, 30)), frames_of(ranks_of(SHIFTS, 30), "Qwen-3")])
    rows = result_rows(frames, dataset="x", protocol="y", story=SESSIONS)
    lines = verdict(compare_rows(frames, story=SESSIONS), HEADLINE, rows, SESSIONS)
    assert sum("with smol, " in line for line in lines) == sum("with Qwen-3, " in line for line in lines) == 7


@pytest.mark.parametrize("sessions", [1, 2, 40])
def test_the_terminal_table(sessions: int) -> None:
    frames = frames_of(ranks_of({**SHIFTS, "[bold]odd": 0}, sessions))
    rows = result_rows(frames, dataset="x", protocol="y", story=SESSIONS)
    out = StringIO()
    Console(file=out, width=200).print(render_table(rows, frames, story=SESSIONS))
    text = out.getvalue()
    for part in ("smol: mean over test sessions", "NDCG@10 (session)", "HR@10 (session)", "oracle (sees the answers)"):
        assert part in text
    assert "[bold]odd" in text
    assert text.index("random ") < text.index("no_hint ") < text.index("oracle (")
    assert ("no interval (1 session)" in text) == (sessions == 1)
    assert "user" not in text
    assert "nan" not in text


def test_one_row_alone_is_no_story() -> None:
    frames = frames_of(ranks_of({"oracle": 0}, 5))
    rows = result_rows(frames, dataset="x", protocol="y", story=SESSIONS)
    assert compare_rows(frames, story=SESSIONS) == []
    assert verdict([], HEADLINE, rows, SESSIONS) == [
        "This run has no two rows that can be compared, so it shows nothing about the method."
    ]
    assert math.isclose(rows[0]["mean"], np.mean(frames["ndcg@5|standard"].to_numpy()), abs_tol=1e-6)
