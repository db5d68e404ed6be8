"""What can be wrong with data before any model sees it: each check says PASS, WARN or FAIL, and what was found."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from lit_rec.data.canonical import RatingsData
from lit_rec.data.columns import EARLIEST, LATEST, day
from lit_rec.data.lists import ListSet
from lit_rec.data.session_sets import SessionData
from lit_rec.data.splits import Splits

PASS, WARN, FAIL = "PASS", "WARN", "FAIL"
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Check:
    """One line of the verdict.

    Attributes:
        status: PASS; WARN: it is so, and worth knowing; FAIL: it must be mended before a run means anything.
        what: What was looked at.
        found: What was found, in numbers.
        first: The ids, by their columns, of the first thing that is not as it should be.
        number: Which of the lines that hold these ids it is, from 0.
    """

    status: str
    what: str
    found: str
    first: Mapping[str, str] | None = None
    number: int = 0


def count_check(what: str, count: int, total: int, noun: str, *, status: str = WARN, hint: str = "") -> Check:
    """PASS when nothing was counted, else `status` with the number and a remedy."""
    if not count:
        return Check(PASS, what, f"none of {total:,} {noun}")
    return Check(status, what, f"{count:,} of {total:,} {noun} ({count / total:.1%}){'; ' if hint else ''}{hint}")


def item_check(what: str, wrong: pl.Series, items: pl.DataFrame, *, status: str = WARN, hint: str = "") -> Check:
    """`count_check` of items, one flag each."""
    check = count_check(what, int(wrong.sum()), len(items), "items", status=status, hint=hint)
    return check if check.status == PASS else replace(check, first={"item_id": items.filter(wrong)["item_id"][0]})


def rating_check(what: str, wrong: pl.Series, data: RatingsData, *, status: str = WARN, hint: str = "") -> Check:
    """`count_check` of interactions, one flag each."""
    table = data.interactions
    check = count_check(what, int(wrong.sum()), len(table), "ratings", status=status, hint=hint)
    if check.status == PASS:
        return check
    row = int(wrong.arg_true()[0])
    user, item = table["user"][row], table["item"][row]
    before = int(((table["user"][:row] == user) & (table["item"][:row] == item)).sum())
    return replace(
        check, first={"user_id": data.users["user_id"][user], "item_id": data.items["item_id"][item]}, number=before
    )


def item_checks(items: pl.DataFrame, attributes: Sequence[str]) -> list[Check]:
    """Titles and attributes of an items frame (row 0 is padding)."""
    table = items[1:]
    title = table["title"].fill_null("")
    missing = title.str.strip_chars() == ""
    checks = [
        item_check(
            "items without a title",
            missing,
            table,
            status=FAIL if missing.all() else WARN,
            hint="a prompt shows them as nothing: add titles, or leave these items out",
        ),
        item_check(
            "items whose title is their id",
            (title == table["item_id"]) & ~missing,
            table,
            hint="an LLM knows nothing of ids: name the column of titles (data.title)",
        ),
        item_check(
            "items that share a title",
            title.is_duplicated() & ~missing,
            table,
            hint="a prompt cannot tell them apart",
        ),
    ]
    for name in attributes:
        checks.append(item_check(f"items without {name}", table[name].list.len().fill_null(0) == 0, table))
    return checks


def rating_checks(data: RatingsData) -> list[Check]:
    """Duplicates, clocks and labels of interactions."""
    table = data.interactions
    n = len(table)
    again = ~table.select(pl.struct("user", "item").is_first_distinct()).to_series()
    times = table.group_by("user", maintain_order=True).agg(
        pl.col("timestamp").n_unique().alias("t"), pl.len().alias("n")
    )
    still = (times["t"] == 1) & (times["n"] > 1)
    positive = int((table["rating"] > data.positive_above).sum())
    outside = (table["rating"] > data.rating_max) | (table["rating"] < 0) | table["rating"].is_nan()
    labels = Check(PASS, "positive ratings", f"{positive:,} of {n:,} are above {data.positive_above:g}")
    if not positive or positive == n:
        which = "none is" if not positive else "all are"
        labels = Check(FAIL if not positive else WARN, "positive ratings", f"{which} above {data.positive_above:g}")
    alike = count_check(
        "users whose ratings are all of one time",
        int(still.sum()),
        len(times),
        "users",
        hint="what was before and what after is then the order of the file",
    )
    if still.any():
        alike = replace(alike, first={"user_id": data.users["user_id"][times.filter(still)["user"][0]]})
    return [
        rating_check(
            "repeated ratings of one item by one user",
            again,
            data,
            hint="protocol strict keeps the first, protocol kar all of them",
        ),
        rating_check("ratings outside the scale", outside, data, status=FAIL, hint="correct data.rating_max"),
        *clock_checks(data),
        alike,
        labels,
    ]


def clock_checks(data: RatingsData) -> list[Check]:
    """Whether the times of interactions are those of a clock that counts seconds."""
    times = data.interactions["timestamp"]
    before = Check(PASS, "times before 1971", f"not all of {len(times):,} ratings")
    if (times < EARLIEST).all() and not in_order(times):
        found = f"all of {len(times):,} ratings: their times may be no seconds, or dates written as numbers"
        before = Check(WARN, before.what, found)
    return [
        rating_check(
            "times later than the year 5000",
            times > LATEST,
            data,
            hint="they look like milliseconds: divide them by 1000",
        ),
        before,
    ]


def in_order(times: pl.Series) -> bool:
    """Whether times are the numbers of the lines, as where the source tells none."""
    return bool(times.min() == 0) and bool(times.max() == len(times) - 1)


def user_checks(data: RatingsData) -> list[Check]:
    """Whether what is known of users is known of these."""
    known = [name for name in data.users.columns if name != "user_id"]
    if not known:
        return []
    nothing = data.users.select(pl.all_horizontal(pl.col(known).cast(pl.String).fill_null("") == "").alias("n"))["n"]
    return [
        count_check(
            "users without a description",
            int(nothing.sum()),
            len(nothing),
            "users",
            status=FAIL if nothing.all() else WARN,
            hint="the table of users has other ids" if nothing.all() else "to a prompt each is a user",
        )
    ]


def list_checks(
    data: RatingsData, lists: ListSet, splits: Splits, *, protocol: str, time_zone: str = "UTC"
) -> list[Check]:
    """Leakage between histories, lists and parts, seen afresh from the interactions.

    Under protocol kar some of it is what KAR's code does; there it is told and not a fault.
    """
    fault = FAIL if protocol == "strict" else WARN
    real = lists.items > 0
    histories = lists.history_items[lists.user]
    among = torch.stack([(histories == column[:, None]).any(1) for column in lists.items.T], dim=1) & real
    leaked, unlike = among & (lists.labels > 0), among & (lists.labels == 0)
    known = (
        "protocol kar looks at no user's history when it draws" if protocol == "kar" else "a defect: please report it"
    )
    n_lists = len(lists.user)
    repeated = int(_repeats(lists.items).sum())
    checks = [
        count_check(
            "positives in the user's own history",
            int(leaked.any(1).sum()),
            n_lists,
            "lists",
            status=fault,
            hint="the prompt gives them away; protocol strict keeps an item's first rating alone",
        ),
        count_check(
            "other candidates in the user's own history",
            int(unlike.any(1).sum()),
            n_lists,
            "lists",
            status=fault,
            hint=known,
        ),
        count_check("lists that hold an item twice", repeated, n_lists, "lists", status=fault, hint=known),
        *_time_checks(data, lists, fault, time_zone if protocol == "kar" else None),
        *part_checks(splits, "users"),
    ]
    for part in PARTS:
        users = getattr(splits, part)
        found = len(lists.of_users(users))
        if len(users):
            checks.append(
                Check(PASS if found else FAIL, f"{part} lists", f"{found:,} lists of {len(users):,} users")
                if found
                else Check(
                    FAIL,
                    f"{part} lists",
                    f"none of {len(users):,} users has a list: use more users or a shorter history",
                )
            )
    return checks


def _time_checks(data: RatingsData, lists: ListSet, fault: str, calendar: str | None) -> list[Check]:
    """Whether a history holds what came after the first item it is to predict; by days of a time zone, or seconds."""
    clock = pl.col("timestamp")
    if calendar is not None:
        clock = day(clock, calendar)
    first = data.interactions.group_by("user", "item").agg(clock.min().alias("first"), clock.max().alias("last"))
    users, places = (lists.history_items > 0).nonzero(as_tuple=True)
    past = pl.DataFrame({"user": users.numpy(), "item": lists.history_items[users, places].numpy()})
    rows, columns = (lists.labels > 0).nonzero(as_tuple=True)
    target = pl.DataFrame({"user": lists.user[rows].numpy(), "item": lists.items[rows, columns].numpy()})
    key = ["user", "item"]
    first = first.with_columns(pl.col("user", "item").cast(pl.Int64))
    newest = past.join(first, on=key).group_by("user").agg(pl.col("first").max().alias("newest"))
    oldest = target.join(first, on=key).group_by("user").agg(pl.col("last").min().alias("oldest"))
    both = newest.join(oldest, on="user")
    late, same = int((both["newest"] > both["oldest"]).sum()), int((both["newest"] == both["oldest"]).sum())
    unit = "second" if calendar is None else "day"
    return [
        count_check("histories that hold items from after a target", late, len(both), "users", status=fault),
        count_check(
            f"histories that end in the {unit} of a target",
            same,
            len(both),
            "users",
            hint="their order is that of the file",
        ),
    ]


def part_checks(splits: Splits, noun: str) -> list[Check]:
    """Whether the parts are disjoint, and which are empty."""
    sizes = {part: len(getattr(splits, part)) for part in PARTS}
    every = torch.cat([getattr(splits, part) for part in PARTS])
    twice = len(every) - len(every.unique())
    checks = [count_check(f"{noun} in more than one part", twice, len(every), noun, status=FAIL)]
    for part, size in sizes.items():
        if not size:
            status = WARN if part == "validation" else FAIL
            checks.append(Check(status, f"{part} {noun}", "there are none"))
    return checks


def session_checks(data: SessionData, *, split: str | None = None) -> list[Check]:
    """Leakage between sessions, candidates and parts.

    Args:
        data: The sessions.
        split: How the source cut the parts, where it says so: "random", "time" or "user".
    """
    lists, n = data.lists, len(data.lists.user)
    shown = lists.items > 0
    targets = (lists.labels > 0).sum(1)
    among = torch.stack([(lists.history_items == column[:, None]).any(1) for column in lists.items.T], 1) & shown
    repeated = int(_repeats(lists.items).sum())
    held_out = {part: _whole(lists, getattr(data.splits, part)) for part in PARTS}
    learnt = {tuple(row[row > 0].tolist()) for row in data.sequences}
    checks = [
        count_check(
            "sessions without exactly one target",
            int((targets != 1).sum()),
            n,
            "sessions",
            status=FAIL,
            hint="the target must be among the candidates, once",
        ),
        count_check(
            "targets that stand in their session",
            int((among & (lists.labels > 0)).any(1).sum()),
            n,
            "sessions",
            status=FAIL,
            hint="the session gives them away",
        ),
        count_check(
            "other candidates that stand in their session",
            int((among & (lists.labels == 0)).any(1).sum()),
            n,
            "sessions",
            hint="they are easier to refuse than others",
        ),
        count_check("sessions that show a candidate twice", repeated, n, "sessions", status=FAIL),
        *part_checks(data.splits, "sessions"),
        _overlap("training sessions that are test sessions too", held_out["train"], held_out["test"]),
        _overlap("training sessions that are validation sessions too", held_out["train"], held_out["validation"]),
        _overlap("validation sessions that are test sessions too", held_out["validation"], held_out["test"]),
        _overlap("test sessions among what sequence models learn from", held_out["test"], learnt),
        _overlap("validation sessions among what sequence models learn from", held_out["validation"], learnt),
    ]
    if split in ("random", "user"):
        told = f"data.split={split}: training sessions may be later than test sessions; data.split=time avoids it"
        checks.append(Check(WARN, "time between the parts", told))
    elif split == "time":
        checks.append(Check(PASS, "time between the parts", "test sessions end last, validation sessions before them"))
    return checks


def _repeats(items: Tensor) -> Tensor:
    """[L] whether a row of [L, C] holds an item twice, padding apart."""
    ordered = items.sort(dim=1).values
    return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)).any(1)


def _whole(lists: ListSet, sessions: Tensor) -> list[tuple[int, ...]]:
    """History and target of each session."""
    pasts, targets = lists.history_items[sessions], lists.targets(sessions).tolist()
    return [(*past[past > 0].tolist(), target) for past, target in zip(pasts, targets, strict=True)]


def _overlap(what: str, mine: Iterable[Any], others: Iterable[Any]) -> Check:
    mine, others = list(mine), set(others)
    count = sum(one in others for one in mine)
    return count_check(what, count, len(mine), "sessions", hint="data.overlap=drop, or a split that keeps them apart")


def histogram(values: np.ndarray, bins: int = 10) -> list[tuple[str, int]]:
    """Counts of numbers: each value on its own where there are few, else ranges of equal width."""
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= bins:
        return [(f"{value:g}", int(count)) for value, count in zip(distinct, counts, strict=True)]
    if np.array_equal(distinct, distinct.round()):  # whole numbers stay whole
        width = int(np.ceil((distinct[-1] - distinct[0] + 1) / bins))
        first = np.arange(int(distinct[0]), int(distinct[-1]) + 1, width)
        counts, _ = np.histogram(values, bins=[*(first - 0.5), first[-1] + width - 0.5])
        return [(f"{low} to {low + width - 1}", int(n)) for low, n in zip(first, counts, strict=True)]
    counts, edges = np.histogram(values, bins=bins)
    return [(f"{low:g} to {high:g}", int(c)) for low, high, c in zip(edges[:-1], edges[1:], counts, strict=True)]
