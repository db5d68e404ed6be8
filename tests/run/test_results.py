import json
import random
from io import StringIO
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from lit_rec.run.comparisons import choose_headline, compare_rows, verdict
from lit_rec.run.headline import Headline
from lit_rec.run.published import published_value
from lit_rec.run.results import FIELDS, render_table, result_rows, write_results
from lit_rec.run.stories import RERANKING

CONVENTIONS = ("kar", "standard")


def frames_of(
    effects: dict[str, float],
    *,
    users: int = 60,
    seeds: int = 2,
    noise: float = 0.03,
    reranker: str = "dlcm",
    split: str = "test",
) -> pl.DataFrame:
    """Per-list metrics of rows whose users differ by `effects`, three lists a user."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.4, 0.7, users)
    owner = np.repeat(np.arange(users), 3)
    parts = []
    for row, effect in effects.items():
        mine = base + effect + rng.normal(0, noise, users)
        for seed in range(seeds):
            frame = pl.DataFrame({"user": owner, "list": np.arange(len(owner))}).with_columns(
                row=pl.lit(row),
                reranker=pl.lit(reranker),
                split=pl.lit(split),
                fold=pl.lit(0),
                seed=pl.lit(seed),
            )
            values = np.clip(mine[owner] + rng.normal(0, 0.02, len(owner)), 0, 1).astype("float32")
            parts.append(
                frame.with_columns(
                    pl.Series(f"{metric}@5|{convention}", values if convention == "kar" else values * 0.9)
                    for metric in ("ndcg", "map")
                    for convention in CONVENTIONS
                )
            )
    return pl.concat(parts)


EFFECTS = {"round_2": 0.1, "no_knowledge": -0.1, "history_only": 0.0, "zero_shot": -0.05, "round_1": 0.05}


def rows_of(frames: pl.DataFrame, protocol: str = "kar") -> list[dict]:
    return result_rows(frames, task="rerank", dataset="ml-1m", protocol=protocol, resamples=300)


def test_rows_have_the_schema_and_the_numbers_of_a_plain_loop() -> None:
    frames = frames_of({"zero_shot": 0.0, "history_only": 0.1}, users=9)
    frames = frames.filter(~((pl.col("user") == 0) & (pl.col("list") > 0)))  # one user has a single list
    rows = rows_of(frames)
    assert len(rows) == 2 * 2 * 2 * 2
    assert all(tuple(row) == FIELDS for row in rows)
    row = next(r for r in rows if (r["row"], r["metric"], r["unit"]) == ("zero_shot", "map@5", "list"))
    mine = frames.filter(pl.col("row") == "zero_shot")
    assert row["mean"] == pytest.approx(np.mean([float(v) for v in mine["map@5|kar"]]), abs=1e-6)
    assert row["ci95"][0] < row["mean"] < row["ci95"][1]
    assert (row["n"], row["seeds"]) == (25, 2)
    users = next(r for r in rows if (r["row"], r["metric"], r["unit"]) == ("zero_shot", "map@5", "user"))
    means = [np.mean(mine.filter(pl.col("user") == u)["map@5|kar"].cast(pl.Float64).to_numpy()) for u in range(9)]
    assert users["mean"] == pytest.approx(np.mean(means), abs=1e-6)
    assert users["n"] == 9


def test_a_metric_that_a_row_lacks_and_a_lone_user_are_no_error(tmp_path: Path) -> None:
    whole = frames_of({"zero_shot": 0.0}, users=1)
    lacking = frames_of({"history_only": 0.0}, users=1).drop("map@5|kar", "map@5|standard")
    rows = rows_of(pl.concat([whole, lacking], how="diagonal"))
    assert not [r for r in rows if r["row"] == "history_only" and r["metric"] == "map@5"]
    assert all(r["ci95"] == [None, None] for r in rows)
    write_results(tmp_path / "results.json", rows)
    assert json.loads((tmp_path / "results.json").read_text()) == rows


def test_published_numbers_stand_only_where_they_are_comparable() -> None:
    frames = pl.concat([frames_of(EFFECTS), frames_of(EFFECTS, split="validation")])
    rows = rows_of(frames)
    known = {(r["row"], r["metric"]): r for r in rows if r["published"] is not None}
    assert {name: r["published"] for name, r in known.items()} == {
        ("no_knowledge", "ndcg@5"): 0.77053,
        ("no_knowledge", "map@5"): 0.72815,
        ("zero_shot", "ndcg@5"): 0.77622,
        ("zero_shot", "map@5"): 0.73482,
        ("round_2", "ndcg@5"): 0.77942,
        ("round_2", "map@5"): 0.73952,
    }
    assert {(r["split"], r["convention"], r["unit"]) for r in known.values()} == {("test", "kar", "list")}
    assert not [r for r in rows_of(frames, "strict") if r["published"] is not None]
    books = published_value(
        dataset="amazon_books", protocol="kar", reranker="prm", row="round_3", metric="ndcg@5", last_round=3
    )
    assert books == 0.70131


def test_equal_runs_write_equal_bytes_whatever_order_the_lists_came_in(tmp_path: Path) -> None:
    frames = frames_of(EFFECTS)
    for name, part in (("a", frames), ("b", frames), ("c", frames.sample(fraction=1, shuffle=True, seed=1))):
        write_results(tmp_path / name, rows_of(part))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]  # no temporary file is left


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, rows_of(frames_of({"zero_shot": 0.0}, users=3)))
    before = path.read_bytes()
    with pytest.raises(KeyError):
        write_results(path, [{"task": "rerank"}])
    assert path.read_bytes() == before


def test_rows_stand_in_an_order_that_reads() -> None:
    order = [
        "no_knowledge",
        "item_only",
        "history_shuffled",
        "history_only",
        "shuffled",
        "shuffled_both",
        "zero_shot",
        "zero_shot_both",
        "zero_shot_kar",
        "best_of_n",
        "random_pairs",
        "round_1",
        "round_2",
        "round_2_both",
        "round_10",
        "something_else",
    ]
    mixed = random.Random(0).sample(order, len(order))
    assert sorted(mixed, key=RERANKING.row_order) == order


def test_whose_history_it_is_is_judged() -> None:
    frames = frames_of({"item_only": 0.0, "history_shuffled": 0.0, "history_only": 0.1})
    headline = Headline()
    lines = verdict(compare_rows(frames, headline), headline)
    assert lines[0].startswith("A user's own history helps beyond having a vector: with DLCM, history_only against")
    frames = frames_of({"history_shuffled": 0.1, "history_only": 0.0})
    assert verdict(compare_rows(frames, headline), headline)[0].startswith("A user's own history does worse")


def test_variants_are_compared_with_their_own_zero_shot() -> None:
    present = ["history_only", "zero_shot", "zero_shot_both", "random_pairs", "round_1", "round_1_both"]
    assert RERANKING.has_to_beat("round_1", present) == ["history_only", "zero_shot", "random_pairs"]
    assert RERANKING.has_to_beat("round_1_both", present) == ["history_only", "zero_shot_both"]
    assert RERANKING.has_to_beat("zero_shot_both", present) == ["history_only"]
    assert RERANKING.has_to_beat("history_only", present) == []


@pytest.mark.parametrize("unit", ["user", "list"])
def test_verdict_says_that_a_clear_gain_is_one(unit: str) -> None:
    headline = Headline(unit=unit)
    lines = verdict(compare_rows(frames_of(EFFECTS), headline), headline)
    assert lines[0].startswith("DPO helped: with DLCM, round_2 against zero_shot is +0.1")
    assert f"(kar, {unit} mean)" in lines[0]
    assert lines[1].startswith("Better than the raw history")
    assert "round_2 +0.0" in lines[1] or "round_2 +0.1" in lines[1]


def test_verdict_claims_nothing_when_nothing_is_there() -> None:
    frames = frames_of({"history_only": 0, "zero_shot": 0, "random_pairs": 0, "round_1": 0}, noise=0.1)
    lines = verdict(compare_rows(frames), choose_headline(frames))
    assert lines[0].startswith("Whether DPO helps is not shown")
    assert "cannot be told from chance" in lines[0]
    assert lines[1].startswith("Pairs chosen by the reward are not shown to be better than random pairs")
    assert lines[2].startswith("No LLM text is shown to beat the raw history")


def test_more_training_is_not_taken_for_a_better_reward() -> None:
    """Every round adds as much, whatever its pairs: two rounds are above one on random pairs, and that says nothing."""
    means = {"history_only": 0.0, "zero_shot": 0.0, "random_pairs": 0.1, "round_1": 0.1, "round_2": 0.2}
    frames = frames_of(means, noise=0.02)
    lines = verdict(compare_rows(frames), choose_headline(frames))
    assert lines[0].startswith("DPO helped: with DLCM, round_2 against zero_shot")
    assert lines[1].startswith(
        "Pairs chosen by the reward are not shown to be better than random pairs: with DLCM, round_1"
    )


def test_a_text_that_wins_like_anybodys_is_told() -> None:
    means = {"history_only": 0.0, "zero_shot_both": 0.0, "round_1_both": 0.1, "shuffled_both": 0.1}
    frames = frames_of(means, noise=0.02)
    lines = verdict(compare_rows(frames), choose_headline(frames))
    (better,) = [n for n, line in enumerate(lines) if line.startswith("Better than the raw history")]
    assert lines[better + 1].startswith("So is somebody else's text with DLCM")
    assert "shuffled_both +0.1" in lines[better + 1]
    frames = frames_of({**means, "shuffled_both": 0.0}, noise=0.02)
    assert not [line for line in verdict(compare_rows(frames), choose_headline(frames)) if line.startswith("So is")]


def test_variants_of_the_answer_alone_have_their_own_zero_shot() -> None:
    present = ["history_only", "zero_shot", "zero_shot_answer", "random_pairs_answer", "round_1", "round_1_answer"]
    found = RERANKING.has_to_beat("round_1_answer", present)
    assert set(found) == {"history_only", "zero_shot_answer", "random_pairs_answer"}


def test_verdict_says_that_harm_is_harm_and_judges_the_last_round_only() -> None:
    frames = frames_of({"history_only": 0.2, "zero_shot": 0.0, "round_1": 0.15, "round_2": -0.15})
    lines = verdict(compare_rows(frames), choose_headline(frames))
    assert lines[0].startswith("DPO hurt: with DLCM, round_2")
    assert "3 of 3 are clearly worse" in lines[1]


HINTED = {"history_only": -0.2, "zero_shot": 0.0, "random_pairs": 0.05, "hinted_1": 0.05, "hinted_2": 0.1}


def test_rows_with_hints_stand_before_the_round_they_began() -> None:
    order = ["zero_shot", "best_of_n", "random_pairs", "hinted_1", "hinted_1_both", "round_1", "round_1_both"]
    order += ["hinted_2", "hinted_2_kar", "round_2", "hinted_10", "round_10", "something_else"]
    mixed = random.Random(1).sample(order, len(order))
    assert sorted(mixed, key=RERANKING.row_order) == order


@pytest.mark.parametrize(
    ("row", "against"),
    [
        ("hinted_1", {"history_only", "zero_shot"}),
        ("hinted_2", {"history_only", "zero_shot", "round_1"}),
        ("hinted_2_both", {"history_only", "zero_shot_both", "round_1_both"}),
        ("round_1", {"history_only", "zero_shot", "random_pairs", "hinted_1"}),
        ("round_2", {"history_only", "zero_shot", "hinted_2"}),  # random pairs had one round of DPO
        ("round_1_answer", {"history_only"}),
        ("round_2_both", {"history_only", "zero_shot_both", "hinted_2_both"}),
    ],
)
def test_what_has_to_be_beaten_where_there_are_hints(row: str, against: set[str]) -> None:
    present = ["history_only", "zero_shot", "random_pairs", "hinted_1", "round_1", "hinted_2", "round_2"]
    present += [f"{name}_both" for name in ("zero_shot", "hinted_1", "round_1", "hinted_2", "round_2")]
    found = RERANKING.has_to_beat(row, present)
    assert set(found) == against
    assert len(found) == len(against)


@pytest.mark.parametrize(
    ("changes", "claims"),
    [
        ({"round_2": 0.2}, ["The hints helped", "DPO helped beyond the hints", "Hints and DPO together helped"]),
        (
            {"hinted_1": -0.1, "hinted_2": -0.1, "round_2": -0.3},
            ["The hints hurt", "DPO hurt beyond the hints", "Hints and DPO together hurt"],
        ),
        (
            {"hinted_2": 0.3, "round_2": 0.2},  # hints help more than DPO takes away
            ["The hints helped", "DPO hurt beyond the hints", "Hints and DPO together helped"],
        ),
    ],
)
def test_verdict_tells_hints_from_dpo(changes: dict[str, float], claims: list[str]) -> None:
    frames = frames_of({**HINTED, **changes, "round_1": 0.5})  # not the last: judged against random pairs alone
    lines = verdict(compare_rows(frames), choose_headline(frames))
    assert [line.split(":")[0] for line in lines[:3]] == claims
    pairs = [("hinted_1", "zero_shot"), ("round_2", "hinted_2"), ("round_2", "zero_shot")]
    for line, (row, against) in zip(lines, pairs, strict=False):
        assert f": with DLCM, {row} against {against} is " in line
    assert "round_1 against random_pairs" in lines[3]
    assert len(lines) == 6


def test_verdict_claims_nothing_of_hints_when_nothing_is_there() -> None:
    rows = ("history_only", "zero_shot", "hinted_1", "round_1")
    frames = frames_of(dict.fromkeys(rows, 0.0), noise=0.1)
    lines = verdict(compare_rows(frames), choose_headline(frames))
    assert lines[0].startswith("Whether the hints help is not shown: with DLCM, hinted_1 against zero_shot")
    assert lines[1].startswith("Whether DPO helps beyond the hints is not shown: with DLCM, round_1 against hinted_1")
    assert lines[2].startswith("Whether hints and DPO together help is not shown: with DLCM, round_1 against zero_shot")
    assert len(lines) == 5


def test_verdict_of_equal_rows_and_of_no_rows() -> None:
    zero = frames_of({"zero_shot": 0.0})
    frames = pl.concat([zero, zero.with_columns(row=pl.lit("round_1"))])
    assert "equal for every user" in verdict(compare_rows(frames), Headline())[0]
    assert verdict([], Headline()) == [
        "This run has no two rows that can be compared, so it shows nothing about the method."
    ]


def test_headline_takes_what_the_frames_hold() -> None:
    frames = frames_of({"zero_shot": 0.0}).select(pl.exclude("^.*kar$")).rename({"ndcg@5|standard": "ndcg@3|standard"})
    headline = choose_headline(frames)
    assert headline.column() == "ndcg@3|standard"
    assert choose_headline(pl.DataFrame()) == Headline()


def test_the_terminal_table_names_rows_intervals_conventions_and_the_verdict() -> None:
    effects = EFFECTS | {"[bold]odd": 0.0}
    frames = pl.concat([frames_of(effects), frames_of(EFFECTS, reranker="prm")])
    out = StringIO()
    Console(file=out, width=200).print(render_table(rows_of(frames), frames))
    text = out.getvalue()
    for part in (
        "DLCM",
        "PRM",
        "NDCG@5 (kar, user)",
        "MAP@5 (kar, user)",
        "vs zero_shot",
        "[bold]odd",
        "[low, high]",
    ):
        assert part in text
    assert text.index("no_knowledge") < text.index("zero_shot") < text.index("round_1 ")
    assert "DPO helped" in text


def test_a_table_of_nothing_says_so() -> None:
    out = StringIO()
    Console(file=out, width=100).print(render_table([], pl.DataFrame(), comparisons=[]))
    assert "nothing to show" in out.getvalue()
