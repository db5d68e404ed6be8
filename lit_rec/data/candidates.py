"""Candidates: sampled negatives, and the models that make them and their order realistic (popularity, BPR)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lit_rec.errors import UserError
from lit_rec.threads import one_thread

FACTORS = 32
STEPS = 500
PARTS = 5  # of the training users, each ordered by a model of the others
BATCH = 2048
RETRIEVED = 100  # `negatives: retrieved` draws from this many best-scored items


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

    def score_all(self, users: np.ndarray) -> np.ndarray:
        """Scores [n, n_items + 1] of all items for users [n]."""
        with one_thread():  # sums in a fixed order: lists must not depend on how many cores a machine has
            product = torch.from_numpy(self.user_factors[users]) @ torch.from_numpy(self.item_factors).T
        return product.numpy() + self.item_bias


def popularity(items: np.ndarray, n_items: int) -> np.ndarray:
    """[n_items + 1] float64 counts of training interactions; padding 0."""
    return np.bincount(items, minlength=n_items + 1).astype(np.float64)


def popularity_ranker(counts: np.ndarray, n_users: int) -> Ranker:
    """Ranks by popularity, the same for everybody."""
    return Ranker(np.zeros((len(counts), 1)), counts, np.zeros((n_users, 1)))


@one_thread()  # sums in a fixed order: lists must not depend on how many cores a machine has
def bpr_ranker(users: np.ndarray, items: np.ndarray, histories: np.ndarray, n_items: int, seed: int) -> Ranker:
    """A matrix factorisation fitted with Bayesian personalised ranking (arXiv 1205.2618).

    It learns item factors only: a user is the mean of the factors of the user's items (as in FISM), in training of
    the other training items, at ranking time of the HISTORY alone. So users who were not trained on are served like
    all others, and no user's targets are looked at but those it is fitted on.

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


@dataclass
class World:
    """What candidates are drawn from.

    Attributes:
        u: [n] users of all interactions.
        i: [n] their items.
        n_items: Number of items, padding not counted.
        history: [U, H] histories, 0 = padding.
        fit_on: [n] interactions that models may be fitted on.
        known: Items a negative may be.
        seed: Of the fitted models.
        past: [n] interactions of the histories; None: nobody has targets.
    """

    u: np.ndarray
    i: np.ndarray
    n_items: int
    history: np.ndarray
    fit_on: np.ndarray
    known: np.ndarray
    seed: int
    past: np.ndarray | None = None
    _bpr: Ranker | None = None

    def popularity(self) -> np.ndarray:
        """[n_items + 1] counts of training interactions."""
        return popularity(self.i[self.fit_on], self.n_items)

    def bpr(self) -> Ranker:
        """The BPR model, fitted when it is first needed."""
        if self._bpr is None:
            self._bpr = self._fitted(self.fit_on)
        return self._bpr

    def _fitted(self, chosen: np.ndarray) -> Ranker:
        return bpr_ranker(self.u[chosen], self.i[chosen], self.history, self.n_items, self.seed)

    def popular_for(self, users: np.ndarray) -> Iterator[tuple[np.ndarray, Ranker]]:
        """The one model that counts for all users [n] of lists, as `bpr_for` gives its own."""
        yield np.ones(len(users), dtype=bool), popularity_ranker(self.popularity(), len(self.history))

    def bpr_for(self, users: np.ndarray) -> Iterator[tuple[np.ndarray, Ranker]]:
        """Models for the users [n] of lists, each with [n] bool, whose it is: one that has seen nobody's targets.

        Users whose targets a model is fitted on are cut in `PARTS`, and each part is served by a model fitted on the
        others: in the order of a training list, too, the targets must not stand in front because they were looked up.
        """
        learnt = np.unique(self.u[self.fit_on & ~self.past]) if self.past is not None else np.empty(0, dtype=np.int64)
        part_of = np.full(len(self.history), -1)
        part_of[np.random.default_rng(self.seed).permutation(learnt)] = np.arange(len(learnt)) % PARTS
        for part in np.unique(part_of[users]):
            mine = part_of[users] == part
            yield mine, self.bpr() if part < 0 else self._fitted(self.fit_on & (part_of[self.u] != part))


def fill(
    items: np.ndarray,
    owner: np.ndarray,
    world: World,
    protocol: str,
    negatives: str,
    rng: np.random.Generator,
) -> None:
    """Put negatives into the free places of `items`, in place: drawn at once, unfit ones drawn again."""
    free = items == 0
    rows, columns = np.nonzero(free)
    draw = _drawer(owner, world, negatives, rng)
    seen = np.unique(world.u * (world.n_items + 1) + world.i)
    if protocol == "strict":
        _enough(owner, world, seen, items.shape[1])
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


