"""The rows of Re2LLM's result table: every way of ranking the same sessions, from chance to the oracle."""

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_rec.config import plain
from lit_rec.errors import UserError
from lit_rec.metrics.sessions import random_metrics, rank_metrics, session_frame, target_ranks
from lit_rec.recipes.models import by_one
from lit_rec.recipes.session_hints import SessionHints
from lit_rec.rerankers.sasrec import fit_sasrec, sasrec_scores
from lit_rec.rerankers.session_baselines import item_knn_scores, popularity_scores
from lit_rec.run.progress import console, step

AGENTS = ("ppo", "full_information")
HINT_ROWS = ("random_hint", "best_fixed_hint", *AGENTS, "oracle")
Ranks = dict[str, Tensor]  # split -> [seeds, draws, n]: a row's value is the mean over the draws


def uses_hints(cfg: DictConfig) -> bool:
    """Whether any row needs the hint base."""
    return any(cfg.evaluation.rows[row] for row in HINT_ROWS)


class SessionRows:
    """Ranks of the targets by every row.

    Args:
        loop: Hints, rewards and agents.
    """

    def __init__(self, loop: SessionHints) -> None:
        self.loop, self.ground, self.cfg, self.run = loop, loop.ground, loop.cfg, loop.run
        self.data, self.rounds = self.ground.data, loop.rounds
        self.splits = [split for split in ("validation", "test") if len(self.ground.part(split))]

    @cached_property
    def shown(self) -> list[str]:
        """The rows that are switched on; those that need a hint only where there is one."""
        on = [str(name) for name, wanted in self.cfg.evaluation.rows.items() if wanted]
        if not uses_hints(self.cfg) or self.loop.base(self.rounds).kept:
            return on
        left = [name for name in on if name not in HINT_ROWS]
        if not left:
            raise UserError(
                "nothing to evaluate: no hint was kept, and every other row is off",
                where="config key reflection",
                fix="switch evaluation.rows.no_hint on, raise reflection.sessions, or lower reflection.min_gain",
            )
        out = ", ".join(name for name in on if name in HINT_ROWS)
        console.print(f"[yellow]the hint base is empty, so these rows are left out:[/] {out}", highlight=False)
        return left

    # --- the table ----------------------------------------------------------------------------------------------------

    def evaluate(self) -> pl.DataFrame:
        """Per-session metrics of every row that is switched on."""
        frames = [self._random()] if "random" in self.shown else []
        for name in self.shown:
            if name != "random":
                frames += self._frames(name, self.ranks(name))
        table = pl.concat(frames)
        for row, part in table.filter(pl.col("split") == "test").group_by("row"):
            board = self.loop.board(f"rows/{row[0]}")
            columns = [c for c in part.columns if "|" in c]
            board.scalars({f"test/{c.split('|')[0]}": float(part[c].mean() or 0.0) for c in columns}, 0)  # type: ignore[arg-type]
            board.flush()
        return table

    def _frames(self, name: str, ranks: Ranks) -> list[pl.DataFrame]:
        size, ks = self.data.lists.items.shape[1], list(self.cfg.evaluation.ks)
        return [
            self._frame(
                name,
                split,
                {metric: values.mean(0) for metric, values in rank_metrics(drawn, ks, size).items()},
                seed,
            )
            for split, found in ranks.items()
            for seed, drawn in enumerate(found)
        ]

    def _random(self) -> pl.DataFrame:
        """Chance: the exact expectation, every rank being equally likely."""
        items, ks = self.data.lists.items, list(self.cfg.evaluation.ks)
        found = {split: random_metrics(items[self.ground.part(split)], ks) for split in self.splits}
        return pl.concat(self._frame("random", split, metrics) for split, metrics in found.items())

    def _frame(self, name: str, split: str, metrics: dict[str, Tensor], seed: int = 0) -> pl.DataFrame:
        sessions = self.ground.part(split)
        return session_frame(name, self.cfg.llm.name, split, sessions, metrics, seed)

    def ranks(self, name: str) -> Ranks:
        """Ranks of a row as a stage."""

        def build(work: Path) -> None:
            found = getattr(self, f"_{name}")()
            save_file({split: ranks.contiguous() for split, ranks in found.items()}, work / "ranks.safetensors")

        key: dict[str, Any] = {"seed": self.cfg.seed, "test": self.cfg.evaluation.test}
        after = ["sessions"]
        if name == "sasrec":
            key["sasrec"] = plain(self.cfg.evaluation.sasrec)
        elif name in ("empty_prompt", "no_hint"):
            after = ["scoring"]
        elif name not in ("popularity", "item_knn"):
            after = self._made_from(name)
        folder = self.run.run_stage(f"rows/{name}", build, key=key, after=tuple(after))
        return load_file(folder / "ranks.safetensors")

    def _made_from(self, name: str) -> list[str]:
        """Visit the stages that a hint row is made from, and name them."""
        after = [f"round_{self.rounds}/hints"]
        if self.cfg.evaluation.matrix:
            for split in self.splits:
                self._matrix(split)
            after.append("matrix/test")
        if self.cfg.agent.rewards == "matrix":
            after.append(f"round_{self.rounds}/rewards")
        elif self.cfg.evaluation.matrix and "validation" in self.splits:
            after.append("matrix/validation")
        return after + (self.agents(name) if name in AGENTS else [])

    # --- without a language model -------------------------------------------------------------------------------------

    def _scored(self, scores: Callable[[Tensor], Tensor]) -> Ranks:
        return {split: self._places(self.ground.part(split), scores)[None, None] for split in self.splits}

    def _places(self, sessions: Tensor, scores: Callable[[Tensor], Tensor]) -> Tensor:
        candidates = self.data.lists.items[sessions]
        return target_ranks(scores(sessions), candidates, self.data.lists.targets(sessions), seed=self.cfg.seed)

    def _popularity(self) -> Ranks:
        d = self.data
        return self._scored(lambda index: popularity_scores(d.sequences, d.lists, index, len(d.items) - 1))

    def _item_knn(self) -> Ranks:
        d = self.data
        return self._scored(lambda index: item_knn_scores(d.sequences, d.lists, index, len(d.items) - 1))

    def _sasrec(self) -> Ranks:
        d = self.data
        with step("SASRec", 1, "fits") as progress:
            module = fit_sasrec(
                d.sequences,
                len(d.items) - 1,
                validation=(d.lists, d.splits.validation),
                seed=self.cfg.seed,
                **by_one(self.ground.device),
                **self.cfg.evaluation.sasrec,
            )
            progress(1)
        return self._scored(lambda index: sasrec_scores(module, d.lists, index))

    # --- the language model -------------------------------------------------------------------------------------------

    def _empty_prompt(self) -> Ranks:
        with step("ranking without the session", 2, "splits") as progress:

            def scores(sessions: Tensor) -> Tensor:
                found = self.ground.ranker.empty_scores(sessions)
                progress(1)
                return found

            return self._scored(scores)

    def _no_hint(self) -> Ranks:
        none = {split: torch.zeros(len(self.ground.part(split)), dtype=torch.long) for split in self.splits}
        return {split: self._with(split, actions) for split, actions in none.items()}

    def _random_hint(self) -> Ranks:
        """The mean over all hints; without the matrix one hint drawn per session."""
        if self.cfg.evaluation.matrix:
            return {split: self._matrix(split)[:, 1:].T[None] for split in self.splits}
        chance = torch.Generator().manual_seed(self.cfg.seed)
        hints = len(self.loop.base(self.rounds).kept)
        return {
            split: self._with(split, torch.randint(1, hints + 1, (len(self.ground.part(split)),), generator=chance))
            for split in self.splits
        }

    def _best_fixed_hint(self) -> Ranks:
        return {split: self._with(split, self.actions("best_fixed_hint", split)[0]) for split in self.splits}

    def _ppo(self) -> Ranks:
        return self._of_agents("ppo")

    def _full_information(self) -> Ranks:
        return self._of_agents("full_information")

    def _of_agents(self, name: str) -> Ranks:
        def over_seeds(split: str) -> Tensor:
            return torch.cat([self._with(split, actions) for actions in self.actions(name, split)])

        return {split: over_seeds(split) for split in self.splits}

    def _oracle(self) -> Ranks:
        """The best of all hints and none, chosen by looking at the target."""
        return {split: self._matrix(split).min(1).values[None, None] for split in self.splits}

    def _with(self, split: str, actions: Tensor) -> Tensor:
        """[1, 1, n] ranks when these actions [n] are taken."""
        sessions = self.ground.part(split)
        if self.cfg.evaluation.matrix and actions.any():
            return self._matrix(split).gather(1, actions[:, None]).squeeze(1)[None, None]
        if actions.any():
            self.loop.asked(self.rounds).set_hints(self.loop.base(self.rounds).texts)
        return self.loop.ranks(sessions, actions, f"ranking {split} sessions")[None, None]

    def _matrix(self, split: str) -> Tensor:
        """[n, A + 1] ranks with every action."""
        if split == "test":
            return self.test_matrix["ranks"]
        return self.loop.all_ranks(self.ground.part(split), self.rounds)

    @cached_property
    def test_matrix(self) -> dict[str, Tensor]:
        """Ranks and gains of every hint for the test sessions."""
        return self.loop.matrix("matrix/test", self.ground.test, self.rounds)

    # --- what was chosen ----------------------------------------------------------------------------------------------

    def agents(self, name: str) -> list[str]:
        """Stages of the agents of a row, one per seed; the first PPO agent is the one that led the reflection."""
        stages = [f"agents/{name}_{seed}" for seed in range(self.cfg.agent.seeds)]
        return [f"round_{self.rounds}/agent", *stages[1:]] if name == "ppo" else stages

    def actions(self, name: str, split: str) -> list[Tensor]:
        """The actions [n] a row takes, per seed."""
        sessions = self.ground.part(split)
        if name == "best_fixed_hint":
            return [torch.full((len(sessions),), self.best_fixed, dtype=torch.long)]
        states = self.ground.states[sessions]
        return [self.loop.policy(self.rounds, stage).greedy(states) for stage in self.agents(name)]

    @cached_property
    def best_fixed(self) -> int:
        """The one action that does best on the training sessions; online: in what the filter saw of them."""
        if self.cfg.agent.rewards == "matrix":
            train = self.data.splits.train
            gains = self.loop.matrix_of(self.rounds)["gains"][: len(train)]  # the training sessions stand first
            return 1 + int(gains[:, 1:].mean(0).argmax())
        kept = self.loop.base(self.rounds).kept
        return 1 + max(range(len(kept)), key=lambda n: -math.inf if (gain := kept[n].gain_others) is None else gain)

    def choices(self) -> pl.DataFrame:
        """What each row picked for every test session: session, agent, hint (its id, 0 = none), rank, rank_no_hint."""
        sessions = self.ground.test
        kept = self.loop.base(self.rounds).kept
        ids = torch.tensor([0, *(hint.id for hint in kept)])
        plain_ranks = self.ranks("no_hint")["test"][0, 0] if "no_hint" in self.shown else None
        frames = []
        for name in ("best_fixed_hint", *AGENTS, "oracle"):
            if name not in self.shown:
                continue
            oracle = name == "oracle"
            actions = self._matrix("test").min(1).indices if oracle else self.actions(name, "test")[0]
            frames.append(
                pl.DataFrame(
                    {
                        "session": sessions.numpy(),
                        "agent": [name] * len(sessions),
                        "hint": ids[actions].numpy(),
                        "rank": self.ranks(name)["test"][0, 0].numpy(),
                        "rank_no_hint": None if plain_ranks is None else plain_ranks.numpy(),
                    }
                )
            )
        return pl.concat(frames) if frames else pl.DataFrame()
