"""A small world whose truth is known: users love one genre; only their knowledge or history tells which."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rec.data.lists import ListSet

GENRES = 4


@dataclass
class World:
    lists: ListSet
    n_items: int
    attributes: Tensor  # [n_items + 1, 1]
    user_vectors: Tensor  # [U, 8], carries the user's genre
    item_vectors: Tensor  # [n_items + 1, 8], carries the item's genre
    train: Tensor
    validation: Tensor

    def arguments(self, *, knowledge: bool = True) -> dict[str, Any]:
        """What `fit_reranker` needs to learn this world."""
        arguments = {
            "lists": self.lists,
            "n_items": self.n_items,
            "attributes": self.attributes,
            "train_users": self.train,
            "validation_users": self.validation,
            "dim": 8,
            "adaptor": {"hidden": 16, "out": 8, "specific": 2},
            "lr": 5e-3,
            "batch_size": 64,
            "max_epochs": 8,
            "patience": 8,
        }
        if knowledge:
            arguments |= {"user_vectors": self.user_vectors, "item_vectors": self.item_vectors}
        return arguments


def make_world(users: int = 200, lists_each: int = 6, n_items: int = 80, size: int = 8) -> World:
    generator = torch.Generator().manual_seed(0)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    genre = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + integers(GENRES, n_items)])
    love = 1 + integers(GENRES, users)
    user = torch.arange(users).repeat_interleave(lists_each)
    items = 1 + integers(n_items, len(user), size)
    labels = (genre[items] == love[user, None]).float()
    history = 1 + integers(n_items, users, 10)
    history[:5, 6:] = 0  # some users are newer
    ratings = torch.where(genre[history] == love[:, None], 5.0, 1.0) * (history > 0)
    code = torch.randn(GENRES + 1, 8, generator=generator)
    return World(
        lists=ListSet(user, items, labels, history, ratings, {}),
        n_items=n_items,
        attributes=genre[:, None],
        user_vectors=code[love] + 0.1 * torch.randn(users, 8, generator=generator),
        item_vectors=code[genre] + 0.1 * torch.randn(n_items + 1, 8, generator=generator),
        train=torch.arange(0, users * 3 // 4),
        validation=torch.arange(users * 3 // 4, users),
    )


@pytest.fixture(scope="session")
def world() -> World:
    return make_world()