def _enough(owner: np.ndarray, world: World, seen: np.ndarray, size: int) -> None:
    known = np.bincount(seen // (world.n_items + 1), minlength=owner.max() + 1)
    worst = int(known[owner].max())
    if len(world.known) - worst < size:
        raise UserError(
            f"a user knows {worst} of {len(world.known)} items: too few are left for a list of {size}",
            where="config key lists.size",
            fix="use shorter lists, or data with more items",
        )


def _drawer(
    owner: np.ndarray, world: World, negatives: str, rng: np.random.Generator
) -> Callable[[np.ndarray], np.ndarray]:
    """A function from list numbers [n] to one drawn item each."""
    if negatives == "uniform":
        return lambda rows: world.known[rng.integers(len(world.known), size=len(rows))]
    if negatives == "popularity":
        weight = np.maximum(world.popularity()[world.known], 1e-9)
        cumulative = np.cumsum(weight / weight.sum())
        return lambda rows: world.known[
            np.minimum(np.searchsorted(cumulative, rng.random(len(rows)), side="right"), len(world.known) - 1)
        ]
    best = _retrieved(np.unique(owner), world)
    return lambda rows: best[owner[rows], rng.integers(RETRIEVED, size=len(rows))]


def _retrieved(users: np.ndarray, world: World) -> np.ndarray:
    """[max user + 1, RETRIEVED] best-scored items the user never interacted with; few such items are repeated."""
    ranker = world.bpr()
    never = np.setdiff1d(np.arange(world.n_items + 1), world.known)
    best = np.zeros((users.max() + 1, RETRIEVED), dtype=np.int64)
    for at in range(0, len(users), 1024):
        part = users[at : at + 1024]
        scores = ranker.score_all(part)
        mine = np.isin(world.u, part)
        scores[np.searchsorted(part, world.u[mine]), world.i[mine]] = -np.inf
        scores[:, never] = -np.inf
        found = np.isfinite(scores).sum(axis=1)
        if not found.all():
            raise UserError(
                "a user knows every item: there is nothing to retrieve",
                where="config key lists.negatives",
                fix="use lists.negatives=uniform, or data with more items",
            )
        depth = min(RETRIEVED, scores.shape[1])
        top = np.argpartition(-scores, depth - 1, axis=1)[:, :depth]
        order = np.argsort(-np.take_along_axis(scores, top, 1), axis=1, kind="stable")
        top = np.take_along_axis(top, order, 1)  # best first, so that what is not a candidate comes last
        cycle = np.arange(RETRIEVED) % np.minimum(found, depth)[:, None]
        best[part] = np.take_along_axis(top, cycle, 1)
    return best


def _repeated(items: np.ndarray, among: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Which of the given places hold an item that another place of the same list, one of `among` [L, C], holds too."""
    found = np.empty(len(rows), dtype=bool)
    for at in range(0, len(rows), 1 << 20):
        r, c = rows[at : at + (1 << 20)], columns[at : at + (1 << 20)]
        equal = (items[r] == items[r, c][:, None]) & among[r]
        found[at : at + len(r)] = equal.sum(axis=1) > 1
    return found


def _seen(
    items: np.ndarray,
    owner: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    seen: np.ndarray,
    n_items: int,
) -> np.ndarray:
    """Which of the given places hold an item their user has interacted with."""
    keys = owner[rows] * (n_items + 1) + items[rows, columns]
    at = np.minimum(np.searchsorted(seen, keys), len(seen) - 1)
    return seen[at] == keys


def order_candidates(
    items: np.ndarray,
    labels: np.ndarray,
    owner: np.ndarray,
    world: World,
    initial_ranker: str | None,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle the candidates, then let the initial ranker order them; padding stays last."""
    key = rng.random(items.shape)
    order = np.argsort(key, axis=1, kind="stable")
    items, labels = np.take_along_axis(items, order, 1), np.take_along_axis(labels, order, 1)
    if initial_ranker is not None:
        scores = np.empty(items.shape)
        for mine, ranker in world.bpr_for(owner) if initial_ranker == "bpr" else world.popular_for(owner):
            rows = mine.nonzero()[0]
            for at in range(0, len(rows), 65536):
                chunk = rows[at : at + 65536]
                scores[chunk] = ranker.score(owner[chunk], items[chunk])
        order = np.argsort(-scores, axis=1, kind="stable")
        items, labels = np.take_along_axis(items, order, 1), np.take_along_axis(labels, order, 1)
    return items, labels
