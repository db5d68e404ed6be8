"""The report of a run: one HTML file that needs nothing else, and that a person can read."""

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from lit_rec.run.comparisons import (
    Comparison,
    Headline,
    choose_headline,
    compare_rows,
    describe_difference,
    family,
    round_number,
    row_order,
    verdict,
)
from lit_rec.run.figures import length_figure, rewards_figure, rounds_figure, rows_figure, seed_means
from lit_rec.run.folder import write_atomic
from lit_rec.run.results import pick, with_interval

EXAMPLES = 12  # pairs shown per group
_POLICY_COLUMNS = (
    ("train_reward_mean", "mean reward", ".4f"),
    ("reward_spread", "spread per user", ".4f"),
    ("tie_rate", "users with ties only", ".1%"),
    ("unique_answer_rate", "unique answers", ".1%"),
    ("distinct_2", "distinct-2", ".3f"),
    ("cut_rate", "answers cut off", ".1%"),
    ("answer_tokens_mean", "tokens per answer", ".1f"),
    ("reward_length_correlation", "reward-length correlation", "+.2f"),
    ("pairs", "pairs", ",d"),
)
_TRAIN_COLUMNS = (
    ("loss", "DPO loss", ".4f"),
    ("margin", "margin", ".4f"),
    ("accuracy", "accuracy", ".1%"),
    ("chosen_reward", "implicit reward, chosen", "+.4f"),
    ("rejected_reward", "implicit reward, rejected", "+.4f"),
    ("kl", "KL to reference", ".4f"),
)


def write_report(
    path: Path | str,
    *,
    rows: Sequence[dict[str, Any]] = (),
    frames: pl.DataFrame | None = None,
    rounds: Sequence[Mapping[str, Any]] = (),
    rewards: pl.DataFrame | None = None,
    pairs: pl.DataFrame | None = None,
    stages: Sequence[Mapping[str, Any]] = (),
    config_yaml: str = "",
    environment: Mapping[str, Any] | None = None,
    title: str | None = None,
    facts: Mapping[str, object] | None = None,
    headline: Headline | None = None,
    comparisons: Sequence[Comparison] | None = None,
) -> None:
    """Write report.html, atomically; whatever is missing is left out of the page.

    Args:
        path: the file.
        rows: of `result_rows`.
        frames: the evaluation frames, for paired differences and the seeds' own means.
        rounds: one dictionary per policy state, round 0 being the zero-shot model; any value may be None. A
            `name` other than `zero_shot` and `round_k` marks a control: in the tables, not in the curves.
        rewards: one line per scored answer: round, tokens, reward (more columns do no harm).
        pairs: one line per pair: round, user_id, prompt, chosen, rejected, chosen_reward, rejected_reward.
        stages: {name, seconds, counts, reused} in order.
        config_yaml: the composed configuration.
        environment: versions, commit, machine, threads, memory peak; may be nested.
        title: the run's name; None takes it from the configuration.
        facts: label -> value at the top of the page; None takes them from the configuration and the results.
        headline: what is counted in the main table; None chooses it from the frames.
        comparisons: of `compare_rows`, where the caller has them already.
    """
    frames = pl.DataFrame() if frames is None else frames
    headline = headline or choose_headline(frames)
    if comparisons is None:
        comparisons = [] if frames.is_empty() else compare_rows(frames, headline)
    rewards = None if rewards is None or rewards.is_empty() else rewards
    config = _parsed(config_yaml)
    context = {
        "title": title or str(config.get("name") or "lit_rec"),
        "facts": _facts(config, rows, headline) if facts is None else facts,
        "headline": headline,
        "verdict": verdict(comparisons, headline) if rows else [],
        "rerankers": _reranker_sections(rows, frames, headline, comparisons),
        "rounds_figure": rounds_figure([r for r in rounds if not _is_control(r)]),
        "rewards_figure": rewards_figure(rewards) if rewards is not None else None,
        "length_figure": length_figure(rewards) if rewards is not None else None,
        "round_tables": _round_tables(rounds),
        "example_groups": _examples(pairs),
        "stages": [_stage(s) for s in stages],
        "config_yaml": config_yaml,
        "environment": _flat(environment or {}),
    }
    page = _environment().get_template("report.html.j2").render(context)
    write_atomic(Path(path), page.encode("utf-8", errors="replace"))


