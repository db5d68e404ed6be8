"""Train one agent, choose its epoch, keep it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping

from lit_rec.agent.policy import HintPolicy
from lit_rec.agent.ppo import HintAgent
from lit_rec.data.sessions import SessionDataModule
from lit_rec.rerankers.training import quiet


@dataclass
class FittedAgent:
    """A trained policy and how its training went.

    Attributes:
        policy: as it was in the best epoch since the base last changed.
        best_epoch: that epoch, from 0; -1 when nothing was measured.
        best_value: its mean reward on validation sessions; -inf when nothing was measured.
        history: one dictionary of plain numbers per epoch: epoch, losses/..., charts/..., val/....
        seconds: wall-clock of the fit.
    """

    policy: HintPolicy
    best_epoch: int
    best_value: float
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


class KeepHistory(Checkpoint):
    """Every epoch's metrics; a `Checkpoint`, so that it is called when they are complete, and survives a restart."""

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the epoch's metrics."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.history.append({"epoch": trainer.current_epoch, **metrics})

    def state_dict(self) -> dict[str, Any]:
        """The epochs so far."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The epochs before the restart."""
        self.history = list(state_dict["history"])


def fit_agent(
    agent: HintAgent,
    data: SessionDataModule,
    *,
    max_epochs: int,
    patience: int | None = None,
    accelerator: str = "cpu",
    devices: int | list[int] = 1,
    callbacks: Sequence[Callback] = (),
    logger: Any = False,
    resume: Path | None = None,
) -> FittedAgent:
    """Train an agent with one quiet Lightning Trainer; the result depends on the agent's and the data's seeds alone.

    Args:
        agent: with its base set, or set by a callback in `on_fit_start`.
        data: training sessions, and validation sessions to choose the epoch by.
        max_epochs: passes over the training sessions.
        patience: stop after this many epochs without a better validation reward; None runs to the end. Over several
            rounds leave it None: a growing base often costs a little before it pays.
        accelerator: Lightning's, as is devices.
        devices: number of devices, or which GPU.
        callbacks: more Lightning callbacks.
        logger: Lightning logger, or False.
        resume: a checkpoint of the same fit to go on from.
    """
    started = time.perf_counter()
    measured = len(data.index("validation")) > 0
    history = KeepHistory()
    stop = [EarlyStopping("val/reward", mode="max", patience=patience)] if measured and patience is not None else []
    with quiet():
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=devices,
            max_epochs=max_epochs,
            callbacks=[history, *callbacks, *stop],  # first, so that a checkpoint of an epoch holds its metrics
            logger=logger,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=None if measured else 0,
        )
        trainer.fit(agent, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    policy = agent.best_policy()
    return FittedAgent(policy, agent.best_epoch, agent.best_value, history.history, time.perf_counter() - started)
