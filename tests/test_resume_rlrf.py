"""Killed anywhere, RLRF4Rec ends with the results of an undisturbed run."""

from pathlib import Path

import pytest

from tests.resuming import Resumed
from tests.worlds import World, make_world

EVERYWHERE = [
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


class TestKilled(Resumed):
    make = staticmethod(make_world)
    points = EVERYWHERE[::2]


@pytest.mark.slow
class TestKilledEverywhere(TestKilled):
    points = EVERYWHERE


def with_previous_reference(root: Path) -> World:
    """Two epochs a round, against the policy as it was when the round began: half way through, that is no more.

    With dropout: the second epoch has to be in training mode, and to drop what it would have dropped.
    """
    world = make_world(root)
    text = (root / "tiny.yaml").read_text()
    more = "  rounds: 2\n  epochs: 2\n  reference: previous\n  lora: {dropout: 0.5}\n"
    changed = text.replace("  rounds: 2\n  epochs: 1\n", more)
    assert changed != text
    (root / "tiny.yaml").write_text(changed)
    return world


@pytest.mark.slow
class TestKilledWithinARound(Resumed):
    make = staticmethod(with_previous_reference)
    points = [["after", "fold_0_round.ckpt"], ["after", "fold_0_round.ckpt"], ["after", "fold_0_round.ckpt"]]
