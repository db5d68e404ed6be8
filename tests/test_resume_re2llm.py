"""Killed anywhere, Re2LLM ends with the results of an undisturbed run."""

import pytest

from tests.resuming import Resumed
from tests.session_worlds import make_session_world

EVERYWHERE = [
    ["answer", 2],
    ["before", "stages/scoring"],
    ["answer", 3],
    ["before", "round_1/hints"],
    ["answer", 2],
    ["after", "round_1/rewards"],
    ["after", "agent.ckpt"],
    ["before", "round_1/agent"],
    ["after", "round_2/rewards"],
    ["after", "agent.ckpt"],
    ["before", "rows/oracle"],
    ["before", "hints.json"],
    ["before", "report.html"],
]


class TestKilled(Resumed):
    make = staticmethod(make_session_world)
    points = EVERYWHERE[1::2]


@pytest.mark.slow
class TestKilledEverywhere(TestKilled):
    points = EVERYWHERE
