"""What a run cost, part by part: sums against what a person adds up from the stages."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from lit_rec.run.cost import Part, cost_context, cost_parts, cost_sentence

USERS, SAMPLES = 4, 3  # training users; one more user has one answer


def stage(name: str, seconds: float, key: dict[str, Any] | None = None, **counts: Any) -> dict[str, Any]:
    return {"name": name, "seconds": seconds, "key": key or {}, "counts": counts}


def answers(folder: Path, name: str, seconds: float, *, samples: int, written: float = 1.0) -> dict[str, Any]:
    """An answers stage: first answers have 10 tokens, further ones 5; a share of them was not in the store."""
    rows = [(user, sample) for user in range(USERS) for sample in range(samples)] + [(USERS, 0)]
    table = pl.DataFrame(rows, schema=["user", "sample"], orient="row").with_columns(
        tokens=pl.when(pl.col("sample") == 0).then(10).otherwise(5)
    )
    (folder / name / "answers").mkdir(parents=True)
    table.write_parquet(folder / name / "answers" / "answers.parquet")
    tokens = int(table["tokens"].sum())
    return stage(f"{name}/answers", seconds, answers=len(table), tokens=tokens, tokens_written=round(tokens * written))


def plain_run(folder: Path, fold: int = 0) -> list[dict[str, Any]]:
    """Two rounds without hints: 50 tokens of knowledge per state, and 40 more where another round follows."""
    f = f"fold_{fold}"
    return [
        stage("lists", 1.0),
        stage("knowledge", 2.0, {"item_text": "attributes"}, items=5),
        stage(f"{f}/split", 0.5),
        answers(folder, f"{f}/zero_shot", 9.0, samples=SAMPLES),
        stage(f"{f}/zero_shot/vectors", 1.8),
        stage(f"{f}/zero_shot/reward_model", 7.0),
        stage(f"{f}/zero_shot/rewards", 0.9, answers=13, mean=0.5),
        stage(f"{f}/zero_shot/pairs_best_worst", 0.25),
        stage(f"{f}/zero_shot/pairs_random", 0.25),
        stage(f"{f}/random_pairs/policy", 0.5, training_seconds=11.5),
        answers(folder, f"{f}/random_pairs", 3.0, samples=1),
        stage(f"{f}/random_pairs/divergence", 1.0),
        stage(f"{f}/round_1/policy", 0.5, training_seconds=20.0),
        answers(folder, f"{f}/round_1", 18.0, samples=SAMPLES),
        stage(f"{f}/round_2/policy", 0.5, training_seconds=30.0),
        answers(folder, f"{f}/round_2", 5.0, samples=1),
        stage(f"{f}/round_2/divergence", 2.0),
        stage(f"{f}/rows/zero_shot", 3.0),
        stage(f"{f}/rows/round_2", 4.0),
    ]


def test_a_run_without_hints_adds_up(tmp_path: Path) -> None:
    parts = cost_parts(plain_run(tmp_path), tmp_path)
    assert [(p.name, p.of, p.answers, p.tokens, pytest.approx(p.seconds)) for p in parts] == [
        ("Data, items and histories", "", 0, 0, 3.5),
        ("Zero-shot knowledge", "", 5, 50, 5.0),  # 9 s for 90 tokens
        ("Reward reranker", "DPO", 0, 0, 7.0),
        ("Answers of round 1", "DPO", 8, 40, 4.0),
        ("Answers of round 2", "DPO", 8, 40, 8.0),
        ("DPO training", "DPO", 0, 0, 51.0),
        ("Knowledge after DPO", "DPO", 10, 100, 15.0),
        ("Encoding and scoring", "", 0, 0, 1.5),
        ("Encoding and scoring", "DPO", 0, 0, 1.2 + 0.25 + 2.0),
        ("Controls (random pairs, best of N)", "", 5, 50, 16.25),
        ("Final rerankers", "", 0, 0, 7.0),
    ]
    dpo = 7.0 + 4 + 8 + 51 + 15 + 3.45
    assert cost_sentence(parts) == (
        f"DPO cost 180 tokens and {dpo:.0f} s (2 rounds), of 280 tokens and {dpo + 3.5 + 5 + 1.5 + 16.25 + 7:.0f} s "
        "for the whole run."
    )


def test_no_second_and_no_token_is_lost_or_counted_twice(tmp_path: Path) -> None:
    stages = plain_run(tmp_path) + plain_run(tmp_path, 1)[2:]
    parts = cost_parts(stages, tmp_path)
    counts = [one["counts"] for one in stages]
    assert sum(p.seconds or 0 for p in parts) == pytest.approx(
        sum(one["seconds"] for one in stages) + sum(one.get("training_seconds", 0) for one in counts)
    )
    assert sum(p.tokens or 0 for p in parts) == sum(one.get("tokens", 0) for one in counts)
    assert sum(p.answers or 0 for p in parts) == sum(one["answers"] for one in counts if "tokens" in one)
    assert [p.name for p in parts] == [p.name for p in cost_parts(plain_run(tmp_path / "one"), tmp_path / "one")]


def test_a_resumed_run_tells_the_same_whatever_order_its_stages_come_in(tmp_path: Path) -> None:
    stages = json.loads(json.dumps(plain_run(tmp_path)))
    again = [{**one, "reused": True} for one in reversed(stages)]
    first, second = cost_parts(stages, tmp_path), cost_parts(again, tmp_path)
    assert [(p.name, p.of, p.tokens, pytest.approx(p.seconds)) for p in first] == [
        (p.name, p.of, p.tokens, p.seconds) for p in second
    ]


def hinted_run(folder: Path, **counted: int) -> list[dict[str, Any]]:
    """One round with hints; what its hints wrote is told or not."""
    agent = {"agent": {"rewards": "matrix"}}
    return [
        answers(folder, "fold_0/zero_shot", 5.0, samples=1),
        stage("fold_0/zero_shot/reward_model", 7.0),
        stage("fold_0/hints/round_1/hints", 20.0, conversations=3, **counted),
        stage("fold_0/hints/round_1/rewards", 30.0, **counted),
        stage("fold_0/hints/round_1/agent", 4.0, agent),
        answers(folder, "fold_0/hinted_1", 9.0, samples=SAMPLES),
        stage("fold_0/hinted_1/rewards", 0.9),
        stage("fold_0/hinted_1/pairs_best_worst", 0.1),
        stage("fold_0/round_1/policy", 0.5, training_seconds=20.0),
        answers(folder, "fold_0/round_1", 5.0, samples=1),
    ]


def test_hints_are_told_from_dpo(tmp_path: Path) -> None:
    parts = cost_parts(hinted_run(tmp_path, answers=6, tokens=60), tmp_path)
    assert [(p.name, p.of, p.tokens, pytest.approx(p.seconds)) for p in parts] == [
        ("Zero-shot knowledge", "", 50, 5.0),
        ("Reward reranker", "", 0, 7.0),  # hints and DPO need it alike
        ("Reflection and hints", "hints", 60, 20.0),
        ("Rewards of hints", "hints", 60, 30.0),
        ("Agent", "hints", 0, 4.0),
        ("Knowledge with hints", "hints", 50, 5.0),
        ("Answers of round 1", "DPO", 40, 4.0),
        ("DPO training", "DPO", 0, 20.5),
        ("Knowledge after DPO", "DPO", 50, 5.0),
        ("Encoding and scoring", "DPO", 0, 0.5),
        ("Encoding and scoring", "hints", 0, 0.5),
    ]
    assert cost_sentence(parts) == (
        "DPO cost 90 tokens and 30 s (1 round) and hints cost 170 tokens and 60 s, of 310 tokens and 102 s for the "
        "whole run."
    )


def test_what_was_not_counted_is_not_told(tmp_path: Path) -> None:
    parts = {p.name: p for p in cost_parts(hinted_run(tmp_path), tmp_path)}
    assert parts["Reflection and hints"].tokens is None
    assert parts["Agent"].tokens == 0
    assert "tokens and 102 s" not in cost_sentence([*parts.values()])
    untimed = [{**one, "counts": {}} if one["name"].endswith("policy") else one for one in plain_run(tmp_path / "b")]
    found = {p.name: p for p in cost_parts(untimed, tmp_path / "b")}
    assert found["DPO training"].seconds is None
    assert found["Controls (random pairs, best of N)"].seconds is None
    assert cost_sentence([*found.values()]) == "DPO cost 180 tokens (2 rounds), of 280 tokens for the whole run."
    described = [stage("knowledge", 2.0, {"item_text": "llm"}), stage("lists", 1.0)]
    assert cost_parts(described, tmp_path) == [Part("Data, items and histories", "", None, None, 3.0)]


def test_without_rounds_there_is_nothing_to_say(tmp_path: Path) -> None:
    stages = [answers(tmp_path, "fold_0/zero_shot", 5.0, samples=1), stage("fold_0/rows/zero_shot", 1.0)]
    parts = cost_parts(stages, tmp_path)
    assert [p.name for p in parts] == ["Zero-shot knowledge", "Final rerankers"]
    assert cost_sentence(parts) == cost_sentence([]) == ""


def test_tokens_that_the_store_had_are_told_from_those_that_took_the_seconds(tmp_path: Path) -> None:
    stages = [
        answers(tmp_path, "zero_shot", 0.1, samples=SAMPLES, written=0.0),
        answers(tmp_path, "round_1", 5.0, samples=1, written=0.5),
    ]
    parts = {part.name: part for part in cost_parts(stages, tmp_path)}
    assert {name: (part.tokens, part.stored) for name, part in parts.items()} == {
        "Zero-shot knowledge": (50, 50),
        "Answers of round 1": (40, 40),
        "Knowledge after DPO": (50, 25),
    }
    assert cost_sentence([*parts.values()]) == (
        "DPO cost 90 tokens (65 of them from the store) and 5.0 s (1 round), "
        "of 140 tokens (115 of them from the store) and 5.1 s for the whole run."
    )
    assert "from the store" in cost_context([*parts.values()])["table"]["columns"]


def test_what_an_earlier_version_did_not_count_is_said(tmp_path: Path) -> None:
    stages = [answers(tmp_path, "zero_shot", 0.1, samples=SAMPLES)]
    del stages[0]["counts"]["tokens_written"]
    parts = cost_parts(stages, tmp_path)
    assert all(part.stored is None for part in parts)
    assert cost_sentence(parts).endswith("how many they were was not counted.")
    assert "from the store" not in cost_context(parts)["table"]["columns"]
