"""What an answer is worth: the reranker that scores it, and never saw its user."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_rec.config import plain
from lit_rec.data.lists import ListSet
from lit_rec.recipes.ground import encode_knowledge
from lit_rec.recipes.models import reranker_health
from lit_rec.rerankers.rewards import CrossFit, Values, cross_fit
from lit_rec.rerankers.training import load_reranker, save_reranker
from lit_rec.run.progress import step

if TYPE_CHECKING:
    from lit_rec.recipes.loop import Loop

FIRST, REFRESHED = "reward_model", "refreshed_model"  # stages of a state


class Judge:
    """The reward models of a split: rerankers trained with the knowledge of a state, cross-fitted over user folds.

    Args:
        loop: The split, its answers and their vectors.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop, self.ground, self.cfg = loop, loop.ground, loop.cfg
        self._models: dict[str, CrossFit] = {}

    def stage_for(self, state: str) -> str:
        """The reward model that judges the answers of a state: the first one, unless it is refreshed.

        A refreshed one is trained on the best answers of the state before, as judged then: pairs from what the LLM
        writes after round k are made by a reranker that has learned from what it wrote before that round.
        """
        if not self.cfg.reward.refresh or not state.startswith("round_"):
            return f"zero_shot/{FIRST}"
        k = int(state.removeprefix("round_"))
        return f"{'zero_shot' if k == 1 else f'round_{k - 1}'}/{REFRESHED}"

    def model(self, name: str = f"zero_shot/{FIRST}") -> CrossFit:
        """The reward model of a stage, trained with the knowledge of its state."""
        if name in self._models:
            return self._models[name]
        state, _, kind = name.rpartition("/")
        reward, items = self.cfg.reward, self.ground.item_vectors
        vectors = self.loop.user_vectors(state, self.cfg.knowledge.encode)
        if kind == REFRESHED:
            vectors = self._best_vectors(state, vectors)

        def build(work: Path) -> dict[str, Any]:
            again = " again" if kind == REFRESHED else ""
            with step(f"{state}: training the reward reranker{again}", reward.folds, "folds") as progress:
                fitted = cross_fit(
                    lists=self.ground.lists,
                    train_users=self.loop.splits.train,
                    validation_users=self.loop.splits.validation,
                    folds=reward.folds,
                    seed=self.cfg.seed,
                    health=partial(reranker_health, self.cfg),
                    **self.ground.reranker_arguments(selection=None if len(self.loop.splits.validation) else "last"),
                    user_vectors=vectors,
                    item_vectors=items,
                )
                progress(reward.folds)
            for number, one in enumerate(fitted.fitted):
                save_reranker(one, work / f"fold_{number}")
            save_file({"fold_of": fitted.fold_of, "user_vectors": vectors}, work / "folds.safetensors")
            return {"folds": reward.folds, "best": [round(f.best_value, 4) for f in fitted.fitted]}

        key = {"reranker": plain(self.cfg.reranker), "folds": reward.folds, "encode": self.cfg.knowledge.encode}
        previous = (f"{state}/rewards",) if kind == REFRESHED else ()
        folder = self.loop.stage(name, build, key, "/knowledge", f"{state}/vectors", *previous)
        saved = load_file(folder / "folds.safetensors")
        fitted = [
            load_reranker(folder / f"fold_{n}", user_vectors=saved["user_vectors"], item_vectors=items)
            for n in range(reward.folds)
        ]
        self._models[name] = CrossFit(fitted, saved["fold_of"])
        return self._models[name]

    def _best_vectors(self, state: str, vectors: Tensor) -> Tensor:
        """The knowledge with every training user's vector replaced by that of the best-rewarded answer."""
        answers = self.loop.answers(state)
        table = answers.with_row_index("row").join(self.loop.rewards(state), on=["user", "sample"], how="inner")
        best = table.sort("user", "reward", "sample", descending=[False, True, False]).unique("user", keep="first")
        every = self.loop.answer_vectors(self.loop.vectors(state), answers, self.cfg.knowledge.encode)
        vectors = vectors.clone()
        vectors[best["user"].to_torch().long()] = every[best["row"].to_torch().long()]
        return vectors

    @property
    def reward_key(self) -> dict[str, Any]:
        """How an answer is scored by a reward model that is there."""
        return {k: v for k, v in plain(self.cfg.reward).items() if k in ("metric", "k", "convention")}

    def score(
        self,
        model: CrossFit,
        users: Tensor,
        vectors: Tensor,
        *,
        lists: ListSet | None = None,
        values: Values | None = None,
    ) -> Tensor:
        """Rewards [n] of encoded texts [n, width] about users [n].

        Args:
            model: Which reward model.
            users: Whom the texts are about.
            vectors: The texts.
            lists: Judged by these alone; nan for a user without one.
            values: In the place of the configuration's metric.
        """
        reward = self.cfg.reward
        return model.answer_rewards(
            self.ground.lists if lists is None else lists,
            vectors,
            users,
            reward=values or reward.metric,
            k=reward.k,
            convention=reward.convention,
        )

    def texts(self, users: Tensor, texts: Sequence[str]) -> Tensor:
        """Rewards [n] of texts about users [n], by the reward model of the untrained LLM's knowledge."""
        return self.score(self.model(), users, self._encoded(users, texts))

    def lists(self, user: Tensor, text: str) -> tuple[Tensor, Tensor]:
        """A user's lists and their logits [lists, C], with a text as the user's knowledge."""
        return self.model().answer_logits(self.ground.lists, self._encoded(user, [text]), user)

    def _encoded(self, users: Tensor, texts: Sequence[str]) -> Tensor:
        """[n, width] what the reward model reads of texts about users [n]."""
        kind, g = self.cfg.knowledge.encode, self.ground
        histories = g.history_vectors[users] if kind == "both" else None
        return encode_knowledge(g.encoder, kind, g.prompts, users.tolist(), texts, histories)
