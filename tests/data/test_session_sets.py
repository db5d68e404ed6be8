"""Sessions cut out of ratings, against plain loops; and the real ones."""

import json
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest
import torch
from omegaconf import OmegaConf

from lit_rec.config import configs_dir, instantiate
from lit_rec.data.canonical import RatingsData
from lit_rec.data.movielens import MovieLens1M, MovieLens100K
from lit_rec.data.session_cuts import SessionsOf
from lit_rec.data.session_sets import SessionData, part_size
from lit_rec.data.sessions import SessionDataModule
from lit_rec.errors import UserError
from lit_rec.metrics.ranking import ranking_metrics


class Reader:
    """Ratings that are there already."""

    def __init__(self, data: RatingsData) -> None:
        self.data = data

    def load(self) -> RatingsData:
        return self.data

    def describe(self) -> dict[str, Any]:
        return {"name": self.data.name}


def ratings_of(rows: list[tuple[int, int, float, int]], n_items: int = 90) -> RatingsData:
    """user, item (from 1), rating, timestamp; in the order of the file."""
    frame = pl.DataFrame(
        rows,
        schema={"user": pl.Int32, "item": pl.Int32, "rating": pl.Float32, "timestamp": pl.Int64},
        orient="row",
    )
    users = pl.DataFrame({"user_id": [str(u) for u in range(max(r[0] for r in rows) + 1)]})
    items = pl.DataFrame({"item_id": ["", *(f"i{i}" for i in range(1, n_items + 1))]})
    items = items.with_columns(pl.col("item_id").alias("title"))
    return RatingsData("synthetic", frame, users, items, (), 5, 3, "thing")


@pytest.fixture(scope="module")
def make() -> Callable[..., RatingsData]:
    """Ratings with repeats, ties within a second, days of every length, and users who come back at midnight."""

    def made(seed: int = 0, users: int = 40, n_items: int = 90) -> RatingsData:
        rng = np.random.default_rng(seed)
        rows = []
        for user in range(users):
            for _ in range(rng.integers(1, 6)):
                start = 86400 * int(rng.integers(12000, 12030)) + int(rng.integers(0, 86400))
                for item in 1 + (n_items * rng.random(rng.integers(1, 14)) ** 2).astype(int):
                    start += int(rng.choice([0, 1, 60, 1800, 1801, 7200]))
                    rows.append((user, int(item), float(rng.integers(1, 6)), start))
        rng.shuffle(rows)
        return ratings_of([(int(u), int(i), float(r), int(t)) for u, i, r, t in rows], n_items)

    return made


def brute(data: RatingsData, by: str, zone: str, minutes: float, shortest: int) -> list[dict[str, Any]]:
    """Sessions in plain loops: user, items, ratings, time of the last."""
    of_user: dict[int, list[tuple]] = {}
    for line, (user, item, rating, time) in enumerate(data.interactions.rows()):
        of_user.setdefault(user, []).append((time, line, item, rating))
    found: list[list[tuple]] = []
    for user in sorted(of_user):
        before = None
        for time, _, item, rating in sorted(of_user[user]):
            day = datetime.fromtimestamp(time, ZoneInfo(zone)).date()
            if before is None or (day != before[1] if by == "day" else time - before[0] > 60 * minutes):
                found.append([])
            before = time, day
            if item not in [row[1] for row in found[-1]]:
                found[-1].append((user, item, rating, time))
    return [
        {"user": s[0][0], "items": [r[1] for r in s], "ratings": [r[2] for r in s], "end": s[-1][3]}
        for s in found
        if len(s) >= shortest
    ]


def rows(table: torch.Tensor) -> list[list[float]]:
    """Rows without their padding, which must be at the end."""
    told = [[v for v in row if v] for row in table.tolist()]
    assert all(row == kept + [0] * (len(row) - len(kept)) for row, kept in zip(table.tolist(), told, strict=True))
    return told


