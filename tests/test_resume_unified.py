"""Killed anywhere, both in one loop ends with the results of an undisturbed run."""

import pytest

from tests.resuming import Resumed
from tests.worlds import make_unified_world

EVERYWHERE = [
    ["before", "zero_shot/rewards"],
    ["answer", 2],
    ["before", "hints/round_1/hints"],
    ["after", "hints/round_1/rewards"],
    ["after", "fold_0_hints_agent.ckpt"],
    ["before", "hints/round_1/agent"],
    ["after", "hinted_1/rewards"],
    ["after", "fold_0_round.ckpt"],
    ["before", "round_1/rewards"],
    ["before", "hinted_2/answers"],
    ["before", "round_2/policy"],
    ["before", "rows/hinted_2"],
    ["before", "hints.json"],
]


class TestKilled(Resumed):
    make = staticmethod(make_unified_world)
    points = EVERYWHERE[1::2]


@pytest.mark.slow
class TestKilledEverywhere(TestKilled):
    points = EVERYWHERE