def _parsed(config_yaml: str) -> dict[str, Any]:
    """The configuration as a dictionary, empty where it is none: the report of a run is never lost to it."""
    try:
        config = yaml.safe_load(config_yaml)
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


def _facts(config: dict[str, Any], rows: Sequence[dict[str, Any]], headline: Headline) -> dict[str, object]:
    """What was run, in a few words."""

    def setting(*keys: str) -> Any:
        value: Any = config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    mine = [r for r in rows if r["split"] == headline.split]
    units = {unit: max((r["n"] for r in mine if r["unit"] == unit), default=None) for unit in ("user", "list")}
    facts = {
        "Data": ", ".join(sorted({r["dataset"] for r in rows})),
        "Protocol": ", ".join(sorted({r["protocol"] for r in rows})) or setting("lists", "protocol"),
        "LLM": setting("llm", "name"),
        "Text encoder": setting("encoder", "name"),
        "Reranker": ", ".join(sorted({r["reranker"].upper() for r in rows})),
        f"{headline.split.capitalize()} users": units["user"],
        f"{headline.split.capitalize()} lists": units["list"],
        "Folds over users": setting("evaluation", "folds"),
        "Seeds per row": max((r["seeds"] for r in rows), default=None),
        "DPO rounds": setting("policy", "rounds"),
        "Answers per user and round": setting("pairs", "samples"),
        "Reward": setting("reward", "metric"),
    }
    return {
        label: f"{value:,}" if isinstance(value, int) else value
        for label, value in facts.items()
        if value not in (None, "")
    }


