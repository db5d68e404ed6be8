"""Training the agents that pick hints, whatever the hints are for: callbacks work between the rounds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from callbacks.health import Health
from callbacks.progress import EpochProgress
from callbacks.reflection import GrowingBase, ReflectionRounds, write_agent
from callbacks.rounds import RoundCallback
from lit_rec import distributed
from lit_rec.agent.ppo import FullInformationAgent, HintAgent, PPOAgent, PPOSettings
from lit_rec.agent.training import fit_agent
from lit_rec.data.sessions import SessionDataModule
from lit_rec.recipes.hint_loop import Build, HintLoop
from lit_rec.recipes.models import by_one
from lit_rec.run.folder import never

KINDS: dict[str, type[HintAgent]] = {"ppo": PPOAgent, "full_information": FullInformationAgent}


def train(loop: HintLoop, until: int, extra: Callable[[], list[Any]] = list) -> None:
    """PPO over the rounds up to `until` in ONE Trainer.fit; a later call goes on from its checkpoint.

    Args:
        loop: The hints.
        until: Number of the last round.
        extra: Makes a user's own callbacks.
    """
    cfg, data = loop.cfg, sessions(loop)
    checkpoint = loop.run.path / "checkpoints" / f"{loop.name('agent').replace('/', '_')}.ckpt"
    checkpoint.parent.mkdir(exist_ok=True)
    outer = RoundCallback(loop, "agent", until, cfg.agent.epochs, checkpoint, loop.agent_key)
    if loop.run.done(loop.name(f"round_{until}/agent")):
        for number in range(1, until + 1):  # each stage checks that it was made from this configuration
            loop.environment(number)
            loop.keep_agent(f"round_{number}/agent", number, never)
        return
    # The first round's environment stands in until `begin_round` gives each round its own.
    agent = PPOAgent(
        loop.states, loop.asked(1), train_sessions=loop.splits.train, settings=settings(cfg), seed=cfg.seed
    )
    shown = ("charts/reward", "val/reward", "losses/approx_kl")
    tell = [EpochProgress("agent: PPO epoch", shown)] if cfg.agent.rewards == "online" else []
    fit_agent(
        agent,
        data,
        max_epochs=until * cfg.agent.epochs,
        **by_one(loop.models.device),
        callbacks=[health(cfg), ReflectionRounds(), *tell, *extra(), outer],
        logger=loop.board("ppo").loggers,
        resume=checkpoint if distributed.agreed(checkpoint.is_file()) else None,
    )


def health(cfg: DictConfig) -> Health:
    """Looks after the training of one agent, which clips its own gradients."""
    clip = cfg.agent.max_grad_norm
    return Health(cfg.trainer.bad_updates, name="the agent's training", keys="agent.lr", clip=clip)


def seed_of(cfg: DictConfig, number: int) -> int:
    """The seed of an agent: no two agents of runs with the seeds 1, 2, 3 have the same."""
    return int(cfg.seed + 1000 * number)


def sessions(loop: HintLoop, number: int = 0) -> SessionDataModule:
    """The sessions, or users, as the agents see them."""
    cfg = loop.cfg
    return SessionDataModule(loop.lists, loop.splits, batch_size=cfg.agent.batch_size, seed=seed_of(cfg, number))


def settings(cfg: DictConfig) -> PPOSettings:
    """The agent's hyper-parameters."""
    names = PPOSettings.__dataclass_fields__
    return PPOSettings(**{k: v for k, v in cfg.agent.items() if k in names}, epochs_per_round=cfg.agent.epochs)


def trained(loop: HintLoop, kind: str, rounds: Sequence[int], seed: int = 0) -> Build:
    """Builds an agent that learns the bases of these rounds one after another, as `train` does, without reflecting.

    What the hints bring is read from the last of these rounds, whose base begins with all earlier ones: over several
    rounds the LLM has to be a frozen one.
    """

    def build(work: Path) -> dict[str, Any]:
        cfg = loop.cfg
        agent = KINDS[kind](
            loop.states,
            loop.environment(rounds[-1]),
            train_sessions=loop.splits.train,
            settings=settings(cfg),
            seed=seed_of(cfg, seed),
        )
        vectors = loop.vectors(rounds[-1])
        bases = [vectors[: len(loop.base(number).kept)] for number in rounds]
        fitted = fit_agent(
            agent,
            sessions(loop, seed),
            max_epochs=len(rounds) * cfg.agent.epochs,
            **by_one(loop.models.device),
            callbacks=[health(cfg), GrowingBase(bases, cfg.agent.epochs)],
            logger=loop.board(f"{kind}_{seed}").loggers,
        )
        return write_agent(work, agent, fitted.history)

    return build
