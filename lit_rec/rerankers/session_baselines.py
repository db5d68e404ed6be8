"""Baselines that rank a session's candidates without a language model (METHODS 2.6): chance, popularity, item-kNN."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_rec.data.candidates import popularity
from lit_rec.data.lists import ListSet
from lit_rec.errors import UserError

PAIRS = 1 << 22  # item pairs in memory at a time
QUERIES = 1 << 16  # items of sessions looked up at a time


def random_scores(lists: ListSet, index: Tensor, seed: int) -> Tensor:
    """Scores without knowledge; those of a session depend on its number and the seed, not on the other sessions asked.

    Args:
        lists: Sessions as lists.
        index: [n] session numbers.
        seed: Of the scores.

    Returns:
        [n, C] float32 in [0, 1).
    """
    return torch.rand(lists.items.shape, generator=torch.Generator().manual_seed(seed))[index]


def popularity_scores(sequences: Tensor, lists: ListSet, index: Tensor, n_items: int) -> Tensor:
    """How often a candidate occurs in the training sequences.

    Args:
        sequences: [T, L] int64 training sequences, 0 = padding.
        lists: Sessions as lists.
        index: [n] session numbers.
        n_items: Items without padding.

    Returns:
        [n, C] float32 counts.
    """
    return torch.from_numpy(_counts(sequences, n_items)).float()[lists.items[index]]


def item_knn_scores(
    sequences: Tensor,
    lists: ListSet,
    index: Tensor,
    n_items: int,
    *,
    shrinkage: float = 10.0,
    k: int | None = None,
    recency: float = 1.0,
) -> Tensor:
    """Candidates by their similarity to the session's items, equals by popularity.

    Two items are as similar as their training sessions are: sim(i, j) = n_ij / (sqrt(n_i n_j) + shrinkage), where n
    counts the sequences that hold the item, or both; an item is not its own neighbour. A candidate's similarity is
    the sum over the places of the session (an item that occurs twice counts twice) of sim(item, candidate) x
    recency ^ (places after it). Only similarities to items of the asked sessions are computed, some rows at a time.

    Args:
        sequences: [T, L] int64 training sequences, 0 = padding.
        lists: Sessions as lists.
        index: [n] session numbers.
        n_items: Items without padding.
        shrinkage: Damps similarities that rest on few sequences; 0 is the plain cosine.
        k: An item's only neighbours are the k most similar ones (equals by popularity, then by number); None: all.
        recency: Weight of a place in relation to the one after it, in (0, 1].

    Returns:
        [n, C] float32. As a tie-break would vanish beside similarities, these are the places of the candidates in the
        session's order: 0 for the worst; equal for candidates of equal similarity and popularity.

    Raises:
        UserError: shrinkage, k or recency is out of its range.
    """
    if shrinkage < 0 or (k is not None and k < 1) or not 0 < recency <= 1:
        raise UserError(
            f"item-kNN cannot work with shrinkage={shrinkage}, k={k}, recency={recency}.",
            fix="Use shrinkage >= 0, k >= 1 (or null for all neighbours) and 0 < recency <= 1.",
        )
    history = lists.history_items[lists.user[index]].numpy()
    candidates = lists.items[index].numpy()
    counts = _counts(sequences, n_items)
    place = np.cumsum(history[:, ::-1] > 0, axis=1)[:, ::-1] - 1  # places after this one
    session, column = np.nonzero(history)
    item = history[session, column]
    order = np.argsort(item, kind="stable")
    session, item, weight = session[order], item[order], recency ** place[session, column][order].astype(float)

    similarity = np.zeros(candidates.shape)
    table = _Occurrences.of(sequences.numpy(), n_items)
    for queries, keys, values in table.neighbours(np.unique(item), counts, shrinkage, k):
        if not len(keys):
            continue
        first, last = np.searchsorted(item, queries[0]), np.searchsorted(item, queries[-1], side="right")
        for at in range(first, last, QUERIES):
            part = slice(at, min(at + QUERIES, last))
            wanted = item[part, None] * (n_items + 1) + candidates[session[part]]
            found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            np.add.at(similarity, session[part], (keys[found] == wanted) * values[found] * weight[part, None])
    return torch.from_numpy(_places(similarity, counts[candidates]))


def _counts(sequences: Tensor, n_items: int) -> np.ndarray:
    """[n_items + 1] how often each item occurs; padding 0."""
    flat = sequences.numpy().ravel()
    return popularity(flat[flat > 0], n_items)


def _places(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Dense ranks [n, C] float32 from 0, ascending in `first`, among equals in `second`."""
    first = first.round(10)  # sums of the same terms in another order are equal
    order = np.lexsort((second, first), axis=-1)
    step = np.zeros(first.shape, dtype=bool)
    for key in (first, second):
        ordered = np.take_along_axis(key, order, axis=1)
        step[:, 1:] |= ordered[:, 1:] != ordered[:, :-1]
    places = np.empty(first.shape, dtype=np.float32)
    np.put_along_axis(places, order, step.cumsum(axis=1).astype(np.float32), axis=1)
    return places


