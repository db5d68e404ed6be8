"""A planted environment: sessions in clusters, and it is known which hint is the best for which cluster."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_rec.agent.environment import Environment, MatrixEnvironment
from lit_rec.agent.policy import HintPolicy
from lit_rec.agent.ppo import HintAgent, PPOAgent, PPOSettings
from lit_rec.data.lists import ListSet
from lit_rec.data.sessions import SessionDataModule
from lit_rec.data.splits import Splits

CLUSTERS, DIM, OLD, NEW = 6, 32, 8, 4
BEST = (3, 7, 1, 8, 0, 5)  # the best action per cluster in the first base; 0 is "no hint"
DECENT = 2  # never the best, but good for all but those whom no hint serves
BETTER = {1: 10, 3: 12}  # the best action of two clusters once the base has grown
GOOD, NOISE = 0.3, 0.15


@dataclass
class Planted:
    """What an agent may see, and what only the tests know.

    Attributes:
        states: [S, d] cluster centre + noise + what all texts share.
        hints: [OLD + NEW, d] embeddings, unrelated to the clusters' ones.
        truth: [S, OLD + NEW + 1] expected rewards.
        rewards: the same with noise; what an agent learns from.
        splits: session numbers.
    """

    states: Tensor
    hints: Tensor
    truth: Tensor
    rewards: Tensor
    splits: Splits

    def data(self, seed: int = 0, batch_size: int = 64) -> SessionDataModule:
        """The sessions as the agents are served them."""
        ones = torch.ones(len(self.states), 1, dtype=torch.int64)
        lists = ListSet(torch.arange(len(self.states)), ones, ones.float(), ones, ones.float())
        return SessionDataModule(lists, self.splits, batch_size=batch_size, seed=seed)

    def environment(self, hints: int, rewards: Tensor | None = None) -> MatrixEnvironment:
        """Rewards of the first hints for sessions that are trained on or chosen by, as in a real run."""
        known = torch.cat([self.splits.train, self.splits.validation])
        return MatrixEnvironment((self.rewards if rewards is None else rewards)[known, : hints + 1], known)

    def earned(self, policy: HintPolicy) -> Tensor:
        """[test] expected reward of the greedy choice for sessions nobody was trained on."""
        test = self.splits.test
        return self.truth[test, policy.greedy(self.states[test])]

    def oracle(self, hints: int) -> Tensor:
        """[test] expected reward of the best choice."""
        return self.truth[self.splits.test, : hints + 1].max(dim=1).values

    def fixed(self, hints: int) -> Tensor:
        """[test] expected reward of the one choice that is the best for the test sessions: nobody could know it."""
        test = self.truth[self.splits.test, : hints + 1]
        return test[:, test.mean(dim=0).argmax()]

    def share(self, policy: HintPolicy, hints: int) -> float:
        """Share of the oracle's mean reward."""
        return float(self.earned(policy).mean() / self.oracle(hints).mean())


def plant(seed: int, train: int = 500, validation: int = 150, test: int = 600) -> Planted:
    """Draw a world."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    total = train + validation + test
    cluster = torch.randint(CLUSTERS, (total,), generator=generator)
    states = 4 * normal(DIM) + normal(CLUSTERS, DIM)[cluster] + 0.5 * normal(total, DIM)
    hints = 4 * normal(DIM) + normal(OLD + NEW, DIM)
    value = (0.1 * normal(CLUSTERS, OLD + NEW + 1) - 0.1).clamp(max=0.1)
    value[:, 0] = 0
    for row, action in enumerate(BEST):
        value[row, action] = GOOD if action else 0
    value[:, DECENT] = GOOD / 2
    value[BEST.index(0), 1 : OLD + 1] = value[BEST.index(0), 1 : OLD + 1].clamp(max=-0.1)
    for row, action in BETTER.items():
        value[row, action] = 2 * GOOD
    truth = value[cluster]
    rewards = truth + NOISE * normal(*truth.shape)
    rewards[:, 0] = 0
    order = torch.arange(total)
    parts = Splits(order[:train], order[train : train + validation], order[train + validation :])
    return Planted(states, hints, truth, rewards, parts)


def make_agent(
    world: Planted,
    hints: int = OLD,
    *,
    kind: type[HintAgent] = PPOAgent,
    environment: Environment | None = None,
    seed: int = 0,
    **settings: Any,
) -> HintAgent:
    """An agent with the first hints as its base."""
    agent = kind(
        world.states,
        environment or world.environment(hints),
        train_sessions=world.splits.train,
        settings=PPOSettings(**settings),
        seed=seed,
    )
    agent.set_hints(world.hints[:hints], torch.ones(hints, dtype=torch.bool))
    return agent


def interval(differences: Tensor, seed: int = 0, resamples: int = 2000) -> Sequence[float]:
    """95% interval of a mean of paired differences, by bootstrap over sessions."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(differences), (resamples, len(differences)), generator=generator)
    return differences[drawn].mean(dim=1).quantile(torch.tensor([0.025, 0.975])).tolist()
