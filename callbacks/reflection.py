"""Between rounds of the hint agent: reflect on what it still gets wrong, and give it the new hints (Re2LLM)."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch

from callbacks.rounds import RoundCallback, RoundHooks
from lit_rec.agent.ppo import PPOAgent


class ReflectionRounds(RoundHooks):
    """Serves each round a grown hint base, and keeps the agent after it."""

    def begin_round(self, trainer: L.Trainer, policy: PPOAgent, rounds: RoundCallback, number: int) -> None:
        """Errors of the last agent -> reflection -> hints that help -> rewards -> the agent's new actions."""
        loop = rounds.loop
        policy.environment = loop.environment(number)
        vectors = loop.vectors(number)
        policy.set_hints(vectors, torch.ones(len(vectors), dtype=torch.bool))

    def end_round(self, trainer: L.Trainer, policy: PPOAgent, rounds: RoundCallback, number: int) -> None:
        """Keep the policy of the best epoch and the curves so far."""

        def build(work: Path) -> dict[str, Any]:
            policy.best_policy().save(work)
            (work / "curves.json").write_text(json.dumps(curves_of(trainer)))
            return {"validation reward": policy.best_value, "epoch": policy.best_epoch}

        rounds.loop.environment(number)  # visits the stages this agent was made from
        rounds.loop.keep_agent(f"round_{number}/agent", number, build)


def curves_of(trainer: L.Trainer) -> list[dict[str, float]]:
    """The epochs so far, as `lit_rec.agent.training.KeepHistory` noted them."""
    from lit_rec.agent.training import KeepHistory

    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((c.history for c in callbacks if isinstance(c, KeepHistory)), [])
