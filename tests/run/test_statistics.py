import math
import time

import numpy as np
import polars as pl
import pytest

from lit_rec.run.statistics import (
    bootstrap,
    holm,
    mean_over_lists,
    mean_over_users,
    paired_difference,
    t_quantile,
    t_test,
    user_table,
)

M = "ndcg@5|kar"


def frame_of(rows: dict[str, list[tuple[int, int, int, float]]]) -> pl.DataFrame:
    """Build an evaluation frame from row -> [(seed, user, list, value)]."""
    lines = [
        {"row": row, "reranker": "dlcm", "seed": s, "fold": 0, "split": "test", "user": u, "list": i, M: v}
        for row, values in rows.items()
        for s, u, i, v in values
    ]
    return pl.DataFrame(lines).with_columns(pl.col(M).cast(pl.Float32))


@pytest.mark.parametrize(
    ("degrees", "exact"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1000, 1.9623)],
)
def test_t_quantile_matches_the_printed_tables(degrees: int, exact: float) -> None:
    assert t_quantile(degrees) == pytest.approx(exact, rel=0.006)


def test_user_table_averages_lists_then_seeds_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    values = [
        (s, u, i, float(rng.random())) for s in range(3) for u in range(4) for i in range(u + 1) if (s, u) != (2, 3)
    ]
    table = user_table(frame_of({"a": values}), [M])
    for line in table.to_dicts():
        per_seed = []
        for s in range(3):
            mine = [np.float32(v) for s2, u, _, v in values if (s2, u) == (s, line["user"])]
            if mine:
                per_seed.append(sum(map(float, mine)) / len(mine))
        assert line[M] == pytest.approx(sum(per_seed) / len(per_seed))
        assert line["seeds"] == len(per_seed)
        assert line["lists"] == line["user"] + 1
        assert line[f"{M}:count"] == len(per_seed) * (line["user"] + 1)


def test_bootstrap_sums_are_those_of_redrawn_users() -> None:
    values = np.random.default_rng(1).random((5, 2))
    columns = np.hstack([np.ones((5, 1)), np.eye(5), values])
    drawn = bootstrap(columns, resamples=200, seed=3)
    assert (drawn[:, 0] == 5).all()
    assert np.allclose(drawn[:, 1:6] @ values, drawn[:, 6:])
    assert np.array_equal(drawn, bootstrap(columns, resamples=200, seed=3))


def test_cluster_bootstrap_agrees_with_a_loop_over_redrawn_lists() -> None:
    rng = np.random.default_rng(2)
    lists = [rng.random(int(rng.integers(1, 9))) + rng.normal(0, 0.3) for _ in range(60)]
    sums = np.array([[x.sum()] for x in lists])
    counts = np.array([[float(len(x))] for x in lists])
    mean, low, high = mean_over_lists(sums, counts, resamples=4000)
    loop = []
    for _ in range(4000):
        chosen = rng.integers(0, 60, 60)
        loop.append(np.concatenate([lists[i] for i in chosen]).mean())
    expected = np.quantile(loop, [0.025, 0.975])
    everything = np.concatenate(lists)
    assert mean[0] == pytest.approx(everything.mean())
    assert (low[0], high[0]) == pytest.approx(tuple(expected), abs=0.015)
    # Lists of one user go together: the interval is wider than one that takes lists as independent.
    assert high[0] - low[0] > 1.2 * 2 * 1.96 * everything.std(ddof=1) / math.sqrt(len(everything))


@pytest.mark.parametrize("n", [12, 80])
def test_intervals_cover_the_truth_about_95_percent_of_the_time(n: int) -> None:
    rng = np.random.default_rng(4)
    trials = 500
    hits = {"t": 0, "lists": 0, "paired": 0}
    for trial in range(trials):
        users = rng.normal(0.7, 0.2, n)
        estimate = mean_over_users(users)
        hits["t"] += estimate.low <= 0.7 <= estimate.high
        counts = np.full((n, 1), 3.0)
        _, low, high = mean_over_lists(users[:, None] * 3, counts, resamples=500, seed=trial)
        hits["lists"] += low[0] <= 0.7 <= high[0]
    for trial in range(120):
        base = rng.normal(0.6, 0.3, n)
        other = base + rng.normal(0.05, 0.1, n)
        frame = frame_of(
            {
                "a": [(0, u, u, v) for u, v in enumerate(other)],
                "b": [(0, u, u, v) for u, v in enumerate(base)],
            }
        )
        gap = paired_difference(frame, "a", "b", M, resamples=500, seed=trial)
        hits["paired"] += gap.low <= 0.05 <= gap.high
    assert 0.92 <= hits["t"] / trials <= 0.98
    assert 0.92 <= hits["lists"] / trials <= 0.98
    assert 0.89 <= hits["paired"] / 120 <= 0.995


def test_pairing_uses_common_users_only_and_removes_what_users_share() -> None:
    rng = np.random.default_rng(5)
    base = rng.random(100)
    a = [(0, u, u, float(base[u] + 0.02 + rng.normal(0, 0.01))) for u in range(100)]
    b = [(0, u, u, float(base[u])) for u in range(100)] + [(0, 500, 500, 0.0)]
    gap = paired_difference(frame_of({"a": a, "b": b}), "a", "b", M)
    assert gap.n == 100
    assert gap.mean == pytest.approx(0.02, abs=0.005)
    assert gap.low > 0
    assert gap.p < 0.01
    back = paired_difference(frame_of({"a": a, "b": b}), "b", "a", M)
    assert (back.mean, back.low, back.high) == pytest.approx((-gap.mean, -gap.high, -gap.low))


