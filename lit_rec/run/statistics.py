"""How sure the numbers are: intervals over users, paired differences, correction for many comparisons.

The unit that was drawn at random is the user, never the list: one user's lists share a taste, and thousands
of lists of a few hundred users are a few hundred observations. So every interval here treats users as the
sample:

- mean over users: Student's t interval of the user means (a user's mean over lists first, then over seeds);
- mean over lists: cluster bootstrap, which redraws whole users and needs only their sums and counts;
- paired difference of two rows: bootstrap over the users that both rows have.

A bootstrap of n users is too narrow by sqrt((n - 1) / n) and knows no t quantile; its deviations are
stretched for both (Hesterberg 2015, "What teachers should know about the bootstrap"), which matters below
some fifty users. Where next to no replicate lies beyond zero there is nothing to count, and the p-value is
that of the paired t test: else it could not become small enough to survive a correction for hundreds of
comparisons. The intervals say how much another draw of users would move a number. What another draw of the
training seeds would do is added to differences in `lit_rec.run.seeds`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import polars as pl
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 4000
PAIRED_RESAMPLES = 20000
_Z = NormalDist().inv_cdf(0.975)
_CHUNK = 2_000_000  # draws held in memory at a time
_COUNTED = 10  # replicates beyond zero from which on they can be counted


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval; the bounds are nan with fewer than two users.

    `n` counts users, or lists where the mean is over lists.
    """

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """A paired difference a - b with its 95% interval and two-sided p-value; `n` counts the users."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def t_quantile(degrees: float) -> float:
    """Return the 97.5% point of Student's t, within 0.5% (Abramowitz and Stegun 26.7.5; exact for 1 and 2).

    Broken degrees of freedom below 3 are rounded down.

    >>> round(t_quantile(10), 3)
    2.228
    """
    if degrees < 1:
        return math.nan
    if degrees < 2:
        return math.tan(math.pi * 0.475)
    if degrees < 3:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z, v = _Z, float(degrees)
    terms = (
        z,
        (z**3 + z) / (4 * v),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3),
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4),
    )
    return sum(terms)


def mean_over_users(values: Array) -> Estimate:
    """Return the mean of one value per user and its t interval.

    Args:
        values: [n] a user's mean over lists and seeds.
    """
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n)
    half = t_quantile(n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def bootstrap(columns: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Redraw the users with replacement, and return the sums of every redrawn sample.

    Args:
        columns: [n, M] float64, any M per-user quantities (sums, counts, means); all see the same redraws.
        resamples: how many samples to draw.
        seed: of the draw; equal seeds give equal results for equal n.

    Returns:
        [resamples, M] sums.
    """
    n = len(columns)
    rng = np.random.default_rng(seed)
    sums = np.empty((resamples, columns.shape[1]))
    step = max(1, _CHUNK // max(n, 1))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = rng.integers(0, n, size=(size, n)) + np.arange(size)[:, None] * n
        # How often each user was drawn: one matrix product then serves every column.
        times = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        sums[start : start + size] = times.astype(np.float64) @ columns
    return sums


def _stretched(replicates: Array, centre: Array, n: int) -> Array:
    """Widen the replicates about the estimate by what a bootstrap of n users lacks."""
    return centre + (replicates - centre) * (t_quantile(n - 1) / _Z * math.sqrt(n / (n - 1)))


def mean_over_lists(
    sums: Array, counts: Array, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Array, Array, Array]:
    """Return means over lists with cluster-bootstrap intervals, users being the clusters.

    Args:
        sums: [n, M] per user and metric, the sum over the user's lists (and seeds).
        counts: [n, M] how many values each sum holds, at least 1.
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Returns:
        (mean, low, high), each [M]; bounds are nan with fewer than two users.
    """
    n, width = sums.shape
    total, number = sums.sum(axis=0), counts.sum(axis=0)
    mean = np.divide(total, number, out=np.full(width, np.nan), where=number > 0)
    if n < 2:
        return mean, np.full(width, np.nan), np.full(width, np.nan)
    drawn = bootstrap(np.hstack([sums, counts]), resamples=resamples, seed=seed)
    low, high = np.quantile(_stretched(drawn[:, :width] / drawn[:, width:], mean, n), [0.025, 0.975], axis=0)
    return mean, low, high


def user_table(frame: pl.DataFrame, metrics: Sequence[str]) -> pl.DataFrame:
    """Reduce per-list metrics to one line per split, reranker, row and user.

    Args:
        frame: an evaluation frame: row, reranker, seed, fold, split, user, list and metric columns.
        metrics: the metric columns to keep, such as `ndcg@5|kar`.

    Returns:
        split, reranker, row, user (sorted by them), seeds and lists (distinct ones), and per metric `m` the
        columns `m` (mean over the user's lists, then seeds), `m:sum` and `m:count` (over lists and seeds).
    """
    keys = ["split", "reranker", "row", "user"]
    values = [pl.col(m).cast(pl.Float64) for m in metrics]
    per_seed = frame.group_by([*keys, "seed"]).agg(
        *(v.mean() for v in values),
        *(v.sum().name.suffix(":sum") for v in values),
        *(v.count().cast(pl.Float64).name.suffix(":count") for v in values),
        pl.col("list").n_unique().alias("lists"),
    )
    return (
        per_seed.sort([*keys, "seed"])
        .group_by(keys, maintain_order=True)
        .agg(
            pl.col("seed").n_unique().alias("seeds"),
            pl.col("lists").max(),
            *(pl.col(m).mean() for m in metrics),
            *(pl.col(f"{m}:{part}").sum() for m in metrics for part in ("sum", "count")),
        )
    )


def paired_difference(
    frame: pl.DataFrame,
    row_a: str,
    row_b: str,
    metric: str,
    *,
    reranker: str | None = None,
    split: str = "test",
    unit: str = "user",
    resamples: int = PAIRED_RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Compare two rows on the users that both have: a paired bootstrap over users.

    Args:
        frame: an evaluation frame.
        row_a: the row whose advantage is asked for.
        row_b: the row it is compared with.
        metric: a metric column, such as `ndcg@5|kar`.
        reranker: whose rows; None where the frame has one reranker.
        split: test or validation.
        unit: "user" (mean of user means) or "list" (mean over lists, users as clusters).
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Raises:
        ValueError: when no user has both rows, or when the frame has several rerankers and none is named.
    """
    chosen = frame.filter(pl.col("split") == split, pl.col("row").is_in([row_a, row_b]))
    if reranker is not None:
        chosen = chosen.filter(pl.col("reranker") == reranker)
    elif chosen["reranker"].n_unique() > 1:
        raise ValueError(f"name one reranker of {sorted(chosen['reranker'].unique())}")
    table = user_table(chosen, [metric])
    pair = [(row_a, row_b)]
    return table_differences(table, pair, metric, unit=unit, resamples=resamples, seed=seed)[0]


def table_differences(
    table: pl.DataFrame,
    pairs: Sequence[tuple[str, str]],
    metric: str,
    *,
    unit: str = "user",
    resamples: int = PAIRED_RESAMPLES,
    seed: int = 0,
) -> list[Difference]:
    """Do what `paired_difference` does for many pairs of rows; pairs with the same users share the redraws.

    Args:
        table: a `user_table` of one split and one reranker.
        pairs: (row a, row b) each.
        metric: a metric column, such as `ndcg@5|kar`.
        unit: "user" or "list".
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Raises:
        ValueError: when no user has both rows of a pair, or on an unknown unit.
    """
    if unit not in ("user", "list"):
        raise ValueError(f"unit is user or list, not {unit!r}")
    by_users: dict[tuple[int, ...], list[tuple[int, Array]]] = {}
    for position, (row_a, row_b) in enumerate(pairs):
        users, columns = _paired_columns(table, row_a, row_b, metric, unit)
        by_users.setdefault(users, []).append((position, columns))
    found: dict[int, Difference] = {}
    for users, group in by_users.items():
        n = len(users)
        stacked = np.hstack([columns for _, columns in group])
        estimates = _ratio_gaps(stacked.sum(axis=0, keepdims=True))
        if n > 1:
            drawn = _ratio_gaps(bootstrap(stacked, resamples=resamples, seed=seed))
            replicates = _stretched(drawn, estimates, n)
        else:
            replicates = np.full((1, len(group)), np.nan)
        for (position, columns), estimate, column in zip(group, estimates[0], replicates.T, strict=True):
            found[position] = _difference(float(estimate), column, columns)
    return [found[position] for position in range(len(pairs))]


def _paired_columns(
    table: pl.DataFrame, row_a: str, row_b: str, metric: str, unit: str
) -> tuple[tuple[int, ...], Array]:
    """Return the users of both rows, and [n, 4]: numerator and denominator of a's mean, then of b's."""
    known = table.filter(pl.col(metric).is_not_null())
    a, b = (known.filter(pl.col("row") == row) for row in (row_a, row_b))
    both = a.join(b, on="user", suffix=":b").sort("user")
    if both.is_empty():
        raise ValueError(f"no user has both rows {row_a} and {row_b}")
    if unit == "user":
        parts = [pl.col(metric), pl.lit(1.0).alias("one"), pl.col(f"{metric}:b"), pl.lit(1.0).alias("one:b")]
    else:
        names = [f"{metric}:sum", f"{metric}:count", f"{metric}:sum:b", f"{metric}:count:b"]
        parts = [pl.col(name) for name in names]
    return tuple(both["user"]), both.select(parts).to_numpy()


def _ratio_gaps(sums: Array) -> Array:
    """[B, 4 P] sums -> [B, P] differences of the two means of each pair."""
    return sums[:, 0::4] / sums[:, 1::4] - sums[:, 2::4] / sums[:, 3::4]


def _difference(mean: float, replicates: Array, columns: Array) -> Difference:
    n = len(columns)
    if not math.isfinite(mean) or not np.isfinite(replicates).all():
        return Difference(mean, math.nan, math.nan, math.nan, n)
    # Rows that are equal for every user must not differ by rounding.
    replicates = np.where(np.abs(replicates) < 1e-12, 0.0, replicates)
    low, high = np.quantile(replicates, [0.025, 0.975])
    tail = min(int((replicates <= 0).sum()), int((replicates >= 0).sum()))
    counted = min(1.0, 2 * (tail + 1) / (len(replicates) + 1))
    p = counted if tail >= _COUNTED else t_test(_influence(columns))
    return Difference(mean, float(low), float(high), p, n)


def _influence(columns: Array) -> Array:
    """[n] what each user adds to a difference of two ratios, to first order; with one value a user, the differences."""
    top_a, under_a, top_b, under_b = columns.T
    a, b = top_a.sum() / under_a.sum(), top_b.sum() / under_b.sum()
    return a - b + (top_a - a * under_a) / under_a.mean() - (top_b - b * under_b) / under_b.mean()


def t_p_value(t: float, degrees: float) -> float:
    """Return the two-sided p-value of Student's t, by Wallace's (1959) normal deviate; exact for 1 and 2.

    Broken degrees of freedom below 3 are rounded down.

    >>> f"{t_p_value(2.228, 10):.3f}"
    '0.050'
    """
    if degrees < 2:
        return 1 - 2 / math.pi * math.atan(abs(t))
    if degrees < 3:
        return 1 - abs(t) / math.sqrt(2 + t * t)
    z = (8 * degrees + 1) / (8 * degrees + 3) * math.sqrt(degrees * math.log1p(t * t / degrees))
    return math.erfc(z / math.sqrt(2))


def t_test(values: Array) -> float:
    """Return the two-sided p-value of a mean of 0.

    Equal values, which have no t, get that of the sign test.

    >>> f"{t_test(np.arange(-4.0, 6.0)):.3f}"  # t = .522 with 9 degrees of freedom
    '0.614'
    """
    n, spread = len(values), float(values.std(ddof=1))
    if spread <= 1e-12 * abs(float(values.mean())):
        return 2 * 0.5**n
    return t_p_value(float(values.mean()) / spread * math.sqrt(n), n - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for being several (Holm 1979): the chance of any false claim stays below the level.

    A nan (a comparison that could not be made) stays nan and is not counted.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    running = 0.0
    for rank, (p, i) in enumerate(known):
        running = max(running, min(1.0, (len(known) - rank) * p))
        corrected[i] = running
    return corrected
