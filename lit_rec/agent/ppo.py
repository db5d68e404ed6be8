"""The agents that learn which hint suits which session: PPO, and its full-information upper line."""

import copy
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lit_rec.agent import losses
from lit_rec.agent.environment import Environment
from lit_rec.agent.policy import HintPolicy, mlp
from lit_rec.errors import UserError
from lit_rec.metrics.torch_metrics import DistinctMeans

Rows = dict[str, Tensor]


@dataclass(frozen=True)
class PPOSettings:
    """Hyper-parameters of both agents (METHODS 2.2).

    Attributes:
        lr: Adam's learning rate at the start of a round; it falls linearly to zero over the round.
        clip: how far the probability ratio may move from 1.
        clip_value: also hold the critic within `clip` of its values at the rollout.
        entropy_coef: weight of the entropy bonus, beside advantages (full information: rewards) of deviation 1 where
            `normalize_advantage` is set.
            Over several rounds it decides whether later hints are found: a policy that has settled firmly hardly tries
            them, and `exploration` does not help, for what it draws has next to no gradient.
        value_coef: weight of the critic's loss.
        update_epochs: passes over a rollout.
        minibatches: gradient steps per pass.
        max_grad_norm: gradients are scaled down to this norm.
        target_kl: end a rollout's passes once `approx_kl` is above; None never does.
        weight_decay: decoupled (AdamW).
        samples_per_session: actions tried per session and rollout.
        exploration: share of uniform choices in the policy while it trains.
        state_noise: deviation of the noise added to a rollout's states, in units of a state's own deviation.
        normalize_advantage: give each minibatch's advantages mean 0 and deviation 1.
        reward_scale: rewards are multiplied by it for training; what is logged is not.
        hidden: width of the towers.
        rank: width of the space in which sessions meet hints.
        epochs_per_round: epochs of a round; None: the whole fit is one.
    """

    lr: float = 3e-4
    clip: float = 0.05
    clip_value: bool = False
    entropy_coef: float = 0.01
    value_coef: float = 0.5
    update_epochs: int = 10
    minibatches: int = 1
    max_grad_norm: float = 0.5
    target_kl: float | None = None
    weight_decay: float = 0.0
    samples_per_session: int = 1
    exploration: float = 0.0
    state_noise: float = 0.0
    normalize_advantage: bool = True
    reward_scale: float = 1.0
    hidden: int = 64
    rank: int = 32
    epochs_per_round: int | None = None


