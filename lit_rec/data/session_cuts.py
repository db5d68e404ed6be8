"""Sessions cut out of ratings, whichever reader they come from (METHODS 2.4)."""

from typing import Any, Protocol

import numpy as np
import polars as pl

from lit_rec.data.candidates import World, fill, order_candidates
from lit_rec.data.canonical import RatingsData
from lit_rec.data.columns import EARLIEST, LATEST, day
from lit_rec.data.session_sets import (
    Parts,
    SessionData,
    Sessions,
    assemble,
    check_choices,
    check_least,
    check_source,
    few_of,
    part_size,
)
from lit_rec.errors import UserError


class RatingsReader(Protocol):
    """Any reader of interactions."""

    def load(self) -> RatingsData:
        """Read them."""

    def describe(self) -> dict[str, Any]:
        """What identifies the source."""


class SessionsOf:
    """Sessions cut out of anybody's interactions.

    A session is what one user did on one calendar day, or without a longer pause, in order of time (interactions of
    the same moment keep the order of the file). Of an item that comes twice the first time counts: else the target
    could stand in the history, and would be the only candidate that does. The last item is the target. Its negatives
    are items that are not in the session, also not in the part that `max_history` cuts off.

    Args:
        reader: A reader of interactions.
        by: "day" or "gap".
        gap_minutes: With by=gap a session ends where the next interaction comes later than this.
        time_zone: Whose calendar by=day uses, an IANA name.
        min_length: Fewest items of a session, the target counted; shorter ones are left out.
        max_history: Longest history; of longer ones the last items stay.
        candidates: Candidates per session: the target and negatives.
        negatives: "uniform", or "popularity": in proportion to how often training sessions hold an item.
        few_shot: Training sessions, drawn at random; None: all of them. The others serve `sequences`.
        validation: Share of the training sessions, or their number; 0 is allowed.
        test: Share of all sessions, or their number.
        split: "random"; "time": sessions that end last are tested on, those before them chosen by; "user": a user's
            sessions are all in the same part, so that parts may be somewhat larger than asked for.
        verb: What is done with an item, past tense.
        seed: Of everything random.
    """

    CHOICES = {
        "by": ("day", "gap"),
        "negatives": ("uniform", "popularity"),
        "split": ("random", "time", "user"),
    }
    LEAST = {"gap_minutes": 0, "min_length": 2, "max_history": 1, "candidates": 2, "seed": 0}

    def __init__(
        self,
        *,
        reader: RatingsReader,
        by: str = "day",
        gap_minutes: float = 30,
        time_zone: str = "UTC",
        min_length: int = 4,
        max_history: int = 20,
        candidates: int = 50,
        negatives: str = "uniform",
        few_shot: int | None = 500,
        validation: float = 0.1,
        test: float = 0.2,
        split: str = "random",
        verb: str = "selected",
        seed: int = 0,
    ) -> None:
        self.reader = reader
        self.by, self.gap_minutes, self.time_zone = by, gap_minutes, time_zone
        self.min_length, self.max_history = min_length, max_history
        self.candidates, self.negatives = candidates, negatives
        self.few_shot, self.validation, self.test, self.split = few_shot, validation, test, split
        self.verb, self.seed = verb, seed
        check_source(reader, "reader")
        if getattr(reader, "timestamp", "") is None:
            raise UserError(
                "sessions cannot be cut out of interactions without times",
                where="config key data.reader.timestamp",
                why=f"data.by={by} looks at clocks, and the lines of a file are none",
                fix="name the column of times; sessions that are cut already are read by data=session_files",
            )
        check_choices(vars(self), self.CHOICES)
        check_least(vars(self), self.LEAST)

    def describe(self) -> dict[str, Any]:
        """What identifies the source."""
        source = self.reader.describe()
        options = {k: v for k, v in vars(self).items() if k != "reader"}
        return {"name": source.get("name", ""), "reader": source, **options}

    def load(self) -> SessionData:
        """Read the interactions and build the sessions.

        Raises:
            UserError: The reader's errors; no session is long enough; a part would be empty; there are too few items
                for so many candidates.
        """
        data = self.reader.load()
        sessions, user, time, report = self._cut(data)
        longest = int(sessions.length.max())
        if data.n_items - longest < self.candidates:
            raise UserError(
                f"{self.candidates} candidates are not possible: {data.name} has {data.n_items} items",
                where="config key data.candidates",
                why=f"the longest session holds {longest} of them, and negatives are others",
                fix="use fewer candidates, or data with more items",
            )
        rng = np.random.default_rng(self.seed)
        parts = self._parts(user, time, rng)
        candidates = self._candidates(sessions, parts, data.n_items, rng)
        lists, splits, sequences = assemble(sessions, parts, candidates, self.max_history, report)
        return SessionData(
            data.name, data.items, data.item_attributes, data.item_noun, self.verb, lists, splits, sequences, report
        )

    def _cut(self, data: RatingsData) -> tuple[Sessions, np.ndarray, np.ndarray, dict[str, Any]]:
        """Sessions in order of users and time; user [N] and time of the target [N], seconds; counts."""
        try:
            date = day(pl.col("timestamp"), self.time_zone)
            table = data.interactions.with_columns(date.alias("day")).sort("user", "timestamp", maintain_order=True)
        except pl.exceptions.ComputeError as error:
            raise UserError(
                f"data.time_zone: {self.time_zone} is not a time zone",
                where="config key data.time_zone",
                why=str(error),
                fix="use an IANA name such as UTC or Europe/Madrid",
            ) from error
        pause = pl.col("timestamp").diff() > 60 * self.gap_minutes
        ends = pause if self.by == "gap" else pl.col("day") != pl.col("day").shift()
        first = (pl.col("user") != pl.col("user").shift()).fill_null(True) | ends.fill_null(True)
        table = table.with_columns(first.cum_sum().alias("session"))
        once = table.unique(["session", "item"], keep="first", maintain_order=True)
        kept = once.filter(pl.len().over("session") >= self.min_length)
        read = int(table["session"].max())  # type: ignore[arg-type]
        if kept.is_empty():
            longest = once["session"].value_counts()["count"].to_numpy().max()
            raise UserError(
                f"no session of {self.min_length} items or more",
                where="config key data.min_length",
                why=f"{read} sessions, the longest of {longest} items{_clock(table['timestamp'])}",
                fix="use a smaller min_length, or other ways to cut sessions (data.by, data.gap_minutes)",
            )
        _, start, length = np.unique(kept["session"].to_numpy(), return_index=True, return_counts=True)
        report = {
            "interactions": len(table),
            "sessions_read": read,
            "sessions_too_short": read - len(start),
            "repeated_interactions_dropped": len(table) - len(once),
        }
        items = kept["item"].to_numpy().astype(np.int64)
        sessions = Sessions(items, kept["rating"].to_numpy().astype(np.float32), length.astype(np.int64))
        return sessions, kept["user"].to_numpy()[start], kept["timestamp"].to_numpy()[start + length - 1], report

    def _parts(self, user: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Parts:
        """Order the sessions and cut: training, then validation, then test."""
        if self.split == "time":
            order = np.argsort(time, kind="stable")
        elif self.split == "user":
            order = np.argsort(rng.permutation(user.max() + 1)[user], kind="stable")
        else:
            order = rng.permutation(len(user))
        test = self._boundary(user[order], part_size(self.test, len(order), "test"), "test")
        validation = part_size(self.validation, test, "validation")
        start = self._boundary(user[order][:test], validation, "validation") if validation else test
        train = order[:start]
        return Parts(train, few_of(train, self.few_shot, rng), order[start:test], order[test:])

    def _boundary(self, user: np.ndarray, count: int, part: str) -> int:
        """Where the last `count` sessions begin, for split=user where the first user among them begins."""
        at = len(user) - count
        if self.split == "user" and count:
            at = int(np.flatnonzero(user == user[at])[0])
            if not at:
                raise UserError(
                    f"no user is left for training beside the {part} part",
                    where=f"config key data.{part}",
                    fix="use a smaller part, data with more users, or data.split=random",
                )
        return at

    def _candidates(self, sessions: Sessions, parts: Parts, n_items: int, rng: np.random.Generator) -> np.ndarray:
        """[L, C] the target and negatives of every listed session, shuffled."""
        number = np.repeat(np.arange(len(sessions.length)), sessions.length)
        learnt = np.isin(number, parts.train)
        # A session takes the place of a user: negatives are unique, and nothing that "user" ever interacted with.
        world = World(number, sessions.items, n_items, np.empty(0), learnt, np.arange(1, n_items + 1), self.seed)
        items = np.zeros((len(parts.listed), self.candidates), dtype=np.int64)
        items[:, 0] = sessions.target[parts.listed]
        fill(items, parts.listed, world, "strict", self.negatives, rng)
        return order_candidates(items, np.zeros(items.shape), parts.listed, world, None, rng)[0]


def _clock(times: pl.Series) -> str:
    """What is wrong with times that may be no seconds; "" where they may."""
    last = int(times.max())  # type: ignore[arg-type]
    if last > LATEST:
        return f"; times up to {last} lie behind the year 5000: are they milliseconds? Divide them by 1000"
    return f"; all times lie before 1971 (up to {last}): are they seconds?" if last < EARLIEST else ""
