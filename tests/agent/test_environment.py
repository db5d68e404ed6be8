"""Rewards that are known already, and rewards of texts that are asked for."""

import pytest
import torch
from torch import Tensor

from lit_rec.agent.environment import AskedEnvironment, MatrixEnvironment, TextEnvironment
from lit_rec.errors import UserError
from lit_rec.llm.prompts import Hints

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


# --- rewards of texts -------------------------------------------------------------------------------------------------


class Writer:
    """Rewards of texts from a table, and what was asked."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[int, str | None]]] = []

    def __call__(self, users: Tensor, hints: Hints, asked: AskedEnvironment) -> Tensor:
        pairs = list(zip(users.tolist(), hints, strict=True))
        self.calls.append(pairs)
        return torch.tensor([self.value(*pair) for pair in pairs])

    @staticmethod
    def value(user: int, hint: str | None) -> float:
        return user / 10 + (0 if hint is None else ord(hint) / 1000)


def test_a_hint_is_paid_what_its_text_gains() -> None:
    writer = Writer()
    environment = TextEnvironment(writer)
    environment.set_hints(["a", "b"])
    gains = environment.gains(torch.tensor([4, 2]), [["b", None], ["a", "b"]])
    assert gains.dtype == torch.float32
    torch.testing.assert_close(gains, torch.tensor([[0.098, 0.0], [0.097, 0.098]]))
    assert writer.calls == [[(4, None), (4, "b"), (2, None), (2, "a"), (2, "b")]]  # each text once
    rewards = environment.rewards(torch.tensor([2, 4, 4]), torch.tensor([2, 0, 2]))
    torch.testing.assert_close(rewards, gains[[1, 0, 0], [1, 1, 0]])
    assert len(writer.calls) == 1  # all of it was known
    matrix = environment.table(torch.tensor([4, 7]))["gains"]
    torch.testing.assert_close(matrix, torch.tensor([[0.0, 0.097, 0.098]] * 2))
    # Something was missing, so the whole request is asked again: a resumed run's batches are those of any other.
    assert writer.calls[1] == [(user, hint) for user in (4, 7) for hint in (None, "a", "b")]


def test_trying_hints_on_one_user() -> None:
    trial = TextEnvironment(Writer()).trial(3, ["c", "a"])
    assert trial.gains == pytest.approx([0.099, 0.097])
    assert trial.ranks == []


def test_a_base_only_grows() -> None:
    environment = TextEnvironment(Writer())
    environment.set_hints(["a"])
    environment.set_hints(["a", "b"])
    with pytest.raises(ValueError, match="only grows"):
        environment.set_hints(["b"])