class HintAgent(L.LightningModule):
    """What both agents share: network, updates, schedule, validation, rounds.

    A batch is a dictionary with `list`, the sessions' numbers [B], as `SessionDataModule` serves them. A step asks
    `collect` for rows of experience and takes `update_epochs` passes of minibatches over them, each with the gradient
    of `loss`. Chance depends on the seed, the epoch, the step and the rank alone, so that a resumed fit draws what
    the undisturbed one would have drawn.

    Validation is the mean reward of the greedy choice, logged as `val/reward`. The weights of the best epoch since the
    base last changed are kept here and in the checkpoint, see `best_policy`.

    Args:
        states: [S, d] state of every session; data, in no checkpoint.
        environment: rewards; may be replaced between rounds.
        train_sessions: [n] numbers of the training sessions, whose states give the statistics.
        settings: hyper-parameters.
        seed: of initialisation, choices and minibatches; not negative.
    """

    states: Tensor
    deviation: Tensor

    def __init__(
        self,
        states: Tensor,
        environment: Environment,
        *,
        train_sessions: Tensor,
        settings: PPOSettings | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.settings = settings or PPOSettings()
        self.environment, self.seed = environment, seed
        self.save_hyperparameters({"dim": states.shape[1], "seed": seed, **asdict(self.settings)})
        with isolate_rng():
            torch.manual_seed(seed)
            self.policy = HintPolicy(states.shape[1], hidden=self.settings.hidden, rank=self.settings.rank)
            self.build(states.shape[1])
        states = states.float()
        self.policy.center_states.fit(states[train_sessions])
        self.register_buffer("states", states, persistent=False)
        self.register_buffer("deviation", states[train_sessions].var(0, correction=0).mean().sqrt(), persistent=False)
        self.validation = DistinctMeans(distributed_available_fn=self._together)
        self.best_value, self.best_epoch = float("-inf"), -1
        self.best_weights: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def build(self, dim: int) -> None:
        """Add what an agent needs beside the policy; called once, under the seed."""

    def collect(self, sessions: Tensor, chance: torch.Generator) -> Rows:
        """Experience [N, ...] from the sessions [B] of a batch, under the present policy."""
        raise NotImplementedError

    def loss(self, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss of some rows, and what to log of it; `approx_kl` is read by `target_kl`."""
        raise NotImplementedError

    # The base of hints and the best epoch

    def set_hints(self, vectors: Tensor, alive: Tensor) -> None:
        """Give the agent a later base; also between the epochs of one fit.

        Where the base changes a round ends: training goes on from the best epoch so far, and the best is sought anew,
        for rewards under another base are not comparable. Giving the present base again does nothing.

        Args:
            vectors: [A, d] embeddings of all hints, the old ones first and unchanged.
            alive: [A] bool, False for hints that must not be chosen.
        """
        if self.policy.has_base(vectors, alive):
            return
        if self.best_weights:
            self.load_state_dict(self.best_weights)
        self.policy.set_hints(vectors, alive)
        self.best_value, self.best_epoch, self.best_weights = float("-inf"), -1, {}

    def best_policy(self) -> HintPolicy:
        """A copy of the policy as it was in the best epoch (without validation: as it is), in evaluation mode."""
        policy = copy.deepcopy(self.policy)
        prefix = "policy."
        if self.best_weights:
            policy.load_state_dict(
                {name.removeprefix(prefix): w for name, w in self.best_weights.items() if name.startswith(prefix)}
            )
        return policy.eval()

    # Training

    def on_fit_start(self) -> None:
        """Refuse a fit that cannot be scheduled."""
        if not self._epochs() > 0:
            raise UserError(
                "The learning rate of the agent has no end to fall to.",
                where="trainer.max_epochs",
                fix="Set trainer.max_epochs, or the agent's epochs_per_round.",
            )

    def training_step(self, batch: Rows, batch_idx: int) -> None:
        """One rollout and its updates."""
        cfg = self.settings
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = self._learning_rate(batch_idx)
        chance = self._chance(batch_idx)
        rows = self.collect(batch["list"], chance)
        count = len(rows["states"])
        for _ in range(cfg.update_epochs):
            for index in torch.randperm(count, generator=chance).to(self.device).chunk(cfg.minibatches):
                loss, logged = self.loss({name: values[index] for name, values in rows.items()})
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, cfg.max_grad_norm, "norm")
                optimizer.step()
                self._count({f"losses/{name}": value for name, value in logged.items()})
            # Ranks must agree on when to stop, or one waits for the other's gradients for ever.
            if cfg.target_kl and self.trainer.strategy.reduce(logged["approx_kl"], reduce_op="mean") > cfg.target_kl:
                break

    def _epochs(self) -> int:
        return self.settings.epochs_per_round or self.trainer.max_epochs or 0

    def _learning_rate(self, step: int) -> float:
        """Linear from `lr` to zero over the epochs of a round."""
        epochs = self._epochs()
        done = self.current_epoch % epochs + step / self.trainer.num_training_batches
        return self.settings.lr * (1 - done / epochs)

    def _chance(self, step: int) -> torch.Generator:
        """Random numbers of one step; on the CPU, so that they are the same on every device."""
        state = np.random.SeedSequence((self.seed, self.current_epoch, step, self.global_rank)).generate_state(2)
        return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)

    def observe(self, sessions: Tensor, chance: torch.Generator) -> Tensor:
        """States [B, d] of sessions [B] as a rollout sees them: noise is drawn once, so that ratios start at 1."""
        states = self.states[sessions]
        if not self.settings.state_noise:
            return states
        noise = torch.randn(states.shape, generator=chance).to(states)
        return states + self.settings.state_noise * self.deviation * noise

    def _count(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            kept = torch.stack([value.detach().double().sum(), value.new_tensor(value.numel(), dtype=torch.double)])
            self._sums[name] = self._sums[name] + kept if name in self._sums else kept

    def on_train_epoch_start(self) -> None:
        """Forget the last epoch's sums."""
        self._sums = {}

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means: over updates for `losses/`, over choices for `charts/`."""
        means = {name: (total / count).float() for name, (total, count) in self._sums.items()}
        self.log_dict(means, sync_dist=True)
        self.log("charts/learning_rate", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]

    # Validation and checkpoints

    def validation_step(self, batch: Rows, batch_idx: int) -> None:
        """Reward of the greedy choice."""
        sessions = batch["list"]
        actions = self.policy.greedy(self.states[sessions])
        rewards = self.environment.rewards(sessions, actions)
        self.validation.update(torch.stack([rewards, (actions == 0).to(rewards)], dim=1), sessions, sessions)

    def on_validation_epoch_end(self) -> None:
        """Log `val/reward` and `val/no_hint_share`, and keep the weights where they are the best so far."""
        reward, no_hint = self.validation.compute()[0]
        self.validation.reset()
        if self.trainer.sanity_checking:
            return
        self.log_dict({"val/reward": reward, "val/no_hint_share": no_hint}, rank_zero_only=False)
        if self.trainer.state.fn == TrainerFn.FITTING and float(reward) > self.best_value:
            self.best_value, self.best_epoch = float(reward), self.current_epoch
            self.best_weights = {name: w.detach().clone() for name, w in self.state_dict().items()}

    def _together(self) -> bool:
        """Whether other processes are at work on this very fit; they may be at work on fits of their own."""
        return self.trainer.world_size > 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam with eps 1e-5; weight decay, where there is any, is decoupled."""
        return torch.optim.AdamW(
            self.parameters(), lr=self.settings.lr, eps=1e-5, weight_decay=self.settings.weight_decay
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Plain values and tensors only, so that the checkpoint loads with weights_only=True."""
        checkpoint["best"] = {"value": self.best_value, "epoch": self.best_epoch, "weights": self.best_weights}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the best epoch so far."""
        best = checkpoint["best"]
        self.best_value, self.best_epoch, self.best_weights = best["value"], best["epoch"], dict(best["weights"])


class PPOAgent(HintAgent):
    """Proximal policy optimisation on one-step episodes (arXiv 1707.06347; Re2LLM, section 3.3).

    A rollout draws `samples_per_session` actions per session from the policy, exploration included, and asks the
    environment for exactly these. The advantage is the reward minus the critic's value; sessions are independent, so
    nothing is discounted over them.

    Logged per epoch: losses/policy_loss, losses/value_loss, losses/entropy, losses/approx_kl, losses/clipfrac,
    losses/explained_variance, charts/reward, charts/no_hint_share, charts/learning_rate.
    """

    def build(self, dim: int) -> None:
        """Add the critic."""
        self._judged: list[Tensor] = []
        self.critic = mlp(dim, self.settings.hidden, 1, gain=1.0)

    def on_train_epoch_start(self) -> None:
        """Forget the last epoch's sums and values."""
        super().on_train_epoch_start()
        self._judged = []

    def on_train_epoch_end(self) -> None:
        """Log how much of the epoch's rewards the critic foresaw."""
        super().on_train_epoch_end()
        values, returns = torch.cat(self._judged, dim=1)
        self.log("losses/explained_variance", losses.explained_variance(values, returns), sync_dist=True)

    def value(self, states: Tensor) -> Tensor:
        """Reward [B] that the critic expects in these states [B, d]."""
        return self.critic(self.policy.center_states(states)).squeeze(-1)

    @torch.no_grad()
    def collect(self, sessions: Tensor, chance: torch.Generator) -> Rows:
        """Draw actions, ask for their rewards."""
        cfg = self.settings
        sessions = sessions.repeat_interleave(cfg.samples_per_session)
        states = self.observe(sessions, chance)
        logp = self.policy.log_probs(states, cfg.exploration)
        actions = torch.multinomial(logp.exp().cpu(), 1, generator=chance).to(sessions.device)
        rewards = self.environment.rewards(sessions, actions.squeeze(1)).to(states)
        returns, values = rewards * cfg.reward_scale, self.value(states)
        self._count({"charts/reward": rewards, "charts/no_hint_share": (actions == 0).float()})
        self._judged.append(torch.stack([values, returns]))
        return {
            "states": states,
            "actions": actions,
            "logp": logp.gather(1, actions).squeeze(1),
            "returns": returns,
            "values": values,
        }

    def loss(self, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped surrogate, critic and entropy bonus."""
        cfg = self.settings
        every = self.policy.log_probs(rows["states"], cfg.exploration)
        logp, old = every.gather(1, rows["actions"]).squeeze(1), rows["logp"]
        advantages = rows["returns"] - rows["values"]
        if cfg.normalize_advantage:
            advantages = losses.normalise(advantages)
        policy_loss = losses.clipped_surrogate(logp, old, advantages, cfg.clip)
        held = cfg.clip if cfg.clip_value else None
        value_loss = losses.value_loss(self.value(rows["states"]), rows["returns"], rows["values"], held)
        entropy = losses.entropy(every).mean()
        logged = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "approx_kl": losses.approx_kl(logp, old).detach(),
            "clipfrac": losses.clipfrac(logp, old, cfg.clip),
        }
        return policy_loss + cfg.value_coef * value_loss - cfg.entropy_coef * entropy, logged


class FullInformationAgent(HintAgent):
    """The same policy by the gradient of sum_a pi(a|s) r(s, a), every reward known (METHODS 2.6).

    What PPO could learn from the same sessions if it never had to guess what another hint would have brought. There is
    no critic, nothing is drawn, and the rewards in the logs are expectations. Logged: losses/policy_loss,
    losses/entropy, losses/approx_kl (exact here), charts/reward, charts/no_hint_share, charts/learning_rate.
    """

    @torch.no_grad()
    def collect(self, sessions: Tensor, chance: torch.Generator) -> Rows:
        """Ask for the rewards of every action."""
        states = self.observe(sessions, chance)
        logp = self.policy.log_probs(states, self.settings.exploration)
        rewards = self.environment.matrix(sessions)[:, : self.policy.n_actions].to(states)
        if rewards.shape != logp.shape:
            raise ValueError(f"rewards {tuple(rewards.shape)} do not fit actions {tuple(logp.shape)}")
        chances = logp.exp()
        self._count({"charts/reward": (chances * rewards).sum(-1), "charts/no_hint_share": chances[:, 0]})
        return {"states": states, "logp": logp, "returns": rewards * self.settings.reward_scale}

    def loss(self, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus the expected reward, and the entropy bonus."""
        logp = self.policy.log_probs(rows["states"], self.settings.exploration)
        returns = rows["returns"]
        if self.settings.normalize_advantage:  # so that the entropy bonus weighs as much as it does in PPO
            returns = losses.normalise(returns.flatten()).view_as(returns)
        policy_loss = losses.full_information_loss(logp, returns)
        entropy = losses.entropy(logp).mean()
        moved = (rows["logp"].exp() * (rows["logp"] - logp)).sum(-1).mean().detach()
        logged = {"policy_loss": policy_loss, "entropy": entropy, "approx_kl": moved}
        return policy_loss - self.settings.entropy_coef * entropy, logged
