"""Which row has to beat which, whether it does, and the answer in plain words (METHODS 1.9)."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from lit_rec.run.statistics import PAIRED_RESAMPLES, Difference, holm, table_differences, user_table

VARIANTS = ("both", "kar")  # how the answer reaches the reranker: with the history's vector, or as KAR does
LEVEL = 0.05
_FAMILIES = (
    "no_knowledge",
    "item_only",
    "history_only",
    "shuffled",
    "zero_shot",
    "best_of_n",
    "random_pairs",
    "round",
)
_CONTROLS = ("no_knowledge", "item_only", "history_only", "shuffled")


@dataclass(frozen=True)
class Headline:
    """The one way of counting that tables, differences and the verdict use, so that no two are mixed."""

    k: int = 5
    convention: str = "kar"
    unit: str = "user"
    split: str = "test"
    metric: str = "ndcg"

    def column(self, metric: str = "") -> str:
        """Return the frames' column of a metric: `ndcg@5|kar`."""
        return f"{metric or self.metric}@{self.k}|{self.convention}"

    def label(self, metric: str = "") -> str:
        """Return how a metric is written for people: `NDCG@5`."""
        return f"{(metric or self.metric).upper()}@{self.k}"

    def full_label(self, metric: str = "") -> str:
        """Return a metric with its convention and unit: `NDCG@5 (kar, user mean)`."""
        return f"{self.label(metric)} ({self.convention}, {self.unit} mean)"

    @property
    def counting(self) -> str:
        """The convention and the unit in words."""
        return f"{self.convention} convention, mean over {self.unit}s, {self.split} users"


@dataclass(frozen=True)
class Comparison:
    """One row against the row it has to beat; `p_holm` is the p-value corrected over the whole table."""

    reranker: str
    row: str
    against: str
    difference: Difference
    p_holm: float

    @property
    def sure(self) -> bool:
        """Whether the difference stands after the correction."""
        return self.p_holm < LEVEL


def choose_headline(
    frames: pl.DataFrame, *, k: int = 5, convention: str = "kar", unit: str = "user", split: str = "test"
) -> Headline:
    """Return the headline nearest to what is asked, among what the frames hold."""
    measured = [m for m in (re.fullmatch(r"ndcg@(\d+)\|(\w+)", c) for c in frames.columns) if m]
    if measured:
        conventions = sorted({m[2] for m in measured})
        convention = convention if convention in conventions else conventions[0]
        cuts = [int(m[1]) for m in measured if m[2] == convention]
        k = min(cuts, key=lambda cut: (abs(cut - k), cut))
    splits = frames["split"].unique().sort().to_list() if "split" in frames.columns else []
    return Headline(k, convention, unit, split if split in splits or not splits else splits[0])


def split_name(row: str) -> tuple[str, str]:
    """Split a row's name into its base and its variant.

    >>> split_name("round_2_both"), split_name("history_only")
    (('round_2', 'both'), ('history_only', ''))
    """
    for variant in VARIANTS:
        if row.endswith(f"_{variant}"):
            return row.removesuffix(f"_{variant}"), variant
    return row, ""


def family(row: str) -> str:
    """Return the kind of a row: `round` for `round_2_both`, `other` for what has no fixed place."""
    return next((name for name in _FAMILIES if row.startswith(name)), "other")


def round_number(row: str) -> int | None:
    """Return k of `round_k` (any variant), else None."""
    match = re.fullmatch(r"round_(\d+)", split_name(row)[0])
    return int(match[1]) if match else None


def row_order(row: str) -> tuple[int, int, str, int]:
    """Sort key: controls first, then the zero-shot LLM, then round after round; variants after their base."""
    base, variant = split_name(row)
    place = [*_FAMILIES, "other"].index(family(row))
    return place, round_number(row) or 0, base, VARIANTS.index(variant) + 1 if variant else 0


def has_to_beat(row: str, present: Sequence[str]) -> list[str]:
    """Return the rows that `row` must beat to have shown anything, of those present.

    >>> has_to_beat("round_2_both", ["history_only", "zero_shot", "zero_shot_both", "round_2_both"])
    ['history_only', 'zero_shot_both']
    """
    kind, (_, variant) = family(row), split_name(row)
    same = f"_{variant}" if variant else ""
    wanted = {
        "no_knowledge": [],
        "item_only": ["no_knowledge"],
        "history_only": ["item_only"],
        "random_pairs": ["history_only", f"zero_shot{same}"],
        "best_of_n": ["history_only", f"zero_shot{same}"],
        "round": ["history_only", f"zero_shot{same}", f"random_pairs{same}"],
    }.get(kind, ["history_only"])
    return [other for other in wanted if other in present and other != row]


