"""The environment of the hint agent: the frozen LLM with a hint in its prompt (METHODS 2.1, step 5)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_rec.agent.environment import AskedEnvironment, Trial
from lit_rec.llm.prompts import Hints
from lit_rec.llm.ranker import SessionRanker
from lit_rec.metrics.sessions import target_ranks

REWARDS = ("ndcg", "mrr", "soft")
CHUNK = 16  # sessions whose scores are in memory at a time


class HintEnvironment(AskedEnvironment):
    """Rewards of hints: what the target's place gains over the prompt without a hint.

    Answers are remembered by (session, hint) here, and by content in the store: PPO may ask as often as it likes.

    Args:
        ranker: Asks the LLM.
        reward: "ndcg" (1 / log2(rank + 1)), "mrr" (1 / rank) or "soft" (log-probability of the target among the
            candidates, softmax of their scores).
        k: Ranks beyond k earn nothing in ndcg and mrr; None: every rank counts.
    """

    def __init__(self, ranker: SessionRanker, *, reward: str = "ndcg", k: int | None = None) -> None:
        if reward not in REWARDS:
            raise ValueError(f"reward is one of {', '.join(REWARDS)}, not {reward!r}")
        super().__init__()
        self.ranker, self.reward, self.k = ranker, reward, k
        self._known: dict[tuple[int, str | None], tuple[int, float]] = {}

    def ask(self, sessions: Tensor, hints: Sequence[Hints]) -> tuple[Tensor, Tensor]:
        """Rank and log-probability of the target, for every session with each of its hints.

        Args:
            sessions: [n] session numbers.
            hints: As many hints per session each; None is the prompt without one.

        Returns:
            ranks [n, hints] int64, log-probabilities [n, hints] float64.
        """
        # Chunks are cut from the whole request, and asked whole: a run that was killed asks the same again, and what
        # the store has of it costs nothing.
        wanted = [(s, list(dict.fromkeys(tried))) for s, tried in zip(sessions.tolist(), hints, strict=True)]
        for start in range(0, len(wanted), CHUNK):
            chunk = wanted[start : start + CHUNK]
            if any((s, hint) not in self._known for s, tried in chunk for hint in tried):
                self._work(chunk)
        found = [[self._known[s, h] for h in tried] for s, tried in zip(sessions.tolist(), hints, strict=True)]
        ranks = torch.tensor([[rank for rank, _ in row] for row in found], dtype=torch.long)
        return ranks, torch.tensor([[logp for _, logp in row] for row in found], dtype=torch.float64)

    def _work(self, wanted: list[tuple[int, list[str | None]]]) -> None:
        if self.ranker.shortlist is not None:
            self._rank([(s, [None]) for s, _ in wanted])
            wanted = self._within_reach(wanted)
        self._rank(wanted)

    def _within_reach(self, wanted: list[tuple[int, list[str | None]]]) -> list[tuple[int, list[str | None]]]:
        """What is left to ask: no hint moves a target that is off the shortlist."""
        sessions = torch.tensor([s for s, _ in wanted])
        targets = self.ranker.data.lists.target_columns(sessions)[:, None]
        within = self.ranker.shortlisted(sessions).gather(1, targets).squeeze(1).tolist()
        left: list[tuple[int, list[str | None]]] = []
        for (s, tried), reached in zip(wanted, within, strict=True):
            hints = [hint for hint in tried if hint is not None]
            if reached:
                left.append((s, [*hints]))
                continue
            self._known.update(((s, hint), self._known[s, None]) for hint in hints)
            if self.progress is not None:
                self.progress(len(hints), 0)
        return [(s, hints) for s, hints in left if hints]

    def _rank(self, wanted: list[tuple[int, list[str | None]]]) -> None:
        if not wanted:
            return
        lists = self.ranker.data.lists
        sessions = torch.tensor([s for s, _ in wanted])
        scores = self.ranker.scores(sessions, [tried for _, tried in wanted], self.progress)
        columns = lists.target_columns(sessions).tolist()
        for (s, tried), rows, column in zip(wanted, scores, columns, strict=True):
            candidates, target = lists.items[s][None], lists.items[s][column][None]
            # One seed per session: the same order among equals with every hint, so that ties make no gain.
            ranks = [target_ranks(row[None], candidates, target, seed=self.ranker.seed + s) for row in rows]
            logps = torch.log_softmax(rows.double(), dim=-1)[:, column]
            self._known.update(
                ((s, hint), (int(rank), float(logp))) for hint, rank, logp in zip(tried, ranks, logps, strict=True)
            )

    def value(self, ranks: Tensor, logps: Tensor) -> Tensor:
        """What a place is worth: float64 of the shape of `ranks`."""
        if self.reward == "soft":
            return logps
        worth = 1 / torch.log2(ranks.double() + 1) if self.reward == "ndcg" else 1 / ranks.double()
        return worth if self.k is None else torch.where(ranks <= self.k, worth, 0.0)

    def gains(self, sessions: Tensor, hints: Sequence[Hints]) -> Tensor:
        """Rewards [n, hints] float32 of hints for sessions; None earns 0."""
        ranks, logps = self.ask(sessions, [[None, *tried] for tried in hints])
        values = self.value(ranks, logps)
        return (values[:, 1:] - values[:, :1]).float()

    def trial(self, session: int, hints: Sequence[str]) -> Trial:
        """Try hints on one session."""
        where = torch.tensor([session])
        ranks, _ = self.ask(where, [[None, *hints]])
        return Trial(self.gains(where, [list(hints)])[0].tolist(), ranks[0].tolist())

    def table(self, sessions: Tensor) -> dict[str, Tensor]:
        """Ranks and gains [B, A + 1] of every action."""
        return {"ranks": self.ranks(sessions), **super().table(sessions)}

    def ranks(self, sessions: Tensor) -> Tensor:
        """Ranks [B, A + 1] of the target with every action."""
        return self.ask(sessions.cpu(), [[None, *self.hints]] * len(sessions))[0]
