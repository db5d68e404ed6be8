"""Hints for describing users: whom the descriptions serve badly, and what a hint gains (METHODS 3)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import polars as pl
import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_rec.agent.environment import AskedEnvironment, TextEnvironment
from lit_rec.agent.reflection import Mistake
from lit_rec.config import plain
from lit_rec.data.canonical import RatingsData
from lit_rec.data.lists import ListSet
from lit_rec.data.splits import Splits
from lit_rec.llm.prompts import Hints
from lit_rec.metrics.ranking import misplaced, ranking_metrics
from lit_rec.recipes import agents
from lit_rec.recipes.hint_loop import HintLoop
from lit_rec.recipes.loop import Loop
from lit_rec.run.folder import digest
from lit_rec.run.progress import Step

SHOWN = 3  # wrongly preferred items that the LLM is told of
BEST_IS_ONE = ("ndcg", "map")  # metrics beyond whose 1 nothing is left to gain


class UserHints(HintLoop):
    """Hints in the prompt that asks what a user likes, judged by the reranker that judges the texts.

    Round k asks the LLM as it is before its k-th round of preference optimisation. A user's state is the vector of the
    history, so the agent can pick for users nobody has rewards for.

    Args:
        loop: The split of the users, and everything made on it.
    """

    state_stage = "knowledge"

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop.ground, rounds=int(loop.cfg.policy.rounds), prefix=loop.name("hints/"))
        self.loop, self.ground = loop, loop.ground
        self._asked: dict[int, TextEnvironment] = {}
        self._picked: set[int] = set()

    @property
    def states(self) -> Tensor:
        """[U, d] every user's history, encoded."""
        return self.ground.history_vectors

    @cached_property
    def lists(self) -> ListSet:
        """One row per user: the agents are served users, not lists."""
        lists, users = self.ground.lists, torch.arange(self.ground.data.n_users)
        return ListSet(
            users, torch.zeros(len(users), 1).long(), torch.zeros(len(users), 1), lists.history_items,
            lists.history_ratings,
        )  # fmt: skip

    @cached_property
    def splits(self) -> Splits:
        """The users of the split who have a candidate list: nothing is known of the others."""
        known = torch.zeros(self.ground.data.n_users, dtype=torch.bool)
        known[self.ground.lists.user] = True
        parts = self.loop.splits
        return Splits(*(part[known[part]] for part in (parts.train, parts.validation, parts.test)))

    @property
    def about(self) -> tuple[RatingsData, str]:
        """The data set, and what was done with its items."""
        return self.ground.data, "rated" if self.ground.data.rated else "chose"

    @cached_property
    def reward_key(self) -> dict[str, Any]:
        """What a reward depends on, besides its hint and the stages before."""
        return {"reward": self.loop.judge.reward_key, "prompt": plain(self.cfg.prompt)}

    def before(self, number: int) -> str:
        """The state of the LLM that round `number` begins with."""
        return "zero_shot" if number == 1 else f"round_{number - 1}"

    def llm_of(self, number: int) -> AbstractContextManager[None]:
        """The LLM with the adapter that the round before has kept."""
        return self.loop.as_in(self.before(number))

    def made_from(self, number: int) -> tuple[str, ...]:
        """The rewards of the descriptions so far."""
        self.loop.rewards(self.before(number))
        return (self.loop.name(f"{self.before(number)}/rewards"),)

    # --- what a hint gains --------------------------------------------------------------------------------------------

    def asked(self, number: int) -> TextEnvironment:
        """The LLM as it is in round `number`, and the reranker that judges what it writes."""
        if number not in self._asked:
            self._asked[number] = TextEnvironment(partial(self._values, number))
        return self._asked[number]

    def _values(self, number: int, users: Tensor, hints: Hints, asked: AskedEnvironment) -> Tensor:
        """Rewards [n] of the texts that the LLM of round `number` writes about users [n], each with its hint."""
        prompts = self.ground.prompts.users(users.tolist(), hints)
        with self.llm_of(number):
            given = self.ground.llm.answers(prompts, [1] * len(prompts), progress=asked.progress)
        return self.loop.judge.texts(users, [answers[0].text for answers in given])

    def cost(self, *steps: Step) -> dict[str, int]:
        """Answers written and their tokens; what the store had costs nothing."""
        return {"answers": sum(one.computed for one in steps), "tokens": sum(one.extra for one in steps)}

    # --- whom to reflect on -------------------------------------------------------------------------------------------

    @cached_property
    def _telling(self) -> ListSet:
        """The lists that hold something liked: what another one is worth says nothing of who is served badly."""
        lists = self.ground.lists
        liked = ((lists.labels > 0) & (lists.items > 0)).any(dim=1)
        return replace(lists, user=lists.user[liked], items=lists.items[liked], labels=lists.labels[liked])

    def errors(self, number: int) -> tuple[Tensor, int]:
        """The training users whom the LLM's present knowledge serves worst, of those it could serve better."""
        found = self._present(number).filter(pl.col("split") == "train")
        users = found["user"].to_torch().long()
        vectors = self.loop.user_vectors(self.before(number), self.cfg.knowledge.encode)[users]
        score = partial(self.loop.judge.score, self.loop.judge.model(), users, vectors, lists=self._telling)
        if len(self._telling.user) < len(self.ground.lists.user):
            found = found.with_columns(pl.Series("reward", score().numpy()))
        found = found.filter(pl.Series((score(values=_any_misplaced) > 0).numpy()))  # nan: no list that tells
        if self.cfg.reward.metric in BEST_IS_ONE:
            found = found.filter(pl.col("reward") < 1)  # nothing is left to gain
        worst = found.sort("reward", "user")["user"].head(self.cfg.reflection.sessions).to_list()
        return torch.tensor(sorted(worst), dtype=torch.long), len(found)

    def _present(self, number: int) -> pl.DataFrame:
        """Every user's knowledge and its reward as round `number` begins."""
        return self.loop.rewards(self.before(number)).filter(pl.col("sample") == 0)

    def mistake(self, session: int, number: int) -> Mistake:
        """The list that came out worst: what stood above a better item."""
        said = self._present(number).filter(pl.col("user") == session)["text"].item()
        user = torch.tensor([session])
        index, logits = self.loop.judge.lists(user, said)
        lists, k = self.ground.lists, self.cfg.reward.k
        real = lists.items[index] > 0
        values = ranking_metrics(logits, lists.labels[index], real, (k,), self.cfg.reward.convention)[f"ndcg@{k}"]
        values[~misplaced(logits, lists.labels[index], real)] = 2.0  # as it should be, so nothing to learn
        row = int(values.argmin())
        order = logits[row].masked_fill(~real[row], -torch.inf).argsort(descending=True, stable=True)
        order = order[real[row][order]]
        liked = lists.labels[index[row]][order] > 0
        titles = [str(self.ground.data.items["title"][int(i)]) for i in lists.items[index[row]][order]]
        place = int(liked.nonzero().max()) if liked.any() else len(titles) - 1
        wrong = [title for title, good in zip(titles[:place], liked[:place].tolist(), strict=True) if not good]
        return Mistake(session, self.ground.prompts.rated(session), wrong[:SHOWN], titles[place], said)

    # --- who gets which hint ------------------------------------------------------------------------------------------

    def texts(self, number: int, users: Sequence[int]) -> list[str | None]:
        """The hint of every user in round `number`; None where no hint is the choice."""
        known: list[str | None] = [None, *self.base(number).texts]
        return [known[a] for a in self.actions(number, torch.tensor(users, dtype=torch.long)).tolist()]

    def picker(self, number: int) -> str:
        """Visit what the choice of round `number` rests on, and give its stage's full name."""
        pick, stage = (
            self.cfg.agent.pick,
            {"random": "hints", "best_fixed": "rewards"}.get(self.cfg.agent.pick, "agent"),
        )
        if number not in self._picked:
            _ = self.base(number)
            if pick == "ppo":
                agents.train(self, number)
            elif pick == "best_fixed":
                self.matrix_of(number)
            elif pick == "full_information":
                self.environment(number)
                self.keep_agent(f"round_{number}/agent", number, agents.trained(self, pick, [number]))
            self._picked.add(number)
        return self.name(f"round_{number}/{stage}")

    def actions(self, number: int, users: Tensor) -> Tensor:
        """Actions [n] for users [n]; 0 is no hint."""
        self.picker(number)
        count = len(self.base(number).kept)
        if not count:
            return torch.zeros(len(users), dtype=torch.long)
        if self.cfg.agent.pick == "random":
            chance = torch.Generator().manual_seed(self.cfg.seed + number)
            return torch.randint(1, count + 1, (self.ground.data.n_users,), generator=chance)[users]
        return self._told(number, self.states[users])

    def choice(self, number: int, count: int, states: Tensor, names: Sequence[str]) -> Tensor:
        """Actions [n] for people outside the data set, in a finished round; no stage is visited.

        Args:
            number: Of the round.
            count: Hints it has kept.
            states: [n, d] their histories, encoded.
            names: [n] their ids, of which a random choice is made.
        """
        if not count:
            return torch.zeros(len(states), dtype=torch.long)
        if self.cfg.agent.pick == "random":
            drawn = [int(digest([self.cfg.seed, number, name]), 16) for name in names]
            return torch.tensor([1 + one % count for one in drawn])
        return self._told(number, states)

    def _told(self, number: int, states: Tensor) -> Tensor:
        """Actions [n] by what was learnt in a round, whose stages are there."""
        if self.cfg.agent.pick == "best_fixed":
            gains = load_file(self.folder(f"round_{number}/rewards") / "matrix.safetensors")["gains"]
            return torch.full((len(states),), 1 + int(gains[: len(self.splits.train), 1:].mean(0).argmax()))
        return self.policy(number).greedy(states)


def _any_misplaced(logits: Tensor, labels: Tensor, mask: Tensor, k: int) -> Tensor:
    return misplaced(logits, labels, mask).float()
