"""How sure a difference of two rows is when their training had chance in it too.

An interval over users says what another draw of users would do. Rerankers of one row that differ by their training seed
alone differ as well, often by more: a difference that holds for one draw of seeds may not hold for the next. What is
counted is what was trained again: the rerankers of a run, or its agents; the LLM is sampled and tuned once per run.

With one seed, rows of one layout (the same inputs, so the same initial weights and batches) are lucky or unlucky
together. Two such rows differ from seed to seed by little, and pairs of them tell the spread together; a row against
one of another layout differs by more, all such pairs by the same luck, so only further seeds tell more of it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from lit_rec.run.statistics import Difference, t_p_value, t_quantile

RUNS = 1 << 20  # seeds of one run, at most: a frame of several runs numbers those of the k-th from k * RUNS on
BySeed = tuple[
    tuple[float, ...], ...
]  # differences of two rows; those of the same users, which seeds tell apart, together
Cell = Mapping[int, tuple[int, float]]  # seed -> (which users, as a number; their mean)
Named = tuple[str, str, str, Difference]  # reranker, row, other row, their difference over users


@dataclass(frozen=True)
class Spread:
    """How differences of two rows vary from seed to seed.

    Attributes:
        deviation: Standard deviation.
        freedom: Its degrees of freedom: few seeds tell it badly.
        alike: Whether the rows are of one layout.
    """

    deviation: float
    freedom: int
    alike: bool


def count_seeds(
    frames: pl.DataFrame, column: str, unit: str, found: Sequence[Named]
) -> list[tuple[Difference, BySeed, Spread | None]]:
    """Count training seeds into differences over users.

    Args:
        frames: What the differences were made of: an evaluation frame, one split. Where it has a column `layout`, rows
            with the same one are trained alike; without it all are.
        column: The metric.
        unit: "user" or "list".
        found: The differences over users.

    Returns:
        For each the difference with seeds, the differences by seed, and their spread: None where no seeds tell.
    """
    cells = _cells(frames, column, unit)
    by_seed = [_by_seed(cells[who, row], cells[who, other]) for who, row, other, _ in found]
    layouts = dict.fromkeys(cells, "")
    if "layout" in frames.columns:
        layouts = {(who, row): name for who, row, name in frames.select("reranker", "row", "layout").unique().rows()}
    kinds = [(who, frozenset((layouts[who, row], layouts[who, other]))) for who, row, other, _ in found]
    spreads: dict[tuple[str, frozenset[str]], Spread | None] = {}
    for kind in set(kinds):
        same = [n for n, one in enumerate(kinds) if one == kind and seeds_of(by_seed[n])]
        alike = len(kind[1]) == 1
        pairs = [found[n][1:3] for n in same]
        trained = {row for pair in pairs for row in pair if _several(cells[kind[0], row])}
        contrasts = _contrasts(pairs, trained) if alike else 1
        freedom = contrasts * min((sum(len(gaps) - 1 for gaps in by_seed[n]) for n in same), default=0)
        spreads[kind] = Spread(seed_spread([by_seed[n] for n in same]), freedom, alike) if same else None
    told = [spreads[kind] for kind in kinds]
    return [
        (with_seeds(gap, mine, spread), mine, spread)
        for (*_, gap), mine, spread in zip(found, by_seed, told, strict=True)
    ]


def _contrasts(pairs: Sequence[tuple[str, str]], trained: set[str]) -> int:
    """How many of the differences of these pairs of rows follow from none of the others.

    Args:
        pairs: Rows that are compared.
        trained: Those that have a luck of their own; one for which one training stands is a fixed point.
    """
    groups: list[set[str]] = []
    for pair in pairs:
        met = [group for group in groups if group & set(pair)]
        groups = [group for group in groups if group not in met] + [set(pair).union(*met)]
    return max(1, sum(len(group & trained) - (group <= trained) for group in groups))


def _cells(frames: pl.DataFrame, column: str, unit: str) -> dict[tuple[str, str], dict[int, tuple[int, float]]]:
    """What every reranker's row has with each of its seeds."""
    keys = ["reranker", "row", "seed"]
    users = frames.group_by(keys).agg(pl.col("user").unique().sort().implode().hash().first().alias("who"))
    if unit == "user":
        frames = frames.group_by([*keys, "user"]).agg(pl.col(column).mean())
    means = frames.group_by(keys).agg(pl.col(column).cast(pl.Float64).mean()).join(users, on=keys)
    found: dict[tuple[str, str], dict[int, tuple[int, float]]] = {}
    for reranker, row, seed, mean, who in means.sort(keys).rows():
        found.setdefault((reranker, row), {})[seed] = who, mean
    return found


