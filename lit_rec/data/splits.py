"""Who is trained on, who is chosen by, who is tested."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rec.errors import UserError


@dataclass(frozen=True)
class Splits:
    """User rows, each a sorted int64 tensor; the three are disjoint and cover all users."""

    train: Tensor
    validation: Tensor
    test: Tensor


def split_users(
    n_users: int,
    *,
    protocol: str = "strict",
    test: float = 0.1,
    validation: float = 0.1,
    fold: int = 0,
    folds: int = 1,
    seed: int = 0,
) -> Splits:
    """Split users (METHODS 1.5).

    Args:
        n_users: Number of users.
        protocol: With "kar" and one fold the last `test` share of users, by number, is the test set, as in KAR's
            code; else users are drawn at random.
        test: Share of test users with one fold; with several folds every fold's share is 1 / folds.
        validation: Share of all users, taken from the training users; 0 is allowed.
        fold: Which fold.
        folds: Over all folds every user is a test user exactly once.
        seed: Of the draw.

    Raises:
        UserError: A part that was asked for would be empty, or the fold does not exist.
    """
    if not 0 <= fold < folds:
        raise UserError(
            f"fold {fold} does not exist: folds are numbered from 0 to {folds - 1}",
            where="config key evaluation.only_folds",
            fix="name existing folds, or null for all",
        )
    generator = torch.Generator().manual_seed(seed)
    if protocol == "kar" and folds == 1:
        order = torch.arange(n_users)
        last = n_users - round(n_users * test)
        held_out, rest = order[last:], order[:last]
        rest = rest[torch.randperm(len(rest), generator=generator)]
    else:
        order = torch.randperm(n_users, generator=generator)
        count = round(n_users * test)
        bounds = [round(n_users * f / folds) for f in range(folds + 1)] if folds > 1 else [0, count]
        first, last = bounds[fold], bounds[fold + 1]
        held_out, rest = order[first:last], torch.cat([order[:first], order[last:]])
    chosen = round(n_users * validation)
    parts = {"train": rest[chosen:], "validation": rest[:chosen], "test": held_out}
    asked = {"train": 1.0, "validation": validation, "test": test if folds == 1 else 1.0}
    for name, users in parts.items():
        if asked[name] > 0 and not len(users):
            raise UserError(
                f"{n_users} users leave no {name} user",
                where="config keys evaluation.test and evaluation.validation",
                fix="use more users, or other shares",
            )
    return Splits(**{name: users.sort().values for name, users in parts.items()})


def sampled(numbers: Tensor, wanted: int | None, seed: int) -> Tensor:
    """A random sample of this many numbers [n], ascending; all of them where there are not more, or None is wanted."""
    if wanted is None or wanted >= len(numbers):
        return numbers
    return numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))[:wanted]].sort().values
