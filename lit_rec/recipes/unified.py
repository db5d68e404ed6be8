"""One loop for both systems (METHODS 3): hints say how to describe a user, DPO trains the LLM that describes.

knowledge of every user and item from the base LLM -> vectors; reward model <- the reranker, trained with that knowledge
for round t = 1..T:
    the users whom the knowledge serves worst -> reflection -> hints that help -> rewards -> PPO picks one for each user
    N answers per training user, the picked hint in the prompt -> rewards -> pairs -> DPO on LoRA
knowledge of every user from the tuned LLM, with the picked hints -> the final reranker -> test

The reward of a hint is what the reranker gains by the text it leads to, over the text without: the same reranker, and
the same reward, that make the pairs. States of the LLM: "zero_shot"; "hinted_k", round k's hints before its DPO;
"round_k", after it. So every row of the table adds one part of the loop to the row above.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import polars as pl
from omegaconf import DictConfig

from callbacks.evaluation import log_state
from callbacks.reflection import log_hints
from callbacks.rounds import RoundCallback, RoundHooks
from lit_rec.llm.prompts import Messages
from lit_rec.recipes import rlrf
from lit_rec.recipes.loop import Loop
from lit_rec.recipes.user_hints import UserHints
from lit_rec.run.folder import RunFolder


def fit(cfg: DictConfig, run: RunFolder) -> tuple[pl.DataFrame, list[Loop]]:
    """Run the whole recipe, or what is left of it; see `lit_rec.recipes.rlrf.fit`."""
    if cfg.agent.pick == "none":
        return rlrf.fit(cfg, run)
    return rlrf.fit(cfg, run, UnifiedLoop, (HintRounds(),))


class HintRounds(RoundHooks):
    """Before each round's pairs: reflect, keep the hints that help, train the agent on their rewards."""

    def begin_round(self, trainer: L.Trainer, policy: L.LightningModule, rounds: RoundCallback, number: int) -> None:
        """Errors of the knowledge so far -> hints -> rewards -> agent -> answers with the picked hints."""
        loop = rounds.loop
        fresh = not loop.run.done(loop.name(f"hinted_{number}/rewards"))
        loop.rewards(f"hinted_{number}")
        if fresh:  # the first control that needs them has had them made
            log_hints(loop.hints, number)
            log_state(loop, f"hinted_{number}", number)


class UnifiedLoop(Loop):
    """`Loop` with a hint in every prompt but those of the untouched LLM."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.hints = UserHints(self)

    def round_of(self, state: str) -> int:
        """Number of the round whose hints stand in the prompts of a state; 0: none do."""
        kind, _, number = state.rpartition("_")
        if kind in ("hinted", "round"):
            return int(number)
        return 0 if state == "zero_shot" else 1

    def prompts_of(self, state: str, users: Sequence[int]) -> list[Messages]:
        """What the LLM is asked about these users in a state, with the hints of its round."""
        number = self.round_of(state)
        return self.ground.prompts.users(users, self.hints.texts(number, users) if number else None)

    def pairs_from(self, policy: str, number: int) -> str:
        """Pairs are made of answers with the hints of the round."""
        return f"hinted_{number}"

    def made_by(self, state: str) -> tuple[str, ...]:
        """Stages that the answers of a state depend on: the choice of hints, and the policy."""
        number = self.round_of(state)
        if not number:
            return ()
        tuned = self.hints.before(number) if state.startswith("hinted_") else state
        policy = () if tuned == "zero_shot" else (f"{tuned}/policy",)
        return (self.hints.picker(number).removeprefix(self.name("")), *policy)

    def states(self) -> list[tuple[int, str]]:
        """(number of rounds behind it, state) of every state of the LLM that has rewards."""
        names = [(0, "zero_shot")]
        for k in range(1, self.cfg.policy.rounds + 1):
            names += [(k - 1, f"hinted_{k}"), (k, f"round_{k}")]
        return [*names, *self.controls()]

    def flattered(self, state: str) -> bool:
        """The agent is kept as it was in its best epoch, by the rewards of the texts that its hints lead to."""
        return self.round_of(state) > 0 and self.cfg.agent.pick in ("ppo", "full_information")

    def samples_of(self, state: str) -> int:
        """N answers where pairs are made of them."""
        return int(self.cfg.pairs.samples) if state.startswith("hinted_") else 1

    def keep_hints(self, folder: Path) -> None:
        """Leave the last hint base, which a person can read, in a folder."""
        self.hints.base(self.hints.rounds).save(folder / "hints.json")