def load(data: RatingsData, **options: Any) -> SessionData:
    return SessionsOf(reader=Reader(data), **({"few_shot": None, "candidates": 10} | options)).load()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"time_zone": "America/Los_Angeles", "min_length": 2},
        {"time_zone": "Asia/Kolkata", "max_history": 3},
        {"by": "gap", "max_history": 100},
        {"by": "gap", "gap_minutes": 1, "min_length": 3, "max_history": 1},
        {"by": "gap", "gap_minutes": 0, "min_length": 2},
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_sessions_against_plain_loops(make, options, seed):
    data, h = make(seed), options.get("max_history", 20)
    expected = brute(
        data,
        options.get("by", "day"),
        options.get("time_zone", "UTC"),
        options.get("gap_minutes", 30),
        options.get("min_length", 4),
    )
    made = load(data, seed=seed, **options)
    lists, splits = made.lists, made.splits
    assert len(expected) > 20
    assert lists.user.tolist() == list(range(len(expected)))
    assert rows(lists.history_items) == [s["items"][:-1][-h:] for s in expected]
    assert rows(lists.history_ratings) == [s["ratings"][:-1][-h:] for s in expected]
    assert lists.items[lists.labels > 0].tolist() == [s["items"][-1] for s in expected]
    assert bool((lists.labels.sum(1) == 1).all())
    assert rows(made.sequences) == [expected[s]["items"][-h - 1 :] for s in splits.train.tolist()]
    assert sorted(torch.cat([splits.train, splits.validation, splits.test]).tolist()) == list(range(len(expected)))
    report = made.report
    assert report["sessions"] == len(expected) == report["sessions_read"] - report["sessions_too_short"]
    assert report["session_length_max"] == max(len(s["items"]) for s in expected)
    assert report["histories_cut"] == sum(len(s["items"]) - 1 > h for s in expected)


def test_of_an_item_that_comes_twice_the_first_time_counts():
    day = [(0, i, 5.0, 10 * t) for t, i in enumerate([7, 8, 7, 9, 10, 8])]
    more = [(u, i, 3.0, 5) for u in (1, 2, 3) for i in (1, 2, 3, 4)]
    made = load(ratings_of(day + more), test=1, validation=1)
    assert rows(made.lists.history_items)[0] == [7, 8, 9]
    assert made.lists.items[0][made.lists.labels[0] > 0].tolist() == [10]
    assert made.report["repeated_interactions_dropped"] == 2


@pytest.mark.parametrize("negatives", ["uniform", "popularity"])
def test_negatives_are_others_and_unique(make, negatives):
    data = make(3)
    expected = brute(data, "day", "UTC", 30, 4)
    made = load(data, candidates=50, max_history=2, negatives=negatives)
    for session, items, labels in zip(expected, made.lists.items.tolist(), made.lists.labels.tolist(), strict=True):
        wrong = [i for i, label in zip(items, labels, strict=True) if not label]
        assert len(wrong) == len(set(wrong)) == 49
        assert not set(wrong) & set(session["items"])  # also not what max_history cut off
        assert all(1 <= i <= data.n_items for i in wrong)


def test_uniform_negatives_are_uniform_and_targets_stand_anywhere():
    data = ratings_of([(u, 1 + i, 3.0, u) for u in range(3000) for i in range(4)], 34)
    made = load(data, candidates=11, few_shot=None)
    counts = torch.bincount(made.lists.items.flatten(), minlength=35)[5:]  # items 1 to 4 are in every session
    assert len(counts) == 30
    assert counts.sum() == 30_000
    # 3,000 draws of 10 out of 30: mean 1,000, standard deviation sqrt(3000 / 3 * 2 / 3) = 26
    assert int((counts - 1000).abs().max()) < 130
    places = torch.bincount(made.lists.labels.argmax(1), minlength=11)
    assert int((places - 3000 / 11).abs().max()) < 5 * np.sqrt(3000 / 11)


