import pytest
import torch
from lightning.pytorch.utilities.data import _update_dataloader
from torch.utils.data.distributed import DistributedSampler

from lit_rec.data.lists import build_lists
from lit_rec.data.sessions import SessionDataModule
from lit_rec.data.splits import Splits, split_users


@pytest.fixture(scope="module")
def lists(make_ratings):
    return build_lists(make_ratings(users=50))


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_every_list_is_served_once_whole_and_with_its_own_values(lists, part):
    splits = split_users(50)
    data = SessionDataModule(lists, splits, batch_size=7, with_history=True)
    loader = {"train": data.train_dataloader, "validation": data.val_dataloader, "test": data.test_dataloader}[part]()
    batches = list(loader)
    index = torch.cat([b["list"] for b in batches])
    assert index.sort().values.tolist() == lists.of_users(getattr(splits, part)).tolist()
    assert len(batches) == -(-len(index) // (7 if part == "train" else 28))  # the last, smaller batch is kept
    for batch in batches:
        at = batch["list"]
        assert torch.equal(batch["items"], lists.items[at])
        assert torch.equal(batch["labels"], lists.labels[at])
        assert torch.equal(batch["user"], lists.user[at])
        assert torch.equal(batch["history_items"], lists.history_items[batch["user"]])
        assert torch.equal(batch["history_ratings"], lists.history_ratings[batch["user"]])


def test_the_seed_fixes_the_order_and_epochs_differ(lists):
    def epochs(seed: int) -> list[list[int]]:
        loader = SessionDataModule(lists, split_users(50), batch_size=8, seed=seed).train_dataloader()
        return [torch.cat([b["list"] for b in loader]).tolist() for _ in range(2)]

    assert epochs(1) == epochs(1)
    assert epochs(1) != epochs(2)
    assert epochs(1)[0] != epochs(1)[1]
    batch = next(iter(SessionDataModule(lists, split_users(50), batch_size=8).train_dataloader()))
    assert set(batch) == {"user", "items", "labels", "list"}


def test_other_training_users_are_another_split(lists):
    some = torch.arange(10)
    data = SessionDataModule(lists, Splits(some, torch.empty(0).long(), torch.empty(0).long()), batch_size=4)
    assert set(torch.cat([b["user"] for b in data.train_dataloader()]).tolist()) <= set(range(10))
    assert list(data.val_dataloader()) == []


def test_lightning_can_put_in_a_distributed_sampler(lists):
    """What the Trainer does to a DataLoader on two ranks; equal numbers of batches, every list on some rank."""
    data, seen, counts = SessionDataModule(lists, split_users(50), batch_size=8), [], []
    for rank in range(2):
        loader = data.train_dataloader()
        loader = _update_dataloader(loader, DistributedSampler(loader.dataset, 2, rank, shuffle=True, seed=0))
        batches = [b["list"] for b in loader]
        counts.append(len(batches))
        seen += torch.cat(batches).tolist()
    assert counts[0] == counts[1]
    assert set(seen) == set(data.index("train").tolist())