@dataclass(frozen=True)
class _Occurrences:
    """Which sequence holds which item, compressed by rows both ways.

    Attributes:
        n_items: Items without padding.
        items: The items of sequence 0, those of sequence 1, ...; each once per sequence.
        item_start: [T + 1] where a sequence's items begin.
        sequences: The sequences of item 0 (none), those of item 1, ...
        sequence_start: [n_items + 2] where an item's sequences begin.
    """

    n_items: int
    items: np.ndarray
    item_start: np.ndarray
    sequences: np.ndarray
    sequence_start: np.ndarray

    @classmethod
    def of(cls, sequences: np.ndarray, n_items: int) -> "_Occurrences":
        """Index padded sequences [T, L]."""
        row, column = np.nonzero(sequences)
        row, items = np.divmod(np.unique(row * (n_items + 1) + sequences[row, column]), n_items + 1)
        order = np.argsort(items, kind="stable")
        return cls(n_items, items, _starts(row, len(sequences)), row[order], _starts(items[order], n_items + 1))

    def neighbours(
        self, queries: np.ndarray, popular: np.ndarray, shrinkage: float, k: int | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Similarities of some items to all others, in parts that fit into memory.

        Args:
            queries: [q] items, ascending.
            popular: [n_items + 1] decides between equal neighbours.
            shrinkage: See `item_knn_scores`.
            k: See `item_knn_scores`.

        Yields:
            Some of the queries; keys, ascending, query * (n_items + 1) + neighbour; their similarities, float64.
        """
        holders = np.diff(self.sequence_start)
        held = np.diff(self.item_start)
        work = np.concatenate([[0], np.cumsum(held[self.sequences])])
        work = work[self.sequence_start[1:]] - work[self.sequence_start[:-1]]  # [n_items + 1] pairs of an item
        part = np.cumsum(work[queries]) // PAIRS
        for some in np.split(queries, np.flatnonzero(np.diff(part)) + 1):
            owner, at = _ranges(self.sequence_start[some], holders[some])
            sequence = self.sequences[at]
            inner, at = _ranges(self.item_start[sequence], held[sequence])
            query, other = some[owner[inner]], self.items[at]
            keys, both = np.unique((query * (self.n_items + 1) + other)[query != other], return_counts=True)
            query, other = np.divmod(keys, self.n_items + 1)
            values = both / (np.sqrt(holders[query] * holders[other]) + shrinkage)
            if k is not None:
                best = np.lexsort((other, -popular[other], -values, query))  # a query's neighbours stay together
                kept = np.zeros(len(keys), dtype=bool)
                kept[best] = np.arange(len(keys)) - np.searchsorted(query, query) < k
                keys, values = keys[kept], values[kept]
            yield some, keys, values


def _starts(sorted_rows: np.ndarray, n: int) -> np.ndarray:
    """[n + 1] where each of n rows begins in a sorted array of row numbers."""
    return np.searchsorted(sorted_rows, np.arange(n + 1))


def _ranges(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers start, ..., start + length - 1 of every range, one after another, and which range each is of."""
    owner = np.repeat(np.arange(len(start)), length)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(length) - length, length) + start[owner]
