"""Pictures of several runs: a row in every setting, what a setting changes, and how rewards went."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import matplotlib.ticker
from markupsafe import Markup

from lit_rec.run.figures import (
    ACCENT,
    GRID,
    INK,
    MUTED,
    SECOND,
    drawing,
    finite,
    label_places,
    rows_figure,
    seed_means,
    short,
)
from lit_rec.run.headline import Comparison
from lit_rec.run.many import Section, Setting, equal

_COLOURS = (ACCENT, SECOND, MUTED, INK)
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
MOST_LINES = len(_COLOURS) * len(_DASHES)  # further ones could not be told apart


def row_figure(section: Section, row: str) -> Markup | None:
    """Draw one row in every setting, as `rows_figure` draws the rows of a run; dashed: the first setting."""
    lines = [line for line in section.picked() if line["row"] == row]
    names = [section.setting(line["setting"]).name for line in lines]
    means: dict[str, list[float]] = {}
    for line, name in zip(lines, names, strict=True):
        frames = section.setting(line["setting"]).frames
        means |= {name: seed_means(frames, line["reranker"], section.headline).get(row, [])}
    story = replace(
        section.story,
        row_order=lambda name: (names.index(name),),
        family=lambda name: str(section.story.family(row)),
        line=(names[0] if names else "", ""),
        marks={},
    )
    renamed = [{**line, "row": name} for line, name in zip(lines, names, strict=True)]
    return rows_figure(renamed, means, section.headline, story)


def gaps_figure(section: Section, gaps: Sequence[Comparison]) -> Markup | None:
    """Draw differences between settings as bars with their 95% intervals."""
    shown = [gap for gap in gaps if finite(gap.difference.mean) and not equal(gap.difference)]
    if not shown:
        return None
    with drawing(0.9 + 0.32 * len(shown), width=4.8) as (figure, drawn):
        axes = figure.subplots()
        for y, gap in enumerate(shown):
            d = gap.difference
            axes.barh([y], [d.mean], height=0.55, color=ACCENT if gap.sure else MUTED, alpha=0.55, linewidth=0)
            if finite(d.low) and finite(d.high):
                axes.plot([d.low, d.high], [y, y], color=INK, linewidth=1.6, solid_capstyle="round")
        axes.axvline(0, color=INK, linewidth=0.9)
        names = [f"{short(section.setting(gap.reranker).name)} vs {gap.against}" for gap in shown]
        axes.set_yticks(range(len(shown)), names)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_color(GRID)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.set_xlabel(f"difference in {section.headline.label()}")
    return drawn[0]


def curve_of(setting: Setting) -> list[tuple[float, float]]:
    """A setting's mean curve over its runs, at the points that all of them have."""
    curves: list[Mapping[float, float]] = [dict(run.curve) for run in setting.runs if run.curve]
    points = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return [(at, sum(curve[at] for curve in curves) / len(curves)) for at in points]


def curves_figure(section: Section) -> Markup | None:
    """Draw the reward on held-out users over rounds, or on validation sessions over epochs, one line per setting."""
    lines = [(one, curve_of(one)) for one in section.settings[:MOST_LINES]]
    lines = [(one, points) for one, points in lines if points]
    if not lines:
        return None
    rounds = "list" in section.story.units  # rounds of DPO; else epochs of the agent
    with drawing(2.4 + 0.2 * ((len(lines) + 1) // 2), width=4.8) as (figure, drawn):
        axes = figure.subplots()
        for n, (one, points) in enumerate(lines):
            colour, dash = _COLOURS[n % len(_COLOURS)], _DASHES[n // len(_COLOURS)]
            x, y = zip(*points, strict=True)
            marker = "o" if rounds or len(x) == 1 else ""
            name = short(one.name) + ("*" if any(run.flattered for run in one.runs) else "")
            axes.plot(x, y, linestyle=dash, marker=marker, color=colour, linewidth=1.5, markersize=4, label=name)
        ticks = sorted({at for _, points in lines for at, _ in points})
        if rounds:
            label_places(axes, ticks)
        else:
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
            axes.set_xlabel("epoch")
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.grid(axis="x", visible=False)
        axes.margins(x=0.06)
        axes.set_title(f"reward, {'held-out users' if rounds else 'validation sessions'}", loc="left", fontsize=10)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.18), fontsize=9, ncols=2, borderpad=0)
    return drawn[0]
