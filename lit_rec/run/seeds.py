"""How sure a difference of two rows is when their training had chance in it too.

An interval over users says what another draw of users would do. Rerankers of one row that differ by their training seed
alone differ as well, often by more: a difference that holds for one draw of seeds may not hold for the next.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from lit_rec.run.statistics import Difference

Z = NormalDist().inv_cdf(0.975)


BySeed = Sequence[Sequence[float]]  # differences of two rows, those of the same users with several seeds together


def seeds_of(by_seed: BySeed) -> int:
    """How many seeds the differences are means over; 0 where no users were measured under several."""
    return sum(map(len, by_seed)) if any(len(gaps) > 1 for gaps in by_seed) else 0


def seed_spread(pairs: Sequence[BySeed]) -> float:
    """The standard deviation of a difference from seed to seed, pooled over pairs of rows; 0 with one seed."""
    known = [np.asarray(gaps) for by_seed in pairs for gaps in by_seed if len(gaps) > 1]
    freedom = sum(len(gaps) - 1 for gaps in known)
    return math.sqrt(sum(float(((gaps - gaps.mean()) ** 2).sum()) for gaps in known) / freedom) if freedom else 0.0


def with_seeds(gap: Difference, by_seed: BySeed, spread: float) -> Difference:
    """Widen a difference's interval, and raise its p-value, by what another draw of training seeds would move it.

    Args:
        gap: Over users.
        by_seed: The difference with each seed.
        spread: Of such differences from seed to seed.
    """
    seeds = seeds_of(by_seed)
    if not seeds or not math.isfinite(gap.low) or not any(any(gaps) for gaps in by_seed):
        return gap
    of_users, of_seeds = (gap.high - gap.low) / (2 * Z), spread / math.sqrt(seeds)
    whole = math.hypot(of_users, of_seeds)
    if not whole:
        return gap
    wider = whole / of_users if of_users else 1.0
    low, high = (gap.mean + (bound - gap.mean) * wider for bound in (gap.low, gap.high))
    if not of_users:
        low, high = gap.mean - Z * whole, gap.mean + Z * whole
    return Difference(gap.mean, low, high, max(gap.p, math.erfc(abs(gap.mean) / whole / math.sqrt(2))), gap.n)
