"""The stages of RLRF4Rec on one split of the users: each is built once, kept in the run folder, and read from there.

A "state" is a state of the LLM: "zero_shot" (untrained), "round_1", "round_2" ... (after that many rounds of DPO),
"random_pairs" and "best_of_n" (the controls). Every state has answers, their vectors and their rewards.
What differs where hints stand in the prompts is in `lit_rec.recipes.unified`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_rec import distributed
from lit_rec.config import plain
from lit_rec.data.splits import Splits
from lit_rec.llm.prompts import Messages
from lit_rec.policy.pairs import conversational, make_pairs
from lit_rec.recipes.ground import Ground
from lit_rec.recipes.judge import Judge
from lit_rec.recipes.models import callbacks_key
from lit_rec.run.cost import WRITTEN
from lit_rec.run.loggers import Board, make_board
from lit_rec.run.progress import step
from lit_rec.run.rates import remember

Build = Callable[[Path], Mapping[str, Any] | None]


class Loop:
    """One split of the users, and everything made on it.

    Args:
        ground: What all splits share: data, lists, prompts, models, run folder.
        splits: Training, validation and test users.
        fold: Number of the split.
    """

    def __init__(self, ground: Ground, splits: Splits, fold: int) -> None:
        self.ground, self.splits, self.fold = ground, splits, fold
        self.cfg, self.run, self.llm = ground.cfg, ground.run, ground.llm
        self._tables: dict[str, pl.DataFrame] = {}
        self._boards: dict[str, Board] = {}
        self.judge = Judge(self)

    # --- plumbing -----------------------------------------------------------------------------------------------------

    def stage(self, name: str, build: Build, key: dict[str, Any], *after: str) -> Path:
        """A stage of this split; `after` names stages of this split, or of the ground with a leading slash."""
        before = tuple(a[1:] if a.startswith("/") else self.name(a) for a in after)
        return self.run.run_stage(self.name(name), build, key=key, after=before)

    def name(self, stage: str) -> str:
        """The stage's full name."""
        return f"fold_{self.fold}/{stage}"

    def board(self, policy: str = "round") -> Board:
        """Curves of this split; each control policy has its own."""
        if policy not in self._boards:
            name = f"fold_{self.fold}" + ("" if policy == "round" else f"_{policy}")
            self._boards[policy] = make_board(self.cfg, self.run.path, name)
        return self._boards[policy]

    def table(self, stage: str, folder: Path, file: str) -> pl.DataFrame:
        """A stage's table, read once."""
        if stage not in self._tables:
            self._tables[stage] = pl.read_parquet(folder / file)
        return self._tables[stage]

    def samples_of(self, state: str) -> int:
        """Answers per training user: N where another round follows, else the one that is the user's knowledge."""
        following = {"zero_shot", *(f"round_{k}" for k in range(1, self.cfg.policy.rounds))}
        return self.cfg.pairs.samples if state in following and self.cfg.policy.rounds > 0 else 1

    @cached_property
    def paired(self) -> set[int]:
        """The training users whose answers make pairs: all, or a sample, which is enough to tune an LLM by."""
        train, wanted = self.splits.train, self.cfg.pairs.users
        drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.cfg.seed))
        return set(train[drawn[:wanted]].tolist())

    # --- what hints change --------------------------------------------------------------------------------------------

    def prompts_of(self, state: str, users: Sequence[int]) -> list[Messages]:
        """What the LLM is asked about these users in a state."""
        return self.ground.prompts.users(users)

    def pairs_from(self, policy: str, number: int) -> str:
        """The state whose answers are the pairs of a policy's round `number`."""
        return "zero_shot" if number == 1 else f"{policy}_{number - 1}"

    def made_by(self, state: str) -> tuple[str, ...]:
        """Stages of this split that the answers of a state depend on."""
        return () if state == "zero_shot" else (f"{state}/policy",)

    def as_in(self, state: str) -> AbstractContextManager[None]:
        """The LLM with the adapter that a state has kept, whatever it has learnt since, here or on another split."""
        kept = next((name for name in self.made_by(state) if name.endswith("/policy")), None)
        return self.llm.wearing(None if kept is None else self.run.stage(self.name(kept)) / "adapter")

    def states(self) -> list[tuple[int, str]]:
        """(number of rounds behind it, state) of every state of the LLM that has rewards."""
        names = [(0, "zero_shot"), *((k, f"round_{k}") for k in range(1, self.cfg.policy.rounds + 1))]
        return [*names, *self.controls()] if self.cfg.policy.rounds > 0 else []

    def flattered(self, state: str) -> bool:
        """Whether something about a state was chosen by the rewards of the held-out users."""
        return False

    def controls(self) -> list[tuple[int, str]]:
        """The control policies among the states."""
        switched = self.cfg.evaluation.controls
        return [(1, name) for name in ("random_pairs", "best_of_n") if switched[name]]

    # --- texts --------------------------------------------------------------------------------------------------------

    def answers(self, state: str) -> pl.DataFrame:
        """The LLM's answers in this state: N for each training user of `paired`, one for everybody else.

        Sample 0 is the user's knowledge.

        Returns:
            user, sample, text, tokens, finish, split; by user and sample.
        """
        groups = [("train", self.splits.train), ("validation", self.splits.validation), ("test", self.splits.test)]
        rows = sorted((int(u), name) for name, users in groups for u in users)
        samples = self.samples_of(state)
        counts = [samples if user in self.paired else 1 for user, _ in rows]

        def build(work: Path) -> dict[str, Any]:
            with step(f"{state}: the LLM writes", sum(counts), "answers") as progress, self.as_in(state):
                given = self.llm.answers(self.prompts_of(state, [u for u, _ in rows]), counts, progress=progress)
            remember(self.cfg, "tokens", progress.extra, progress.seconds)
            written = sum(distributed.gathered(progress.extra))  # the others came from the store, and took no time
            table = pl.DataFrame(
                [
                    {"user": user, "sample": j, "text": a.text, "tokens": a.tokens, "finish": a.finish, "split": name}
                    for (user, name), answers in zip(rows, given, strict=True)
                    for j, a in enumerate(answers)
                ]
            )
            table.write_parquet(work / "answers.parquet")
            return {"answers": len(table), "tokens": int(table["tokens"].sum()), WRITTEN: written}

        made_by = self.made_by(state)
        key = {
            "prompt": plain(self.cfg.prompt),
            "llm": self.ground.llm_key,
            "samples": samples,
            "seed": self.cfg.seed,
        }
        if self.cfg.pairs.users is not None:
            key["sampled users"] = self.cfg.pairs.users
        folder = self.stage(f"{state}/answers", build, key, "split", *made_by)
        return self.table(f"{state}/answers", folder, "answers.parquet")

    def kept_answers(self, state: str) -> pl.DataFrame:
        """The answers of a finished run in this state; the LLM is not asked."""
        return pl.read_parquet(self.run.stage(self.name(f"{state}/answers")) / "answers.parquet")

    def vectors(self, state: str) -> dict[str, Tensor]:
        """Encoded answers of a state.

        Returns:
            "answer" and, where the configuration asks for it, "kar" (history and answer as one text): [answers, width].
        """
        answers = self.answers(state)
        wanted = {self.cfg.knowledge.encode, *self.cfg.evaluation.inputs}
        kinds = [k for k, asked in (("answer", wanted & {"answer", "both"}), ("kar", "kar" in wanted)) if asked]

        def build(work: Path) -> dict[str, Any]:
            texts = {
                "answer": answers["text"].to_list(),
                "kar": [f"{self.ground.prompts.history_text(u)} {t}" for u, t in answers.select("user", "text").rows()],
            }
            with step(f"{state}: encoding", len(kinds) * answers["text"].n_unique(), "texts") as progress:
                encoded = {k: self.ground.encoder.encode(texts[k], cut=k == "kar", progress=progress) for k in kinds}
            save_file(encoded, work / "vectors.safetensors")
            return {"texts": len(answers)}

        key = {"encoder": self.ground.encoder_key, "kinds": kinds}
        return load_file(self.stage(f"{state}/vectors", build, key, f"{state}/answers") / "vectors.safetensors")

    def user_vectors(self, state: str, encode: str, *, shuffle: bool = False) -> Tensor:
        """The users' knowledge in a state: [U, width], zero for users outside this split.

        Args:
            state: Whose answers.
            encode: "answer", "kar", or "both": history and answer vectors side by side.
            shuffle: Give every user the answer of another one (with "both", beside the user's own history).
        """
        answers, vectors = self.answers(state), self.vectors(state)
        first = (answers["sample"] == 0).to_torch().nonzero().squeeze(1)
        users = answers["user"].to_torch().long()[first]
        source = first
        if shuffle:
            source = first[somebody_else(len(first), self.cfg.seed)]
        vectors = {kind: v[source] for kind, v in vectors.items()}
        chosen = self.answer_vectors(vectors, answers[first.tolist()], encode)
        matrix = torch.zeros(self.ground.data.n_users, chosen.shape[1])
        matrix[users] = chosen
        return matrix

    def answer_vectors(self, vectors: dict[str, Tensor], answers: pl.DataFrame, encode: str) -> Tensor:
        """What rerankers read of encoded answers: [n, width], with "both" behind the history's vector."""
        if encode != "both":
            return vectors[encode]
        users = answers["user"].to_torch().long()
        return torch.cat([self.ground.history_vectors[users], vectors["answer"]], dim=1)

    # --- rewards ------------------------------------------------------------------------------------------------------

    def rewards(self, state: str) -> pl.DataFrame:
        """Rewards of the answers to training and validation users; test users are not looked at.

        Returns:
            user, sample, text, tokens, split, reward; users without a candidate list left out.
        """
        answers, vectors = self.answers(state), self.vectors(state)
        judge = self.judge.stage_for(state)
        model = self.judge.model(judge)

        def build(work: Path) -> dict[str, Any]:
            table = answers.with_row_index("row").filter(pl.col("split") != "test")
            users = table["user"].to_torch().long()
            encoded = self.answer_vectors(vectors, answers, self.cfg.knowledge.encode)
            with step(f"{state}: scoring", len(table), "answers") as progress:
                values = self.judge.score(model, users, encoded[table["row"].to_torch().long()])
                progress(len(table))
            table = table.with_columns(pl.Series("reward", values.numpy())).drop("row", "finish")
            table = table.filter(pl.col("reward").is_not_nan())
            table.write_parquet(work / "rewards.parquet")
            return {"answers": len(table), "mean": table["reward"].mean()}

        folder = self.stage(f"{state}/rewards", build, {"reward": self.judge.reward_key}, f"{state}/vectors", judge)
        return self.table(f"{state}/rewards", folder, "rewards.parquet")

    def pairs(self, state: str, rule: str) -> pl.DataFrame:
        """Preference pairs of the training users from the rewarded answers of a state.

        Returns:
            TRL's conversational form: prompt, chosen, rejected, chosen_reward, rejected_reward, user_id.
        """
        rewards = self.rewards(state).filter(pl.col("user").is_in(self.paired))
        wanted = self.cfg.pairs

        def build(work: Path) -> dict[str, Any]:
            pairs, counts = make_pairs(
                rewards, rule=rule, min_gap=wanted.min_gap, max_pairs=wanted.max_pairs, seed=self.cfg.seed
            )
            users = pairs["user"].to_list()
            prompts = self.prompts_of(state, users)
            ids = self.ground.data.users["user_id"].gather(users).to_list()
            conversational(pairs, prompts, ids).write_parquet(work / "pairs.parquet")
            (work / "counts.json").write_text(json.dumps(counts))
            return counts

        key = {"min_gap": wanted.min_gap, "max_pairs": wanted.max_pairs, "rule": rule}
        folder = self.stage(f"{state}/pairs_{rule}", build, key, f"{state}/rewards")
        return self.table(f"{state}/pairs_{rule}", folder, "pairs.parquet")

    # --- the tuned policy ---------------------------------------------------------------------------------------------

    def keep_policy(self, state: str, before: str, rule: str, settings: Any, build: Build) -> Path:
        """The adapter of a state and how its training went."""
        self.pairs(before, rule)
        return self.stage(f"{state}/policy", build, self.policy_key(settings), f"{before}/pairs_{rule}")

    def policy_key(self, settings: Any) -> dict[str, Any]:
        """How a policy is trained on its pairs."""
        key = {"policy": plain(settings), "precision": self.cfg.trainer.precision, "seed": self.cfg.seed}
        return key | callbacks_key(self.cfg)

    def keep_divergence(self, state: str, build: Build) -> float | None:
        """KL(policy || untrained model) per answer."""
        folder = self.stage(f"{state}/divergence", build, {}, f"{state}/answers")
        return json.loads((folder / "divergence.json").read_text())["kl"]


def somebody_else(count: int, seed: int) -> Tensor:
    """[count] another one for each, every one once: a random cycle, so that nobody is left with the own."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    found = torch.empty(count, dtype=torch.long)
    found[order] = order.roll(1)
    return found
