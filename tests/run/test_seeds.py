"""Differences count in what another draw of training seeds would do."""

import math

import numpy as np
import polars as pl
import pytest

from lit_rec.run.comparisons import compare_rows, verdict
from lit_rec.run.headline import Headline
from lit_rec.run.reranking_story import with_layouts
from lit_rec.run.seeds import RUNS, Spread, seed_spread, seeds_of, with_seeds
from lit_rec.run.statistics import Difference, t_quantile
from lit_rec.run.stories import SESSIONS

HEADLINE = Headline()


def frames_of(shifts: dict[str, list[float]], users: int = 300, noise: float = 0.05, draw: int = 0) -> pl.DataFrame:
    """Rows with a shift for each of their seeds; users differ alike in all of them."""
    rng = np.random.default_rng(draw)
    base = rng.random(users) * 0.5 + 0.2
    parts = []
    for row, by_seed in shifts.items():
        for seed, shift in enumerate(by_seed):
            value = base + shift + rng.normal(0, noise, users)
            about = {"row": row, "reranker": "dlcm", "seed": seed, "fold": 0, "split": "test"}
            parts.append(
                pl.DataFrame({**about, "user": np.arange(users), "list": np.arange(users), "ndcg@5|kar": value})
            )
    return pl.concat(parts)


def test_spread_by_hand() -> None:
    pairs = [((0.1, 0.3),), ((0.0, 0.0, 0.3),), ((0.5,), (0.7,))]  # the last one: other users, nothing to compare
    assert seed_spread(pairs) == pytest.approx(math.sqrt((0.02 + 0.06) / 3))
    assert seed_spread([((0.5,),)]) == 0
    assert [seeds_of(by_seed) for by_seed in pairs] == [2, 3, 0]


def test_interval_and_p_value_by_hand() -> None:
    gap = Difference(0.02, 0.02 - 1.96 * 0.003, 0.02 + 1.96 * 0.003, 1e-9, 10**7)
    spread = 0.004 * math.sqrt(2)  # a mean over two seeds: 0.004 beside 0.003
    found = with_seeds(gap, ((0.01, 0.03),), Spread(spread, 10**7, True))
    assert (found.low, found.high) == pytest.approx((0.02 - 1.96 * 0.005, 0.02 + 1.96 * 0.005), abs=1e-6)
    assert found.p == pytest.approx(math.erfc(4 / math.sqrt(2)), rel=1e-3)
    few = with_seeds(gap, ((0.01, 0.03),), Spread(spread, 4, True))  # t = 2.776 in place of 1.96
    assert few.high - 0.02 == pytest.approx(math.hypot(1.96 * 0.003, 2.776 * 0.004), rel=0.003)
    at = Difference(0.0, -1.96 * 0.003, 1.96 * 0.003, 1e-9, 10**7)
    edge = Difference(few.high - 0.02, *(few.high - 0.02 + side for side in (at.low, at.high)), 1e-9, 10**7)
    assert with_seeds(edge, ((0.01, 0.03),), Spread(spread, 4, True)).p == pytest.approx(0.05, rel=0.02)  # ends at 0
    of_seeds = with_seeds(Difference(0.02, 0.02, 0.02, 1e-9, 9), ((0.01, 0.03),), Spread(spread, 2, False))
    assert of_seeds.high - 0.02 == pytest.approx(4.303 * 0.004, rel=1e-3)
    assert of_seeds.p == pytest.approx(1 - 5 / math.sqrt(27), rel=1e-5)  # t = 5 with 2 degrees, exactly
    assert with_seeds(gap, ((0.02,),), Spread(0.5, 1, True)) == gap
    assert with_seeds(gap, ((0.01, 0.03),), None) == gap
    same = Difference(0.0, 0.0, 0.0, 1.0, 100)
    assert with_seeds(same, ((0.0, 0.0),), Spread(0.5, 1, True)) == same  # rows that are equal whatever the seed


