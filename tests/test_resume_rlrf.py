"""Killed anywhere, RLRF4Rec ends with the results of an undisturbed run."""

from tests.resuming import Resumed
from tests.worlds import make_world


class TestKilled(Resumed):
    make = staticmethod(make_world)
    points = [
        ["answer", 2],
        ["before", "zero_shot/answers"],
        ["after", "zero_shot/reward_model"],
        ["before", "zero_shot/pairs_random"],
        ["after", "fold_0_random_pairs.ckpt"],
        ["before", "random_pairs/policy"],
        ["answer", 1],
        ["after", "fold_0_round.ckpt"],
        ["before", "round_1/answers"],
        ["after", "round_1/divergence"],
        ["after", "fold_0_round.ckpt"],
        ["before", "round_2/policy"],
        ["before", "rows/round_1"],
        ["before", "results.json"],
        ["before", "report.html"],
    ]
