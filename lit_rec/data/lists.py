"""Candidate lists: what a reranker is trained and tested on (METHODS 1.5)."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_rec.data.candidates import Ranker, bpr_ranker, popularity, popularity_ranker
from lit_rec.data.canonical import RatingsData
from lit_rec.errors import UserError

RETRIEVED = 100  # `negatives: retrieved` draws from this many best-scored items


@dataclass
class ListSet:
    """Candidate lists of all users.

    Attributes:
        user: [L] int64, whose list.
        items: [L, C] int64, candidates in the order they are shown; 0 = padding.
        labels: [L, C] float32, relevance.
        history_items: [U, H] int64, what the prompt may use, chronological, left-aligned; 0 = padding.
        history_ratings: [U, H] float32.
        report: Counts worth telling.
    """

    user: Tensor
    items: Tensor
    labels: Tensor
    history_items: Tensor
    history_ratings: Tensor
    report: dict[str, Any] = field(default_factory=dict)

    def of_users(self, users: Tensor) -> Tensor:
        """Indices of the lists of these users, ascending."""
        wanted = torch.zeros(len(self.history_items), dtype=torch.bool)
        wanted[users] = True
        return wanted[self.user].nonzero().squeeze(1)

    def save(self, path: Path) -> None:
        """Write `path`.safetensors and `path`.json."""
        tensors = {k: v.contiguous() for k, v in vars(self).items() if isinstance(v, Tensor)}
        save_file(tensors, path.with_suffix(".safetensors"))
        path.with_suffix(".json").write_text(json.dumps(self.report, indent=1))

    @classmethod
    def load(cls, path: Path) -> "ListSet":
        """Read what `save` wrote."""
        report = json.loads(path.with_suffix(".json").read_text())
        return cls(**load_file(path.with_suffix(".safetensors")), report=report)


def build_lists(
    data: RatingsData,
    *,
    protocol: str = "strict",
    history: int = 30,
    real: int = 4,
    list_size: int = 10,
    negatives: str = "uniform",
    initial_ranker: str | None = None,
    item_core: int = 0,
    seed: int = 0,
    train_users: Tensor | None = None,
) -> ListSet:
    """Cut every user's interactions into a history and lists of candidates.

    Both protocols: the first n_u = min((len + 1) // 2, history) interactions are the history; from there each list takes the
    next <= `real` interactions and is filled with negatives up to `list_size`. The label of a real item is 1 when it was
    rated above `data.positive_above`.

    "kar": time is cut to the calendar date (UTC) before the stable sort; negatives are drawn without looking at the user;
    lists without a positive stay. "strict": time in seconds; negatives are unique in a list and nothing the user ever
    interacted with; lists without a positive are dropped and counted.

    Args:
        data: The ratings.
        protocol: "kar" or "strict".
        history: Longest history.
        real: Interactions per list.
        list_size: Candidates per list.
        negatives: "uniform"; "popularity" (in proportion to training popularity); "retrieved" (from the items a BPR model
            ranks highest for the user).
        initial_ranker: None shuffles the candidates; "popularity" or "bpr" orders them, best first.
        item_core: Drop items with fewer ratings first; 0 keeps all.
        seed: Of everything random.
        train_users: Users whose interactions popularity and BPR may be fitted on; default: all.

    Raises:
        UserError: No user has a list, or there are too few items for a list.
    """
    u, i, r, report = _ordered(data, protocol, item_core)
    counts = np.bincount(u, minlength=data.n_users)
    start = np.concatenate([[0], np.cumsum(counts)[:-1]])
    place = np.arange(len(u)) - start[u]  # position of an interaction in its user's sequence
    n_history = np.minimum((counts + 1) // 2, history)
    past = place < n_history[u]
    history_items = np.zeros((data.n_users, history), dtype=np.int64)
    history_ratings = np.zeros((data.n_users, history), dtype=np.float32)
    history_items[u[past], place[past]] = i[past]
    history_ratings[u[past], place[past]] = r[past]

    lists_per_user = -(-(counts - n_history) // real)
    first_list = np.concatenate([[0], np.cumsum(lists_per_user)[:-1]])
    owner = np.repeat(np.arange(data.n_users), lists_per_user)
    if not len(owner):
        raise UserError(
            "no user has a candidate list",
            where="config keys data and lists.history",
            why=f"{data.n_users} users, none with more interactions than the history takes",
            fix="use users with more interactions, or a smaller lists.history",
        )
    after = place - n_history[u]
    row, column = (first_list[u] + after // real)[~past], (after % real)[~past]
    items = np.zeros((len(owner), list_size), dtype=np.int64)
    labels = np.zeros((len(owner), list_size), dtype=np.float32)
    items[row, column] = i[~past]
    labels[row, column] = r[~past] > data.positive_above

    real_places = items > 0
    rng = np.random.default_rng(seed)
    fit_on = np.ones(data.n_users, dtype=bool)
    if train_users is not None:
        fit_on = np.zeros(data.n_users, dtype=bool)
        fit_on[train_users.numpy()] = True
    known = np.unique(i) if protocol == "strict" else np.arange(1, data.n_items + 1)
    world = _World(u, i, data.n_items, history_items, fit_on, known, seed)
    _fill(items, owner, world, protocol, negatives, rng)
    report["negatives_among_real"] = int(
        ((items[:, :, None] == items[:, None, :]) & ~real_places[:, :, None] & real_places[:, None, :]).any(2).sum()
    )
    items, labels = _order(items, labels, owner, world, initial_ranker, rng)
    if protocol == "strict":
        positive = labels.any(axis=1)
        report["lists_without_positive_dropped"] = int((~positive).sum())
        owner, items, labels = owner[positive], items[positive], labels[positive]
    report |= {
        "users": int(data.n_users),
        "users_without_a_list": int(data.n_users - len(np.unique(owner))),
        "items": int(len(known)),
        "interactions": int(len(u)),
        "lists": int(len(owner)),
        "positives_per_list": round(float(labels.sum(1).mean()), 3),
    }
    arrays = (owner.astype(np.int64), items, labels, history_items, history_ratings)
    return ListSet(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays), report=report)


@dataclass
class _World:
    """What candidates are drawn from."""

    u: np.ndarray
    i: np.ndarray
    n_items: int
    history: np.ndarray
    fit_on: np.ndarray
    known: np.ndarray
    seed: int
    _bpr: Ranker | None = None

    def popularity(self) -> np.ndarray:
        return popularity(self.i[self.fit_on[self.u]], self.n_items)

    def bpr(self) -> Ranker:
        if self._bpr is None:
            chosen = self.fit_on[self.u]
            self._bpr = bpr_ranker(self.u[chosen], self.i[chosen], self.history, self.n_items, self.seed)
        return self._bpr


def _ordered(
    data: RatingsData, protocol: str, item_core: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """Interactions sorted by user and time, stable: users, items, ratings; and what was left out."""
    table = data.interactions
    report: dict[str, Any] = {}
    if item_core:
        kept = table.filter(pl.len().over("item") >= item_core)
        report["ratings_dropped_by_item_core"] = len(table) - len(kept)
        table = kept
    time = pl.col("timestamp") // 86400 if protocol == "kar" else pl.col("timestamp")
    table = table.with_columns(time.alias("time")).sort("user", "time", maintain_order=True)
    return (
        table["user"].to_numpy().astype(np.int64),
        table["item"].to_numpy().astype(np.int64),
        table["rating"].to_numpy(),
        report,
    )


def _fill(
    items: np.ndarray, owner: np.ndarray, world: _World, protocol: str, negatives: str, rng: np.random.Generator
) -> None:
    """Put negatives into the free places of `items`, in place: drawn at once, unfit ones drawn again."""
    free = items == 0
    rows, columns = np.nonzero(free)
    draw = _drawer(owner, world, negatives, rng)
    seen = np.unique(world.u * (world.n_items + 1) + world.i)
    if protocol == "strict":
        _enough(owner, world, items.shape[1])
    for _ in range(1000):
        if not len(rows):
            return
        items[rows, columns] = draw(rows)
        if protocol == "kar":  # unique among the negatives, drawn without looking at the user
            again = _repeated(items, free, rows, columns)
        else:
            again = _repeated(items, np.ones_like(free), rows, columns)
            again |= _seen(items, owner, rows, columns, seen, world.n_items)
        rows, columns = rows[again], columns[again]
    raise UserError(
        f"{len(rows)} candidate places cannot be filled with items the user does not know",
        where="config key lists.negatives",
        fix="use lists.negatives=uniform, shorter lists, or data with more items",
    )


def _enough(owner: np.ndarray, world: _World, size: int) -> None:
    known = np.bincount(np.unique(np.stack([world.u, world.i]), axis=1)[0], minlength=owner.max() + 1)
    worst = int(known[owner].max())
    if len(world.known) - worst < size:
        raise UserError(
            f"a user knows {worst} of {len(world.known)} items: too few are left for a list of {size}",
            where="config key lists.size",
            fix="use shorter lists, or data with more items",
        )


def _drawer(owner: np.ndarray, world: _World, negatives: str, rng: np.random.Generator) -> Any:
    """A function from list numbers [n] to one drawn item each."""
    if negatives == "uniform":
        return lambda rows: world.known[rng.integers(len(world.known), size=len(rows))]
    if negatives == "popularity":
        weight = np.maximum(world.popularity()[world.known], 1e-9)
        cumulative = np.cumsum(weight / weight.sum())
        return lambda rows: world.known[
            np.minimum(np.searchsorted(cumulative, rng.random(len(rows)), side="right"), len(world.known) - 1)
        ]
    ranker = world.bpr()
    users = np.unique(owner)
    # Deep enough that a user who knows most of the top items still has items left to draw.
    known_items = np.bincount(world.u, minlength=owner.max() + 1)
    depth = min(len(world.known), RETRIEVED + int(known_items.max()))
    best = np.zeros((owner.max() + 1, RETRIEVED), dtype=np.int64)
    for at in range(0, len(users), 1024):
        part = users[at : at + 1024]
        scores = ranker.user_factors[part] @ ranker.item_factors.T + ranker.item_bias
        mine = np.isin(world.u, part)
        scores[np.searchsorted(part, world.u[mine]), world.i[mine]] = -np.inf
        scores[:, np.setdiff1d(np.arange(world.n_items + 1), world.known)] = -np.inf
        top = np.argsort(-scores, axis=1, kind="stable")[:, : min(depth, RETRIEVED)]
        best[part, : top.shape[1]] = top
        if top.shape[1] < RETRIEVED:
            best[part, top.shape[1] :] = top[:, :1]
    return lambda rows: best[owner[rows], rng.integers(RETRIEVED, size=len(rows))]


def _repeated(items: np.ndarray, among: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Which of the given places hold an item that another place of the same list, one of `among` [L, C], holds too."""
    found = np.empty(len(rows), dtype=bool)
    for at in range(0, len(rows), 1 << 20):
        r, c = rows[at : at + (1 << 20)], columns[at : at + (1 << 20)]
        equal = (items[r] == items[r, c][:, None]) & among[r]
        found[at : at + len(r)] = equal.sum(axis=1) > 1
    return found


def _seen(
    items: np.ndarray, owner: np.ndarray, rows: np.ndarray, columns: np.ndarray, seen: np.ndarray, n_items: int
) -> np.ndarray:
    """Which of the given places hold an item their user has interacted with."""
    keys = owner[rows] * (n_items + 1) + items[rows, columns]
    at = np.minimum(np.searchsorted(seen, keys), len(seen) - 1)
    return seen[at] == keys


def _order(
    items: np.ndarray,
    labels: np.ndarray,
    owner: np.ndarray,
    world: _World,
    initial_ranker: str | None,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle the candidates, then let the initial ranker order them; padding stays last."""
    key = rng.random(items.shape)
    order = np.argsort(key, axis=1, kind="stable")
    items, labels = np.take_along_axis(items, order, 1), np.take_along_axis(labels, order, 1)
    if initial_ranker is not None:
        counts = world.popularity()
        ranker = popularity_ranker(counts, len(world.history)) if initial_ranker == "popularity" else world.bpr()
        scores = np.concatenate(
            [ranker.score(owner[at : at + 65536], items[at : at + 65536]) for at in range(0, len(owner), 65536)]
        )
        order = np.argsort(-scores, axis=1, kind="stable")
        items, labels = np.take_along_axis(items, order, 1), np.take_along_axis(labels, order, 1)
    return items, labels
