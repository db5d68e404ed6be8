"""The DataModule of everything that ranks: candidate lists, served a batch at a time by one gather per field."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_rec.data.lists import ListSet
from lit_rec.data.splits import Splits

Batch = dict[str, Tensor]


def batch_of(lists: ListSet, index: Tensor, history: bool = False) -> Batch:
    """Gather the lists of an index [B] into a batch.

    Returns:
        user, list [B]; items, labels [B, C]; with `history` also history_items and history_ratings [B, H].
    """
    users = lists.user[index]
    batch = {"user": users, "items": lists.items[index], "labels": lists.labels[index], "list": index}
    if history:
        batch |= {
            "history_items": lists.history_items[users],
            "history_ratings": lists.history_ratings[users],
        }
    return batch


class _Batches(Dataset[Batch]):
    """Some of the lists; a whole batch is fetched at once, so nothing is collated."""

    def __init__(self, lists: ListSet, index: Tensor, history: bool) -> None:
        self.lists, self.index, self.history = lists, index, history

    def __len__(self) -> int:
        return len(self.index)

    def __getitems__(self, positions: list[int]) -> Batch:
        return batch_of(self.lists, self.index[torch.tensor(positions)], self.history)


def _whole(batch: Batch) -> Batch:
    return batch


class SessionDataModule(L.LightningDataModule):
    """Serves candidate lists of training, validation and test users.

    Args:
        lists: The candidate lists of all users.
        splits: Who is in which part.
        batch_size: Lists per training step; evaluation takes four times as many.
        with_history: Add the users' histories to the batches.
        seed: Of the order of training lists.
    """

    def __init__(
        self, lists: ListSet, splits: Splits, *, batch_size: int, with_history: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self.lists, self.splits, self.batch_size, self.with_history = lists, splits, batch_size, with_history
        self.order = torch.Generator().manual_seed(seed)

    def index(self, split: str) -> Tensor:
        """The lists of a part of the users."""
        return self.lists.of_users(getattr(self.splits, split))

    def state_dict(self) -> dict[str, Any]:
        """Where the shuffling stands: a resumed fit must see the batches of an undisturbed one."""
        return {"order": self.order.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on shuffling from there."""
        self.order.set_state(state_dict["order"])

    def _loader(self, split: str, *, train: bool = False) -> DataLoader[Batch]:
        data = _Batches(self.lists, self.index(split), self.with_history)
        if train:
            return DataLoader(data, self.batch_size, shuffle=True, generator=self.order, collate_fn=_whole)  # type: ignore[arg-type]
        return DataLoader(data, 4 * self.batch_size, collate_fn=_whole)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training lists in a random order; the last batch may be smaller."""
        return self._loader("train", train=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation lists."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test lists."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Test lists."""
        return self._loader("test")
