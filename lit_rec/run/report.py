"""The report of a run: one HTML file that needs nothing else, and that a person can read."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lit_rec.run.comparisons import choose_headline, compare_rows, verdict
from lit_rec.run.cost import Part, cost_context
from lit_rec.run.figures import rows_figure, seed_means
from lit_rec.run.folder import write_atomic
from lit_rec.run.headline import Comparison, Headline, describe_difference
from lit_rec.run.hint_report import HintStory, hint_context
from lit_rec.run.results import pick, with_interval
from lit_rec.run.round_report import round_context
from lit_rec.run.session_report import session_context
from lit_rec.run.stories import RERANKING, Story


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
    story: Story = RERANKING,
    hints: HintStory | None = None,
    cost: Sequence[Part] = (),
) -> None:
    """Write report.html, atomically; whatever is missing is left out of the page.

    Args:
        path: the file.
        rows: of `result_rows`.
        frames: the evaluation frames, for paired differences and the seeds' own means.
        rounds: one dictionary per policy state, round 0 being the zero-shot model; any value may be None. A
            `name` that has no `place` among the rounds marks a control: in the tables, not in the curves.
        rewards: one line per scored answer: round (the state's `place`), sample (0: the user's knowledge), tokens,
            reward (more columns do no harm).
        pairs: one line per pair: round, user_id, prompt, chosen, rejected, chosen_reward, rejected_reward.
        stages: {name, seconds, counts, reused} in order.
        config_yaml: the composed configuration.
        environment: versions, commit, machine, threads, memory peak; may be nested.
        title: the run's name; None takes it from the configuration.
        facts: label -> value at the top of the page; None takes them from the configuration and the results.
        headline: what is counted in the main table; None chooses it from the frames.
        comparisons: of `compare_rows`, where the caller has them already.
        story: of the recipe.
        hints: what a recipe with hints has to tell of them; a `SessionStory` where sessions were ranked.
        cost: of `cost_parts`.
    """
    frames = pl.DataFrame() if frames is None else frames
    headline = headline or choose_headline(frames, story=story)
    if comparisons is None:
        comparisons = [] if frames.is_empty() else compare_rows(frames, headline, story=story)
    config = _parsed(config_yaml)
    context = {
        "title": title or str(config.get("name") or "lit_rec"),
        "facts": _facts(config, rows, headline, story) if facts is None else facts,
        "headline": headline,
        "story": story,
        "verdict": verdict(comparisons, headline, rows, story) if rows else [],
        "rerankers": _reranker_sections(rows, frames, headline, comparisons, story),
        **round_context(rounds, rewards, pairs, [headline.column(), headline.column(story.second)]),
        "sessions": session_context(hints),
        "hints": hint_context(hints),
        "cost": cost_context(cost),
        "stages": [_stage(s) for s in stages],
        "config_yaml": config_yaml,
        "environment": _flat(environment or {}),
    }
    context["script"] = _script() if _searchable(context) else None
    page = page_environment().get_template("report.html.j2").render(context)
    write_atomic(Path(path), page.encode("utf-8", errors="replace"))


def _searchable(context: Mapping[str, Any]) -> bool:
    """Whether the page has pairs, hints or examples to search."""
    hints, sessions = context["hints"], context["sessions"]
    return bool(context["examples"] or (hints and hints["fates"]) or (sessions and sessions["examples"]))


def _script() -> dict[str, str]:
    """The page's only script, and the hash by which its Content-Security-Policy lets that one run and no other."""
    text = Path(__file__).with_name("report.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).digest()
    return {"text": Markup(text), "sha256": base64.b64encode(digest).decode()}


def _parsed(config_yaml: str) -> dict[str, Any]:
    """The configuration as a dictionary, empty where it is none: the report of a run is never lost to it."""
    try:
        config = yaml.safe_load(config_yaml)
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


def _facts(
    config: dict[str, Any], rows: Sequence[dict[str, Any]], headline: Headline, story: Story
) -> dict[str, object]:
    """What was run, in a few words."""

    def setting(dotted: str) -> Any:
        value: Any = config
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def names(column: str) -> str:
        return ", ".join(sorted({r[column] for r in rows}))

    mine = [r for r in rows if r["split"] == headline.split]
    idle = story.idle({r["row"] for r in rows}) if rows else ()
    facts = {
        "Data": names("dataset"),
        "Protocol": names("protocol") or setting("lists.protocol"),
        "Reranker": story.named(names("reranker")) if story.capitals else None,
        **{
            f"{headline.split.capitalize()} {unit}s": max((r["n"] for r in mine if r["unit"] == unit), default=None)
            for unit in story.units
        },
        "Seeds per row": max((r["seeds"] for r in rows), default=None),
        **{label: setting(key) for label, key in story.facts if label not in idle},
    }
    return {
        label: f"{value:,}" if isinstance(value, int) else value
        for label, value in facts.items()
        if value not in (None, "")
    }


def page_environment() -> Environment:
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
    story: Story,
) -> list[dict[str, Any]]:
    sections = []
    main, seconds = pick(rows, headline, story=story), pick(rows, headline, story.second, story)
    for reranker in sorted({r["reranker"] for r in main}):
        mine = [r for r in main if r["reranker"] == reranker]
        second_of = {r["row"]: r for r in seconds if r["reranker"] == reranker}
        lines = [
            {
                "row": r["row"],
                "mark": story.marks.get(r["row"]),
                "main": with_interval(r),
                "second": with_interval(second_of.get(r["row"])),
                "n": r["n"],
                "gaps": [_gap(c, headline) for c in comparisons if (c.reranker, c.row) == (reranker, r["row"])],
            }
            for r in mine
        ]
        means = seed_means(frames, reranker, headline) if not frames.is_empty() else {}
        sections.append(
            {
                "name": story.named(reranker),
                "lines": lines,
                "figure": rows_figure(mine, means, headline, story),
                "several_seeds": any(len(m) > 1 for m in means.values()),
                "everything": _everything(rows, reranker, headline, story),
                "published": _published(rows, reranker, story),
            }
        )
    return sections


