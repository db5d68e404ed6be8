"""Killed anywhere, RLRF4Rec ends with the results of an undisturbed run."""

from tests.resuming import Resumed
from tests.worlds import make_world


class TestKilled(Resumed):
    make = staticmethod(make_world)
    points = [
        ["answer", 2],
        ["before", "zero_shot/answers"],
        ["after", "zero_shot/reward_model"],
        ["after", "fold_0_random_pairs.ckpt"],
        ["before", "random_pairs/policy"],
        ["after", "fold_0_round.ckpt"],
        ["before", "round_1/answers"],
        ["after", "fold_0_round.ckpt"],
        ["before", "round_2/policy"],
        ["before", "results.json"],
        ["before", "report.html"],
    ]
