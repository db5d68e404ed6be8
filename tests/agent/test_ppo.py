"""The agents as training machines: what they ask, log, draw, keep, and how they go on after a crash."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributions import Categorical

from callbacks.rounds import RoundCallback, RoundHooks
from lit_rec.agent.ppo import FullInformationAgent, HintAgent, PPOAgent, Rows
from lit_rec.agent.training import FittedAgent, fit_agent
from lit_rec.errors import UserError
from tests.agent.planted import NEW, OLD, Planted, make_agent, plant

EPOCHS = 2  # per round
KINDS = [PPOAgent, FullInformationAgent]
SETTINGS: dict[str, Any] = {
    "lr": 3e-3,
    "update_epochs": 2,
    "minibatches": 2,
    "samples_per_session": 2,
    "exploration": 0.1,
    "state_noise": 0.1,
    "epochs_per_round": EPOCHS,
}


@pytest.fixture(scope="module")
def world() -> Planted:
    return plant(0, train=60, validation=30, test=10)


def fit(world: Planted, agent: HintAgent, *, epochs: int = EPOCHS, seed: int = 0, **arguments: Any) -> FittedAgent:
    return fit_agent(agent, world.data(seed, batch_size=16), max_epochs=epochs, **arguments)


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Chance


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_depends_on_its_seeds_alone(world: Planted, kind: type[HintAgent]) -> None:
    fits = []
    for noise, seed, order in ((1, 0, 0), (2, 0, 0), (1, 5, 0), (1, 0, 5)):
        torch.manual_seed(noise)
        fits.append(fit(world, make_agent(world, kind=kind, seed=seed, **SETTINGS), seed=order))
    assert same(fits[0].policy, fits[1].policy)
    assert fits[0].history == fits[1].history
    assert not same(fits[0].policy, fits[2].policy)
    assert not same(fits[0].policy, fits[3].policy)


def test_making_an_agent_leaves_the_global_random_state(world: Planted) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    make_agent(world)
    assert torch.equal(torch.get_rng_state(), before)


# Rounds and restarts


class Crash(Exception):
    pass


class Grow(RoundHooks):
    """Serves the bases of two rounds, and dies where it is told to."""

    def __init__(self, world: Planted, crash: str = "") -> None:
        self.world, self.crash = world, crash

    def begin_round(self, trainer: L.Trainer, policy: HintAgent, rounds: RoundCallback, number: int) -> None:
        if self.crash == f"begin {number}":
            raise Crash
        hints = OLD if number == 1 else OLD + NEW
        policy.environment = self.world.environment(hints)
        policy.set_hints(self.world.hints[:hints], torch.ones(hints, dtype=torch.bool))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.crash == f"epoch {trainer.current_epoch}":
            raise Crash

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self.crash == f"middle of epoch {trainer.current_epoch}" and args[-1] == 1:
            raise Crash


def rounds_of(
    world: Planted, kind: type[HintAgent], folder: Path, crash: str = "", lr: float = 0.1, **arguments: Any
) -> FittedAgent:
    agent = kind(
        world.states,
        world.environment(0),
        train_sessions=world.splits.train,
        settings=make_agent(world, **SETTINGS).settings,
        seed=4,
    )
    loop = SimpleNamespace(run=SimpleNamespace(path=folder))
    rounds = RoundCallback(loop, "round", 2, EPOCHS, folder / "last.ckpt", {"agent": {"lr": lr}})
    return fit(world, agent, epochs=2 * EPOCHS, callbacks=[Grow(world, crash), rounds], **arguments)


@pytest.fixture(scope="module")
def undisturbed(world: Planted, tmp_path_factory: pytest.TempPathFactory) -> dict[type[HintAgent], FittedAgent]:
    return {kind: rounds_of(world, kind, tmp_path_factory.mktemp("undisturbed")) for kind in KINDS}


def test_other_settings_do_not_go_on_from_a_checkpoint(world: Planted, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        rounds_of(world, KINDS[0], tmp_path, "epoch 1")
    with pytest.raises(UserError, match="another configuration") as caught:
        rounds_of(world, KINDS[0], tmp_path, lr=0.2, resume=tmp_path / "last.ckpt")
    assert "agent.lr: 0.1 -> 0.2" in caught.value.why
    assert "last.ckpt" in caught.value.where


@pytest.mark.parametrize("crash", ["epoch 1", "middle of epoch 1", "begin 2", "epoch 2", "epoch 3"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_ends_where_the_undisturbed_fit_ends(
    world: Planted,
    undisturbed: dict[type[HintAgent], FittedAgent],
    kind: type[HintAgent],
    crash: str,
    tmp_path: Path,
) -> None:
    expected = undisturbed[kind]
    with pytest.raises(Crash):
        rounds_of(world, kind, tmp_path, crash)
    found = rounds_of(world, kind, tmp_path, resume=tmp_path / "last.ckpt")
    assert same(found.policy, expected.policy)
    assert (found.best_epoch, found.best_value) == (expected.best_epoch, expected.best_value)
    assert found.history == expected.history
    assert [row["epoch"] for row in found.history] == [0, 1, 2, 3]


def test_a_grown_base_goes_on_from_the_best_epoch(world: Planted) -> None:
    agent = make_agent(world, **{**SETTINGS, "lr": 0.05, "epochs_per_round": None})
    fitted = fit(world, agent, epochs=6)
    assert fitted.best_epoch < 5  # else the last epoch is the best, and the test is about nothing
    last = {name: p.detach().clone() for name, p in agent.named_parameters()}
    agent.set_hints(agent.policy.hints, agent.policy.alive)  # the present base: nothing happens
    assert all(torch.equal(p, last[name]) for name, p in agent.named_parameters())
    assert agent.best_epoch == fitted.best_epoch
    agent.set_hints(world.hints, torch.ones(OLD + NEW, dtype=torch.bool))
    best = dict(fitted.policy.named_parameters())
    assert all(torch.equal(p, best[name]) for name, p in agent.policy.named_parameters())
    assert any(not torch.equal(p, last[f"policy.{name}"]) for name, p in best.items())
    assert (agent.best_epoch, agent.best_value) == (-1, -math.inf)


def test_the_kept_epoch_is_the_one_with_the_best_validation_reward(world: Planted) -> None:
    agent = make_agent(world, **{**SETTINGS, "lr": 0.05, "epochs_per_round": None})
    fitted = fit(world, agent, epochs=6)
    measured = [row["val/reward"] for row in fitted.history]
    assert fitted.best_value == max(measured)
    assert fitted.best_epoch == measured.index(max(measured))
    sessions = world.splits.validation
    choice = fitted.policy.greedy(world.states[sessions])
    assert world.rewards[sessions, choice].mean().item() == pytest.approx(fitted.best_value, abs=1e-6)


def test_patience_ends_a_fit_and_without_validation_the_last_epoch_counts(world: Planted) -> None:
    still = {**SETTINGS, "lr": 0.0, "epochs_per_round": None}
    assert len(fit(world, make_agent(world, **still), epochs=9, patience=2).history) == 3
    alone = plant(0, train=60, validation=0, test=10)
    agent = make_agent(alone, **SETTINGS)
    fitted = fit(alone, agent)
    assert (fitted.best_epoch, fitted.best_value) == (-1, -math.inf)
    assert same(fitted.policy, agent.policy)
    assert not any(name.startswith("val/") for row in fitted.history for name in row)


# What is asked for


class Online:
    """An environment that answers pairs, and writes down which."""

    def __init__(self, rewards: Tensor) -> None:
        self.table, self.asked = rewards, []  # type: tuple[Tensor, list[tuple[int, int]]]

    def rewards(self, sessions: Tensor, actions: Tensor) -> Tensor:
        self.asked += zip(sessions.tolist(), actions.tolist(), strict=True)
        return self.table[sessions, actions]

    def matrix(self, sessions: Tensor) -> Tensor:
        raise AssertionError("PPO must not ask for all rewards")


class Noting(PPOAgent):
    """Writes down what it draws."""

    def build(self, dim: int) -> None:
        super().build(dim)
        self.drawn: list[tuple[int, int]] = []
        self.chances: list[int] = []

    def collect(self, sessions: Tensor, chance: torch.Generator) -> Rows:
        rows = super().collect(sessions, chance)
        self.chances.append(chance.initial_seed())
        each = sessions.repeat_interleave(self.settings.samples_per_session)
        self.drawn += zip(each.tolist(), rows["actions"].squeeze(1).tolist(), strict=True)
        return rows


def test_online_only_what_was_drawn_is_asked_for_and_the_agent_is_the_same(world: Planted) -> None:
    online = Online(world.rewards)
    agent = make_agent(world, kind=Noting, environment=online, **SETTINGS)
    assert isinstance(agent, Noting)
    fitted = fit(world, agent)
    train, validation = set(world.splits.train.tolist()), set(world.splits.validation.tolist())
    assert [pair for pair in online.asked if pair[0] in train] == agent.drawn
    assert sorted(s for s, _ in agent.drawn) == sorted(EPOCHS * SETTINGS["samples_per_session"] * list(train))
    rest = [s for s, _ in online.asked if s not in train]
    assert sorted(rest) == sorted(EPOCHS * list(validation))  # the greedy choice, once per epoch; never a test session
    assert len(set(agent.drawn)) < len(train) * (OLD + 1)
    offline = fit(world, make_agent(world, **SETTINGS))
    assert same(offline.policy, fitted.policy)
    assert offline.history == fitted.history


def test_every_step_of_every_epoch_and_seed_has_its_own_chance(world: Planted) -> None:
    found: list[int] = []
    for seed in (0, 1):
        agent = make_agent(world, kind=Noting, seed=seed, **SETTINGS)
        fit(world, agent)
        assert isinstance(agent, Noting)
        found += agent.chances
    assert len(set(found)) == len(found) == 2 * EPOCHS * math.ceil(60 / 16)


def test_actions_are_drawn_from_the_policy_and_its_log_probability_is_stored(world: Planted) -> None:
    agent = make_agent(world, samples_per_session=20_000, exploration=0.3)
    with torch.no_grad():
        agent.policy.bias.add_(0.3 * torch.randn(len(agent.policy.bias)))
        logits = agent.policy(world.states[:1])
    expected = 0.7 * Categorical(logits=logits).probs[0] + 0.3 / (OLD + 1)
    rows = agent.collect(torch.tensor([0]), torch.Generator().manual_seed(0))
    actions = rows["actions"].squeeze(1)
    counts = torch.bincount(actions, minlength=OLD + 1)
    assert ((counts - 20_000 * expected) ** 2 / (20_000 * expected)).sum() < 26.1  # 0.1%, 8 degrees of freedom
    torch.testing.assert_close(rows["logp"], expected.log()[actions])
    torch.testing.assert_close(rows["returns"], world.rewards[0, actions])


def test_the_noise_of_states_is_in_units_of_their_deviation(world: Planted) -> None:
    agent = make_agent(world, state_noise=0.5)
    sessions = world.splits.train.repeat(50)
    noise = agent.observe(sessions, torch.Generator().manual_seed(0)) - world.states[sessions]
    train = world.states[world.splits.train]
    assert noise.std().item() == pytest.approx(0.5 * (train - train.mean(0)).pow(2).mean().sqrt().item(), rel=0.02)
    quiet = make_agent(world)
    assert torch.equal(quiet.observe(sessions, torch.Generator()), world.states[sessions])


def test_full_information_refuses_rewards_of_another_base(world: Planted) -> None:
    agent = make_agent(world, kind=FullInformationAgent, environment=world.environment(0))
    with pytest.raises(ValueError, match="do not fit"):
        agent.collect(world.splits.train[:4], torch.Generator())


# The update


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_equals_its_definition(world: Planted, normalize: bool) -> None:
    """One row at a time, after the policy has moved away from the one that drew."""
    settings = {"clip": 0.1, "entropy_coef": 0.3, "value_coef": 0.7, "clip_value": True, "reward_scale": 2.0}
    agent = make_agent(world, normalize_advantage=normalize, samples_per_session=2, **settings)
    assert isinstance(agent, PPOAgent)
    rows = agent.collect(world.splits.train[:20], torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    found, logged = agent.loss(rows)
    advantages = (rows["returns"] - rows["values"]).double()
    if normalize:
        advantages = (advantages - advantages.mean()) / advantages.std()
    policy, critic, entropy, outside = 0.0, 0.0, 0.0, 0
    for row, state in enumerate(rows["states"]):
        chances = Categorical(logits=agent.policy(state[None])[0].double())
        ratio = math.exp(chances.log_prob(rows["actions"][row, 0]).item() - rows["logp"][row].item())
        advantage, goal, old = advantages[row].item(), rows["returns"][row].item(), rows["values"][row].item()
        policy -= min(ratio * advantage, min(max(ratio, 0.9), 1.1) * advantage) / 40
        value = agent.value(state[None]).item()
        held = old + min(max(value - old, -0.1), 0.1)
        critic += 0.5 * max((value - goal) ** 2, (held - goal) ** 2) / 40
        entropy += chances.entropy().item() / 40
        outside += not 0.9 <= ratio <= 1.1
    assert logged["policy_loss"].item() == pytest.approx(policy, abs=1e-5)
    assert logged["value_loss"].item() == pytest.approx(critic, rel=1e-4)
    assert logged["entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert logged["clipfrac"].item() == pytest.approx(outside / 40)
    assert 0 < outside < 40
    assert found.item() == pytest.approx(policy + 0.7 * critic - 0.3 * entropy, rel=1e-4)
    assert rows["returns"][0] == 2 * world.rewards[world.splits.train[0], rows["actions"][0, 0]]


class Counting(PPOAgent):
    """Counts gradient steps, and notes the norms of their gradients."""

    def build(self, dim: int) -> None:
        super().build(dim)
        self.norms: list[float] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack([g.norm() for g in grads]).norm()))


@pytest.mark.parametrize(("target_kl", "passes"), [(None, 2), (1e-12, 1), (1e9, 2)])
def test_passes_minibatches_and_gradient_norms(world: Planted, target_kl: float | None, passes: int) -> None:
    settings = {**SETTINGS, "target_kl": target_kl, "max_grad_norm": 1e-3}
    agent = make_agent(world, kind=Counting, **settings)
    assert isinstance(agent, Counting)
    fit(world, agent)
    batches = math.ceil(60 / 16)
    assert len(agent.norms) == EPOCHS * batches * passes * SETTINGS["minibatches"]
    assert max(agent.norms) == pytest.approx(1e-3, rel=1e-3)


def test_the_learning_rate_falls_to_zero_over_each_round(world: Planted) -> None:
    batches = math.ceil(60 / 16)
    fitted = fit(world, make_agent(world, **SETTINGS), epochs=2 * EPOCHS)
    last_steps = [1 - (epoch % EPOCHS + (batches - 1) / batches) / EPOCHS for epoch in range(2 * EPOCHS)]
    found = [row["charts/learning_rate"] for row in fitted.history]
    assert found == pytest.approx([SETTINGS["lr"] * share for share in last_steps])


def test_a_fit_without_an_end_is_refused(world: Planted) -> None:
    with pytest.raises(UserError, match="learning rate") as caught:
        fit(world, make_agent(world), epochs=-1)
    assert "max_epochs" in str(caught.value)


# The logs

COMMON = {"epoch", "losses/policy_loss", "losses/entropy", "losses/approx_kl"}
COMMON |= {"charts/reward", "charts/no_hint_share", "charts/learning_rate", "val/reward", "val/no_hint_share"}
PPO = {"losses/value_loss", "losses/clipfrac", "losses/explained_variance"}


@pytest.mark.parametrize(("kind", "names"), [(PPOAgent, COMMON | PPO), (FullInformationAgent, COMMON)])
def test_the_names_that_are_logged(world: Planted, kind: type[HintAgent], names: set[str]) -> None:
    for row in fit(world, make_agent(world, kind=kind, **SETTINGS)).history:
        assert set(row) == names
        assert all(math.isfinite(value) for value in row.values())


class Keep(Callback):
    """Keeps the agent's choices of the first epoch apart from the later ones."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Noting)
        if trainer.current_epoch == 0:
            self.drawn = list(pl_module.drawn)


