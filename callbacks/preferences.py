"""Between rounds: sample answers, score them with the reranker, make pairs, and hand them to the policy."""

import time
from typing import Any

import lightning as L
import torch
from torch import Tensor

from callbacks.rounds import RoundCallback, RoundHooks
from lit_rec import distributed
from lit_rec.errors import UserError
from lit_rec.policy.dpo import DPOPolicy
from lit_rec.policy.pairs import PreferenceDataModule
from lit_rec.policy.sequences import Example, answer_logps, collate
from lit_rec.run.progress import step


class PreferenceRounds(RoundHooks):
    """Serves each round the preference pairs of the state before it.

    Args:
        rule: "best_worst" or "random", as in `lit_rec.policy.pairs.make_pairs`.
    """

    def __init__(self, rule: str = "best_worst") -> None:
        self.rule = rule
        self.reference: dict[str, Any] = {}  # of the present round: its number, and log-probabilities [pairs, answers]

    def state_dict(self) -> dict[str, Any]:
        """The reference log-probabilities: within a round "previous" is a policy that is no more."""
        return self.reference

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Those of the round in which the run was stopped."""
        self.reference = state_dict

    def begin_round(self, trainer: L.Trainer, policy: DPOPolicy, rounds: RoundCallback, number: int) -> None:
        """Samples and rewards of the last state -> pairs -> reference log-probabilities -> the DataModule."""
        state = rounds.pairs_from(number)
        pairs = rounds.loop.pairs(state, self.rule)
        if not len(pairs):
            raise UserError(
                f"round {number} has no preference pair: no training user's answers differ enough in their rewards",
                where="config keys pairs and reward",
                fix="more answers (pairs.samples), a finer reward (reward.metric=soft), a smaller pairs.min_gap, or "
                "knowledge.encode=answer",
            )
        data: PreferenceDataModule = trainer.datamodule  # type: ignore[attr-defined]
        examples = data.encode(pairs)
        if self.reference.get("number") != number:
            began = time.perf_counter()
            self.reference = {"number": number, "logps": reference_logps(policy, examples, data.batch_size)}
            rounds.spent(number, began)
        data.set_round(examples, self.reference["logps"])
        policy.updates_per_round = data.updates_per_epoch * policy.cfg.epochs


@torch.no_grad()
def reference_logps(policy: DPOPolicy, examples: list[Example], batch_size: int) -> Tensor:
    """Log-probabilities of every answer under the reference policy: computed once per round, not once per step.

    Returns:
        [pairs, answers] float32 on the CPU.
    """
    order = sorted(range(len(examples)), key=lambda i: -examples[i].length)
    logps = torch.zeros(len(examples), len(examples[0].answers))
    training = policy.training
    policy.eval()
    with step("reference log-probabilities", len(examples), "pairs") as progress:
        for start in policy.llm.share(range(0, len(order), 2 * batch_size)):
            rows = order[start : start + 2 * batch_size]
            batch = {k: v.to(policy.device) for k, v in collate([examples[i] for i in rows]).items()}
            with policy.llm.reference(policy.cfg.reference), policy.trainer.precision_plugin.forward_context():
                logps[rows] = answer_logps(policy.model, batch).cpu()
            progress(len(rows))
    policy.train(training)
    if policy.llm.sharded:
        return logps
    return torch.stack(distributed.gathered(logps)).sum(0)  # each process has filled in its share