@pytest.mark.parametrize("users", [5, 10, 94])
def test_few_users_are_stretched_for_once(users: int) -> None:
    """An interval over few users that ends at 0 has p = 0.05, whatever seeds that hardly differ are counted in."""
    wide = t_quantile(users - 1) * 0.01
    gap = Difference(wide, 0.0, 2 * wide, 0.05, users)
    found = with_seeds(gap, ((wide - 1e-9, wide + 1e-9),), Spread(1e-9, 4, True))
    assert (found.low, found.high) == pytest.approx((0, 2 * wide), abs=1e-6)
    assert found.p == pytest.approx(0.05, abs=1e-3)  # the quantile's own precision


def test_rows_of_one_layout_are_lucky_together() -> None:
    """A seed's luck is common to the rows with two vectors: it drops out between them, not between them and others."""
    luck = [0.0, 0.06, -0.04]
    frames = with_layouts(
        frames_of(
            {
                "history_only": [0.0, 0.001, 0.0],
                "zero_shot_both": [one + 0.0 for one in luck],
                "round_1_both": [one + 0.03 for one in luck],
            }
        ),
        {"knowledge": {"encode": "answer"}},
    )
    found = {(c.row, c.against): c for c in compare_rows(frames, HEADLINE)}
    alike = found["round_1_both", "zero_shot_both"]
    assert alike.sure
    assert alike.spread is not None
    assert (alike.spread.alike, alike.spread.freedom) == (True, 2)
    assert alike.spread.deviation < 0.01
    for row in ("zero_shot_both", "round_1_both"):  # two differences, one luck: two degrees of freedom and not four
        apart = found[row, "history_only"]
        assert apart.spread == found["zero_shot_both", "history_only"].spread
        assert apart.spread is not None
        assert (apart.spread.alike, apart.spread.freedom) == (False, 2)
        assert apart.spread.deviation == pytest.approx(0.05, abs=0.01)
        assert not apart.sure
    (line,) = [one for one in verdict(list(found.values()), HEADLINE) if one.startswith("Training seeds (3 a row)")]
    assert "that read the same inputs by 0.00" in line
    assert "that read different inputs by 0.0" in line


@pytest.mark.parametrize(
    ("encode", "row", "layout"),
    [
        ("answer", "no_knowledge", "no_knowledge"),
        ("both", "history_only", "one"),
        ("both", "item_only", "item_only"),
        ("both", "round_1", "both"),
        ("both", "round_1_answer", "one"),
        ("answer", "round_1", "one"),
        ("answer", "shuffled_both", "both"),
        ("kar", "hinted_1", "one"),
    ],
)
def test_layouts(encode: str, row: str, layout: str) -> None:
    found = with_layouts(pl.DataFrame({"row": [row]}), {"knowledge": {"encode": encode}})
    assert found["layout"].to_list() == [layout]


def test_what_one_lucky_seed_did_is_not_sure() -> None:
    """Over users +.02 is far beyond chance; from seed to seed the rows move by more than that."""
    lucky = frames_of({"history_only": [0.0, 0.0], "zero_shot": [0.0, 0.01], "round_1": [-0.02, 0.06]})
    (gap,) = [c for c in compare_rows(lucky, HEADLINE) if (c.row, c.against) == ("round_1", "zero_shot")]
    assert gap.difference.mean == pytest.approx(0.015, abs=0.01)
    assert not gap.sure
    lines = verdict(compare_rows(lucky, HEADLINE), HEADLINE)
    assert lines[0].startswith("Whether DPO helps is not shown")
    assert "300 users and 2 training seeds" in lines[0]
    assert lines[-1].startswith(
        "Training seeds (2 a row): with DLCM, the difference of two rows varies from one to the next"
    )
    steady = frames_of({"history_only": [0.0, 0.0, 0.0], "zero_shot": [0.0, 0.01, 0.0], "round_1": [0.03, 0.041, 0.03]})
    (gap,) = [c for c in compare_rows(steady, HEADLINE) if (c.row, c.against) == ("round_1", "zero_shot")]
    assert gap.sure


