"""A handful of sessions: padded candidates, histories of several lengths, and two films of one title."""

import random

import polars as pl
import torch

from lit_rec.data.lists import ListSet
from lit_rec.data.session_sets import SessionData
from lit_rec.data.splits import Splits

FIRST = ("Dark", "Old", "Last", "Red", "Lost")
SECOND = ("City", "River", "Moon", "Alien", "Waltz", "Garden")
FILMS = [f"{a} {b}{' Again' if n % 4 == 0 else ''}" for n, (a, b) in enumerate((a, b) for a in FIRST for b in SECOND)]
WORDS = sorted({word for film in FILMS for word in film.split()})


def few_sessions(n: int = 5, *, candidates: int = 7, seed: int = 0) -> SessionData:
    """Session s has s % 3 candidates less than there is room for, and 1 + s % 4 items before its target.

    The first two candidates of session 0 are of the same title.
    """
    draw = random.Random(seed)
    titles = [*FILMS, FILMS[0]]
    items = pl.DataFrame({"item_id": ["", *(f"i{k}" for k in range(1, len(titles) + 1))], "title": ["", *titles]})
    shown, labels = torch.zeros(n, candidates, dtype=torch.long), torch.zeros(n, candidates)
    history = torch.zeros(n, 4, dtype=torch.long)
    for s in range(n):
        drawn = draw.sample(range(2, len(titles)), candidates + 4)
        shown[s] = torch.tensor(drawn[:candidates])
        if s == 0:
            shown[s, :2] = torch.tensor([1, len(titles)])
        if s % 3:
            shown[s, candidates - s % 3 :] = 0
        labels[s, draw.randrange(candidates - s % 3)] = 1
        history[s, : 1 + s % 4] = torch.tensor(drawn[candidates : candidates + 1 + s % 4])
    lists = ListSet(torch.arange(n), shown, labels, history, torch.zeros(n, 4))
    none = torch.zeros(0, dtype=torch.long)
    return SessionData(
        "few", items, (), "movie", "watched", lists, Splits(torch.arange(n), none, none), torch.zeros(0, 5), {}
    )
