"""From per-list metrics to results.json and the table in the terminal."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lit_rec.metrics.ranking import METRICS
from lit_rec.run.comparisons import choose_headline, compare_rows, verdict
from lit_rec.run.folder import write_atomic
from lit_rec.run.headline import Comparison, Headline, describe_difference
from lit_rec.run.published import published_value
from lit_rec.run.reranking_story import round_number
from lit_rec.run.statistics import RESAMPLES, Array, mean_over_lists, mean_over_users, user_table
from lit_rec.run.stories import RERANKING, Story

DIGITS = 6
FIELDS = (
    "task",
    "dataset",
    "protocol",
    "split",
    "reranker",
    "row",
    "metric",
    "convention",
    "unit",
    "mean",
    "ci95",
    "n",
    "seeds",
    "published",
)


def metric_columns(frames: pl.DataFrame) -> list[str]:
    """Return the columns that hold metrics (`ndcg@5|kar`), in a fixed order."""
    pattern = re.compile(rf"({'|'.join(METRICS)})@(\d+)\|(\w+)")
    found = [(match, column) for column in frames.columns if (match := pattern.fullmatch(column))]
    return [c for m, c in sorted(found, key=lambda f: (METRICS.index(f[0][1]), int(f[0][2]), f[0][3]))]


def result_rows(
    frames: pl.DataFrame,
    *,
    dataset: str,
    protocol: str,
    task: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    story: Story = RERANKING,
    whole: bool = True,
) -> list[dict[str, Any]]:
    """Summarise per-list metrics: one line per split, reranker, row, metric, convention and unit.

    Args:
        frames: evaluation frames, concatenated; a metric that a row lacks is null there.
        dataset: its name, such as "ml-1m".
        protocol: such as "strict" or "kar".
        task: such as "reranking"; None: the story's.
        resamples: bootstrap samples behind the intervals over lists.
        seed: of the bootstrap.
        story: of the recipe: order of the rows, and what means are taken over.
        whole: whether all users of the data set were used: published numbers are of all, not of a sample.

    Returns:
        Dictionaries with the keys of `FIELDS`: `metric` is "ndcg@5", say; `ci95` is [low, high], or two
        None with fewer than two users; `n` counts users, lists or sessions; `seeds` counts seeds; `published` is the
        paper's number where one is comparable (all users, protocol and convention kar, test split, mean over lists).
    """
    metrics = metric_columns(frames)
    if not metrics or frames.is_empty():
        return []
    table = user_table(frames, metrics)
    groups = {key: part for key, part in table.group_by(["split", "reranker", "row"], maintain_order=True)}
    by_list = "list" in story.units
    over_lists = _list_estimates(groups, metrics, resamples=resamples, seed=seed) if by_list else {}
    last = max((round_number(str(key[2])) or 0 for key in groups), default=0) or None
    rows: list[dict[str, Any]] = []
    for key in sorted(groups, key=lambda k: (str(k[0]), str(k[1]), story.row_order(str(k[2])))):
        split, reranker, row = (str(part) for part in key)
        part = groups[key]
        for column in metrics:
            if part[column].null_count() == len(part):
                continue
            metric, convention = column.split("|")
            users = mean_over_users(part[column].drop_nulls().to_numpy())
            shared = {
                "task": task or story.task,
                "dataset": dataset,
                "protocol": protocol,
                "split": split,
                "reranker": reranker,
                "row": row,
                "metric": metric,
                "convention": convention,
            }
            seeds = int(part["seeds"].max())  # type: ignore[arg-type]
            numbers = _numbers(users.mean, users.low, users.high, users.n, seeds)
            rows.append({**shared, "unit": story.units[0], **numbers, "published": None})
            if not by_list:
                continue
            known = published_value(
                dataset=dataset, protocol=protocol, reranker=reranker, row=row, metric=metric, last_round=last
            )
            comparable = known if whole and convention == "kar" and split == "test" else None
            mean, low, high = over_lists[key, column]
            numbers = _numbers(mean, low, high, int(part["lists"].sum()), seeds)
            rows.append({**shared, "unit": "list", **numbers, "published": comparable})
    return rows


def _list_estimates(
    groups: dict[tuple[object, ...], pl.DataFrame], metrics: Sequence[str], *, resamples: int, seed: int
) -> dict[tuple[tuple[object, ...], str], tuple[float, float, float]]:
    """Bootstrap all groups with the same users at once: the draws are most of the work."""
    by_users: dict[tuple[int, ...], list[tuple[tuple[object, ...], str]]] = {}
    columns: dict[tuple[tuple[object, ...], str], tuple[Array, Array]] = {}
    for key, part in groups.items():
        for column in metrics:
            known = part.filter(pl.col(f"{column}:count") > 0)
            if known.is_empty():
                continue
            by_users.setdefault(tuple(known["user"]), []).append((key, column))
            columns[key, column] = (known[f"{column}:sum"].to_numpy(), known[f"{column}:count"].to_numpy())
    found = {}
    for names in by_users.values():
        sums = np.stack([columns[name][0] for name in names], axis=1)
        counts = np.stack([columns[name][1] for name in names], axis=1)
        estimates = mean_over_lists(sums, counts, resamples=resamples, seed=seed)
        for name, mean, low, high in zip(names, *estimates, strict=True):
            found[name] = (float(mean), float(low), float(high))
    return found


def _numbers(mean: float, low: float, high: float, n: int, seeds: int) -> dict[str, Any]:
    return {"mean": _rounded(mean), "ci95": [_rounded(low), _rounded(high)], "n": n, "seeds": seeds}


def _rounded(value: float | None) -> float | None:
    """Round for a file: None for what is not a number, and no negative zero."""
    if value is None or not math.isfinite(value):
        return None
    return round(value, DIGITS) + 0.0


def write_results(path: Path | str, rows: Sequence[dict[str, Any]]) -> None:
    """Write results.json: one row a line, keys in the order of `FIELDS`: equal runs give equal bytes."""
    lines = []
    for row in rows:
        ordered = {name: row[name] for name in FIELDS}
        ordered["mean"] = _rounded(ordered["mean"])
        ordered["ci95"] = [_rounded(bound) for bound in ordered["ci95"]]
        lines.append(json.dumps(ordered, ensure_ascii=False, allow_nan=False))
    write_atomic(Path(path), "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n")


def pick(
    rows: Sequence[dict[str, Any]], headline: Headline, metric: str = "", story: Story = RERANKING
) -> list[dict[str, Any]]:
    """Return the result rows of one metric counted as the headline says, in table order."""
    found = [r for r in rows if headline.counts(r, metric)]
    return sorted(found, key=lambda r: (r["reranker"], story.row_order(r["row"])))


def with_interval(row: dict[str, Any] | None) -> str:
    """Write a mean with its interval: `.7512 [.7450, .7574]`."""
    if row is None or row["mean"] is None:
        return "n/a"
    low, high = row["ci95"]
    bounded = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    return f"{row['mean']:.4f}" + (f" [{low:.4f}, {high:.4f}]" if bounded else "")


def render_table(
    rows: Sequence[dict[str, Any]],
    frames: pl.DataFrame,
    *,
    headline: Headline | None = None,
    comparisons: Sequence[Comparison] | None = None,
    story: Story = RERANKING,
) -> Group:
    """Make the terminal's summary: one table per reranker, then the verdict in words.

    Args:
        rows: of `result_rows`.
        frames: the evaluation frames, for the paired differences.
        headline: what is counted; None chooses it from the frames.
        comparisons: of `compare_rows`, where the caller has them already.
        story: of the recipe.
    """
    headline = headline or choose_headline(frames, story=story)
    comparisons = compare_rows(frames, headline, story=story) if comparisons is None else comparisons
    main = pick(rows, headline, story=story)
    tables: list[Table | Text] = [
        _reranker_table(reranker, rows, [r for r in main if r["reranker"] == reranker], headline, comparisons, story)
        for reranker in sorted({r["reranker"] for r in main})
    ]
    if not tables:
        tables.append(Text("There is nothing to show: no row was evaluated."))
    return Group(*tables, Text("\n".join(["", *verdict(comparisons, headline, rows, story)])))


def _reranker_table(
    reranker: str,
    rows: Sequence[dict[str, Any]],
    mine: Sequence[dict[str, Any]],
    headline: Headline,
    comparisons: Sequence[Comparison],
    story: Story,
) -> Table:
    drawn = headline.drawn
    table = Table(
        title=Text(f"{story.named(reranker)}: {headline.counting}"),
        title_justify="left",
        caption=Text(
            f"[low, high]: 95% interval over {drawn}s. Differences: paired over {drawn}s, with training seeds where "
            "there are several, p Holm-corrected."
        ),
        caption_justify="left",
    )
    table.add_column("row")
    for name in (headline.label(), headline.label(story.second)):
        table.add_column(f"{name} ({headline.short})", justify="right")
    table.add_column(f"difference in {headline.label()}", justify="left")
    table.add_column(f"{headline.unit}s", justify="right")
    second = {r["row"]: r for r in pick(rows, headline, story.second, story) if r["reranker"] == reranker}
    for r in mine:
        gaps = [c for c in comparisons if (c.reranker, c.row) == (reranker, r["row"])]
        mark = story.marks.get(r["row"])
        table.add_row(
            Text(f"{r['row']} ({mark})" if mark else r["row"]),
            Text(with_interval(r)),
            Text(with_interval(second.get(r["row"]))),
            Text("\n").join(_difference_text(c, drawn) for c in gaps),
            str(r["n"]),
        )
    return table


def _difference_text(c: Comparison, drawn: str) -> Text:
    text = Text(f"{describe_difference(c, drawn)} vs {c.against}")
    if c.sure:
        text.stylize("green" if c.difference.mean > 0 else "red")
    return text
