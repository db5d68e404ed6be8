"""Between rounds of the hint agent: reflect on what it still gets wrong, and give it the new hints (Re2LLM)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from callbacks.rounds import RoundCallback, RoundHooks
from lit_rec.agent.ppo import HintAgent, PPOAgent
from lit_rec.agent.training import KeepHistory
from lit_rec.run.folder import never


class ReflectionRounds(RoundHooks):
    """Serves each round a grown hint base, and keeps the agent after it."""

    def begin_round(self, trainer: L.Trainer, policy: PPOAgent, rounds: RoundCallback, number: int) -> None:
        """Errors of the last agent -> reflection -> hints that help -> rewards -> the agent's new actions."""
        loop = rounds.loop
        policy.environment = loop.environment(number)
        vectors = loop.vectors(number)
        policy.set_hints(vectors, torch.ones(len(vectors), dtype=torch.bool))
        log_hints(loop, number)

    def end_round(self, trainer: L.Trainer, policy: PPOAgent, rounds: RoundCallback, number: int) -> None:
        """Keep the policy of the best epoch and the curves so far."""
        history = next(c.history for c in trainer.callbacks if isinstance(c, KeepHistory))  # type: ignore[attr-defined]
        rounds.loop.environment(number)  # visits the stages this agent was made from

        def build(work: Path) -> dict[str, Any]:
            return write_agent(work, policy, history) | rounds.cost(number)

        rounds.loop.keep_agent(f"round_{number}/agent", number, never if rounds.passed(number) else build)


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
