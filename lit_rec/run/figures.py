"""The report's pictures: matplotlib figures as inline SVG that takes its colours from the page.

Figures are drawn small (4 inches wide or little more) so that they stay legible on a phone, transparent, and
in placeholder colours that are exchanged for CSS variables: light and dark are left to the style sheet.
"""

import io
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
import polars as pl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from lit_rec.run.headline import Headline
from lit_rec.run.reranking_story import place_name
from lit_rec.run.stories import RERANKING, Story

INK, MUTED, GRID, ACCENT, SECOND, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    ACCENT: "var(--accent)",
    SECOND: "var(--second)",
    PAPER: "var(--card)",
}
_STYLE = {
    "svg.fonttype": "none",  # text stays text: the page's font, selectable, small
    "svg.hashsalt": "lit_rec",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}
FIRST_HINTS = 0.5  # place of "hinted_1", where DPO has not begun
_POINTS = 900  # of the scatter: more is ink, not information


@contextmanager
def drawing(height: float, width: float = 4.0) -> Iterator[tuple[Figure, list[Markup]]]:
    """Give a figure to draw on; its SVG is in the list when the block ends."""
    drawn: list[Markup] = []
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, drawn
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn.append(_inline(buffer.getvalue()))


def _inline(svg: str) -> Markup:
    """Cut the file down to what may stand in a page, and hand its colours to the style sheet.

    matplotlib escapes the texts it was given, which is why the result may be trusted.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    for placeholder, variable in VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", svg)
    return Markup(svg.replace("<svg", '<svg role="img"', 1))


def rows_figure(
    rows: Sequence[Mapping[str, Any]],
    seed_means: Mapping[str, Sequence[float]],
    headline: Headline,
    story: Story = RERANKING,
) -> Markup | None:
    """Draw one reranker's rows as dots with 95% intervals, and the line to pass.

    Args:
        rows: result rows of one reranker and metric.
        seed_means: row -> the mean of every seed.
        headline: names the axis.
        story: says which rows are brought out; one with a mark is drawn hollow.
    """
    shown = [r for r in sorted(rows, key=lambda r: story.row_order(r["row"])) if r["mean"] is not None]
    if not shown:
        return None
    with drawing(0.9 + 0.25 * len(shown), width=4.8) as (figure, drawn):
        axes = figure.subplots()
        bar = next((r["mean"] for r in shown if r["row"] == story.line[0]), None)
        if bar is not None:
            axes.axvline(bar, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
        for y, row in enumerate(shown):
            colour = {story.accent: ACCENT, story.contrast: SECOND}.get(story.family(row["row"]), MUTED)
            low, high = row["ci95"]
            if finite(low) and finite(high):
                axes.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="round", zorder=2)
            means = seed_means.get(row["row"], ())
            if len(means) > 1:
                axes.plot(means, [y + 0.27] * len(means), "|", color=colour, markersize=5, alpha=0.7)
            inside = PAPER if row["row"] in story.marks else colour
            axes.plot([row["mean"]], [y], "o", color=colour, markerfacecolor=inside, markersize=6, zorder=3)
        axes.set_yticks(range(len(shown)), [short(r["row"]) for r in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.set_xlabel(f"{headline.label()}, {headline.short} mean")
    return drawn[0]


def short(name: str) -> str:
    """Cut a name to what the margin of a figure can hold, without characters that no font draws."""
    name = "".join(c if c.isprintable() else " " for c in name)
    return name if len(name) <= 24 else name[:23] + "\N{HORIZONTAL ELLIPSIS}"


def finite(value: float | None) -> bool:
    """Whether there is a number to draw."""
    return value is not None and math.isfinite(value)


def rounds_figure(states: Sequence[tuple[float, Mapping[str, Any]]], metrics: Sequence[str] = ()) -> Markup | None:
    """Draw held-out reward and validation metrics over rounds, with intervals, one panel each.

    Args:
        states: (place as `lit_rec.run.reranking_story.place` gives it, numbers of the state).
        metrics: which validation metrics, as `ndcg@5|standard`; empty: those that come first.
    """
    series: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for at, state in sorted(states, key=lambda entry: entry[0]):
        entries = {"reward on held-out users": state.get("heldout_reward")}
        measured = state.get("validation") or {}
        entries |= {f"validation {k.replace('|', ', ')}": measured.get(k) for k in metrics or measured}
        for name, value in entries.items():
            if value and finite(value.get("mean")):
                series.setdefault(name, []).append((at, value))
    if not series:
        return None
    panels = list(series.items())[:3]
    with drawing(1.7 * len(panels) + 0.3) as (figure, drawn):
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, values), colour in zip(grid, panels, (ACCENT, SECOND, MUTED), strict=False):
            x = [k for k, _ in values]
            for k, value in values:
                low, high = value.get("ci95") or (None, None)
                if finite(low) and finite(high):
                    axes.plot([k, k], [low, high], color=colour, linewidth=2, solid_capstyle="round")
            axes.plot(x, [v["mean"] for _, v in values], "o-", color=colour, linewidth=1.3, markersize=5)
            axes.set_title(name, loc="left", fontsize=10)
            axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
            axes.grid(axis="x", visible=False)
            axes.margins(x=0.08)
        label_places(grid[-1], {k for _, values in panels for k, _ in values})
    return drawn[0]


def label_places(axes: Axes, places: Collection[float]) -> None:
    """Name the rounds, and the hints between them, on the x axis; turned where they would overlap."""
    names = [place_name(at) for at in sorted(places)]
    turned: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if len(names) > 6 else {}
    axes.set_xticks(sorted(places), names, **turned)


def rewards_figure(rewards: pl.DataFrame) -> Markup | None:
    """Draw the distribution of rewards in every round, one histogram above the other.

    Args:
        rewards: `round` and `reward` of one answer a user, the same users in every round: their means stand together.
    """
    known = rewards.filter(pl.col("reward").is_finite())
    if known.is_empty():
        return None
    rounds = sorted(known["round"].unique())
    low, high = float(known["reward"].min()), float(known["reward"].max())  # type: ignore[arg-type]
    edges = np.linspace(low, high if high > low else low + 1e-6, 41)
    with drawing(0.85 * len(rounds) + 0.6) as (figure, drawn):
        grid = figure.subplots(len(rounds), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, number in zip(grid, rounds, strict=True):
            values = known.filter(pl.col("round") == number)["reward"].to_numpy()
            colour = _place_colour(number)
            axes.hist(values, bins=edges, weights=np.full(len(values), 1 / len(values)), color=colour, alpha=0.55)
            axes.axvline(values.mean(), color=INK, linewidth=1.2)
            axes.set_yticks([])
            axes.grid(axis="y", visible=False)
            axes.spines["left"].set_visible(False)
            axes.set_title(
                f"{place_name(number)}: mean {values.mean():.4f}, {len(values):,} users", loc="left", fontsize=9
            )
        grid[-1].set_xlabel("reward of a user's knowledge")
    return drawn[0]


def length_figure(rewards: pl.DataFrame, *, points: int = _POINTS, among: pl.DataFrame | None = None) -> Markup | None:
    """Draw reward against answer length (a random sample), with the means of groups of lengths.

    Args:
        rewards: `round` (place of the state), `tokens` and `reward` of every answer.
        points: Answers drawn.
        among: The same of several figures that are to have the same axes.
    """
    known = _measured(rewards)
    if len(known) < 3:
        return None
    shown = known.sample(min(points, len(known)), seed=0)
    with drawing(3.0) as (figure, drawn):
        axes = figure.subplots()
        for number in sorted(shown["round"].unique()):
            part = shown.filter(pl.col("round") == number)
            colour = _place_colour(number)
            axes.plot(part["tokens"], part["reward"], ".", color=colour, alpha=0.35, markersize=4)
        _draw_means(axes, known)
        if among is not None:
            ends = _measured(among).select("tokens", "reward")
            axes.update_datalim([*ends.min().rows(), *ends.max().rows()])
            axes.autoscale_view()
        axes.set_xlabel("tokens of the answer")
        axes.set_ylabel("reward")
        hinted = [(MUTED, "hints, before DPO")] if (known["round"] == FIRST_HINTS).any() else []
        for colour, label in ((SECOND, "zero-shot"), *hinted, (ACCENT, "after DPO")):
            axes.plot([], [], "o", color=colour, markersize=5, label=label)
        columns = 2 if hinted else 3  # four names in one line are wider than the figure
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=9, ncols=columns, borderpad=0, handletextpad=0.3)
    return drawn[0]


def _measured(rewards: pl.DataFrame) -> pl.DataFrame:
    return rewards.filter(pl.col("reward").is_finite() & pl.col("tokens").is_not_null())


def _place_colour(at: float) -> str:
    """Answers of the LLM as it came, of the same LLM with hints, and after DPO."""
    return {0: SECOND, FIRST_HINTS: MUTED}.get(at, ACCENT)


def length_means(known: pl.DataFrame) -> pl.DataFrame:
    """Mean tokens and reward of at most ten groups of answers, by length and of equal size but for ties.

    Answers of one length stay in one group: many end at the longest that is allowed, where cutting them into groups
    would draw chance as a line straight up.
    """
    group = (pl.col("tokens").rank("min") - 1) * 10 // pl.len()
    means = known.group_by(group.alias("group")).agg(pl.col("tokens", "reward").cast(pl.Float64).mean())
    return means.sort("group").select("tokens", "reward")


def _draw_means(axes: Axes, known: pl.DataFrame) -> None:
    x, y = length_means(known)
    axes.plot(x, y, "o-", color=PAPER, linewidth=4, markersize=5)  # a halo: the line is seen above the points
    axes.plot(x, y, "o-", color=INK, linewidth=1.8, markersize=3, label="mean")


def seed_means(frames: pl.DataFrame, reranker: str, headline: Headline) -> dict[str, list[float]]:
    """Return row -> the headline metric of every seed, counted in the headline's unit."""
    column = headline.column()
    mine = frames.filter(
        pl.col("reranker") == reranker, pl.col("split") == headline.split, pl.col(column).is_not_null()
    )
    if headline.unit != "list":
        mine = mine.group_by("row", "seed", "user").agg(pl.col(column).mean())
    found: dict[str, list[float]] = {}
    for row, _, mean in mine.group_by("row", "seed").agg(pl.col(column).mean()).sort("row", "seed").rows():
        found.setdefault(row, []).append(mean)
    return found