def test_the_logged_reward_is_that_of_the_choices(world: Planted) -> None:
    agent, keep = make_agent(world, kind=Noting, **{**SETTINGS, "reward_scale": 10.0}), Keep()
    first = fit(world, agent, callbacks=[keep]).history[0]
    sessions, actions = (torch.tensor(column) for column in zip(*keep.drawn, strict=True))
    assert first["charts/reward"] == pytest.approx(world.rewards[sessions, actions].mean().item(), abs=1e-6)
    assert first["charts/no_hint_share"] == pytest.approx((actions == 0).float().mean().item())


def test_full_information_logs_expected_rewards(world: Planted) -> None:
    raw = {"lr": 0.0, "state_noise": 0.0, "normalize_advantage": False}
    agent = make_agent(world, kind=FullInformationAgent, **{**SETTINGS, **raw})
    train = world.splits.train
    with torch.no_grad():
        chances = agent.policy.log_probs(world.states[train], SETTINGS["exploration"]).exp()
    expected = (chances * world.rewards[train, : OLD + 1]).sum(-1).mean().item()
    first = fit(world, agent).history[0]
    assert first["charts/reward"] == pytest.approx(expected, abs=1e-6)
    assert first["losses/policy_loss"] == pytest.approx(-expected, rel=0.2)  # of minibatches of unequal size
    assert first["losses/approx_kl"] == pytest.approx(0, abs=1e-7)
