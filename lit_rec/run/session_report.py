"""The part of a report that tells of session ranking: prompt, hints, what the agents pick, examples, costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
from rich.table import Table
from rich.text import Text

from lit_rec.agent.hints import KEPT, Hint, HintBase
from lit_rec.run.figures import VARIABLES
from lit_rec.run.round_report import known, make_table
from lit_rec.run.session_figures import agent_colour, curve_figures, picks_figure
from lit_rec.run.session_story import row_order

AGENT = "ppo"
_SCORING_COLUMNS = (
    ("prior", "weight of the prior", "g"),
    ("length", "length exponent", "g"),
    ("ndcg", "NDCG, not cut", ".4f"),
    ("ndcg@10", "NDCG@10", ".4f"),
    ("hr@10", "HR@10", ".4f"),
    ("sessions", "sessions", ",d"),
    ("choice", "", "s"),
)
_AGENT_COLUMNS = (
    ("sessions", "test sessions", ",d"),
    ("no_hint", "no hint picked", ".0%"),
    ("hints", "hints used", ",d"),
    ("gain", "mean rank gain", "+.2f"),
    ("better", "rank better", ",d"),
    ("worse", "rank worse", ",d"),
)


@dataclass(frozen=True)
class SessionStory:
    """What a session ranking run has to tell beside its rows; whatever is empty is left out of the page.

    Attributes:
        scoring: template, prior, length, ndcg, ndcg@10, hr@10, sessions, chosen of every way of asking tried on
            known sessions; metrics may be missing where there was nothing to choose.
        hints: `asdict` of every `Hint`, kept or not.
        choices: session, agent, hint (its id, 0 = none), rank, rank_no_hint (null where unknown), on test sessions.
        examples: group, titles, target, hint ("" = none), rank_no_hint, rank, best_hint, best_rank.
        bias: row, fifth (1 to 5), hr, n: HR@10 by the fifth of the shown candidates in which the target stands;
            empty where the prompt shows no candidates.
        counts: what was asked of the LLM; None is left out, a name ending in `_rate` is a share.
        curves: agent -> one dictionary per epoch.
        rounds: epochs per round; None: no round ends are drawn.
        talk: one reflection, {role, content} per message.
    """

    scoring: Sequence[Mapping[str, Any]] = ()
    hints: Sequence[Mapping[str, Any]] = ()
    choices: pl.DataFrame = field(default_factory=pl.DataFrame)
    examples: Sequence[Mapping[str, Any]] = ()
    bias: pl.DataFrame = field(default_factory=pl.DataFrame)
    counts: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    rounds: int | None = None
    talk: Sequence[Mapping[str, str]] = ()

    @property
    def base(self) -> HintBase:
        """The hints."""
        return HintBase(Hint(**hint) for hint in self.hints)

    def picked(self, hint: int, agent: str = AGENT) -> int | None:
        """On how many test sessions an agent picks a hint; None where that agent picked nothing at all."""
        if self.choices.is_empty():
            return None
        mine = self.choices.filter(pl.col("agent") == agent)
        return None if mine.is_empty() else mine.filter(pl.col("hint") == hint).height


def session_context(story: SessionStory | None) -> dict[str, Any] | None:
    """Return what `report_sessions.html.j2` shows."""
    if story is None:
        return None
    base, shares = story.base, _shares(story.choices)
    order = list(dict.fromkeys([0, *(h.id for h in base.kept), *sorted({h for s in shares.values() for h in s})]))
    return {
        "scoring": _scoring(story.scoring),
        "hints": [_hint(hint, story) for hint in base.kept],
        "refused": [hint for hint in base.hints if hint.fate != KEPT],
        "fates": base.fates(),
        "agents": _agents(story.choices),
        "picks_figure": picks_figure(shares, order),
        "examples": _examples(story.examples),
        "bias": _bias(story.bias),
        "counts": [(name.replace("_", " "), _number(name, v)) for name, v in story.counts.items() if known(v)],
        "curves": curve_figures(story.curves, story.rounds),
        "agents_drawn": {agent: VARIABLES[agent_colour(agent)] for agent, epochs in story.curves.items() if epochs},
        "several_rounds": bool(story.rounds) and any(len(c) > (story.rounds or 0) for c in story.curves.values()),
        "talk": story.talk,
    }


def _scoring(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not lines:
        return None
    shown = [(str(line["template"]), {**line, "choice": "chosen" if line.get("chosen") else ""}) for line in lines]
    chosen = []
    for name, line in shown:
        if line["choice"]:
            measure = [
                f"{label} {line[key]:{form}}" for key, label, form in _SCORING_COLUMNS[:2] if known(line.get(key))
            ]
            chosen.append(", ".join([name, *measure]))
    measured = any(line.get("sessions") for line in lines)  # else there was nothing to choose, or nothing to choose on
    table = make_table("", shown, _SCORING_COLUMNS) if measured else None
    return {"chosen": chosen, "tried": len(lines), "table": table}


def _hint(hint: Hint, story: SessionStory) -> dict[str, Any]:
    return {
        "id": hint.id,
        "text": hint.text,
        "round": hint.round,
        "session": hint.session,
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


def _agents(choices: pl.DataFrame) -> dict[str, Any]:
    lines = []
    for agent, part in _by_agent(choices):
        gains = (part["rank_no_hint"].cast(pl.Float64) - part["rank"].cast(pl.Float64)).drop_nulls()
        measured = len(gains) > 0
        used = part.filter(pl.col("hint") > 0)["hint"].n_unique()
        numbers = {"sessions": len(part), "no_hint": float((part["hint"] == 0).mean()), "hints": used}  # type: ignore
        if measured:
            numbers |= {"gain": float(gains.mean()), "better": int((gains > 0).sum()), "worse": int((gains < 0).sum())}  # type: ignore
        lines.append((agent, numbers))
    return make_table("What the agents pick on test sessions", lines, _AGENT_COLUMNS)


def _examples(examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for example in examples:
        groups.setdefault(str(example["group"]), []).append(example)
    return [{"title": title, "sessions": sessions} for title, sessions in groups.items()]


def _bias(bias: pl.DataFrame) -> dict[str, Any] | None:
    """Rows down, fifths across."""
    if bias.is_empty():
        return None
    lines: dict[str, dict[str, str]] = {}
    for row, fifth, hr, n in bias.select("row", "fifth", "hr", "n").rows():
        lines.setdefault(row, {})[str(fifth)] = f"{hr:.3f} ({n:,})" if known(hr) else f"({n or 0:,})"
    columns = [(str(f), f"fifth {f}", "s") for f in range(1, 6)]
    ordered = sorted(lines.items(), key=lambda line: row_order(line[0]))
    return make_table("Where the target stands in the list that is shown", ordered, columns)


def _number(name: str, value: Any) -> str:
    if isinstance(value, int | float) and name.endswith("_rate"):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if isinstance(value, float) else str(value)


def hint_table(story: SessionStory) -> Table:
    """Make the terminal's table of the hints that were kept."""
    test = 0 if story.choices.is_empty() else story.choices["session"].n_unique()
    fates = ", ".join(f"{fate} ({count})" for fate, count in story.base.fates().items())
    table = Table(
        title=Text("Hints in the base"),
        title_justify="left",
        caption=Text(_printable(f"All hints written: {fates or 'none'}. Gains are rewards over no hint.")),
        caption_justify="left",
    )
    table.add_column("id", justify="right")
    table.add_column("hint", ratio=1)
    for name in ("gain on its own session", "gain on others", f"picked by {AGENT} ({test:,} test sessions)"):
        table.add_column(name, justify="right")
    for hint in story.base.kept:
        picked = story.picked(hint.id)
        others = f"{_gain(hint.gain_others)} ({hint.others})" if hint.others else _gain(hint.gain_others)
        cells = (_printable(hint.text), _gain(hint.gain_source), others, "" if picked is None else f"{picked:,}")
        table.add_row(str(hint.id), *(Text(cell) for cell in cells))
    return table


def _printable(text: str) -> str:
    """Text without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)
