"""What every split of a run shares: data, candidate lists, prompts, models, and the run folder they are kept in."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import polars as pl
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_rec.config import instantiate, plain
from lit_rec.data.canonical import RatingsData, attribute_table, sample_users
from lit_rec.data.lists import ListSet, build_lists
from lit_rec.data.splits import Splits, split_users
from lit_rec.errors import UserError
from lit_rec.knowledge.cache import SharedVectors
from lit_rec.llm.language_model import LanguageModel
from lit_rec.llm.prompts import Prompts
from lit_rec.llm.sampler import SamplingSettings
from lit_rec.recipes.models import Models, by_one, sharded
from lit_rec.run.folder import RunFolder
from lit_rec.run.progress import step


class Ground(Models):
    """Data, lists, prompts, encoder and language model of a run; each part is made when it is first needed.

    Args:
        cfg: The whole configuration.
        run: The run folder.
    """

    def __init__(self, cfg: DictConfig, run: RunFolder) -> None:
        super().__init__(cfg, run)
        kind: Callable[..., LanguageModel] = LanguageModel
        if cfg.llm.server:
            from lit_rec.llm.served import ServedLanguageModel  # takes a second to import

            kind = partial(ServedLanguageModel, server=cfg.llm.server, run=run.path)
        self.llm = kind(
            cfg.llm,
            cfg.policy.lora,
            self.store,
            device=self.device,
            seed=cfg.seed,
            cache=self.cache,
            sharded=sharded(cfg),
        )

    # --- data ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _reader(self) -> Any:
        return instantiate(self.cfg.data, "data")

    @cached_property
    def data(self) -> RatingsData:
        """The ratings, cut to a sample of users where `users` says so."""
        data = self._reader.load()
        return data if self.cfg.users is None else sample_users(data, self.cfg.users, self.cfg.seed)

    @cached_property
    def data_key(self) -> dict[str, Any]:
        """Every value the candidate lists depend on."""
        return {
            "data": self._reader.describe(),
            "users": self.cfg.users,
            "lists": plain(self.cfg.lists),
            "folded": self.cfg.evaluation.folds > 1,
            "seed": self.cfg.seed,
        }

    @cached_property
    def lists(self) -> ListSet:
        """The candidate lists of all users."""
        c = self.cfg.lists

        def build(work: Path) -> dict[str, Any]:
            with step("candidate lists", self.data.n_users, "users") as progress:
                lists = build_lists(
                    self.data,
                    protocol=c.protocol,
                    history=c.history,
                    real=c.real,
                    list_size=c.size,
                    negatives=c.negatives,
                    initial_ranker=c.initial_ranker,
                    item_core=c.item_core,
                    time_zone=c.time_zone,
                    seed=self.cfg.seed,
                    train_users=self.splits(0).train if self.cfg.evaluation.folds == 1 else torch.zeros(0).long(),
                )
                progress(self.data.n_users)
            lists.save(work / "lists")
            ids = self.data.users["user_id"].cast(pl.String).to_list()
            (work / "users.json").write_text(json.dumps(ids))  # samples of one data set share users, not their numbers
            return lists.report

        return ListSet.load(self.run.run_stage("lists", build, key=self.data_key) / "lists")

    def splits(self, fold: int) -> Splits:
        """Training, validation and test users of a fold."""
        e = self.cfg.evaluation
        if e.folds > self.data.n_users:
            raise UserError(
                f"{self.data.n_users} users are too few for {e.folds} folds",
                where="config key evaluation.folds",
                why="every fold has test users of its own",
                fix="use fewer folds, or more users",
            )
        return split_users(
            self.data.n_users,
            protocol=self.cfg.lists.protocol,
            test=e.test,
            validation=e.validation,
            fold=fold,
            folds=e.folds,
            seed=self.cfg.seed,
        )

    def keep_split(self, fold: int) -> Splits:
        """The split of a fold, written down as a stage that others depend on."""
        splits = self.splits(fold)
        e = self.cfg.evaluation

        def build(work: Path) -> dict[str, Any]:
            parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
            save_file({k: v.contiguous() for k, v in parts.items()}, work / "users.safetensors")
            return {k: len(v) for k, v in parts.items()} | {"items": self.data.n_items}

        key = {"test": e.test, "validation": e.validation, "folds": e.folds, "fold": fold, "seed": self.cfg.seed}
        _ = self.lists
        self.run.run_stage(f"fold_{fold}/split", build, key=key, after=("lists",))
        return splits

    @cached_property
    def prompts(self) -> Prompts:
        """The prompts of every user and item."""
        p = self.cfg.prompt
        histories = (self.lists.history_items, self.lists.history_ratings)
        return Prompts(self.data, histories, p.template, p.history, p.factors)

    # --- knowledge that no round changes ----------------------------------------------------------------------------

    @cached_property
    def _knowledge(self) -> dict[str, Tensor]:
        """History vectors of every user and item vectors, encoded once."""
        items = range(1, self.data.n_items + 1)

        def build(work: Path) -> dict[str, Any]:
            texts = self._item_texts()
            histories = [self.prompts.history_text(u, limit=self.cfg.lists.history) for u in range(self.data.n_users)]
            with step("encoding items and histories", len(texts) + len(histories), "texts") as progress:
                vectors = self.encoder.encode(texts, progress=progress)
                padding = torch.zeros(1, vectors.shape[1])
                encoded = {
                    "items": torch.cat([padding, vectors]),
                    "history": self.encoder.encode(histories, progress=progress),
                }
            save_file(encoded, work / "vectors.safetensors")
            pl.DataFrame({"item": list(items), "text": texts}).write_parquet(work / "items.parquet")
            return {"items": len(texts), "histories": len(histories)}

        k = self.cfg.knowledge
        key: dict[str, Any] = {"encoder": self.encoder_key, "item_text": k.item_text}
        if k.item_text == "llm":
            key |= {"item_tokens": k.item_tokens, "prompt": plain(self.cfg.prompt), "llm": self.llm_key}
        folder = self.run.run_stage("knowledge", build, key=key, after=("lists",))
        return load_file(folder / "vectors.safetensors")

    def _item_texts(self) -> list[str]:
        """What is known of each item: title and attributes, or the LLM's description with the title in front."""
        items = range(1, self.data.n_items + 1)
        plain_texts = [self.prompts.item_text(i) for i in items]
        if self.cfg.knowledge.item_text == "attributes":
            return plain_texts
        settings = SamplingSettings(self.cfg.knowledge.item_tokens, self.cfg.llm.temperature, self.cfg.llm.top_p)
        with step("items: the LLM describes", len(plain_texts), "answers") as progress:
            given = self.llm.answers(
                [self.prompts.item(i) for i in items], [1] * len(plain_texts), settings=settings, progress=progress
            )
        return [f"{text}. {answers[0].text}" for text, answers in zip(plain_texts, given, strict=True)]

    @property
    def history_vectors(self) -> Tensor:
        """[U, width]: every user's history text, encoded; no LLM."""
        _ = self.lists
        return self._knowledge["history"]

    @property
    def item_vectors(self) -> Tensor:
        """[n_items + 1, width], row 0 padding."""
        _ = self.lists
        return self._knowledge["items"]

    def reranker_arguments(self, selection: str | None = None) -> dict[str, Any]:
        """What every reranker of the run is built and trained with, knowledge apart."""
        r = self.cfg.reranker
        table, widths = attribute_table(self.data)
        return {
            "n_items": self.data.n_items,
            "attributes": table,
            "attribute_widths": widths,
            "first_attribute_only": self.cfg.lists.protocol == "kar",
            "rating_max": self.data.rating_max,
            "architecture": r.architecture,
            "architecture_args": plain(r.args),
            "loss": r.loss,
            "temperature": r.temperature,
            "lr": r.lr,
            "batch_size": r.batch_size,
            "max_epochs": r.max_epochs,
            "patience": r.patience,
            "metric": r.metric,
            **by_one(self.device),
            "selection": selection or "validation",
        }


def encode_knowledge(
    encoder: SharedVectors,
    kind: str,
    prompts: Prompts,
    rows: Sequence[int],
    texts: Sequence[str],
    histories: Tensor | None,
) -> Tensor:
    """[n, width] what a reranker reads of texts about users.

    Args:
        encoder: The text encoder.
        kind: "answer", "kar" (history and answer as one text) or "both" (history's vector beside the answer's).
        prompts: Know the users' histories.
        rows: [n] whose text it is, as the prompts number users.
        texts: [n].
        histories: [n, d] the users' histories, encoded; only "both" needs them.
    """
    if kind == "kar":
        return encoder.encode([f"{prompts.history_text(u)} {t}" for u, t in zip(rows, texts, strict=True)], cut=True)
    vectors = encoder.encode(list(texts))
    if kind == "answer":
        return vectors
    assert histories is not None
    return torch.cat([histories, vectors], dim=1)
