"""Does the reward pay for length? Reward against answer length in every setting that tuned its LLM."""

from typing import Any

import polars as pl

from lit_rec.metrics.texts import within_user_correlation
from lit_rec.run.figures import length_figure
from lit_rec.run.many import Section, Setting
from lit_rec.run.many_figures import MOST_LINES
from lit_rec.run.reranking_story import place_name
from lit_rec.run.round_report import make_table

_POINTS = 300  # per figure, of which a page may have many
_WHOSE = ("run", "fold", "user")  # a user is judged by another reranker in every run and fold


def rewards_of(setting: Setting) -> pl.DataFrame:
    """The rewards of all runs of a setting: run (place among its runs) and the columns of `FinishedRun.rewards`."""
    return pl.concat([run.rewards.with_columns(run=pl.lit(n)) for n, run in enumerate(setting.runs)])


def correlations(rewards: pl.DataFrame) -> dict[float, float | None]:
    """The within-user correlation of reward and tokens at every place among the rounds, over all runs and folds."""
    known = rewards.filter(pl.col("reward").is_finite())
    return {
        at: within_user_correlation(known.filter(pl.col("round") == at), "reward", "tokens", user=_WHOSE)
        for at in sorted(known["round"].unique())
    }


def length_context(section: Section) -> dict[str, Any] | None:
    """What the page shows; None where no LLM was tuned.

    Returns:
        figures: (setting, picture), on the same axes where rewards are counted alike.
        table: The correlations, settings down and states across; without columns where none is defined.
    """
    tables = [(one, rewards_of(one)) for one in section.settings[:MOST_LINES]]
    tables = [(one, table) for one, table in tables if not table.is_empty()]
    figures = []
    for one, table in tables:
        alike = pl.concat([other for setting, other in tables if _counted(setting) == _counted(one)])
        figures.append((one.name, length_figure(table, points=_POINTS, among=alike)))
    figures = [(name, figure) for name, figure in figures if figure]
    if not figures:
        return None
    lines = [(one.name, {place_name(at): value for at, value in correlations(table).items()}) for one, table in tables]
    places = sorted({at for _, table in tables for at in table["round"].unique()})
    columns = [(place_name(at), place_name(at), "+.2f") for at in places]
    return {"figures": figures, "table": make_table("Correlation of reward and tokens within users", lines, columns)}


def _counted(setting: Setting) -> Any:
    """How its rewards are counted."""
    return setting.runs[0].config.get("reward")
