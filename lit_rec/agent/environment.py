"""What answers a choice of hint with a reward."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lit_rec.errors import UserError
from lit_rec.llm.prompts import Hints


class Environment(Protocol):
    """Rewards of hints for sessions: the gain in NDCG over the answer without a hint (METHODS 2.1).

    Action 0 is "no hint", whose reward is 0 by definition; action a > 0 is hint a - 1 of the base. Sessions are
    numbers, the same as in the batches of `SessionDataModule`.
    """

    def rewards(self, sessions: Tensor, actions: Tensor) -> Tensor:
        """Rewards [B] of these pairs: sessions [B] int64, actions [B] int64."""
        ...

    def matrix(self, sessions: Tensor) -> Tensor:
        """Rewards [B, A + 1] of every action for these sessions [B]."""
        ...


@dataclass(frozen=True)
class Trial:
    """Hints tried on one session, or user.

    Attributes:
        gains: Reward of each hint.
        ranks: Rank of the target without a hint, then with each; empty where there is no single target.
    """

    gains: list[float]
    ranks: list[int]


class AskedEnvironment(ABC):
    """Rewards that are asked for when they are wanted, of hints that may become more.

    Attributes:
        hints: Actions 1, 2, ...
        progress: Called with (questions, tokens) while something is asked.
    """

    def __init__(self) -> None:
        self.hints: list[str] = []
        self.progress: Callable[[int, int], None] | None = None

    def set_hints(self, texts: Sequence[str]) -> None:
        """Make these the actions 1, 2, ...; a base only grows."""
        if list(texts[: len(self.hints)]) != self.hints:
            raise ValueError("a base only grows: its first hints must stay as they are")
        self.hints = list(texts)

    @abstractmethod
    def gains(self, sessions: Tensor, hints: Sequence[Hints]) -> Tensor:
        """Rewards [n, hints] float32 of as many hints for each session [n]; None earns 0."""

    def trial(self, session: int, hints: Sequence[str]) -> Trial:
        """Try hints on one session."""
        return Trial(self.gains(torch.tensor([session]), [list(hints)])[0].tolist(), [])

    def rewards(self, sessions: Tensor, actions: Tensor) -> Tensor:
        """Rewards [B] of actions [B] for sessions [B]; action 0, no hint, earns 0."""
        texts: list[str | None] = [None, *self.hints]
        return self.gains(sessions.cpu(), [[texts[a]] for a in actions.tolist()]).squeeze(1).to(sessions.device)

    def matrix(self, sessions: Tensor) -> Tensor:
        """Rewards [B, A + 1] of every action."""
        return self.gains(sessions.cpu(), [[None, *self.hints]] * len(sessions)).to(sessions.device)

    def table(self, sessions: Tensor) -> dict[str, Tensor]:
        """What is kept of every action for these sessions: `gains` [B, A + 1], and what else there is."""
        return {"gains": self.matrix(sessions)}


class TextEnvironment(AskedEnvironment):
    """Rewards of hints in the prompt that asks what a user likes (METHODS 3): what a recommender gains by the text.

    A hint's reward is that of the text the LLM writes with it minus that of the text it writes without; one text each,
    so a reward is as noisy as the LLM's answers are.

    Args:
        values: (users [n], the hint of each) -> rewards [n] of the texts, as preference pairs are made of.
    """

    def __init__(self, values: Callable[[Tensor, Hints, "AskedEnvironment"], Tensor]) -> None:
        super().__init__()
        self._values = values
        self._known: dict[tuple[int, str | None], float] = {}

    def gains(self, sessions: Tensor, hints: Sequence[Hints]) -> Tensor:
        """Rewards [n, hints] float32 of hints for users; None earns 0."""
        asked = [[(user, h) for h in (None, *tried)] for user, tried in zip(sessions.tolist(), hints, strict=True)]
        # The whole request, or nothing: a run that was killed asks the same again, in the same batches, and what the
        # store has of it costs nothing.
        whole = list(dict.fromkeys(pair for row in asked for pair in row))
        if any(pair not in self._known for pair in whole):
            values = self._values(torch.tensor([user for user, _ in whole]), [hint for _, hint in whole], self)
            self._known.update(zip(whole, values.tolist(), strict=True))
        values = torch.tensor([[self._known[pair] for pair in row] for row in asked], dtype=torch.float64)
        return (values[:, 1:] - values[:, :1]).float()


class MatrixEnvironment:
    """Rewards that are known already.

    Args:
        matrix: [S, A + 1], column 0 zeros.
        sessions: [S] the rows' session numbers, each once.

    Raises:
        UserError: when a reward is not a number, or "no hint" is rewarded.
    """

    def __init__(self, matrix: Tensor, sessions: Tensor) -> None:
        if matrix.ndim != 2 or sessions.shape != matrix.shape[:1]:
            raise ValueError(f"rewards {tuple(matrix.shape)} do not fit sessions {tuple(sessions.shape)}")
        if len(sessions.unique()) != len(sessions):
            raise ValueError("a session stands twice in the reward matrix")
        if not matrix.isfinite().all():
            row, column = (~matrix.isfinite()).nonzero()[0].tolist()
            raise UserError(
                "The reward matrix has gaps.",
                where=f"session {int(sessions[row])}, action {column}",
                fix="Score every hint for every session, or use agent.rewards=online.",
            )
        if (matrix[:, 0] != 0).any():
            raise UserError(
                'The reward matrix rewards "no hint".',
                where="column 0",
                why="A reward is the gain over the answer without a hint.",
                fix="Subtract each session's value without a hint.",
            )
        self._matrix = matrix
        self._row = torch.full((max(sessions.tolist(), default=0) + 1,), -1, dtype=torch.int64)
        self._row[sessions] = torch.arange(len(sessions))

    def _rows(self, sessions: Tensor) -> Tensor:
        known = (sessions >= 0) & (sessions < len(self._row))
        rows = torch.where(known, self._row[sessions.clamp(0, len(self._row) - 1)], -1)
        if (rows < 0).any():
            raise KeyError(f"session {int(sessions[rows < 0][0])} has no rewards")
        return rows

    def rewards(self, sessions: Tensor, actions: Tensor) -> Tensor:
        """Rewards [B] of these pairs."""
        return self._matrix[self._rows(sessions.cpu()), actions.cpu()].to(sessions.device)

    def matrix(self, sessions: Tensor) -> Tensor:
        """Rewards [B, A + 1] of these sessions."""
        return self._matrix[self._rows(sessions.cpu())].to(sessions.device)
