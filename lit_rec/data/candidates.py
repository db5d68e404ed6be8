"""Models that make candidate lists realistic: popularity, and a matrix factorisation fitted with BPR."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

FACTORS = 32
STEPS = 500
BATCH = 2048


@dataclass(frozen=True)
class Ranker:
    """Scores items for users.

    Attributes:
        item_factors: [n_items + 1, D].
        item_bias: [n_items + 1]; row 0, padding, is never a candidate.
        user_factors: [U, D].
    """

    item_factors: np.ndarray
    item_bias: np.ndarray
    user_factors: np.ndarray

    def score(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Scores of items [n, k] for users [n]."""
        return np.einsum("nd,nkd->nk", self.user_factors[users], self.item_factors[items]) + self.item_bias[items]


def popularity(items: np.ndarray, n_items: int) -> np.ndarray:
    """[n_items + 1] float64 counts of training interactions; padding 0."""
    return np.bincount(items, minlength=n_items + 1).astype(np.float64)


def popularity_ranker(counts: np.ndarray, n_users: int) -> Ranker:
    """Ranks by popularity, the same for everybody."""
    return Ranker(np.zeros((len(counts), 1)), counts, np.zeros((n_users, 1)))


def bpr_ranker(
    users: np.ndarray, items: np.ndarray, histories: np.ndarray, n_items: int, seed: int
) -> Ranker:
    """A matrix factorisation fitted with Bayesian personalised ranking (arXiv 1205.2618).

    It learns item factors only: a user is the mean of the factors of the user's items (as in FISM), in training of the other
    training items, at ranking time of the HISTORY alone. So users who were not trained on are served like all others, and
    no user's targets are looked at.

    Args:
        users: [n] training interactions, user rows.
        items: [n] their items.
        histories: [U, H] histories of all users, 0 = padding.
        n_items: Number of items.
        seed: Of initial factors and negatives.
    """
    generator = torch.Generator().manual_seed(seed)
    source = torch.nn.Parameter(0.1 * torch.randn(n_items + 1, FACTORS, generator=generator))
    target = torch.nn.Parameter(0.1 * torch.randn(n_items + 1, FACTORS, generator=generator))
    bias = torch.nn.Parameter(torch.zeros(n_items + 1))
    optimiser = torch.optim.Adam([source, target, bias], lr=0.02)
    history = torch.from_numpy(histories)
    owner, wanted = torch.from_numpy(users).long(), torch.from_numpy(items).long()
    for _ in range(STEPS):
        pick = torch.randint(len(owner), (min(BATCH, len(owner)),), generator=generator)
        positive = wanted[pick]
        negative = torch.randint(1, n_items + 1, (len(pick),), generator=generator)
        seen = history[owner[pick]]
        mask = (seen > 0) & (seen != positive[:, None])  # the item itself must not help to find it
        user = (source[seen] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        gap = (user * (target[positive] - target[negative])).sum(1) + bias[positive] - bias[negative]
        penalty = 1e-4 * (user.square().sum(1) + target[positive].square().sum(1)).mean()
        loss = -F.logsigmoid(gap).mean() + penalty
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        mask = history > 0
        everyone = (source[history] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    return Ranker(target.detach().numpy(), bias.detach().numpy(), everyone.numpy())
