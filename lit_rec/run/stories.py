"""What a recipe's tables, verdict and report page have to tell: which rows, against which others, in which words."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from lit_rec.run import reranking_story, session_story
from lit_rec.run.headline import Comparison, Headline


@dataclass(frozen=True)
class Story:
    """What differs between recipes.

    Attributes:
        task: Its name in results.json; names the page's own templates too.
        units: What means are taken over; the first one is the headline's.
        k: Cut-off of the headline.
        convention: Metric convention of the headline.
        second: The second metric of tables.
        line: The row that figures draw as the line to pass, and the same in words.
        accent: Family of rows that figures bring out.
        contrast: Family of rows they set beside it.
        marks: Row -> what has to be said beside its name.
        facts: (label, configuration key) of what stands at the top of the page.
        idle: Rows -> labels of facts that none of these rows has anything of.
        capitals: Whether what `reranker` names is written in capitals.
        family: Kind of a row.
        row_order: Sort key of rows.
        wanted: Rows that a row must beat to have shown anything.
        sentences: What one reranker's comparisons and means show; the string names it where there are several, the
            number is that of the runs.
        with_layouts: (evaluation frame, configuration) -> the frame with a column `layout`: see `count_seeds`.
        trained: Parts of the configuration that say what is trained anew with every seed.
    """

    task: str
    units: tuple[str, ...]
    k: int
    convention: str
    second: str
    line: tuple[str, str]
    accent: str
    contrast: str
    facts: tuple[tuple[str, str], ...]
    capitals: bool
    family: Callable[[str], str]
    row_order: Callable[[str], tuple[Any, ...]]
    wanted: Callable[[str], Sequence[str]]
    sentences: Callable[[Sequence[Comparison], Mapping[str, float], str, Headline, int], list[str]]
    with_layouts: Callable[[pl.DataFrame, Mapping[str, Any]], pl.DataFrame]
    trained: tuple[str, ...]
    marks: Mapping[str, str] = field(default_factory=dict)
    idle: Callable[[Collection[str]], Collection[str]] = lambda rows: ()

    def has_to_beat(self, row: str, present: Sequence[str]) -> list[str]:
        """Return the rows that `row` must beat to have shown anything, of those present."""
        return [other for other in self.wanted(row) if other in present and other != row]

    def named(self, reranker: str) -> str:
        """Return how a reranker's name is written."""
        return reranker.upper() if self.capitals else reranker

    def verdict(
        self,
        comparisons: Sequence[Comparison],
        headline: Headline,
        rows: Sequence[Mapping[str, Any]] = (),
        *,
        runs: int = 1,
    ) -> list[str]:
        """Say what a run shows, or several of one setting, one fact a sentence; empty where nothing can be compared."""
        lines: list[str] = []
        names = sorted({c.reranker for c in comparisons})
        for name in names:
            mine = [c for c in comparisons if c.reranker == name]
            means = {
                r["row"]: r["mean"]
                for r in rows
                if r["reranker"] == name and r["mean"] is not None and headline.counts(r)
            }
            called = self.named(name) if self.capitals or len(names) > 1 else ""
            lines += self.sentences(mine, means, called, headline, runs)
        return lines


RERANKING = Story(
    task="reranking",
    units=("user", "list"),
    k=5,
    convention="kar",
    second="map",
    line=("history_only", "the raw history without any LLM (history_only)"),
    accent="round",
    contrast="zero_shot",
    capitals=True,
    facts=(
        ("LLM", "llm.name"),
        ("Text encoder", "encoder.name"),
        ("Folds over users", "evaluation.folds"),
        ("DPO rounds", "policy.rounds"),
        ("Answers per user and round", "pairs.samples"),
        ("Reward", "reward.metric"),
    ),
    family=reranking_story.family,
    row_order=reranking_story.row_order,
    wanted=reranking_story.wanted,
    sentences=reranking_story.sentences,
    with_layouts=reranking_story.with_layouts,
    trained=("reranker", "encoder"),
    idle=reranking_story.idle,
)

SESSIONS = Story(
    task="session-ranking",
    units=("session",),
    k=10,
    convention="standard",
    second="hr",
    line=("no_hint", "the LLM without a hint (no_hint)"),
    accent="ppo",
    contrast="no_hint",
    marks={"oracle": "sees the answers"},
    capitals=False,
    facts=(
        ("LLM", "llm.name"),
        ("Ranks by", "ranking.method"),
        ("Text encoder", "encoder.name"),
        ("Rounds of reflection", "agent.rounds"),
        ("Hints at most", "reflection.size"),
        ("Reward", "agent.reward"),
        ("Rewards known", "agent.rewards"),
        ("Agent epochs per round", "agent.epochs"),
    ),
    family=lambda row: row,
    row_order=session_story.row_order,
    wanted=session_story.wanted,
    sentences=session_story.sentences,
    with_layouts=lambda frames, _: frames.with_columns(pl.lit("").alias("layout")),
    trained=("agent", "encoder"),
)
