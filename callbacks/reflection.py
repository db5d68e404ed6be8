"""Between rounds of the hint agent: reflect on what it still gets wrong, and give it the new hints (Re2LLM)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from callbacks.rounds import RoundCallback, RoundHooks
from lit_rec.agent.ppo import HintAgent, PPOAgent
from lit_rec.agent.training import KeepHistory
from lit_rec.run.folder import never


class GrowingBase(Checkpoint):
    """Serves an agent the hint bases of several rounds, when and as `ReflectionRounds` would.

    It is a `Checkpoint` so that Lightning calls it when the module is done with the epoch.

    Args:
        bases: [A, d] embeddings of the hints of each round.
        epochs: Per round.
    """

    def __init__(self, bases: Sequence[Tensor], epochs: int) -> None:
        self.bases, self.epochs = bases, epochs

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with the first one."""
        _give(pl_module, self.bases[0])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the last epoch of a round go on with the next one."""
        ended, left = divmod(trainer.current_epoch + 1, self.epochs)
        if not left and ended < len(self.bases):
            _give(pl_module, self.bases[ended])


class ReflectionRounds(RoundHooks):
    """Serves each round a grown hint base, and keeps the agent after it."""

    def begin_round(self, trainer: L.Trainer, policy: PPOAgent, rounds: RoundCallback, number: int) -> None:
        """Errors of the last agent -> reflection -> hints that help -> rewards -> the agent's new actions."""
        loop = rounds.loop
        policy.environment = loop.environment(number)
        _give(policy, loop.vectors(number))
        log_hints(loop, number)

    def end_round(self, trainer: L.Trainer, policy: PPOAgent, rounds: RoundCallback, number: int) -> None:
        """Keep the policy of the best epoch and the curves so far."""
        history = next(c.history for c in trainer.callbacks if isinstance(c, KeepHistory))  # type: ignore[attr-defined]
        rounds.loop.environment(number)  # visits the stages this agent was made from

        def build(work: Path) -> dict[str, Any]:
            return write_agent(work, policy, history) | rounds.cost(number)

        rounds.loop.keep_agent(f"round_{number}/agent", number, never if rounds.passed(number) else build)


def _give(agent: Any, vectors: Tensor) -> None:
    """Make these hints [A, d] the agent's actions."""
    agent.set_hints(vectors, torch.ones(len(vectors), dtype=torch.bool))


def write_agent(work: Path, agent: HintAgent, history: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Write the policy of the best epoch and the curves; returns what the manifest says of them."""
    agent.best_policy().save(work)
    (work / "curves.json").write_text(json.dumps(history))
    measured = agent.best_epoch >= 0
    return {"validation reward": agent.best_value, "epoch": agent.best_epoch} if measured else {}


def log_hints(loop: Any, number: int) -> None:
    """Send a round's hints, their gains and fates to the loggers."""
    board = loop.board("ppo")
    hints = [hint for hint in loop.base(number).hints if hint.round == number]
    kept = [hint for hint in hints if hint.fate == "kept"]
    lines = [f"1. {hint.text} (gain {hint.gain_others or 0:+.4f} on {hint.others} other sessions)" for hint in kept]
    board.text("hints/kept", "\n".join(lines), number)
    board.scalars({"hints/written": len(hints), "hints/kept": len(kept)}, number)
    board.flush()
