"""How sure a difference of two rows is when their training had chance in it too.

An interval over users says what another draw of users would do. Rerankers of one row that differ by their training seed
alone differ as well, often by more: a difference that holds for one draw of seeds may not hold for the next. What is
counted is what was trained again: the rerankers of a run, or its agents; the LLM is sampled and tuned once per run.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
import polars as pl

from lit_rec.run.statistics import Difference, t_quantile

Z = NormalDist().inv_cdf(0.975)
RUNS = 1 << 20  # seeds of one run, at most: a frame of several runs numbers those of the k-th from k * RUNS on
BySeed = tuple[
    tuple[float, ...], ...
]  # differences of two rows; those of the same users, which seeds tell apart, together
Cell = Mapping[int, tuple[int, float]]  # seed -> (which users, as a number; their mean)


def count_seeds(
    frames: pl.DataFrame, column: str, unit: str, found: Sequence[tuple[str, str, str, Difference]]
) -> list[tuple[Difference, BySeed]]:
    """Count training seeds into differences over users.

    Args:
        frames: What the differences were made of: an evaluation frame, one split.
        column: The metric.
        unit: "user" or "list".
        found: (reranker, row, other row, their difference over users).

    Returns:
        For each the difference as it is with seeds, and the differences by seed.
    """
    cells = _cells(frames, column, unit)
    by_seed = [_by_seed(cells[who, row], cells[who, other]) for who, row, other, _ in found]
    spreads = {}
    for who in {one[0] for one in found}:
        same = [n for n, one in enumerate(found) if one[0] == who and seeds_of(by_seed[n])]
        rows = {row for n in same for row in found[n][1:3]}
        trained = {row for row in rows if _several(cells[who, row])}
        contrasts = max(1, len(trained) - (trained == rows))
        freedom = contrasts * (min((seeds_of(by_seed[n]) for n in same), default=2) - 1)
        spreads[who] = seed_spread([by_seed[n] for n in same]), freedom
    return [(with_seeds(one[-1], mine, *spreads[one[0]]), mine) for one, mine in zip(found, by_seed, strict=True)]


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


def with_seeds(gap: Difference, by_seed: BySeed, spread: float, freedom: int) -> Difference:
    """Widen a difference's interval, and raise its p-value, by what another draw of training seeds would move it.

    Args:
        gap: Over users.
        by_seed: The difference with each seed.
        spread: Of such differences from seed to seed.
        freedom: Degrees of freedom of the spread: few seeds tell it badly.
    """
    seeds = seeds_of(by_seed)
    if not seeds or not math.isfinite(gap.low) or not any(any(gaps) for gaps in by_seed):
        return gap
    of_users, of_seeds = (gap.high - gap.low) / (2 * Z), spread / math.sqrt(seeds) * t_quantile(max(1, freedom)) / Z
    whole = math.hypot(of_users, of_seeds)
    if not whole:
        return gap
    wider = whole / of_users if of_users else 1.0
    low, high = (gap.mean + (bound - gap.mean) * wider for bound in (gap.low, gap.high))
    if not of_users:
        low, high = gap.mean - Z * whole, gap.mean + Z * whole
    return Difference(gap.mean, low, high, max(gap.p, math.erfc(abs(gap.mean) / whole / math.sqrt(2))), gap.n)