def test_popularity_is_of_training_sessions_alone():
    """Items 1-10 are common, 11-20 rare, 21-40 stand only in the last sessions, which are tested on."""
    rng = np.random.default_rng(0)
    told = []
    for session in range(400):
        if session < 320:
            items = [*(1 + rng.permutation(10)[:4]), *([11 + rng.integers(10)] if session % 4 == 0 else [])]
        else:
            items = [*(21 + rng.permutation(20)[:4])]
        told += [(session, int(i), 3.0, session * 86400 + k) for k, i in enumerate(items)]
    made = load(ratings_of(told, 60), negatives="popularity", split="time", candidates=6, validation=0)
    assert len(made.splits.test) == 80
    negative = made.lists.items[made.lists.labels == 0]
    drawn = torch.bincount(negative, minlength=61).double()
    assert drawn[21:].sum() == 0
    test = made.lists.items[made.splits.test][made.lists.labels[made.splits.test] == 0]
    test_drawn = torch.bincount(test, minlength=61).double()
    # 1,280 common places among ten items, 80 rare ones among ten; five draws without repeats flatten the ratio of 16
    assert 5 < test_drawn[1:11].sum() / test_drawn[11:21].sum() < 16


def test_parts_at_random(make):
    data = make(1)
    n = len(brute(data, "day", "UTC", 30, 4))
    made = load(data, seed=1)
    test = round(0.2 * n)
    assert len(made.splits.test) == test
    assert len(made.splits.validation) == round(0.1 * (n - test))
    other = load(data, seed=2)
    assert made.splits.test.tolist() != other.splits.test.tolist()
    again = load(data, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(vars(made.splits).values(), vars(again.splits).values(), strict=True))
    assert torch.equal(made.lists.items, again.lists.items)
    counted = load(data, test=7, validation=5)
    assert (len(counted.splits.validation), len(counted.splits.test)) == (5, 7)
    assert not len(load(data, validation=0).splits.validation)


def test_parts_by_time(make):
    data = make(2)
    end = np.array([s["end"] for s in brute(data, "day", "UTC", 30, 4)])
    splits = load(data, split="time", validation=0.3).splits
    assert end[splits.train].max() <= end[splits.validation].min()
    assert end[splits.validation].max() <= end[splits.test].min()


@pytest.mark.parametrize("seed", range(5))
def test_parts_by_user(make, seed):
    data = make(seed)
    user = np.array([s["user"] for s in brute(data, "day", "UTC", 30, 4)])
    splits = load(data, split="user", seed=seed, validation=0.2).splits
    parts = [set(user[part].tolist()) for part in vars(splits).values()]
    assert all(parts)
    assert sum(map(len, parts)) == len(set(user.tolist()))  # nobody is in two of them
    most = max(Counter(user.tolist()).values())
    assert 0 <= len(splits.test) - round(0.2 * len(user)) < most


def test_few_shot_sessions_are_listed_and_all_training_sessions_are_learnt_from(make):
    data = make(4)
    expected = [s["items"] for s in brute(data, "day", "UTC", 30, 4)]
    made = load(data, few_shot=9, max_history=60)
    histories, targets = rows(made.lists.history_items), made.lists.items[made.lists.labels > 0].tolist()
    listed = [[*h, t] for h, t in zip(histories, targets, strict=True)]
    held_out = [listed[s] for s in [*made.splits.validation.tolist(), *made.splits.test.tolist()]]
    few = [listed[s] for s in made.splits.train.tolist()]
    learnt = rows(made.sequences)
    assert len(few) == made.report["train"] == 9
    assert len(listed) == 9 + len(held_out)
    assert Counter(map(tuple, learnt)) + Counter(map(tuple, held_out)) == Counter(map(tuple, expected))
    assert not Counter(map(tuple, few)) - Counter(map(tuple, learnt))
    with pytest.raises(UserError, match="few_shot: 1000 training sessions") as error:
        load(data, few_shot=1000)
    assert str(len(learnt)) in error.value.why


def test_sessions_serve_what_works_on_lists(make):
    made = load(make(5))
    module = SessionDataModule(made.lists, made.splits, batch_size=4, with_history=True)
    assert torch.equal(module.index("test"), made.splits.test)
    batch = next(iter(module.test_dataloader()))
    assert torch.equal(batch["history_items"], made.lists.history_items[batch["list"]])
    found = ranking_metrics(batch["labels"], batch["labels"], batch["items"] > 0, [1])
    assert bool((found["hr@1"] == 1).all())


