"""Rewards that are known already."""

import pytest
import torch

from lit_rec.agent.environment import MatrixEnvironment
from lit_rec.errors import UserError

SESSIONS = torch.tensor([7, 2, 40])


def rewards() -> torch.Tensor:
    found = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    found[:, 0] = 0
    return found


def test_rewards_are_found_by_session_and_action() -> None:
    table = rewards()
    environment = MatrixEnvironment(table, SESSIONS)
    expected = {(s, a): table[row, a].item() for row, s in enumerate(SESSIONS.tolist()) for a in range(5)}
    sessions = torch.tensor([40, 7, 7, 2, 40, 2])
    actions = torch.tensor([1, 0, 4, 3, 2, 0])
    found = environment.rewards(sessions, actions)
    assert found.tolist() == [expected[pair] for pair in zip(sessions.tolist(), actions.tolist(), strict=True)]
    assert torch.equal(environment.matrix(torch.tensor([2, 2, 7])), table[[1, 1, 0]])


@pytest.mark.parametrize("unknown", [-1, 0, 8, 41, 1000])
def test_a_session_without_rewards_is_named(unknown: int) -> None:
    environment = MatrixEnvironment(rewards(), SESSIONS)
    asked = torch.tensor([7, unknown])
    with pytest.raises(KeyError, match=f"session {unknown} "):
        environment.rewards(asked, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(KeyError, match=f"session {unknown} "):
        environment.matrix(asked)


def test_an_empty_matrix_knows_nobody() -> None:
    environment = MatrixEnvironment(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert environment.matrix(torch.zeros(0, dtype=torch.int64)).shape == (0, 3)
    with pytest.raises(KeyError, match="session 0 "):
        environment.matrix(torch.tensor([0]))


def test_gaps_and_rewards_of_no_hint_are_refused() -> None:
    for value, where, message in ((float("nan"), (1, 3), "gaps"), (0.5, (2, 0), "no hint")):
        table = rewards()
        table[where] = value
        with pytest.raises(UserError, match=message) as caught:
            MatrixEnvironment(table, SESSIONS)
        assert message != "gaps" or "session 2, action 3" in str(caught.value)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="fit"):
        MatrixEnvironment(rewards(), SESSIONS[:2])
    with pytest.raises(ValueError, match="twice"):
        MatrixEnvironment(rewards(), torch.tensor([7, 2, 7]))
