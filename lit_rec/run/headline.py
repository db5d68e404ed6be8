"""What is counted, and how the comparison of two rows is written."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_rec.run.seeds import BySeed, Spread, seeds_of
from lit_rec.run.statistics import Difference

LEVEL = 0.05


@dataclass(frozen=True)
class Headline:
    """The one way of counting that tables, differences and the verdict use, so that no two are mixed.

    Attributes:
        k: Cut-off.
        convention: Of the metrics: "kar" or "standard".
        unit: What a mean is taken over: "user", "list" or "session".
        split: "test" or "validation".
        metric: The main one.
    """

    k: int = 5
    convention: str = "kar"
    unit: str = "user"
    split: str = "test"
    metric: str = "ndcg"

    @property
    def drawn(self) -> str:
        """What was drawn at random, so what intervals are over: lists belong to users, a session stands alone."""
        return "user" if self.unit == "list" else self.unit

    @property
    def short(self) -> str:
        """Convention and unit; with one target per session the conventions agree and none is named."""
        return self.unit if self.unit == "session" else f"{self.convention}, {self.unit}"

    @property
    def counting(self) -> str:
        """The convention and the unit in words."""
        if self.unit == "session":
            return f"mean over {self.split} sessions"
        return f"{self.convention} convention, mean over {self.unit}s, {self.split} users"

    def column(self, metric: str = "") -> str:
        """Return the frames' column of a metric: `ndcg@5|kar`."""
        return f"{metric or self.metric}@{self.k}|{self.convention}"

    def label(self, metric: str = "") -> str:
        """Return how a metric is written for people: `NDCG@5`."""
        return f"{(metric or self.metric).upper()}@{self.k}"

    def full_label(self, metric: str = "") -> str:
        """Return a metric with its convention and unit: `NDCG@5 (kar, user mean)`."""
        return f"{self.label(metric)} ({self.short} mean)"

    def counts(self, row: Mapping[str, Any], metric: str = "") -> bool:
        """Whether a result row is counted this way."""
        wanted = (f"{metric or self.metric}@{self.k}", self.convention, self.unit, self.split)
        return (row["metric"], row["convention"], row["unit"], row["split"]) == wanted


@dataclass(frozen=True)
class Comparison:
    """One row against the row it has to beat.

    Attributes:
        reranker: Whose rows.
        row: The one.
        against: The other.
        difference: Over users.
        p_holm: Its p-value, corrected over all comparisons of its reranker.
        by_seed: The same difference of means with each training seed that both have, those of the same users together.
        spread: How such differences vary from seed to seed; None where no seeds tell.
    """

    reranker: str
    row: str
    against: str
    difference: Difference
    p_holm: float
    by_seed: BySeed = ()
    spread: Spread | None = None

    @property
    def sure(self) -> bool:
        """Whether the difference stands after the correction."""
        return self.p_holm < LEVEL


def p_text(p: float) -> str:
    """Write a p-value: `p = 0.034`, `p < 0.001`."""
    if math.isnan(p):
        return "p unknown"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def describe_difference(comparison: Comparison, drawn: str = "user") -> str:
    """Write a difference with its interval and corrected p-value.

    Args:
        comparison: The two rows.
        drawn: What was drawn at random, see `Headline.drawn`.
    """
    gap = comparison.difference
    if math.isnan(gap.low):
        return f"{gap.mean:+.4f}, no interval ({gap.n} {drawn if gap.n == 1 else drawn + 's'})"
    return f"{gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}], {p_text(comparison.p_holm)}"


def claim(c: Comparison, words: tuple[str, str, str]) -> str:
    """Return the words for better, worse or not shown."""
    if not c.sure:
        return words[2]
    return words[0] if c.difference.mean > 0 else words[1]


def limit(c: Comparison, drawn: str = "user") -> str:
    """Say how large an effect an inconclusive comparison leaves possible; empty where it is conclusive."""
    if c.sure or math.isnan(c.difference.low):
        return ""
    if c.difference.low == c.difference.high == 0:
        return f" The two rows are equal for every {drawn}."
    if c.difference.low > 0 or c.difference.high < 0:
        return " Alone it would count; among this many comparisons it may be chance."
    half = (c.difference.high - c.difference.low) / 2
    seeds = f" and {trained} training seeds" if (trained := seeds_of(c.by_seed)) else ""
    return (
        f" With {c.difference.n} {drawn}s{seeds}, effects below about {half:.4f} cannot be told from chance here, "
        "nor can somewhat larger ones among several comparisons."
    )