def _gap(c: Comparison, headline: Headline) -> dict[str, str]:
    sign = "better" if c.difference.mean > 0 else "worse"
    return {
        "against": c.against,
        "text": describe_difference(c, headline.drawn),
        "kind": sign if c.sure else "unsure",
    }


def _everything(rows: Sequence[dict[str, Any]], reranker: str, headline: Headline, story: Story) -> dict[str, Any]:
    """Every metric, rows down; where there are conventions and units to tell apart, at the headline's cut-off only."""
    several = len(story.units) > 1
    mine = [
        r
        for r in rows
        if (r["reranker"], r["split"]) == (reranker, headline.split)
        and (not several or r["metric"].endswith(f"@{headline.k}"))
    ]
    columns = list(dict.fromkeys((r["metric"], r["convention"], r["unit"]) for r in mine))
    cells = {(r["row"], r["metric"], r["convention"], r["unit"]): with_interval(r) for r in mine}
    names = sorted({r["row"] for r in mine}, key=story.row_order)
    return {
        "several": several,
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


def _published(rows: Sequence[dict[str, Any]], reranker: str, story: Story) -> list[dict[str, Any]]:
    """The paper's numbers beside ours, counted as the paper counts."""
    return [
        {
            "row": r["row"],
            "metric": r["metric"].upper(),
            "ours": with_interval(r),
            "paper": f"{r['published']:.5f}",
        }
        for r in sorted(rows, key=lambda r: (r["metric"], story.row_order(r["row"])))
        if r["reranker"] == reranker and r["published"] is not None
    ]


def _stage(stage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": stage["name"],
        "time": duration(stage.get("seconds")),
        "counts": counted(stage["counts"]) if stage.get("counts") else "",
        "reused": bool(stage.get("reused")),
    }


def counted(value: Any) -> str:
    """What a stage counts, as a person reads it.

    >>> counted({"lists": 1234, "mean_reward": 0.40948194, "chosen": [{"epoch": 3, "value": 0.5}], "refused": {}})
    'lists 1,234, mean reward 0.4095, chosen epoch 3, value 0.5, refused none'
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{str(name).replace('_', ' ')} {counted(one)}" for name, one in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(counted, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def duration(seconds: float | None) -> str:
    """Seconds as a person writes them."""
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
