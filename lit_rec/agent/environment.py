"""What answers a choice of hint with a reward."""

from typing import Protocol

import torch
from torch import Tensor

from lit_rec.errors import UserError


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
