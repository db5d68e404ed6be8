"""Re2LLM (arXiv 2403.16427), top to bottom as in the paper, with the lines that a hint has to beat.

choose on validation sessions how the frozen LLM is asked
for round t = 1..T: sessions the agent still gets wrong -> reflection -> hints that help -> rewards -> PPO
test sessions: the LLM with the hint that the agent picks, beside no hint, one hint for all, and the best hint of each
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import torch
from omegaconf import DictConfig

from callbacks.progress import EpochProgress
from callbacks.reflection import ReflectionRounds, write_agent
from callbacks.rounds import RoundCallback
from lit_rec.agent.ppo import FullInformationAgent, HintAgent, PPOAgent, PPOSettings
from lit_rec.agent.training import fit_agent
from lit_rec.data.sessions import SessionDataModule
from lit_rec.errors import UserError
from lit_rec.recipes.hint_loop import HintLoop
from lit_rec.recipes.models import extra_callbacks
from lit_rec.recipes.session_ground import SessionGround
from lit_rec.recipes.session_rows import SessionRows, uses_hints
from lit_rec.run.folder import RunFolder


def fit(cfg: DictConfig, run: RunFolder) -> tuple[pl.DataFrame, SessionRows]:
    """Run the whole recipe, or what is left of it.

    Args:
        cfg: The configuration.
        run: The run folder.

    Returns:
        Per-session metrics of every row, and where they came from.
    """
    ground = SessionGround(cfg, run)
    extra_callbacks(cfg)  # a mistake there is told before anything is paid for
    if not any(cfg.evaluation.rows.values()):
        raise UserError(
            "nothing to evaluate: every row is off", where="config key evaluation.rows", fix="switch a row on"
        )
    if uses_hints(cfg):
        _ = ground.encoder_key  # an encoder that cannot be had is told before the LLM works for hours
    ground.keep_sessions()
    loop = HintLoop(ground)
    if uses_hints(cfg):
        train(loop)
        more_agents(loop)
    rows = SessionRows(loop)
    return rows.evaluate(), rows


def train(loop: HintLoop) -> None:
    """All rounds of reflection and PPO in ONE Trainer.fit; callbacks work between the rounds."""
    cfg = loop.cfg
    checkpoint = loop.run.path / "checkpoints" / "agent.ckpt"
    checkpoint.parent.mkdir(exist_ok=True)
    outer = RoundCallback(loop, "agent", loop.rounds, cfg.agent.epochs, checkpoint)
    if loop.run.done(f"round_{loop.rounds}/agent"):
        revisit(loop)
        return
    agent = PPOAgent(
        loop.ground.states,
        loop.asked,
        train_sessions=loop.ground.data.splits.train,
        settings=settings(cfg),
        seed=cfg.seed,
    )
    online = cfg.agent.rewards == "online"
    shown = ("charts/reward", "val/reward", "losses/approx_kl")
    fit_agent(
        agent,
        sessions(loop),
        max_epochs=loop.rounds * cfg.agent.epochs,
        accelerator=loop.ground.accelerator,
        devices=cfg.trainer.devices,
        callbacks=[
            ReflectionRounds(),
            *([EpochProgress("agent: PPO epoch", shown)] if online else []),
            *extra_callbacks(cfg),
            outer,
        ],
        logger=loop.board("ppo"),
        resume=checkpoint if checkpoint.is_file() else None,
    )


def sessions(loop: HintLoop, seed: int = 0) -> SessionDataModule:
    """The sessions as the agents see them."""
    data, cfg = loop.ground.data, loop.cfg
    return SessionDataModule(data.lists, data.splits, batch_size=cfg.agent.batch_size, seed=cfg.seed + seed)


def settings(cfg: DictConfig) -> PPOSettings:
    """The agent's hyper-parameters."""
    names = PPOSettings.__dataclass_fields__
    return PPOSettings(**{k: v for k, v in cfg.agent.items() if k in names}, epochs_per_round=cfg.agent.epochs)


def revisit(loop: HintLoop) -> None:
    """Visit the finished stages of the rounds again: each checks that it was made from this configuration."""
    for number in range(1, loop.rounds + 1):
        loop.environment(number)
        loop.keep_agent(f"round_{number}/agent", number, _never)


def _never(work: Path) -> None:
    raise AssertionError("a finished stage is not built again")


def more_agents(loop: HintLoop) -> None:
    """Agents with other seeds on the last base, and the full-information ones: what chance does to the choice."""
    cfg = loop.cfg
    if not loop.base(loop.rounds).kept:
        return
    kinds: list[tuple[str, type[HintAgent], range]] = []
    if cfg.evaluation.rows.ppo:
        kinds.append(("ppo", PPOAgent, range(1, cfg.agent.seeds)))
    if cfg.evaluation.rows.full_information:
        kinds.append(("full_information", FullInformationAgent, range(cfg.agent.seeds)))
    for kind, agent_class, seeds in kinds:
        for seed in seeds:
            stage = f"agents/{kind}_{seed}"
            loop.keep_agent(stage, loop.rounds, _trained(loop, agent_class, f"{kind}_{seed}", seed))


def _trained(
    loop: HintLoop, agent_class: type[HintAgent], name: str, seed: int
) -> Callable[[Path], dict[str, Any] | None]:
    def build(work: Path) -> dict[str, Any]:
        ground, cfg = loop.ground, loop.cfg
        agent = agent_class(
            ground.states,
            loop.environment(loop.rounds),
            train_sessions=ground.data.splits.train,
            settings=settings(cfg),
            seed=cfg.seed + seed,
        )
        vectors = loop.vectors(loop.rounds)
        agent.set_hints(vectors, torch.ones(len(vectors), dtype=torch.bool))
        fitted = fit_agent(
            agent,
            sessions(loop, seed),
            max_epochs=cfg.agent.epochs,
            accelerator=ground.accelerator,
            devices=cfg.trainer.devices,
            logger=loop.board(name),
        )
        return write_agent(work, agent, fitted.history)

    return build
