"""Compare the rows of a run with the rows they have to beat, and put the answer in plain words (METHODS 1.9)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from lit_rec.run.headline import Comparison, Headline
from lit_rec.run.seeds import count_seeds
from lit_rec.run.statistics import PAIRED_RESAMPLES, Difference, holm, table_differences, user_table
from lit_rec.run.stories import RERANKING, Story


def choose_headline(
    frames: pl.DataFrame,
    *,
    k: int | None = None,
    convention: str | None = None,
    unit: str | None = None,
    split: str = "test",
    story: Story = RERANKING,
) -> Headline:
    """Return the headline nearest to what is asked, among what the frames hold.

    Args:
        frames: evaluation frames, concatenated.
        k: cut-off; None, here and below: the story's own.
        convention: of the metrics.
        unit: what means are taken over.
        split: test or validation.
        story: of the recipe.
    """
    cut, convention = k or story.k, convention or story.convention
    measured = [m for m in (re.fullmatch(r"ndcg@(\d+)\|(\w+)", c) for c in frames.columns) if m]
    if measured:
        conventions = sorted({m[2] for m in measured})
        convention = convention if convention in conventions else conventions[0]
        cuts = [int(m[1]) for m in measured if m[2] == convention]
        cut = min(cuts, key=lambda one: (abs(one - cut), one))
    splits = frames["split"].unique().sort().to_list() if "split" in frames.columns else []
    return Headline(cut, convention, unit or story.units[0], split if split in splits or not splits else splits[0])


def compare_rows(
    frames: pl.DataFrame,
    headline: Headline | None = None,
    *,
    resamples: int = PAIRED_RESAMPLES,
    seed: int = 0,
    story: Story = RERANKING,
) -> list[Comparison]:
    """Compare every row with the rows it has to beat, for every reranker, on the headline metric.

    Differences are over users, and over training seeds where rows have several (`with_seeds`). The p-values of a
    reranker's comparisons together are one family for Holm's correction: others beside it change nothing.

    Args:
        frames: evaluation frames, concatenated.
        headline: what is counted; None chooses it from the frames.
        resamples: bootstrap samples.
        seed: of the bootstrap.
        story: of the recipe: says which row has to beat which.
    """
    headline = headline or choose_headline(frames, story=story)
    column = headline.column()
    if column not in frames.columns:
        return []
    chosen = frames.filter(pl.col("split") == headline.split, pl.col(column).is_not_null())
    table = user_table(chosen, [column])
    unit = "list" if headline.unit == "list" else "user"  # the frames call a session a user with one list
    found: list[tuple[str, str, str, Difference]] = []
    for reranker in sorted(table["reranker"].unique()):
        mine = table.filter(pl.col("reranker") == reranker)
        users = {key[0]: set(part["user"]) for key, part in mine.group_by("row")}
        pairs = [
            (row, other)
            for row in sorted(users, key=story.row_order)
            for other in story.has_to_beat(row, list(users))
            if users[row] & users[other]
        ]
        gaps = table_differences(mine, pairs, column, unit=unit, resamples=resamples, seed=seed)
        found += [(reranker, *pair, gap) for pair, gap in zip(pairs, gaps, strict=True)]
    told = count_seeds(chosen, column, unit, found)
    corrected: list[float] = []
    for name in dict.fromkeys(one[0] for one in found):
        corrected += holm([gap.p for one, (gap, *_) in zip(found, told, strict=True) if one[0] == name])
    return [
        Comparison(reranker, row, other, gap, p, by_seed, spread)
        for (reranker, row, other, _), (gap, by_seed, spread), p in zip(found, told, corrected, strict=True)
    ]


def verdict(
    comparisons: Sequence[Comparison],
    headline: Headline,
    rows: Sequence[Mapping[str, Any]] = (),
    story: Story = RERANKING,
) -> list[str]:
    """Say what the run shows, for every reranker.

    Args:
        comparisons: of `compare_rows`.
        headline: what was counted.
        rows: of `result_rows`, for what is said about means; without them that is left out.
        story: of the recipe.

    Returns:
        Sentences, one fact each; never empty.
    """
    lines = story.verdict(comparisons, headline, rows)
    return lines or ["This run has no two rows that can be compared, so it shows nothing about the method."]
