"""Hints for sessions that a frozen LLM ranks: what is an error there, and what a hint gains (Re2LLM, METHODS 2.1)."""

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lit_rec.agent.llm_environment import HintEnvironment
from lit_rec.agent.reflection import Mistake
from lit_rec.data.lists import ListSet
from lit_rec.data.session_sets import SessionData
from lit_rec.data.splits import Splits
from lit_rec.recipes.hint_loop import HintLoop
from lit_rec.recipes.session_ground import SessionGround
from lit_rec.run.progress import Step, step


class SessionHints(HintLoop):
    """The rounds of Re2LLM.

    Args:
        ground: Sessions, ranker, embeddings, run folder.
    """

    state_stage = "states"

    def __init__(self, ground: SessionGround) -> None:
        super().__init__(ground, rounds=int(ground.cfg.agent.rounds))
        self.ground = ground
        _ = ground.scoring
        measured = {"reward": self.cfg.agent.reward, "k": self.cut}
        self._asked = HintEnvironment(ground.ranker, **measured)
        self._asked_whole = HintEnvironment(replace(ground.ranker, shortlist=None), **measured)

    @property
    def states(self) -> Tensor:
        """[S, d] mean embedding of each session's items."""
        return self.ground.states

    @property
    def lists(self) -> ListSet:
        """The sessions."""
        return self.ground.data.lists

    @property
    def splits(self) -> Splits:
        """Training, validation and test sessions."""
        return self.ground.data.splits

    @property
    def about(self) -> tuple[SessionData, str]:
        """The data set, and what was done with its items."""
        return self.ground.data, self.ground.data.verb

    @property
    def cut(self) -> int | None:
        """The last rank that earns something: what the LLM did not list is worth nothing (METHODS 2.1)."""
        if self.cfg.agent.k is None and self.cfg.ranking.method == "generate":
            return int(self.cfg.ranking.top)
        return self.cfg.agent.k

    @cached_property
    def reward_key(self) -> dict[str, Any]:
        """What a reward depends on, besides its hint."""
        return {"reward": self.cfg.agent.reward, "k": self.cut, "llm": self.ground.llm_key}

    def asked(self, number: int) -> HintEnvironment:
        """The frozen LLM is the same in every round."""
        return self._asked

    def work(self, done: Step) -> tuple[str, int]:
        """Titles scored, or tokens of the lists written."""
        if self.cfg.ranking.method == "generate":
            return "tokens", done.extra
        return "titles", done.computed * (self.cfg.ranking.shortlist or self.lists.items.shape[1])

    def asked_whole(self, number: int) -> HintEnvironment:
        """All candidates: an error's target is ranked so low that a shortlist would not hold it."""
        return self._asked_whole

    def made_from(self, number: int) -> tuple[str, ...]:
        """How the LLM is asked, and the agent before."""
        return ("scoring", *([f"round_{number - 1}/agent"] if number > 1 else []))

    def errors(self, number: int) -> tuple[Tensor, int]:
        """Training sessions that are ranked badly with the choices of the agent so far, a random sample of them."""
        r, train = self.cfg.reflection, self.splits.train
        actions = torch.zeros(len(train), dtype=torch.long)
        if number > 1:
            actions = self.policy(number - 1).greedy(self.states[train])
        self._asked.set_hints(self.base(number - 1).texts)
        ranks = self.ranks(train, actions, f"round {number}: ranking training sessions")
        bad = ranks > r.error_rank
        if number > 1:  # what a hint has done is nothing to reflect on: the LLM is shown, and tried, without it
            bad &= self.ranks(train, torch.zeros_like(actions), f"round {number}: without hints") > r.error_rank
        errors = train[bad]
        drawn = torch.randperm(len(errors), generator=torch.Generator().manual_seed(self.cfg.seed + number))
        return errors[drawn[: r.sessions]].sort().values, len(errors)

    def ranks(self, sessions: Tensor, actions: Tensor, what: str) -> Tensor:
        """Ranks [n] of the targets when the agent takes these actions."""
        asked = self._asked
        texts: list[str | None] = [None, *asked.hints]
        with step(what, len(sessions), "questions") as progress:
            asked.progress = progress
            found = asked.ask(sessions, [[texts[a]] for a in actions.tolist()])[0].squeeze(1)
            asked.progress = None
        return found

    def all_ranks(self, sessions: Tensor, number: int) -> Tensor:
        """[n, A + 1] ranks of validation sessions with every action of a round."""
        if self.cfg.agent.rewards == "online":
            return self.matrix("matrix/validation", sessions, number)["ranks"]
        return self.matrix_of(number)["ranks"][len(self.splits.train) :]

    def mistake(self, session: int, number: int) -> Mistake:
        """The LLM's list without the target, which was ranked too low."""
        ground, items = self.ground, self.lists.items[session]
        scores = ground.ranker.scores(torch.tensor([session]), [[None]])[0][0]
        best = scores.argsort(descending=True, stable=True)[: self.cfg.ranking.top].tolist()
        target = ground.target(session)
        answer = [ground.title(int(items[c])) for c in best if scores[c] > -torch.inf and int(items[c]) != target]
        return Mistake(session, ground.titles(session)[-self.cfg.ranking.history :], answer, ground.title(target))
