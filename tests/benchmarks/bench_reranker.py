"""A training epoch of the rerankers against lists fetched one by one and an adaptor per candidate (as in KAR)."""

import copy
import statistics
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from lit_rec.data.lists import ListSet
from lit_rec.data.sessions import SessionDataModule, batch_of
from lit_rec.data.splits import Splits
from lit_rec.kernels import calls
from lit_rec.knowledge.adaptor import Experts, HybridExpertAdaptor
from lit_rec.rerankers.module import RerankerModule
from lit_rec.rerankers.prm import PRM
from lit_rec.rerankers.training import SMALL, quiet
from lit_rec.threads import one_thread
from tests.benchmarks.harness import Row, interleave, seconds
from tests.benchmarks.worlds import GENRE, ITEMS, USERS, lists

BATCH, WIDTH, CANDIDATES = 256, 384, 10
ALIKE = 1e-5  # mean losses of both sides; they are apart by rounding alone
HISTORY = 5  # items of the history that KAR's code reads with every list, whatever the model (its default)


class PerSample(Dataset[dict[str, Any]]):
    """One list per sample, made of Python lists candidate by candidate, the default collation: as KAR's code has it.

    Vectors are Python lists of numbers too, as they are when read from KAR's JSON files; every sample carries the end
    of its user's history, which DLCM and PRM do not look at.
    """

    def __init__(self, source: ListSet, index: Tensor, users: Tensor | None, items: Tensor | None) -> None:
        fields = (source.user, source.items, source.labels)
        self.data = list(zip(*(field[index].tolist() for field in fields), strict=True))
        self.history = {
            str(n): past
            for n, past in enumerate(
                zip(source.history_items.tolist(), source.history_ratings.long().tolist(), strict=True)
            )
        }
        self.genre = {str(item): genre for item, genre in enumerate(GENRE.tolist())}
        self.users = None if users is None else {str(n): vector for n, vector in enumerate(users.tolist())}
        self.items = None if items is None else {str(n): vector for n, vector in enumerate(items.tolist())}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: int) -> dict[str, Any]:
        user, candidates, labels = self.data[place]
        past, ratings = (values[-HISTORY:] for values in self.history[str(user)])
        sample: dict[str, Any] = {
            "user": torch.tensor(user).long(),
            "items": torch.tensor(candidates).long(),
            "genre": torch.tensor([self.genre[str(item)] for item in candidates]).long(),
            "labels": torch.tensor(labels),
            "past_items": torch.tensor(past).long(),
            "past_genre": torch.tensor([self.genre[str(item)] for item in past]).long(),
            "past_ratings": torch.tensor(ratings).long(),
            "past_length": torch.tensor(len(past)).long(),
        }
        if self.users is not None and self.items is not None:
            sample["user_vector"] = torch.tensor(self.users[str(user)]).float()
            sample["item_vectors"] = [torch.tensor(self.items[str(item)]).float() for item in candidates]
        return sample


class PerCandidateAdaptor(nn.Module):
    """The same experts as modules of their own, called for every candidate with its user: as in KAR's code."""

    def __init__(self, like: HybridExpertAdaptor) -> None:
        super().__init__()
        self.shared = self._experts(like.shared)
        self.own = nn.ModuleList(self._experts(experts) for experts in like.specific)  # type: ignore[arg-type]
        self.gates = copy.deepcopy(like.gates)

    @staticmethod
    def _experts(stack: Experts) -> nn.ModuleList:
        experts = nn.ModuleList()
        for w1, b1, w2, b2 in zip(stack.weight1, stack.bias1, stack.weight2, stack.bias2, strict=True):
            first, second = nn.Linear(w1.shape[1], len(w1)), nn.Linear(w2.shape[1], len(w2))
            with torch.no_grad():
                for layer, weight, bias in ((first, w1, b1), (second, w2, b2)):
                    layer.weight.copy_(weight)
                    layer.bias.copy_(bias)
            experts.append(nn.Sequential(first, nn.ReLU(), second, nn.ReLU()))
        return experts

    def forward(self, towers: list[Tensor]) -> Tensor:
        """[B, d] of each tower to [B, towers * out]."""
        gates = torch.stack([gate(x) for gate, x in zip(self.gates, towers, strict=True)], dim=1).softmax(-1)
        both = torch.stack(towers, dim=1)
        shared = torch.stack([expert(both) for expert in self.shared], dim=2)
        own = [torch.stack([e(x) for e in es], dim=1) for es, x in zip(self.own, towers, strict=True)]  # type: ignore[attr-defined]
        experts = torch.cat([shared, torch.stack(own, dim=1)], dim=2)  # [B, towers, experts, out]
        return (gates.unsqueeze(2) @ experts).flatten(1)


class TextbookPRM(nn.Module):
    """PRM around `nn.MultiheadAttention`, as KAR's code has it."""

    def __init__(self, like: PRM) -> None:
        super().__init__()
        self.like = copy.deepcopy(like)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, C, width] to logits [B, C]."""
        x = x + self.like.positions[: x.shape[1]]
        context, _ = self.like.attention(x, x, x, need_weights=False)
        return self.like.mlp(torch.cat([context, x], dim=-1)).squeeze(-1)


def textbook(ranker: nn.Module) -> nn.Module:
    """The peer's form of it; that of DLCM is around `nn.GRU`, as ours."""
    return TextbookPRM(ranker) if isinstance(ranker, PRM) else copy.deepcopy(ranker)


