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

from lit_rec.data.candidates import World, fill, order_candidates
from lit_rec.data.canonical import RatingsData
from lit_rec.data.columns import day
from lit_rec.errors import UserError

CHOICES: dict[str, tuple[str | None, ...]] = {
    "protocol": ("strict", "kar"),
    "negatives": ("uniform", "popularity", "retrieved"),
    "initial_ranker": (None, "popularity", "bpr"),
}


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

    def target_columns(self, index: Tensor) -> Tensor:
        """[n] where the target stands in each of these lists [n], of which every one has a single target."""
        return self.labels[index].argmax(1)

    def targets(self, index: Tensor) -> Tensor:
        """[n] the targets' items."""
        return self.items[index, self.target_columns(index)]

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
    time_zone: str = "UTC",
) -> ListSet:
    """Cut every user's interactions into a history and lists of candidates.

    Both protocols: the first n_u = min((len + 1) // 2, history) interactions are the history; from there each list
    takes the next <= `real` interactions and is filled with negatives up to `list_size`. The label of a real item is
    1 when it was rated above `data.positive_above`.

    "kar": time is cut to the calendar date (in `time_zone`) before the stable sort; negatives are drawn without
    looking at the user; lists without a positive stay. "strict": time in seconds; of repeated interactions with an
    item the first counts, so that nothing of the history is a target; negatives are unique in a list and nothing the
    user ever interacted with; lists without a positive are dropped and counted.

    Args:
        data: The ratings.
        protocol: "kar" or "strict".
        history: Longest history.
        real: Interactions per list.
        list_size: Candidates per list.
        negatives: "uniform"; "popularity" (in proportion to training popularity); "retrieved" (from the items a BPR
            model ranks highest for the user).
        initial_ranker: None shuffles the candidates; "popularity" or "bpr" orders them, best first.
        item_core: Drop items with fewer ratings first; 0 keeps all.
        seed: Of everything random.
        train_users: Users whose interactions popularity and BPR may be fitted on; default: all. An empty tensor fits
            them on everybody's history instead, which holds no target: for folds, where every user is tested once.
        time_zone: Whose calendar "kar" uses, an IANA name. KAR's code takes that of the machine it runs on, so that
            lists differ between machines; here it is said.

    Raises:
        UserError: An option is not possible, no user has a list, or there are too few items for a list.
    """
    _check(protocol, negatives, initial_ranker, history, real, list_size)
    u, i, r, report = _ordered(data, protocol, item_core, time_zone)
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
        raise _nobody(f"{data.n_users} users, none with more interactions than the history takes")
    after = place - n_history[u]
    row, column = (first_list[u] + after // real)[~past], (after % real)[~past]
    items = np.zeros((len(owner), list_size), dtype=np.int64)
    labels = np.zeros((len(owner), list_size), dtype=np.float32)
    items[row, column] = i[~past]
    labels[row, column] = r[~past] > data.positive_above

    real_places = items > 0
    rng = np.random.default_rng(seed)
    fit_on = np.ones(len(u), dtype=bool)
    if train_users is not None:
        fit_on = np.isin(u, train_users.numpy()) if len(train_users) else past
    known = np.unique(i) if protocol == "strict" or item_core else np.arange(1, data.n_items + 1)
    world = World(u, i, data.n_items, history_items, fit_on, known, seed, past)
    fill(items, owner, world, protocol, negatives, rng)
    report["negatives_among_real"] = int(
        ((items[:, :, None] == items[:, None, :]) & ~real_places[:, :, None] & real_places[:, None, :]).any(2).sum()
    )
    items, labels = order_candidates(items, labels, owner, world, initial_ranker, rng)
    if protocol == "strict":
        positive = labels.any(axis=1)
        report["lists_without_positive_dropped"] = int((~positive).sum())
        owner, items, labels = owner[positive], items[positive], labels[positive]
        if not len(owner):
            raise _nobody(f"no interaction after a history is rated above {data.positive_above:g}")
    report |= {
        "users": int(data.n_users),
        "users_without_a_list": int(data.n_users - len(np.unique(owner))),
        "items": int(len(known)),
        "interactions": int(len(u)),
        "items_without_title": int((data.items["title"][1:] == "").sum()),
        "lists": int(len(owner)),
        "positives_per_list": round(float(labels.sum(1).mean()), 3),
    }
    user, listed, relevant, items_before, ratings_before = (
        torch.from_numpy(np.ascontiguousarray(a))
        for a in (owner.astype(np.int64), items, labels, history_items, history_ratings)
    )
    return ListSet(user, listed, relevant, items_before, ratings_before, report)


def _check(protocol: str, negatives: str, initial_ranker: str | None, history: int, real: int, list_size: int) -> None:
    given = {"protocol": protocol, "negatives": negatives, "initial_ranker": initial_ranker}
    for key, value in given.items():
        if value not in CHOICES[key]:
            choices = ", ".join("null" if c is None else c for c in CHOICES[key])
            raise UserError(
                f"lists.{key}: {value} is not possible",
                where=f"config key lists.{key}",
                fix=f"use one of {choices}",
            )
    if history < 1:
        raise UserError("a history needs a place", where="config key lists.history", fix="use 1 or more")
    if not 1 <= real < list_size:
        raise UserError(
            f"{real} real items in lists of {list_size} are not possible",
            where="config key lists.real",
            why="a list holds at least one real item and at least one negative",
            fix="use a number from 1 to lists.size - 1",
        )


def _nobody(why: str) -> UserError:
    return UserError(
        "no user has a candidate list",
        where="config keys data and lists.history",
        why=why,
        fix="use users with more interactions, or a smaller lists.history",
    )


def _ordered(
    data: RatingsData, protocol: str, item_core: int, time_zone: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """Interactions sorted by user and time, stable: users, items, ratings; and what was left out."""
    table = data.interactions
    report: dict[str, Any] = {}
    if item_core:
        kept = table.filter(pl.len().over("item") >= item_core)
        report["ratings_dropped_by_item_core"] = len(table) - len(kept)
        table = kept
    time = pl.col("timestamp")
    try:
        if protocol == "kar":
            time = day(time, time_zone)
        table = table.with_columns(time.alias("time")).sort("user", "time", maintain_order=True)
    except pl.exceptions.ComputeError as error:
        raise UserError(
            f"{time_zone} is not a time zone",
            where="build_lists, time_zone",
            why=str(error),
            fix="use an IANA name such as UTC or Asia/Shanghai",
        ) from error
    if protocol == "strict":
        once = table.unique(["user", "item"], keep="first", maintain_order=True)
        report["repeated_interactions_dropped"] = len(table) - len(once)
        table = once
    return (
        table["user"].to_numpy().astype(np.int64),
        table["item"].to_numpy().astype(np.int64),
        table["rating"].to_numpy(),
        report,
    )
