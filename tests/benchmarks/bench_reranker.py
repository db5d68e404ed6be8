"""A training epoch of the rerankers against lists fetched one by one and an adaptor per candidate (as in KAR)."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_rec.data.lists import ListSet
from lit_rec.data.sessions import SessionDataModule
from lit_rec.rerankers.module import RerankerModule
from lit_rec.rerankers.training import quiet
from tests.benchmarks.harness import Row, interleave
from tests.benchmarks.worlds import ITEMS, USERS, lists

LISTS, BATCH, WIDTH = 24_000, 256, 384


class OneByOne(Dataset):
    """One list per item, as most code serves them."""

    def __init__(self, source: ListSet, index: Tensor) -> None:
        self.source, self.index = source, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        n = int(self.index[place])
        return {"user": self.source.user[n], "items": self.source.items[n], "labels": self.source.labels[n]}


class PerCandidate(RerankerModule):
    """Adapts the knowledge of every candidate and of its user anew."""

    def forward(self, batch: Any) -> Tensor:
        items, knowledge = batch["items"], self.knowledge
        user = batch["user"][:, None].expand_as(items)

        def adapted(side: str, rows: Tensor) -> Tensor:
            if side not in knowledge.towers:
                return torch.zeros(*rows.shape, 0)
            vectors = getattr(knowledge, f"{side}_vectors")[rows.flatten()]
            return knowledge.adapt(side, vectors).view(*rows.shape, -1)

        x = torch.cat([self.features(items), adapted("user", user), adapted("item", items)], dim=-1)
        return self.ranker(x, items > 0)


def epoch(kind: type[RerankerModule], architecture: str, data: Any, vectors: dict[str, Tensor]) -> float:
    """Train one epoch; returns its mean loss."""
    torch.manual_seed(0)
    module = kind(n_items=ITEMS, architecture=architecture, **vectors)
    with quiet():
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data)
    return float(trainer.callback_metrics["train/loss"])


def run() -> list[Row]:
    """Lists per second."""
    source, splits = lists(LISTS)
    draw = torch.Generator().manual_seed(0)
    known = {
        "user_vectors": torch.randn(USERS, WIDTH, generator=draw),
        "item_vectors": torch.randn(ITEMS + 1, WIDTH, generator=draw),
    }
    rows = []
    for vectors, reach in ((known, 8.0), ({}, 4.0)):
        for architecture in ("dlcm", "prm"):
            rows.append(_compare(source, splits, architecture, vectors, reach))
    return rows


def _compare(source: ListSet, splits: Any, architecture: str, vectors: dict[str, Tensor], reach: float) -> Row:
    module = SessionDataModule(source, splits, batch_size=BATCH)
    index = module.index("train")
    losses: dict[str, float] = {}

    def ours() -> None:
        loader = SessionDataModule(source, splits, batch_size=BATCH, seed=1).train_dataloader()
        losses["ours"] = epoch(RerankerModule, architecture, loader, vectors)

    def peer() -> None:
        shuffled = torch.Generator().manual_seed(1)
        loader = DataLoader(OneByOne(source, index), BATCH, shuffle=True, generator=shuffled)
        losses["peer"] = epoch(PerCandidate, architecture, loader, vectors)

    ours()
    mine, theirs = interleave(ours, peer)
    assert abs(losses["ours"] - losses["peer"]) < 0.02 * abs(losses["peer"]), losses  # the same training
    name = f"{architecture.upper()}, one epoch of {len(index):,} lists, "
    name += f"{WIDTH}-d knowledge" if vectors else "no knowledge"
    note = f"mean loss {losses['ours']:.4f} against {losses['peer']:.4f}"
    rates = len(index) / mine, len(index) / theirs
    return Row(name, "list by list, adaptor per candidate", *rates, "lists/s", theirs / mine, reach, note)
