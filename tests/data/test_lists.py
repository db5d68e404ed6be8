from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rec.data import candidates
from lit_rec.data.canonical import canonical
from lit_rec.data.lists import ListSet, build_lists
from lit_rec.errors import UserError

HISTORY, REAL, SIZE = 12, 4, 10


@pytest.fixture(autouse=True)
def _short_training(monkeypatch):
    monkeypatch.setattr(candidates, "STEPS", 40)


def by_hand(data, protocol: str, history: int = HISTORY, real: int = REAL):
    """METHODS 1.5 user by user: {user: (history, [(real items, labels)])}, written without looking at lists.py."""
    sequences: dict[int, list] = {u: [] for u in range(data.n_users)}
    for user, item, rating, time in data.interactions.iter_rows():
        key = datetime.fromtimestamp(time, UTC).date() if protocol == "kar" else time
        sequences[user].append((key, item, rating))
    found = {}
    for user, sequence in sequences.items():
        sequence = sorted(sequence, key=lambda entry: entry[0])
        n_u = min((len(sequence) + 1) // 2, history)
        lists = []
        for start in range(n_u, len(sequence), real):
            part = sequence[start : start + real]
            lists.append(([i for _, i, _ in part], [float(r > data.positive_above) for _, _, r in part]))
        found[user] = ([(i, r) for _, i, r in sequence[:n_u]], lists)
    return found


def histories(lists: ListSet, user: int) -> list:
    items, ratings = lists.history_items[user].tolist(), lists.history_ratings[user].tolist()
    count = sum(i > 0 for i in items)
    assert items[count:] == [0] * (len(items) - count)
    return list(zip(items[:count], ratings[:count], strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_kar_against_a_plain_reimplementation(make_ratings, seed):
    data = make_ratings(seed=seed)
    lists = build_lists(data, protocol="kar", history=HISTORY, seed=seed)
    expected = by_hand(data, "kar")
    at = 0
    for user in range(data.n_users):
        assert histories(lists, user) == expected[user][0]
        for items, labels in expected[user][1]:
            assert lists.user[at] == user
            shown = Counter(zip(lists.items[at].tolist(), lists.labels[at].tolist(), strict=True))
            real = Counter(zip(items, labels, strict=True))
            assert not real - shown  # every real item with its label; the rest is random and 0
            rest = shown - real
            assert sum(rest.values()) == SIZE - len(items)
            assert all(label == 0 and 1 <= item <= data.n_items for item, label in rest)
            at += 1
    assert at == len(lists.user) == lists.report["lists"]


@pytest.mark.parametrize("seed", range(4))
def test_strict_has_the_same_real_items_and_drops_lists_without_a_positive(make_ratings, seed):
    data = make_ratings(seed=seed)
    lists = build_lists(data, history=HISTORY, seed=seed)
    expected, at, dropped = by_hand(data, "strict"), 0, 0
    known = data.interactions.group_by("user").agg("item")
    seen = {u: set(i) for u, i in known.iter_rows()}
    for user in range(data.n_users):
        assert histories(lists, user) == expected[user][0]
        for items, labels in expected[user][1]:
            if not any(labels):
                dropped += 1
                continue
            shown = dict(zip(lists.items[at].tolist(), lists.labels[at].tolist(), strict=True))
            assert lists.user[at] == user
            assert len(shown) == SIZE  # nothing twice
            assert {i: shown[i] for i in items} == dict(zip(items, labels, strict=True))
            assert not (set(shown) - set(items)) & seen[user]
            assert all(shown[i] == 0 for i in set(shown) - set(items))
            at += 1
    assert at == len(lists.user)
    assert dropped == lists.report["lists_without_positive_dropped"] > 0


@pytest.mark.parametrize("negatives", ["uniform", "popularity", "retrieved"])
@pytest.mark.parametrize("initial_ranker", [None, "popularity", "bpr"])
def test_strict_invariants_hold_for_every_choice(make_ratings, negatives, initial_ranker):
    data = make_ratings(users=15, longest=40)
    options = {"negatives": negatives, "initial_ranker": initial_ranker, "train_users": torch.arange(10)}
    lists = build_lists(data, seed=3, **options)
    seen = {u: set(i) for u, i in data.interactions.group_by("user").agg("item").iter_rows()}
    real = {(u, i): r > 3 for u, i, r, _ in data.interactions.iter_rows()}
    for user, items, labels in zip(lists.user.tolist(), lists.items.tolist(), lists.labels.tolist(), strict=True):
        assert len(set(items)) == SIZE
        assert 0 not in items
        assert any(labels)
        for item, label in zip(items, labels, strict=True):
            assert label == float(real.get((user, item), False))
        assert 1 <= len(set(items) & seen[user]) <= REAL
    same = build_lists(data, seed=3, **options)
    assert torch.equal(same.items, lists.items)
    assert torch.equal(same.labels, lists.labels)
    assert not torch.equal(build_lists(data, seed=4, **options).items, lists.items)


@pytest.mark.parametrize("options", [{"negatives": "retrieved"}, {"protocol": "kar"}])
def test_the_number_of_threads_changes_nothing(make_ratings, options):
    data, before = make_ratings(users=300, items=800, longest=80), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(build_lists(data, **options).items)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_seconds_and_dates_differ_within_a_day(make_ratings):
    data = make_ratings(users=2)
    kar, strict = (build_lists(data, protocol=p).history_items for p in ("kar", "strict"))
    assert not torch.equal(kar, strict)


def test_a_calendar_date_belongs_to_a_time_zone():
    # 23:30 and 00:30 UTC: two dates in London, one in New York, where the order of the file then decides.
    data = tiny([("1", "late", 5, 84600 + 3600), ("1", "early", 5, 84600), ("1", "c", 5, 10**6), ("1", "d", 5, 10**6)])
    order = {}
    for zone in ("UTC", "America/New_York"):
        lists = build_lists(data, protocol="kar", real=2, list_size=4, time_zone=zone)
        order[zone] = [data.items["item_id"][i] for i in lists.history_items[0][:2].tolist()]
    assert order == {"UTC": ["early", "late"], "America/New_York": ["late", "early"]}
    with pytest.raises(UserError, match="Mars"):
        build_lists(data, protocol="kar", real=2, list_size=4, time_zone="Mars/Olympus")


def tiny(rows):
    ratings = pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
    users, items = ratings["user_id"].unique(maintain_order=True), ratings["item_id"].unique(maintain_order=True)
    return canonical(
        "tiny",
        ratings,
        pl.DataFrame({"user_id": users}),
        pl.DataFrame({"item_id": items, "title": items}),
        item_attributes=[],
        rating_max=5,
        positive_above=3,
        item_noun="item",
    )


def test_popular_negatives_follow_training_popularity(make_ratings):
    data = make_ratings(users=200, items=60, longest=20)
    train = torch.arange(150)
    counts = np.bincount(data.interactions.filter(pl.col("user") < 150)["item"].to_numpy(), minlength=data.n_items + 1)
    share = {}
    for negatives in ("uniform", "popularity"):
        lists = build_lists(data, protocol="kar", negatives=negatives, train_users=train)
        shown = lists.items[lists.user >= 150].numpy()
        share[negatives] = counts[shown].mean()
    assert share["popularity"] > 1.2 * share["uniform"]


@pytest.mark.parametrize(
    "options", [{"negatives": "retrieved"}, {"initial_ranker": "bpr"}, {"negatives": "popularity"}]
)
@pytest.mark.parametrize("trained", [20, 0])
def test_targets_of_held_out_users_do_not_reach_the_fitted_models(make_ratings, options, trained):
    """Test users' ratings after the history are permuted between them: what was learned must not move."""
    data, train, fitted = make_ratings(users=30, longest=30), torch.arange(trained), []
    original = candidates.World.bpr, candidates.World.popularity

    def spy(name):
        def call(self):
            value = original[0](self) if name == "bpr" else original[1](self)
            fitted.append(value.item_factors if name == "bpr" else value)
            return value

        return call

    n_history = {u: len(h) for u, (h, _) in by_hand(data, "kar", 30).items()}
    order = data.interactions.with_row_index("line")
    order = order.sort("user", pl.col("timestamp") // 86400, maintain_order=True)
    order = order.with_columns(pl.int_range(pl.len()).over("user").alias("place"))
    target = (pl.col("user") >= 20) & (
        pl.col("place") >= pl.col("user").replace_strict(n_history, return_dtype=pl.Int64)
    )
    changed = order.with_columns(
        pl.when(target).then(1 + pl.col("item") * 7 % data.n_items).otherwise("item").alias("item")
    )
    other = replace(
        data, interactions=changed.sort("line").select(data.interactions.columns).cast(data.interactions.schema)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates.World, "bpr", spy("bpr"))
        patch.setattr(candidates.World, "popularity", spy("popularity"))
        build_lists(data, protocol="kar", train_users=train, **options)
        half = len(fitted)
        build_lists(other, protocol="kar", train_users=train, **options)
    assert half > 0
    assert len(fitted) == 2 * half
    for a, b in zip(fitted[:half], fitted[half:], strict=True):
        assert np.array_equal(a, b)


def test_retrieved_negatives_are_harder_than_random_ones(make_ratings):
    data = make_ratings(users=150, items=200, longest=40)
    popular = np.bincount(data.interactions["item"].to_numpy(), minlength=data.n_items + 1)
    seen = {u: set(i) for u, i in data.interactions.group_by("user").agg("item").iter_rows()}

    def mean_count(negatives: str) -> float:
        lists = build_lists(data, negatives=negatives)
        pairs = zip(lists.user.tolist(), lists.items.tolist(), strict=True)
        return float(np.mean([popular[i] for u, row in pairs for i in row if i not in seen[u]]))

    assert mean_count("retrieved") > mean_count("uniform")


def test_retrieved_negatives_score_high_under_the_ranker(make_ratings, monkeypatch):
    data, fitted = make_ratings(users=150, items=300, longest=40), []
    original = candidates.World.bpr
    monkeypatch.setattr(candidates.World, "bpr", lambda self: fitted.append(original(self)) or fitted[-1])
    scores = {}
    for negatives in ("retrieved", "uniform"):
        lists = build_lists(data, negatives=negatives, initial_ranker="bpr", train_users=torch.arange(100))
        shown = fitted[0].score(lists.user.numpy(), lists.items.numpy())
        scores[negatives] = shown[lists.labels.numpy() == 0].mean()
        given = fitted[-1].score(lists.user.numpy(), lists.items.numpy())[lists.user.numpy() >= 100]
        assert (np.diff(given, axis=1) <= 1e-6).all()  # and the initial ranker put the best first
    assert scores["retrieved"] > scores["uniform"] + 0.1


@pytest.mark.parametrize("protocol", ["kar", "strict"])
def test_retrieving_from_few_items_gives_no_padding(make_ratings, protocol):
    data = make_ratings(users=20, items=40, longest=20)
    lists = build_lists(data, protocol=protocol, negatives="retrieved")
    assert lists.items.min() >= 1
    seen = {u: set(i) for u, i in data.interactions.group_by("user").agg("item").iter_rows()}
    for user, items, labels in zip(lists.user.tolist(), lists.items.tolist(), lists.labels.tolist(), strict=True):
        assert all(i in seen[user] for i, label in zip(items, labels, strict=True) if label)
        assert len(set(items)) == SIZE


def test_the_order_of_training_lists_knows_no_more_than_that_of_others(make_ratings):
    """Ratings are random: who stands in front because of the own targets has had them looked up."""
    data = make_ratings(users=200, items=300, longest=60)
    lists = build_lists(data, protocol="strict", initial_ranker="bpr", train_users=torch.arange(120), seed=1)
    real = {(u, i) for u, i, *_ in data.interactions.iter_rows()}
    own = torch.tensor(
        [[(u, i) in real for i in items] for u, items in zip(lists.user.tolist(), lists.items.tolist(), strict=True)]
    )
    place = torch.arange(own.shape[1], dtype=torch.float64).expand_as(own)
    early = [
        float(
            place[part][~own[part]].mean() - place[part][own[part]].mean()
        )  # places that own items stand before others
        for part in (lists.user < 120, lists.user >= 120)
    ]
    assert early[0] < early[1] + 0.6


def test_the_initial_ranker_puts_popular_items_first(make_ratings):
    data = make_ratings()
    popular = torch.from_numpy(np.bincount(data.interactions["item"].to_numpy(), minlength=data.n_items + 1))
    counts = popular[build_lists(data, initial_ranker="popularity").items]
    assert bool((counts[:, :-1] >= counts[:, 1:]).all())


def test_places_of_positives_are_shuffled(make_ratings):
    lists = build_lists(make_ratings(users=300), seed=1)
    share = lists.labels.mean(0)
    assert float((share - share.mean()).abs().max()) < 0.05


@pytest.mark.parametrize("protocol", ["kar", "strict"])
def test_item_core_leaves_dropped_items_out_everywhere(make_ratings, protocol):
    data = make_ratings(users=25, longest=30)
    counts = np.bincount(data.interactions["item"].to_numpy(), minlength=data.n_items + 1)
    lists = build_lists(data, protocol=protocol, item_core=5)
    assert counts[1:].min() < 5
    assert counts[lists.items.numpy()].min() >= 5
    assert lists.report["ratings_dropped_by_item_core"] == counts[counts < 5].sum()


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30), st.integers(1, 5), st.integers(0, 40)), min_size=20),
    history=st.integers(1, 6),
    real=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_strict_invariants_on_any_data(rows, history, real, seed):
    """Repeated interactions and equal times included."""
    rows = [(str(u), str(i), float(r), 3600 * t) for u, i, r, t in rows]
    rows += [(f"other {i % 2}", f"other {i}", 5.0, i) for i in range(60)]  # enough items for everybody's lists
    data = tiny(rows)
    lists = build_lists(data, history=history, real=real, list_size=real + 3, seed=seed)
    ratings: dict[tuple[int, int], list] = {}
    for user, item, rating, time in data.interactions.iter_rows():
        ratings.setdefault((user, item), []).append((time, rating))
    first = {key: min(found, key=lambda entry: entry[0])[1] for key, found in ratings.items()}
    targets = set()
    for user, items, labels in zip(lists.user.tolist(), lists.items.tolist(), lists.labels.tolist(), strict=True):
        past = set(lists.history_items[user].tolist())
        assert len(set(items)) == real + 3
        assert 0 not in items
        assert sum(labels) >= 1
        for item, label in zip(items, labels, strict=True):
            assert item not in past
            assert label == ((user, item) in first and first[user, item] > 3)
            if (user, item) in first:
                assert (user, item) not in targets  # a target once
                targets.add((user, item))
    per_user = Counter(u for u, _ in first)
    total = sum(-(-(n - min((n + 1) // 2, history)) // real) for n in per_user.values())
    assert total == len(lists.user) + lists.report["lists_without_positive_dropped"]
    assert lists.report["repeated_interactions_dropped"] == len(rows) - len(first)


def test_users_with_too_little_are_counted():
    rows = [("short", "a", 5, 1), *(("long", x, 5, t) for t, x in enumerate("abcdef"))]
    rows += [("other", x, 5, t) for t, x in enumerate("ghijklmnopqrstuv")]
    lists = build_lists(tiny(rows), list_size=6)
    assert lists.report["users_without_a_list"] == 1
    assert len(lists.of_users(torch.tensor([0]))) == 0
    assert lists.of_users(torch.tensor([1, 2])).tolist() == list(range(len(lists.user)))


@pytest.mark.parametrize("protocol", ["kar", "strict"])
def test_nobody_left_is_an_error(protocol):
    with pytest.raises(UserError, match="no user has a candidate list"):
        build_lists(tiny([("1", "a", 5, 1), ("2", "b", 5, 1)]), protocol=protocol)


def test_nothing_liked_is_an_error_under_strict():
    rows = [("1", x, 1, t) for t, x in enumerate("abcdef")] + [("2", x, 1, t) for t, x in enumerate("ghijkl")]
    with pytest.raises(UserError, match="no user has a candidate list|no candidate list holds a positive"):
        build_lists(tiny(rows), list_size=5)


@pytest.mark.parametrize(
    "options",
    [
        {"protocol": "Kar"},
        {"negatives": "random"},
        {"initial_ranker": "bm25"},
        {"real": 0},
        {"history": 0},
        {"real": 11},
        {"list_size": 1, "real": 1},
    ],
)
def test_impossible_options_are_named(make_ratings, options):
    with pytest.raises(UserError) as error:
        build_lists(make_ratings(users=4), **options)
    assert error.value.where.startswith("config key lists.")
    assert error.value.fix


@pytest.mark.parametrize("protocol", ["kar", "strict"])
def test_too_few_items_is_an_error(protocol):
    rows = [("1", x, 5, t) for t, x in enumerate("abcdef")] + [("2", x, 5, t) for t, x in enumerate("abcdeg")]
    with pytest.raises(UserError, match="too few|cannot be filled"):
        build_lists(tiny(rows), protocol=protocol, list_size=12)


def test_save_and_load(make_ratings, tmp_path):
    lists = build_lists(make_ratings(users=5))
    lists.save(tmp_path / "lists")
    again = ListSet.load(tmp_path / "lists")
    assert again.report == lists.report
    for name in ("user", "items", "labels", "history_items", "history_ratings"):
        assert torch.equal(getattr(again, name), getattr(lists, name))
        assert getattr(again, name).dtype == getattr(lists, name).dtype