def _environment() -> Environment:
    """Everything that data, users and LLMs wrote is escaped; only the figures are markup."""
    return Environment(
        loader=PackageLoader("lit_rec.run", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _reranker_sections(
    rows: Sequence[dict[str, Any]],
    frames: pl.DataFrame,
    headline: Headline,
    comparisons: Sequence[Comparison],
) -> list[dict[str, Any]]:
    sections = []
    main, maps = pick(rows, headline), pick(rows, headline, "map")
    for reranker in sorted({r["reranker"] for r in main}):
        mine = [r for r in main if r["reranker"] == reranker]
        map_of = {r["row"]: r for r in maps if r["reranker"] == reranker}
        lines = [
            {
                "row": r["row"],
                "family": family(r["row"]),
                "main": with_interval(r),
                "map": with_interval(map_of.get(r["row"])),
                "n": r["n"],
                "gaps": [_gap(c) for c in comparisons if (c.reranker, c.row) == (reranker, r["row"])],
            }
            for r in mine
        ]
        means = seed_means(frames, reranker, headline) if not frames.is_empty() else {}
        sections.append(
            {
                "name": reranker.upper(),
                "lines": lines,
                "figure": rows_figure(mine, means, headline),
                "several_seeds": any(len(m) > 1 for m in means.values()),
                "everything": _everything(rows, reranker, headline),
                "published": _published(rows, reranker),
            }
        )
    return sections


def _gap(c: Comparison) -> dict[str, str]:
    sign = "better" if c.difference.mean > 0 else "worse"
    return {"against": c.against, "text": describe_difference(c), "kind": sign if c.sure else "unsure"}


def _everything(rows: Sequence[dict[str, Any]], reranker: str, headline: Headline) -> dict[str, Any]:
    """Every metric at the headline's cut-off in both conventions and units, rows down."""
    mine = [
        r
        for r in rows
        if (r["reranker"], r["split"]) == (reranker, headline.split) and r["metric"].endswith(f"@{headline.k}")
    ]
    columns = list(dict.fromkeys((r["metric"], r["convention"], r["unit"]) for r in mine))
    cells = {(r["row"], r["metric"], r["convention"], r["unit"]): with_interval(r) for r in mine}
    names = sorted({r["row"] for r in mine}, key=row_order)
    return {
        "rows": names,
        "lines": [
            {
                "metric": m,
                "convention": c,
                "unit": u,
                "cells": [cells.get((name, m, c, u), "") for name in names],
            }
            for m, c, u in columns
        ],
    }


def _published(rows: Sequence[dict[str, Any]], reranker: str) -> list[dict[str, Any]]:
    """The paper's numbers beside ours, counted as the paper counts."""
    return [
        {
            "row": r["row"],
            "metric": r["metric"].upper(),
            "ours": with_interval(r),
            "paper": f"{r['published']:.5f}",
        }
        for r in sorted(rows, key=lambda r: (r["metric"], row_order(r["row"])))
        if r["reranker"] == reranker and r["published"] is not None
    ]


def _round_tables(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Two tables, answers and training, without the columns that no round has."""
    answers = [(_state_name(s), {**s, **_held_out(s)}) for s in rounds]
    training = [(_state_name(s), {**(s.get("train") or {}), "seconds": s.get("seconds")}) for s in rounds]
    held_out = (("held_out", "held-out reward", "s"),)
    tables = [
        _table("Answers and rewards", answers, (*held_out, *_POLICY_COLUMNS)),
        _table("Training", training, (*_TRAIN_COLUMNS, ("seconds", "seconds", ",.0f"))),
    ]
    return [t for t in tables if t["columns"]]


def _held_out(state: Mapping[str, Any]) -> dict[str, Any]:
    value = state.get("heldout_reward")
    if not value or not _known(value.get("mean")):
        return {"held_out": None}
    return {"held_out": with_interval({"mean": value["mean"], "ci95": value.get("ci95") or (None, None)})}


def _is_control(state: Mapping[str, Any]) -> bool:
    name = state.get("name")
    return bool(name) and name != "zero_shot" and round_number(str(name)) is None


def _state_name(state: Mapping[str, Any]) -> str:
    if _is_control(state):
        return str(state["name"])
    return "zero-shot" if state["round"] == 0 else f"round {state['round']}"


def _known(value: Any) -> bool:
    """Whether a cell has something to show: neither missing nor nan."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _table(
    title: str, lines: Sequence[tuple[str, Mapping[str, Any]]], columns: Sequence[tuple[str, str, str]]
) -> dict[str, Any]:
    used = [c for c in columns if any(_known(values.get(c[0])) for _, values in lines)]
    return {
        "title": title,
        "columns": [label for _, label, _ in used],
        "lines": [
            {
                "name": name,
                "cells": [format(v[key], form) if _known(v.get(key)) else "" for key, _, form in used],
            }
            for name, v in lines
            if any(_known(v.get(key)) for key, _, _ in used)
        ],
    }


def _examples(pairs: pl.DataFrame | None) -> list[dict[str, Any]]:
    """Return the pairs with the largest gaps, and random ones, which do not flatter."""
    if pairs is None or pairs.is_empty():
        return []
    gaps = pairs.with_columns(gap=pl.col("chosen_reward") - pl.col("rejected_reward")).with_row_index("line")
    largest = gaps.sort("gap", descending=True, nulls_last=True, maintain_order=True).head(EXAMPLES)
    rest = gaps.filter(~pl.col("line").is_in(largest["line"].to_list()))
    chosen = rest.sample(min(EXAMPLES, len(rest)), seed=0).sort("line")
    groups = [("Largest reward gaps", largest), ("Drawn at random", chosen)]
    return [
        {"title": title, "pairs": part.to_dicts(), "open": part is largest}
        for title, part in groups
        if not part.is_empty()
    ]


def _stage(stage: Mapping[str, Any]) -> dict[str, Any]:
    counts = ", ".join(
        f"{name} {value:,}" if isinstance(value, int | float) else f"{name} {value}"
        for name, value in (stage.get("counts") or {}).items()
    )
    return {
        "name": stage["name"],
        "time": _duration(stage.get("seconds")),
        "counts": counts,
        "reused": bool(stage.get("reused")),
    }


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.1f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested dictionaries as (dotted name, text) in order."""
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", str(value)))
    return found