def test_p_value_is_even_under_no_difference_and_one_for_equal_rows() -> None:
    rng = np.random.default_rng(6)
    p_values = []
    for trial in range(200):
        frame = frame_of({r: [(0, u, u, float(v)) for u, v in enumerate(rng.normal(size=40))] for r in "ab"})
        p_values.append(paired_difference(frame, "a", "b", M, resamples=400, seed=trial).p)
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.1
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.08)
    same = [(0, u, u, 0.1 * u) for u in range(7)]
    gap = paired_difference(frame_of({"a": same, "b": same}), "a", "b", M)
    assert (gap.mean, gap.low, gap.high, gap.p) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("t", "degrees", "exact"),
    [(2.2622, 9, 0.05), (4.7809, 9, 0.001), (1.0, 3, 0.39100), (3.3905, 99, 0.001), (8.0, 99, 2.376e-12)],
)
def test_t_test_matches_the_printed_tables(t: float, degrees: int, exact: float) -> None:
    values = np.arange(degrees + 1.0)
    values = (values - values.mean()) / values.std(ddof=1) + t / math.sqrt(degrees + 1)
    assert t_test(values) == pytest.approx(exact, rel=0.03)


def test_equal_values_have_the_p_value_of_the_sign_test() -> None:
    assert t_test(np.full(2, 0.1)) == 0.5
    assert t_test(np.full(11, -0.1)) == 2**-10


@pytest.mark.parametrize("users", [3, 5, 8])
def test_few_users_seldom_look_sure(users: int) -> None:
    """No replicate of so few lies beyond zero now and then: that is no reason for a p-value of next to nothing."""
    rng = np.random.default_rng(users)
    found = []
    for trial in range(400):
        values = rng.normal(size=users)
        frame = frame_of({r: [(0, u, u, v if r == "a" else 0.0) for u, v in enumerate(values)] for r in "ab"})
        found.append(paired_difference(frame, "a", "b", M, resamples=500, seed=trial).p)
    assert np.mean(np.array(found) < 0.002) < 0.012


@pytest.mark.parametrize("unit", ["user", "list"])
def test_a_clear_difference_survives_hundreds_of_comparisons(unit: str) -> None:
    """The bootstrap alone says 1e-4 at best, and Holm multiplies that by the number of comparisons."""
    rng = np.random.default_rng(8)
    base = rng.random(90)
    lists = [(u, i) for u in range(30) for i in range(3 * u, 3 * u + 1 + u % 3)]
    a = [(0, u, i, float(base[i] + 0.02 + rng.normal(0, 0.002))) for u, i in lists]
    b = [(0, u, i, float(base[i])) for u, i in lists]
    gap = paired_difference(frame_of({"a": a, "b": b}), "a", "b", M, unit=unit)
    assert gap.p < 1e-8
    assert holm([gap.p] * 1000)[0] < 0.001
    # Halfway to noise both ways to a p-value can be seen, and they agree.
    noisy = [(0, u, i, float(base[i] + 0.02 + rng.normal(0, 0.05))) for u, i in lists]
    frame = frame_of({"a": noisy, "b": b})
    counted = paired_difference(frame, "a", "b", M, unit=unit, resamples=200_000).p
    told = paired_difference(frame, "a", "b", M, unit=unit, resamples=500).p
    assert 2e-4 < counted < 0.02
    assert told == pytest.approx(counted, rel=0.6)


def test_list_unit_weights_users_by_their_lists() -> None:
    heavy = [(0, 0, i, 1.0) for i in range(9)] + [(0, 1, 9, 0.0)]
    zero = [(0, 0, i, 0.0) for i in range(9)] + [(0, 1, 9, 0.0)]
    frame = frame_of({"a": heavy, "b": zero})
    assert paired_difference(frame, "a", "b", M, unit="list").mean == pytest.approx(0.9)
    assert paired_difference(frame, "a", "b", M, unit="user").mean == pytest.approx(0.5)


def test_one_user_has_a_mean_and_no_interval() -> None:
    frame = frame_of({"a": [(0, 0, 0, 0.5)], "b": [(0, 0, 0, 0.25)]})
    gap = paired_difference(frame, "a", "b", M)
    assert gap.mean == 0.25
    assert math.isnan(gap.low)
    assert math.isnan(gap.p)
    assert math.isnan(mean_over_users(np.array([0.5])).low)


def test_what_cannot_be_compared_is_refused() -> None:
    frame = frame_of({"a": [(0, 0, 0, 0.5)], "b": [(0, 1, 1, 0.25)]})
    with pytest.raises(ValueError, match="no user"):
        paired_difference(frame, "a", "b", M)
    two = pl.concat([frame, frame.with_columns(reranker=pl.lit("prm"))])
    with pytest.raises(ValueError, match="name one reranker"):
        paired_difference(two, "a", "b", M)


def test_holm_by_hand() -> None:
    # Sorted .005 .01 .03 .04 times 4 3 2 1 gives .02 .03 .06 .04; a later one is never below an earlier one.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    corrected = holm([math.nan, 0.02])
    assert math.isnan(corrected[0])
    assert corrected[1] == 0.02


def test_a_thousand_users_take_well_under_a_second() -> None:
    rng = np.random.default_rng(7)
    counts = rng.integers(1, 400, (1000, 1)).astype(float)
    started = time.perf_counter()
    mean_over_lists(counts * rng.random((1000, 1)), counts)
    assert time.perf_counter() - started < 1.5
