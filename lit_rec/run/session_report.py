"""The part of a report that tells of session ranking: how the LLM is asked, examples, costs; hints in `hint_report`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from lit_rec.run.hint_report import HintStory
from lit_rec.run.round_report import known, make_table
from lit_rec.run.session_story import row_order

_SCORING_COLUMNS = (
    ("prior", "weight of the prior", "g"),
    ("length", "length exponent", "g"),
    ("ndcg", "NDCG, not cut", ".4f"),
    ("ndcg@10", "NDCG@10", ".4f"),
    ("hr@10", "HR@10", ".4f"),
    ("sessions", "sessions", ",d"),
    ("choice", "", "s"),
)


@dataclass(frozen=True)
class SessionStory(HintStory):
    """What a session ranking run has to tell beside its rows; whatever is empty is left out of the page.

    Attributes:
        scoring: template, prior, length, ndcg, ndcg@10, hr@10, sessions, chosen of every way of asking tried on
            known sessions; metrics may be missing where there was nothing to choose.
        examples: group, titles, target, hint ("" = none), rank_no_hint, rank, best_hint, best_rank.
        bias: row, fifth (1 to 5), hr, n: HR@10 by the fifth of the shown candidates in which the target stands;
            empty where the prompt shows no candidates.
        counts: what was asked of the LLM; None is left out, a name ending in `_rate` is a share.
    """

    scoring: Sequence[Mapping[str, Any]] = ()
    examples: Sequence[Mapping[str, Any]] = ()
    bias: pl.DataFrame = field(default_factory=pl.DataFrame)
    counts: Mapping[str, Any] = field(default_factory=dict)


def session_context(story: HintStory | None) -> dict[str, Any] | None:
    """Return what `report_sessions.html.j2` shows, which is nothing beside hints unless sessions were ranked."""
    if not isinstance(story, SessionStory):
        return None
    return {
        "scoring": _scoring(story.scoring),
        "examples": _examples(story.examples),
        "bias": _bias(story.bias),
        "counts": [(name.replace("_", " "), _number(name, v)) for name, v in story.counts.items() if known(v)],
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
