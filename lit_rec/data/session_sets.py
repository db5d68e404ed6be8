"""Sessions: what somebody did in one sitting, what came next, and the candidates it hides among (METHODS 2.4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import polars as pl
import torch
from torch import Tensor

from lit_rec.data.lists import ListSet
from lit_rec.data.splits import Splits
from lit_rec.errors import UserError


@dataclass(frozen=True)
class SessionData:
    """Sessions with candidates, each of them a candidate list, so that all that works on lists works on sessions.

    Attributes:
        name: Of the data set.
        items: item_id, title, List[String] attribute columns and year where known; row 0 is padding.
        item_attributes: Which columns of `items` are categorical attributes.
        item_noun: "movie", "video game", ...
        verb: What is done with an item, past tense: "watched", "purchased".
        lists: One list per session: user [S] = arange(S), items [S, C] with 0 = padding, labels [S, C] = 1 at the
            target, history_items [S, H] = the session without its target, its last H items.
        splits: Session numbers: training (the few-shot ones), validation, test.
        sequences: [T, H + 1] int64, left-aligned, 0 = padding: history and target of every training session,
            the few-shot ones and those beyond them; no validation and no test session.
        report: Counts: sessions read, left out and why, their lengths, the parts.
    """

    name: str
    items: pl.DataFrame
    item_attributes: tuple[str, ...]
    item_noun: str
    verb: str
    lists: ListSet
    splits: Splits
    sequences: Tensor
    report: dict[str, Any]


@dataclass(frozen=True)
class ItemTable:
    """What is known of items.

    Attributes:
        items: item_id, title, List[String] attribute columns, and year where known; no padding row.
        attributes: Which columns are categorical attributes.
        item_noun: What an item is called.
        verb: What is done with one, past tense.
    """

    items: pl.DataFrame
    attributes: tuple[str, ...]
    item_noun: str
    verb: str


class ItemSource(Protocol):
    """Any reader of items."""

    def load(self) -> ItemTable:
        """Read them."""

    def describe(self) -> dict[str, Any]:
        """What identifies the source."""


@dataclass(frozen=True)
class Sessions:
    """Sessions laid end to end, the target last in each.

    Attributes:
        items: [n] int64, item rows, from 1.
        ratings: [n] float32, 0 = unknown.
        length: [N] int64, items of each session, the target counted.
    """

    items: np.ndarray
    ratings: np.ndarray
    length: np.ndarray

    @property
    def target(self) -> np.ndarray:
        """[N] the last item of every session."""
        return self.items[np.cumsum(self.length) - 1]

    def last(self, values: np.ndarray, width: int, *, without_target: bool) -> np.ndarray:
        """[N, width] the last `width` values of every session, left-aligned; 0 = padding."""
        end = np.cumsum(self.length) - without_target
        taken = np.minimum(self.length - without_target, width)
        column = np.arange(width)
        index = np.minimum((end - taken)[:, None] + column, len(values) - 1)
        return np.where(column < taken[:, None], values[index], values.dtype.type(0))


@dataclass(frozen=True)
class Parts:
    """Session numbers; training, validation and test are disjoint.

    Attributes:
        train: Every training session.
        few: The training sessions that the LLM is asked about.
        validation: Chosen by.
        test: Tested on.
    """

    train: np.ndarray
    few: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @property
    def listed(self) -> np.ndarray:
        """Sessions that need candidates, ascending."""
        return np.sort(np.concatenate([self.few, self.validation, self.test]))


def part_size(value: float, n: int, key: str) -> int:
    """How many of n sessions a share (a float below 1) or a count (an int) asks for; validation may ask for none.

    Raises:
        UserError: It is no share and no count, none would be taken, or none would be left.
    """
    count = value if isinstance(value, int) else round(n * value) if isinstance(value, float) else -1
    least = 0 if key == "validation" and value == 0 else 1
    if not least <= count < n or (isinstance(value, float) and value >= 1):
        raise UserError(
            f"data.{key}: {value} of {n} sessions is not possible",
            where=f"config key data.{key}",
            why="at least one must be taken, and one be left",
            fix=f"use a share such as 0.2, or a whole number from {least} to {n - 1}",
        )
    return count


def few_of(train: np.ndarray, few_shot: int | None, rng: np.random.Generator) -> np.ndarray:
    """The few-shot sessions among the training sessions; None takes all.

    Raises:
        UserError: There are not so many.
    """
    if few_shot is None:
        return train
    if not (isinstance(few_shot, int) and 1 <= few_shot <= len(train)):
        raise UserError(
            f"data.few_shot: {few_shot} training sessions are not possible",
            where="config key data.few_shot",
            why=f"there are {len(train)}",
            fix="use a smaller number, or null for all of them",
        )
    return rng.choice(train, few_shot, replace=False)


def check_source(source: object, key: str) -> None:
    """Refuse what reads nothing.

    Raises:
        UserError: It has no `load`.
    """
    if not callable(getattr(source, "load", None)):
        raise UserError(
            f"data.{key} is no reader", where=f"config key data.{key}", fix="give it a _target_ and its arguments"
        )


def check_choices(given: Mapping[str, str], choices: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse an option that does not exist.

    Raises:
        UserError: The first one.
    """
    for key, possible in choices.items():
        if given[key] not in possible:
            raise UserError(
                f"data.{key}: {given[key]} is not possible",
                where=f"config key data.{key}",
                fix=f"use one of {', '.join(possible)}",
            )


def check_least(given: Mapping[str, float], least: Mapping[str, float]) -> None:
    """Refuse a number that is too small.

    Raises:
        UserError: The first one.
    """
    for key, smallest in least.items():
        if given[key] < smallest:
            raise UserError(
                f"data.{key}: {given[key]} is too small",
                where=f"config key data.{key}",
                fix=f"use {smallest} or more",
            )


def assemble(
    sessions: Sessions, parts: Parts, candidates: np.ndarray, max_history: int, report: dict[str, Any]
) -> tuple[ListSet, Splits, Tensor]:
    """Put sessions into the form of candidate lists.

    Args:
        sessions: All sessions.
        parts: Which are in which part.
        candidates: [len(parts.listed), C] candidates in the order they are shown, every target once among its own.
        max_history: Longest history; of longer ones the last items stay.
        report: Counts so far; those of the sessions themselves are added.
    """
    listed = parts.listed
    history = sessions.last(sessions.items, max_history, without_target=True)[listed]
    ratings = sessions.last(sessions.ratings, max_history, without_target=True)[listed]
    report |= {
        "sessions": len(sessions.length),
        "session_length_mean": round(float(sessions.length.mean()), 3),
        "session_length_max": int(sessions.length.max()),
        "histories_cut": int((sessions.length[listed] - 1 > max_history).sum()),
        "candidates": candidates.shape[1],
        "training_sequences": len(parts.train),
        **{part: len(getattr(parts, key)) for part, key in _NAMES.items()},
    }
    lists = ListSet(
        torch.arange(len(listed)),
        torch.from_numpy(candidates),
        torch.from_numpy((candidates == sessions.target[listed][:, None]).astype(np.float32)),
        torch.from_numpy(history),
        torch.from_numpy(ratings),
        report,
    )
    numbers = (torch.from_numpy(np.searchsorted(listed, np.sort(getattr(parts, key)))) for key in _NAMES.values())
    learnt = sessions.last(sessions.items, max_history + 1, without_target=False)[np.sort(parts.train)]
    return lists, Splits(*numbers), torch.from_numpy(learnt)


_NAMES = {"train": "few", "validation": "validation", "test": "test"}  # of Splits, and of Parts