def test_one_seed_is_told() -> None:
    one = frames_of({"zero_shot": [0.0], "round_1": [0.02]})
    assert compare_rows(one, HEADLINE)[0].by_seed == ((pytest.approx(0.02, abs=0.01),),)
    assert "trained with one seed" in verdict(compare_rows(one, HEADLINE), HEADLINE)[-1]


@pytest.mark.parametrize(("rows", "seeds"), [(2, 2), (3, 2), (6, 2), (3, 3)])
def test_intervals_cover_the_truth_where_seeds_move_rows(rows: int, seeds: int) -> None:
    """Both draws again and again: users, and seeds that move a row by more than the users do."""
    rng, inside, over_users = np.random.default_rng(rows + seeds), 0, 0
    names = ("zero_shot", "round_1", "history_only", "random_pairs", "best_of_n", "item_only")[:rows]
    for trial in range(200):
        shifts = {row: rng.normal(0, 0.01, seeds).tolist() for row in names}
        found = compare_rows(frames_of(shifts, users=100, noise=0.05, draw=trial), HEADLINE, resamples=300)
        (gap,) = [c.difference for c in found if (c.row, c.against) == ("round_1", "zero_shot")]
        inside += gap.low <= 0 <= gap.high
        over_users += abs(gap.mean) <= 1.96 * 0.05 * math.sqrt(2 / seeds / 100)
    assert inside / 200 > 0.92
    assert over_users / 200 < 0.85  # what the users alone would have said


def test_rows_that_need_no_seed_stand_for_all_of_a_run() -> None:
    """Agents of three runs with three seeds each, on sessions of their own, against one row that was not trained."""
    parts = []
    for run in range(3):
        one = frames_of({"no_hint": [0.0], "ppo": [0.01, 0.02, 0.03]}, draw=run)
        parts.append(one.with_columns(pl.col("user") + 1000 * run, pl.col("seed") + RUNS * run))
    frames = pl.concat(parts)
    renamed = frames.rename({"ndcg@5|kar": "ndcg@10|standard"})
    found = compare_rows(renamed, Headline(10, "standard", "session"), story=SESSIONS)
    (gap,) = found
    assert [len(gaps) for gaps in gap.by_seed] == [3, 3, 3]
    assert seeds_of(gap.by_seed) == 9


def test_runs_on_the_same_users_are_what_is_drawn() -> None:
    """What differs from run to run moves all rerankers of a run together: they are one draw of it."""
    parts = []
    for run, shift in enumerate((0.0, 0.06)):
        one = frames_of({"zero_shot": [0.0, 0.0], "round_1": [shift, shift + 0.001]}, draw=run)
        parts.append(one.with_columns(pl.col("seed") + RUNS * run))
    (gap,) = compare_rows(pl.concat(parts), HEADLINE)
    assert [len(gaps) for gaps in gap.by_seed] == [2]
    assert gap.by_seed[0][1] - gap.by_seed[0][0] == pytest.approx(0.06, abs=0.01)
    assert not gap.sure


def test_seeds_of_other_users_are_no_seeds() -> None:
    """Two runs of a sweep on samples of their own: what differs between them is users as well."""
    one, two = frames_of({"zero_shot": [0.0], "round_1": [0.02]}), frames_of({"zero_shot": [0.0], "round_1": [0.06]})
    two = two.with_columns(pl.col("user") + 1000, pl.col("list") + 1000, seed=pl.lit(RUNS))
    (gap,) = [c for c in compare_rows(pl.concat([one, two.select(one.columns)]), HEADLINE)]
    assert len(gap.by_seed) == 2
    assert seeds_of(gap.by_seed) == 0
    assert gap.sure