def _several(cell: Cell) -> bool:
    """Whether some users were measured under several seeds."""
    return len({who for who, _ in cell.values()}) < len(cell)


def _by_seed(ours: Cell, theirs: Cell) -> BySeed:
    """Differences of two rows with each seed that both have.

    Where a run has one seed of a row and several of the other, that one stands for all: it needed none. Where the same
    users were measured in several runs, it is the runs that are drawn, and a run's seeds are averaged.
    """
    groups: dict[int, dict[int, list[float]]] = {}  # users -> run -> differences
    for run in sorted({seed // RUNS for seed in ours} & {seed // RUNS for seed in theirs}):
        mine, others = ({s: cell for s, cell in one.items() if s // RUNS == run} for one in (ours, theirs))
        if len(others) == 1:
            others = dict.fromkeys(mine, *others.values())
        elif len(mine) == 1:
            mine = dict.fromkeys(others, *mine.values())
        for seed in mine:
            if seed in others and mine[seed][0] == others[seed][0]:
                groups.setdefault(mine[seed][0], {}).setdefault(run, []).append(mine[seed][1] - others[seed][1])
    found = []
    for runs in groups.values():
        alone = len(runs) == 1
        found.append(tuple(next(iter(runs.values())) if alone else (sum(gaps) / len(gaps) for gaps in runs.values())))
    return tuple(found)


def seeds_of(by_seed: BySeed) -> int:
    """How many seeds the differences are means over; 0 where no users were measured under several."""
    return sum(map(len, by_seed)) if any(len(gaps) > 1 for gaps in by_seed) else 0


def seed_spread(pairs: Sequence[BySeed]) -> float:
    """The standard deviation of a difference from seed to seed, pooled over pairs of rows; 0 with one seed."""
    known = [np.asarray(gaps) for by_seed in pairs for gaps in by_seed if len(gaps) > 1]
    freedom = sum(len(gaps) - 1 for gaps in known)
    return math.sqrt(sum(float(((gaps - gaps.mean()) ** 2).sum()) for gaps in known) / freedom) if freedom else 0.0


def with_seeds(gap: Difference, by_seed: BySeed, spread: Spread | None) -> Difference:
    """Widen a difference's interval, and raise its p-value, by what another draw of training seeds would move it.

    The half-widths of both draws, each by its own degrees of freedom, are added as the sides of a right angle; the
    p-value is the level at which the interval ends at 0. One pooled number of degrees of freedom (Satterthwaite) covers
    too little where two seeds happen to agree.

    Args:
        gap: Over users.
        by_seed: The difference with each seed.
        spread: Of such differences from seed to seed.
    """
    seeds = seeds_of(by_seed)
    if not seeds or spread is None or not math.isfinite(gap.low) or not any(any(gaps) for gaps in by_seed):
        return gap
    of_users = (gap.high - gap.low) / (2 * t_quantile(max(1, gap.n - 1)))  # an interval over users is as wide as t
    of_seeds = spread.deviation / math.sqrt(seeds)
    if not of_users and not of_seeds:
        return gap
    freedom = max(1, spread.freedom)
    far = t_quantile(freedom) * of_seeds
    below, above = math.hypot(gap.mean - gap.low, far), math.hypot(gap.high - gap.mean, far)

    def reach(p: float) -> float:
        return math.hypot(_t_at(p, max(1, gap.n - 1)) * of_users, _t_at(p, freedom) * of_seeds)

    p = _falling(reach, abs(gap.mean), 0.0, 1.0)
    return Difference(gap.mean, gap.mean - below, gap.mean + above, max(gap.p, p), gap.n)


def _t_at(p: float, degrees: int) -> float:
    """The value of Student's t whose two-sided p-value this is."""
    return _falling(lambda t: t_p_value(t, degrees), p, 0.0, 1e9)


def _falling(function: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Where a falling function has a value, between two bounds that are not negative, to one part in a million."""
    for _ in range(200):
        middle = math.sqrt(low * high) if low else high / 1000
        if function(middle) > value:
            low = middle
        else:
            high = middle
        if high < 1e-300 or (low and high / low < 1 + 1e-6):
            break
    return high
