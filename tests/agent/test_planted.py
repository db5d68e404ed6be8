"""In an environment whose truth is planted the agents find it, on sessions they have never seen."""

from dataclasses import dataclass

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_rec.agent.ppo import FullInformationAgent, HintAgent, PPOAgent
from lit_rec.agent.training import FittedAgent, fit_agent
from tests.agent.planted import NEW, OLD, Planted, interval, make_agent, plant

EPOCHS = 6
SEEDS = (0, 1, 2)
# The entropy bonus is weighed against advantages of deviation 1; a smaller one lets the policy settle so firmly that
# it hardly ever tries a hint that comes later.
SETTINGS = {"lr": 1e-3, "clip": 0.2, "update_epochs": 5, "samples_per_session": 4, "entropy_coef": 0.5}


class Growth(Callback):
    """Keeps the policy of the first round, then gives the agent all hints, as the rounds of a run do."""

    def __init__(self, world: Planted) -> None:
        self.world = world

    def on_train_epoch_start(self, trainer: L.Trainer, agent: HintAgent) -> None:  # type: ignore[override]
        if trainer.current_epoch == EPOCHS:
            self.first, self.best_epoch = agent.best_policy(), agent.best_epoch
            agent.environment = self.world.environment(OLD + NEW)
            agent.set_hints(self.world.hints, torch.ones(OLD + NEW, dtype=torch.bool))
            self.grown = agent.best_policy()


@dataclass
class Trained:
    world: Planted
    growth: Growth
    fitted: FittedAgent


def fit(world: Planted, seed: int, kind: type[HintAgent] = PPOAgent, rewards: Tensor | None = None) -> FittedAgent:
    agent = make_agent(world, kind=kind, environment=world.environment(OLD, rewards), seed=seed, **SETTINGS)
    return fit_agent(agent, world.data(seed), max_epochs=EPOCHS)


@pytest.fixture(scope="module", params=SEEDS)
def trained(request: pytest.FixtureRequest) -> Trained:
    """PPO over two rounds."""
    world = plant(request.param)
    growth = Growth(world)
    agent = make_agent(world, seed=request.param, epochs_per_round=EPOCHS, **SETTINGS)
    fitted = fit_agent(agent, world.data(request.param), max_epochs=2 * EPOCHS, callbacks=[growth])
    return Trained(world, growth, fitted)


def test_the_world_is_worth_learning() -> None:
    for seed in SEEDS:
        world = plant(seed)
        best, fixed = world.oracle(OLD).mean(), world.fixed(OLD).mean()
        assert 0 < fixed < 0.6 * best  # sessions need different hints, and no hint
        assert world.oracle(OLD + NEW).mean() > 1.2 * best  # and new hints are worth finding


def test_ppo_reaches_the_oracle_on_unseen_sessions(trained: Trained) -> None:
    share = trained.world.share(trained.growth.first, OLD)
    print(f"PPO: {share:.3f} of the oracle")
    assert share >= 0.95


def test_ppo_beats_the_best_fixed_hint(trained: Trained) -> None:
    world = trained.world
    low, _ = interval(world.earned(trained.growth.first) - world.fixed(OLD))
    assert low > 0


def test_a_grown_base_costs_no_skill_before_training(trained: Trained) -> None:
    world, growth = trained.world, trained.growth
    kept = float(world.earned(growth.grown).mean() / world.earned(growth.first).mean())
    print(f"right after growth: {kept:.3f} of the skill before")
    assert kept >= 0.9
    assert growth.grown.n_actions == OLD + NEW + 1


def test_ppo_finds_the_better_hints_of_a_grown_base(trained: Trained) -> None:
    world = trained.world
    share = world.share(trained.fitted.policy, OLD + NEW)
    print(f"PPO after growth: {share:.3f} of the oracle")
    assert share >= 0.95
    assert trained.fitted.best_epoch >= EPOCHS
    low, _ = interval(world.earned(trained.fitted.policy) - world.earned(trained.growth.first))
    assert low > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_full_information_reaches_the_oracle(seed: int) -> None:
    world = plant(seed)
    share = world.share(fit(world, seed, FullInformationAgent).policy, OLD)
    print(f"full information: {share:.3f} of the oracle")
    assert share >= 0.95


@pytest.mark.parametrize("kind", [PPOAgent, FullInformationAgent])
@pytest.mark.parametrize("seed", SEEDS)
def test_where_there_is_nothing_to_learn_nothing_is_learnt(seed: int, kind: type[HintAgent]) -> None:
    """Rewards of other sessions: what is left is how good a hint is for everybody."""
    world = plant(seed)
    known = torch.cat([world.splits.train, world.splits.validation])
    shuffled = world.rewards.clone()
    shuffled[known] = world.rewards[known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))]]
    policy = fit(world, seed, kind, shuffled).policy
    low, high = interval(world.earned(policy) - world.fixed(OLD))
    print(f"shuffled: gain over the best fixed hint {low:+.3f} .. {high:+.3f}")
    assert low <= 0