class PerCandidate(nn.Module):
    """The same reranker with the weights of ours, reading what `PerSample` gives."""

    def __init__(self, module: RerankerModule) -> None:
        super().__init__()
        self.item, self.genre = copy.deepcopy(module.features.item), copy.deepcopy(module.features.attribute)
        self.rating = nn.Embedding(6, module.features.dim)
        self.ranker = textbook(module.ranker)
        known = module.knowledge.adaptor
        self.adaptor = PerCandidateAdaptor(known) if known is not None else None

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Logits [B, C]."""
        past = (self.item(batch["past_items"]), self.genre(batch["past_genre"]).flatten(2))  # type: ignore[misc]
        torch.cat([*past, self.rating(batch["past_ratings"])], dim=-1)  # made for every model there
        parts = [self.item(batch["items"]), self.genre(batch["genre"]).flatten(2)]  # type: ignore[misc]
        if self.adaptor is not None:
            user = batch["user_vector"]
            parts.append(torch.stack([self.adaptor([user, item]) for item in batch["item_vectors"]], dim=1))
        return self.ranker(torch.cat(parts, dim=-1), batch["items"] > 0)


def train_ours(module: RerankerModule, loader: Any) -> float:
    """Train one epoch as the package does; returns its mean loss."""
    with quiet(), one_thread(BATCH * CANDIDATES < SMALL):  # as `fit_reranker` does
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)
    return float(trainer.callback_metrics["train/loss"])


def train_peer(module: PerCandidate, loader: Any) -> float:
    """The usual loop around it."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    losses = []
    for batch in loader:
        loss = F.binary_cross_entropy_with_logits(module(batch), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def plain() -> AbstractContextManager[object]:
    """Torch's layers compute, not our kernels."""
    return patch.object(calls, "library", lambda: None)


def arithmetic(module: RerankerModule, batch: dict[str, Tensor]) -> float:
    """Seconds that the matrix products of a step take per list, at the rate of a large one.

    That is torch's, or oneDNN's where it is faster: on some processors torch's library does half of what they can.
    """
    with plain(), FlopCounterMode(display=False) as counter:  # which counts torch's products alone
        module.training_step(batch, 0).backward()
    a, b = torch.randn(2, 2048, 2048)
    products = [lambda: a @ b]
    if torch.backends.mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    with one_thread(BATCH * CANDIDATES < SMALL):
        fastest = min(statistics.median(seconds(product) for _ in range(9)) for product in products)
    return counter.get_total_flops() / (2 * 2048**3) * fastest / len(batch["items"])


def run(full: bool = False) -> list[Row]:
    """Lists per second."""
    draw = torch.Generator().manual_seed(0)
    known = {
        "user_vectors": torch.randn(USERS, WIDTH, generator=draw),
        "item_vectors": torch.randn(ITEMS + 1, WIDTH, generator=draw),
    }
    cases = [(vectors, kind, reach) for vectors, reach in ((known, 8.0), ({}, 4.0)) for kind in ("dlcm", "prm")]
    counts = {True: (2_000, 16_000), False: (6_000, 96_000)}  # with knowledge the peer takes ten times as long
    sizes = {told: [lists(200_000 if full else count, CANDIDATES) for count in both] for told, both in counts.items()}
    return [_compare(*sizes[bool(vectors)], kind, vectors, reach) for vectors, kind, reach in cases]


def _compare(
    short: tuple[ListSet, Splits], long: tuple[ListSet, Splits], kind: str, vectors: dict[str, Tensor], reach: float
) -> Row:
    """Both train on the short epoch, for their losses; what starting costs Lightning must not count for more than in an
    epoch of MovieLens-1M (200,000 lists), so ours is timed on the long one."""
    source, splits = short
    index = source.of_users(splits.train)
    timed = len(long[0].of_users(long[1].train))
    losses: dict[str, float] = {}

    def fresh(told: dict[str, Tensor] = vectors) -> RerankerModule:
        torch.manual_seed(0)
        return RerankerModule(n_items=ITEMS, architecture=kind, attributes=GENRE, **told)

    def train(data: tuple[ListSet, Splits], told: dict[str, Tensor] = vectors) -> float:
        return train_ours(fresh(told), SessionDataModule(*data, batch_size=BATCH, seed=1).train_dataloader())

    data = PerSample(source, index, vectors.get("user_vectors"), vectors.get("item_vectors"))  # read once, not measured

    def peer() -> None:
        shuffled = torch.Generator().manual_seed(1)
        loader = DataLoader(data, BATCH, shuffle=True, generator=shuffled)
        with plain():
            losses["peer"] = train_peer(PerCandidate(fresh()), loader)

    def peer_in_one_thread() -> None:
        with one_thread():
            peer()

    losses["ours"] = train(short)
    mine, *others = interleave(lambda: train(long), peer, peer_in_one_thread)
    rates = timed / mine, len(index) / min(others)
    assert abs(losses["ours"] - losses["peer"]) < ALIKE, losses  # the same training
    if vectors:  # which one that ignored the knowledge would not pass for
        losses["told nothing"] = train(short, {name: torch.zeros_like(known) for name, known in vectors.items()})
        assert abs(losses["ours"] - losses["told nothing"]) > 10 * ALIKE, losses
    name = f"{kind.upper()}, batches of {BATCH} lists, "
    name += f"{WIDTH}-d knowledge" if vectors else "no knowledge"
    limit = 1 / arithmetic(fresh(), batch_of(source, index[:BATCH]))
    note = f"mean losses {abs(losses['ours'] - losses['peer']):.0e} apart; ours timed on {timed:,} lists, the peer on "
    note += f"{len(index):,}; "
    note += f"{rates[0] / limit:.0%} of the {limit:,.0f} lists/s that the matrix products alone would allow here"
    return Row(
        name,
        "list by list, adaptor per candidate, one thread or all",
        *rates,
        "lists/s",
        rates[0] / rates[1],
        reach,
        note,
    )