@pytest.mark.parametrize(
    ("options", "where", "match"),
    [
        ({"by": "week"}, "data.by", "day, gap"),
        ({"split": "item"}, "data.split", "random, time, user"),
        ({"negatives": "hard"}, "data.negatives", "uniform, popularity"),
        ({"min_length": 1}, "data.min_length", "2 or more"),
        ({"max_history": 0}, "data.max_history", "1 or more"),
        ({"candidates": 1}, "data.candidates", "2 or more"),
        ({"gap_minutes": -1}, "data.gap_minutes", "0 or more"),
        ({"seed": -1}, "data.seed", "0 or more"),
        ({"min_length": 99}, "data.min_length", "the longest of"),
        ({"candidates": 80}, "data.candidates", "80 candidates are not possible"),
        ({"time_zone": "Mars"}, "data.time_zone", "Mars is not a time zone"),
        ({"few_shot": 0}, "data.few_shot", "0 training sessions"),
        ({"test": 0}, "data.test", "0 of .* sessions is not possible"),
        ({"test": 1.0}, "data.test", "1.0 of"),
        ({"test": "many"}, "data.test", "many of"),
        ({"validation": 5000}, "data.validation", "5000 of"),
        ({"split": "user", "test": 0.99}, "data.test", "no user is left"),
    ],
)
def test_what_is_not_possible_is_told(make, options, where, match):
    with pytest.raises(UserError, match=match) as error:
        load(make(0), **options)
    assert error.value.where == f"config key {where}"


def test_the_reader_must_read():
    with pytest.raises(UserError, match=r"data\.reader is no reader"):
        SessionsOf(reader={"root": "x"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "n", "count"), [(0.2, 10, 2), (3, 10, 3), (0.25, 10, 2), (9, 10, 9), (0.0, 10, 0), (0, 5, 0)]
)
def test_part_size(value, n, count):
    assert part_size(value, n, "validation") == count


@pytest.mark.parametrize(("value", "n"), [(10, 10), (1.5, 10), (-1, 10), (0.01, 10), (0.99, 10)])
def test_part_size_refuses(value, n):
    with pytest.raises(UserError, match="of 10 sessions"):
        part_size(value, n, "validation")


def test_describe_is_plain_and_tells_everything(make):
    described = SessionsOf(reader=Reader(make(0)), few_shot=5).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["reader"] == {"name": "synthetic"}
    assert {"by", "time_zone", "few_shot", "seed", "negatives", "test"} <= set(described)


def test_the_config_of_100k(tmp_path: Path):
    cfg = OmegaConf.load(configs_dir() / "data" / "ml100k_sessions.yaml")
    made = instantiate(cfg, "data")
    assert isinstance(made, SessionsOf)
    assert isinstance(made.reader, MovieLens100K)
    assert (made.verb, made.min_length, made.candidates, made.few_shot) == ("watched", 4, 50, 500)


@pytest.mark.shared_data
def test_days_of_the_real_1m(shared_data):
    data = MovieLens1M(root=str(shared_data / "ml-1m")).load()
    made = SessionsOf(reader=Reader(data), verb="watched").load()
    by_day = data.interactions.with_columns(pl.col("timestamp") // 86400).group_by("user", "timestamp").len()
    assert made.report["sessions_read"] == len(by_day)
    assert made.report["sessions"] == int((by_day["len"] > 3).sum())
    assert made.report["session_length_max"] == by_day["len"].max()
    assert len(made.splits.train) == 500
    assert len(made.splits.test) == round(0.2 * made.report["sessions"])
    assert made.lists.items.shape[1] == 50
    assert bool((made.lists.items > 0).all())
    assert bool((made.lists.items.sort(1).values.diff(dim=1) > 0).all())
    target = made.lists.items[made.lists.labels > 0]
    assert not bool((made.lists.history_items == target[:, None]).any())
    assert made.sequences.shape == (made.report["training_sequences"], 21)