def compare_rows(
    frames: pl.DataFrame,
    headline: Headline | None = None,
    *,
    resamples: int = PAIRED_RESAMPLES,
    seed: int = 0,
) -> list[Comparison]:
    """Compare every row with the rows it has to beat, for every reranker, on the headline metric.

    The p-values of all these comparisons together are one family for Holm's correction.

    Args:
        frames: evaluation frames, concatenated.
        headline: what is counted; None chooses it from the frames.
        resamples: bootstrap samples.
        seed: of the bootstrap.
    """
    headline = headline or choose_headline(frames)
    column = headline.column()
    if column not in frames.columns:
        return []
    chosen = frames.filter(pl.col("split") == headline.split, pl.col(column).is_not_null())
    table = user_table(chosen, [column])
    found: list[tuple[str, str, str, Difference]] = []
    for reranker in sorted(table["reranker"].unique()):
        mine = table.filter(pl.col("reranker") == reranker)
        users = {key[0]: set(part["user"]) for key, part in mine.group_by("row")}
        pairs = [
            (row, other)
            for row in sorted(users, key=row_order)
            for other in has_to_beat(row, list(users))
            if users[row] & users[other]
        ]
        gaps = table_differences(mine, pairs, column, unit=headline.unit, resamples=resamples, seed=seed)
        found += [(reranker, *pair, gap) for pair, gap in zip(pairs, gaps, strict=True)]
    corrected = holm([gap.p for *_, gap in found])
    return [Comparison(*entry, p) for entry, p in zip(found, corrected, strict=True)]


def p_text(p: float) -> str:
    """Write a p-value: `p = 0.034`, `p < 0.001`."""
    if math.isnan(p):
        return "p unknown"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def describe_difference(comparison: Comparison) -> str:
    """Write a difference with its interval and corrected p-value."""
    gap = comparison.difference
    if math.isnan(gap.low):
        return f"{gap.mean:+.4f}, no interval ({gap.n} {'user' if gap.n == 1 else 'users'})"
    return f"{gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}], {p_text(comparison.p_holm)}"


def verdict(comparisons: Sequence[Comparison], headline: Headline) -> list[str]:
    """Say whether DPO helped, by how much and how sure, and whether any text beats the raw history.

    The last round is judged, never the best one: picking the best on test users would flatter it.

    Returns:
        Sentences, one fact each; never empty.
    """
    lines: list[str] = []
    for reranker in sorted({c.reranker for c in comparisons}):
        mine = [c for c in comparisons if c.reranker == reranker]
        lines += _dpo_lines(mine, reranker, headline) + _text_lines(mine, reranker, headline)
    if not lines:
        return ["This run has no two rows that can be compared, so it shows nothing about the method."]
    return lines


def _dpo_lines(mine: Sequence[Comparison], reranker: str, headline: Headline) -> list[str]:
    lines = []
    last = max((round_number(c.row) or 0 for c in mine), default=0)
    for c in mine:
        if not last or round_number(c.row) != last:
            continue
        name = f"with {reranker.upper()}, {c.row} against {c.against} is"
        if family(c.against) == "zero_shot":
            words = ("DPO helped", "DPO hurt", "Whether DPO helps is not shown")
        elif family(c.against) == "random_pairs":
            words = (
                "The reward, not just more training, made the difference",
                "Pairs chosen by the reward did worse than random pairs",
                "Pairs chosen by the reward are not shown to be better than random pairs",
            )
        else:
            continue
        lines.append(f"{_pick(c, words)}: {name} {describe_difference(c)} in {headline.full_label()}.{_limit(c)}")
    return lines


def _text_lines(mine: Sequence[Comparison], reranker: str, headline: Headline) -> list[str]:
    texts = [c for c in mine if c.against == "history_only" and family(c.row) not in _CONTROLS]
    if not texts:
        return []
    name = f"with {reranker.upper()}: in {headline.full_label()}"
    winners = [c for c in texts if c.sure and c.difference.mean > 0]
    if winners:
        listed = "; ".join(f"{c.row} {describe_difference(c)}" for c in winners)
        return [f"Better than the raw history (history_only) {name}, {listed}."]
    known = [c for c in texts if math.isfinite(c.difference.mean)]
    if not known:
        return [f"No LLM text could be compared with the raw history (history_only) {name}."]
    best = max(known, key=lambda c: c.difference.mean)
    worse = sum(c.sure and c.difference.mean < 0 for c in texts)
    closing = f" {worse} of {len(texts)} are clearly worse than it." if worse else ""
    return [
        f"No LLM text is shown to beat the raw history (history_only) {name}, the nearest is {best.row}, "
        f"{describe_difference(best)}.{closing}"
    ]


def _pick(c: Comparison, words: tuple[str, str, str]) -> str:
    if not c.sure:
        return words[2]
    return words[0] if c.difference.mean > 0 else words[1]


def _limit(c: Comparison) -> str:
    """Say how large an effect an inconclusive comparison leaves possible."""
    if c.sure or math.isnan(c.difference.low):
        return ""
    if c.difference.low == c.difference.high == 0:
        return " The two rows are equal for every user."
    if c.difference.low > 0 or c.difference.high < 0:
        return " Alone it would count; among this many comparisons it may be chance."
    half = (c.difference.high - c.difference.low) / 2
    return f" With {c.difference.n} users, effects below about {half:.4f} cannot be told from chance here."
