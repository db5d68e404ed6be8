"""The report's pictures about hints: which are picked, and how the agents learned to pick them."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.ticker
from markupsafe import Markup

from lit_rec.run.figures import ACCENT, INK, MUTED, SECOND, drawing, finite, short

_CURVES = (
    ("val/reward", "reward, validation {subject}s"),
    ("charts/reward", "reward, training {subject}s"),
    ("charts/no_hint_share", "share of no hint, training"),
    ("losses/entropy", "entropy of the choice"),
    ("losses/approx_kl", "KL of an update"),
    ("losses/clipfrac", "share of clipped ratios"),
    ("losses/explained_variance", "variance explained by the critic"),
    ("losses/value_loss", "loss of the critic"),
)
_FLOOR = {"losses/explained_variance": -1.0}  # an untrained critic is wrong without bound


def agent_colour(agent: str) -> str:
    """Return the colour of an agent; those that differ by seed share it."""
    kinds = (("ppo", ACCENT), ("full_information", SECOND))
    return next((colour for kind, colour in kinds if agent.startswith(kind)), MUTED)


def picks_figure(shares: Mapping[str, Mapping[int, float]], hints: Sequence[int]) -> Markup | None:
    """Draw how often each agent picks each hint, one panel per agent.

    Args:
        shares: agent -> hint -> share of the test set, in the order of the panels.
        hints: numbers of the hints in order, 0 being no hint.
    """
    if not shares or not hints:
        return None
    with drawing(0.85 * len(shares) + 0.4, width=4.8) as (figure, drawn):
        grid = figure.subplots(len(shares), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (agent, mine) in zip(grid, shares.items(), strict=True):
            axes.bar(range(len(hints)), [mine.get(h, 0.0) for h in hints], width=0.7, color=agent_colour(agent))
            axes.set_title(short(agent), loc="left", fontsize=10)
            axes.set_xlim(-0.6, max(len(hints), 4) - 0.4)
            axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(2))
            axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
            axes.tick_params(labelsize=9)
            axes.grid(axis="x", visible=False)
        turned = 90 if len(hints) > 12 else 0
        grid[-1].set_xticks(range(len(hints)), ["none" if h == 0 else str(h) for h in hints], rotation=turned)
        grid[-1].set_xlabel("hint")
    return drawn[0]


def curve_figures(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], epochs_per_round: int | None, subject: str
) -> list[Markup]:
    """Draw what was measured over epochs, one small figure per metric, one line per agent.

    Args:
        curves: agent -> one dictionary per epoch; what is missing or not a number is a gap.
        epochs_per_round: a dashed line stands where a round ends and the base of hints grows; None: no lines.
        subject: what hints are picked for.
    """
    figures = []
    for key, title in _CURVES:
        lines = {
            agent: [
                (epoch.get("epoch", place) + 1, epoch[key])
                for place, epoch in enumerate(epochs)
                if finite(epoch.get(key))
            ]
            for agent, epochs in curves.items()
        }
        lines = {agent: points for agent, points in lines.items() if points}
        if lines:
            figures.append(_curve(title.format(subject=subject), lines, epochs_per_round, _FLOOR.get(key)))
    return figures


def _curve(
    title: str, lines: Mapping[str, Sequence[tuple[float, float]]], step: int | None, floor: float | None
) -> Markup:
    last = max(x for points in lines.values() for x, _ in points)
    with drawing(1.7, width=3.2) as (figure, drawn):
        axes = figure.subplots()
        for agent in reversed(list(lines)):  # the first agent on top
            x, y = zip(*lines[agent], strict=True)
            marker = "o" if len(x) == 1 else ""
            axes.plot(x, y, "-", marker=marker, color=agent_colour(agent), linewidth=1.4, markersize=5)
        for end in range(step, int(last), step) if step else ():
            axes.axvline(end + 0.5, color=INK, linewidth=0.9, linestyle=(0, (3, 3)))
        if floor is not None:
            axes.set_ylim(bottom=max(floor, axes.get_ylim()[0]))
        axes.set_title(title, loc="left", fontsize=10)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("epoch")
    return drawn[0]
