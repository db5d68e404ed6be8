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
from lit_rec.run.comparisons import (
    Comparison,
    Headline,
    choose_headline,
    compare_rows,
    describe_difference,
    round_number,
    row_order,
    verdict,
)
from lit_rec.run.folder import write_atomic
from lit_rec.run.published import published_value
from lit_rec.run.statistics import RESAMPLES, Array, mean_over_lists, mean_over_users, user_table

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
    task: str,
    dataset: str,
    protocol: str,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Summarise per-list metrics: one line per split, reranker, row, metric, convention and unit.

    Args:
        frames: evaluation frames, concatenated; a metric that a row lacks is null there.
        task: such as "rerank".
        dataset: its name, such as "ml-1m".
        protocol: "strict" or "kar".
        resamples: bootstrap samples behind the intervals over lists.
        seed: of the bootstrap.

    Returns:
        Dictionaries with the keys of `FIELDS`: `metric` is "ndcg@5", say; `ci95` is [low, high], or two
        None with fewer than two users; `n` counts users or lists; `seeds` counts seeds; `published` is the
        paper's number where one is comparable (protocol and convention kar, test split, mean over lists).
    """
    metrics = metric_columns(frames)
    if not metrics or frames.is_empty():
        return []
    table = user_table(frames, metrics)
    groups = {key: part for key, part in table.group_by(["split", "reranker", "row"], maintain_order=True)}
    over_lists = _list_estimates(groups, metrics, resamples=resamples, seed=seed)
    last = max((round_number(str(key[2])) or 0 for key in groups), default=0) or None
    rows: list[dict[str, Any]] = []
    for key in sorted(groups, key=lambda k: (str(k[0]), str(k[1]), row_order(str(k[2])))):
        split, reranker, row = (str(part) for part in key)
        part = groups[key]
        for column in metrics:
            if part[column].null_count() == len(part):
                continue
            metric, convention = column.split("|")
            users = mean_over_users(part[column].drop_nulls().to_numpy())
            shared = {
                "task": task,
                "dataset": dataset,
                "protocol": protocol,
                "split": split,
                "reranker": reranker,
                "row": row,
                "metric": metric,
                "convention": convention,
            }
            seeds = int(part["seeds"].max())  # type: ignore[arg-type]
            known = published_value(
                dataset=dataset, protocol=protocol, reranker=reranker, row=row, metric=metric, last_round=last
            )
            comparable = known if convention == "kar" and split == "test" else None
            rows.append(
                {**shared, "unit": "user", **_numbers(users.mean, users.low, users.high, users.n, seeds)}
                | {"published": None}
            )
            mean, low, high = over_lists[key, column]
            rows.append(
                {**shared, "unit": "list", **_numbers(mean, low, high, int(part["lists"].sum()), seeds)}
                | {"published": comparable}
            )
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


def pick(rows: Sequence[dict[str, Any]], headline: Headline, metric: str = "") -> list[dict[str, Any]]:
    """Return the result rows of one metric counted as the headline says, in table order."""
    wanted = (f"{metric or headline.metric}@{headline.k}", headline.convention, headline.unit, headline.split)
    found = [r for r in rows if (r["metric"], r["convention"], r["unit"], r["split"]) == wanted]
    return sorted(found, key=lambda r: (r["reranker"], row_order(r["row"])))


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
) -> Group:
    """Make the terminal's summary: one table per reranker, then the verdict in words.

    Args:
        rows: of `result_rows`.
        frames: the evaluation frames, for the paired differences.
        headline: what is counted; None chooses it from the frames.
        comparisons: of `compare_rows`, where the caller has them already.
    """
    headline = headline or choose_headline(frames)
    comparisons = compare_rows(frames, headline) if comparisons is None else comparisons
    main = pick(rows, headline)
    maps = {(r["reranker"], r["row"]): r for r in pick(rows, headline, "map")}
    tables: list[Table | Text] = []
    for reranker in sorted({r["reranker"] for r in main}):
        mine = [r for r in main if r["reranker"] == reranker]
        table = Table(
            title=Text(f"{reranker.upper()}: {headline.counting}"),
            title_justify="left",
            caption=Text("[low, high]: 95% interval over users. Differences: paired over users, p Holm-corrected."),
            caption_justify="left",
        )
        table.add_column("row")
        for name in (headline.label(), headline.label("map")):
            table.add_column(f"{name} ({headline.convention}, {headline.unit})", justify="right")
        table.add_column(f"difference in {headline.label()}", justify="left")
        table.add_column(f"{headline.unit}s", justify="right")
        for r in mine:
            gaps = [c for c in comparisons if (c.reranker, c.row) == (reranker, r["row"])]
            table.add_row(
                Text(r["row"]),
                Text(with_interval(r)),
                Text(with_interval(maps.get((reranker, r["row"])))),
                Text("\n").join(_difference_text(c) for c in gaps),
                str(r["n"]),
            )
        tables.append(table)
    if not tables:
        tables.append(Text("There is nothing to show: no row was evaluated."))
    return Group(*tables, Text("\n".join(["", *verdict(comparisons, headline)])))


def _difference_text(c: Comparison) -> Text:
    text = Text(f"{describe_difference(c)} vs {c.against}")
    if c.sure:
        text.stylize("green" if c.difference.mean > 0 else "red")
    return text
