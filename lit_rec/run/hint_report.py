"""The part of a report that tells of hints: which there are, where from, who gets which, and how that was learned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
from rich.table import Table
from rich.text import Text

from lit_rec.agent.hints import KEPT, Hint, HintBase
from lit_rec.run.figures import VARIABLES
from lit_rec.run.hint_figures import agent_colour, curve_figures, picks_figure
from lit_rec.run.round_report import known, make_table
from lit_rec.run.session_story import row_order
from lit_rec.texts import printable

_AGENT_COLUMNS = (
    ("subjects", "test {subject}s", ",d"),
    ("no_hint", "no hint picked", ".0%"),
    ("hints", "hints used", ",d"),
    ("gain", "mean rank gain", "+.2f"),
    ("better", "rank better", ",d"),
    ("worse", "rank worse", ",d"),
)
_LEADS_TO = {"session": "then", "user": "ranked too low"}  # what a hint's target is to the titles before it


@dataclass(frozen=True)
class HintStory:
    """What a run has to tell of its hints; whatever is empty is left out of the page.

    Attributes:
        subject: What hints are picked for: "session" or "user".
        agent: Who picks them.
        hints: `asdict` of every `Hint`, kept or not.
        choices: session, agent, hint (its id, 0 = none) on the test set; where they are known, rank and rank_no_hint
            of the target too.
        curves: agent -> one dictionary per epoch.
        rounds: epochs per round; None: no round ends are drawn.
        talk: one reflection, {role, content} per message.
        names: what a hint's session, or user, is called; its number where it has no name.
    """

    subject: str = "session"
    agent: str = "ppo"
    hints: Sequence[Mapping[str, Any]] = ()
    choices: pl.DataFrame = field(default_factory=pl.DataFrame)
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    rounds: int | None = None
    talk: Sequence[Mapping[str, str]] = ()
    names: Mapping[int, str] = field(default_factory=dict)

    @property
    def base(self) -> HintBase:
        """The hints."""
        return HintBase(Hint(**hint) for hint in self.hints)

    def picked(self, hint: int) -> int | None:
        """How often the agent picks a hint on the test set; None where it picked nothing at all."""
        if self.choices.is_empty():
            return None
        mine = self.choices.filter(pl.col("agent") == self.agent)
        return None if mine.is_empty() else mine.filter(pl.col("hint") == hint).height


def hint_context(story: HintStory | None) -> dict[str, Any] | None:
    """Return what `report_hints.html.j2` shows."""
    if story is None:
        return None
    base, shares = story.base, _shares(story.choices)
    order = list(dict.fromkeys([0, *(h.id for h in base.kept), *sorted({h for s in shares.values() for h in s})]))
    return {
        "subject": story.subject,
        "agent": story.agent,
        "leads_to": _LEADS_TO[story.subject],
        "kept": [_hint(hint, story) for hint in base.kept],
        "refused": [hint for hint in base.hints if hint.fate != KEPT],
        "fates": base.fates(),
        "agents": _agents(story),
        "picks_figure": picks_figure(shares, order),
        "curves": curve_figures(story.curves, story.rounds, story.subject),
        "agents_drawn": {agent: VARIABLES[agent_colour(agent)] for agent, epochs in story.curves.items() if epochs},
        "several_rounds": bool(story.rounds) and any(len(c) > (story.rounds or 0) for c in story.curves.values()),
        "talk": story.talk,
    }


def _hint(hint: Hint, story: HintStory) -> dict[str, Any]:
    return {
        "id": hint.id,
        "text": hint.text,
        "round": hint.round,
        "where": story.names.get(hint.session, str(hint.session)),
        "titles": hint.titles,
        "target": hint.target,
        "own": _gain(hint.gain_source),
        "ranks": "" if None in (hint.rank_before, hint.rank_after) else f"{hint.rank_before} to {hint.rank_after}",
        "others": _gain(hint.gain_others),
        "on": hint.others,
        "picked": story.picked(hint.id),
    }


def _gain(value: float | None) -> str:
    return f"{value:+.4f}" if known(value) else "not tried"


def _by_agent(choices: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    if choices.is_empty():
        return []
    parts = {str(key[0]): part for key, part in choices.group_by("agent")}
    return sorted(parts.items(), key=lambda item: row_order(item[0]))


def _shares(choices: pl.DataFrame) -> dict[str, dict[int, float]]:
    """Agent -> hint -> share of its sessions."""
    found = {}
    for agent, part in _by_agent(choices):
        counted = part.group_by("hint").len()
        found[agent] = {hint: count / len(part) for hint, count in counted.rows()}
    return found


def _agents(story: HintStory) -> dict[str, Any]:
    """How the agents pick; what their picks gain in rank is left out where ranks were not looked at."""
    lines = []
    for agent, part in _by_agent(story.choices):
        used = part.filter(pl.col("hint") > 0)["hint"].n_unique()
        numbers = {"subjects": len(part), "no_hint": float((part["hint"] == 0).mean()), "hints": used}  # type: ignore
        if {"rank", "rank_no_hint"} <= set(part.columns):
            gains = (part["rank_no_hint"].cast(pl.Float64) - part["rank"].cast(pl.Float64)).drop_nulls()
            if len(gains):
                numbers |= {"gain": float(gains.mean())}  # type: ignore[arg-type]
                numbers |= {"better": int((gains > 0).sum()), "worse": int((gains < 0).sum())}
        lines.append((agent, numbers))
    columns = [(key, label.format(subject=story.subject), form) for key, label, form in _AGENT_COLUMNS]
    title = f"What the agents pick on test {story.subject}s"
    return make_table(title, lines, columns) | {"ranked": any("gain" in numbers for _, numbers in lines)}


def hint_table(story: HintStory) -> Table:
    """Make the terminal's table of the hints that were kept."""
    test = 0 if story.choices.is_empty() else story.choices["session"].n_unique()
    fates = ", ".join(f"{fate} ({count})" for fate, count in story.base.fates().items())
    table = Table(
        title=Text("Hints in the base"),
        title_justify="left",
        caption=Text(printable(f"All hints written: {fates or 'none'}. Gains are rewards over no hint.")),
        caption_justify="left",
    )
    table.add_column("id", justify="right")
    table.add_column("hint", ratio=1)
    own, picked_by = f"gain on its own {story.subject}", f"picked by {story.agent} ({test:,} test {story.subject}s)"
    for name in (own, "gain on others", picked_by):
        table.add_column(name, justify="right")
    for hint in story.base.kept:
        picked = story.picked(hint.id)
        others = f"{_gain(hint.gain_others)} ({hint.others})" if hint.others else _gain(hint.gain_others)
        cells = (printable(hint.text), _gain(hint.gain_source), others, "" if picked is None else f"{picked:,}")
        table.add_row(str(hint.id), *(Text(cell) for cell in cells))
    return table
