"""SASRec: it sees no future and no padding, its loss is the definition's, and it learns a planted chain."""

import math

import pytest
import torch
from torch import Tensor

from lit_rec.data.lists import ListSet
from lit_rec.errors import UserError
from lit_rec.metrics.sessions import rank_metrics, target_ranks
from lit_rec.rerankers.sasrec import SASRec, SASRecModule, fit_sasrec, next_item_loss, sasrec_scores, windows

ITEMS = 20


def make(max_length: int = 8, dropout: float = 0.0) -> SASRec:
    torch.manual_seed(0)
    return SASRec(n_items=ITEMS, max_length=max_length, dim=8, blocks=2, heads=2, dropout=dropout).eval()


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randint(1, ITEMS + 1, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("place", range(8))
def test_a_place_sees_itself_and_the_past_alone(place: int) -> None:
    model, first = make(), draw(0, 5, 8)
    second = first.clone()
    second[:, place] = second[:, place] % ITEMS + 1
    before, after = model(first), model(second)
    assert torch.equal(before[:, :place], after[:, :place])
    assert ((before[:, place:] - after[:, place:]).abs().amax(-1) > 1e-6).all()


def test_padding_does_not_matter_and_neither_do_the_other_sessions() -> None:
    model, candidates = make(), draw(1, 6, 10)
    length = torch.tensor([1, 2, 3, 5, 7, 8])
    history = torch.where(torch.arange(8) < length[:, None], draw(2, 6, 8), 0)
    together = model.score(history, candidates)
    wider = model.score(torch.nn.functional.pad(history, (0, 5)), candidates)
    torch.testing.assert_close(wider, together)
    for row in range(6):
        alone = model.score(history[row : row + 1, : length[row]], candidates[row : row + 1])
        torch.testing.assert_close(alone[0], together[row])


def test_of_a_long_session_the_last_items_are_read() -> None:
    model, candidates, history = make(), draw(3, 4, 10), draw(4, 4, 13)
    history[0, 9:] = 0  # 9 items; another row has few
    history[1, 3:] = 0
    found = model.score(history, candidates)
    for row, length in enumerate((9, 3, 13, 13)):
        recent = history[row, max(0, length - 8) : length]
        torch.testing.assert_close(found[row], model.score(recent[None], candidates[row, None])[0])


def test_a_score_is_the_product_of_the_last_state_and_the_item_and_padding_scores_0() -> None:
    model, candidates, history = make(), draw(5, 3, 10), draw(6, 3, 4)
    candidates[:, 7:] = 0
    scores = model.score(history, candidates)
    states = model(history)[:, -1]
    for row in range(3):
        expected = [(states[row] @ model.items.weight[c]).item() for c in candidates[row].tolist()]
        assert scores[row].tolist() == pytest.approx(expected, abs=1e-5)
    assert scores[:, 7:].count_nonzero() == 0
    assert model.score(torch.zeros(2, 4, dtype=torch.int64), candidates[:2]).isfinite().all()


def test_the_whole_softmax_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(7)
    states, table = torch.randn(9, 4, generator=generator), torch.randn(ITEMS + 1, 4, generator=generator)
    targets = draw(8, 9)
    total = 0.0
    for state, target in zip(states, targets.tolist(), strict=True):
        weights = [math.exp(float(state @ table[item])) for item in range(1, ITEMS + 1)]
        total -= math.log(weights[target - 1] / sum(weights))
    assert next_item_loss(states, targets, table, 0).item() == pytest.approx(total / 9, rel=1e-5)


def test_the_sampled_softmax_equals_a_loop_and_estimates_the_whole_one() -> None:
    generator = torch.Generator().manual_seed(9)
    states, table = torch.randn(9, 4, generator=generator), torch.randn(ITEMS + 1, 4, generator=generator)
    targets = draw(10, 9)
    torch.manual_seed(1)
    found = next_item_loss(states, targets, table, 6).item()
    torch.manual_seed(1)
    drawn = torch.randint(1, ITEMS + 1, (6,)).tolist()
    total = 0.0
    for state, target in zip(states, targets.tolist(), strict=True):
        own = math.exp(float(state @ table[target]))
        others = sum(math.exp(float(state @ table[item])) for item in drawn if item != target)
        total += math.log(own + others * ITEMS / 6) - math.log(own)
    assert found == pytest.approx(total / 9, rel=1e-5)
    whole = next_item_loss(states, targets, table, 0).item()
    assert next_item_loss(states, targets, table, 200_000).item() == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("max_length", [1, 2, 3, 5, 8, 20])
def test_every_transition_is_in_exactly_one_piece(max_length: int) -> None:
    numbers = torch.arange(1, 61).view(5, 12)  # every transition is its own
    sequences = torch.where(torch.arange(12) < torch.tensor([0, 1, 2, 7, 12])[:, None], numbers, 0)
    expected = sorted((a, b) for row in sequences.tolist() for a, b in zip(row, row[1:], strict=False) if b)
    cut = windows(sequences, max_length)
    assert cut.shape[1] == max_length + 1
    assert sorted((a, b) for row in cut.tolist() for a, b in zip(row, row[1:], strict=False) if b) == expected
    assert (cut[:, :2] > 0).all()


@pytest.mark.parametrize("width", [0, 1])
def test_sequences_without_a_transition_have_no_pieces(width: int) -> None:
    assert windows(torch.ones(3, width, dtype=torch.int64), 4).shape == (0, 5)


@pytest.mark.parametrize("wrong", [{"dim": 9}, {"blocks": 0}, {"max_length": 0}])
def test_impossible_sizes_are_told(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="SASRec cannot be built"):
        SASRec(**{"n_items": 5, "max_length": 4, "dim": 8, "heads": 2, **wrong})


# A planted chain: 85% of the steps go to the item's one successor, the others anywhere.

SUCCESSOR = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(11)) + 1
FOLLOWED = 0.85


def chain(rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(1, ITEMS + 1, (rows, length), generator=generator)
    follow = torch.rand(rows, length, generator=generator) < FOLLOWED
    for t in range(1, length):
        items[:, t] = torch.where(follow[:, t], SUCCESSOR[items[:, t - 1] - 1], items[:, t])
    return items


def sessions(rows: int, seed: int) -> tuple[ListSet, Tensor]:
    """Sessions of a chain, every item a candidate; and their targets."""
    generator = torch.Generator().manual_seed(seed)
    walk = chain(rows, 6, seed)
    items = torch.stack([torch.randperm(ITEMS, generator=generator) + 1 for _ in range(rows)])
    labels = (items == walk[:, -1:]).float()
    history = walk[:, :-1].clone()
    return ListSet(torch.arange(rows), items, labels, history, torch.zeros(history.shape)), walk[:, -1]


def train(seed: int = 1, negatives: int | None = None, epochs: int = 15) -> SASRecModule:
    lists, _ = sessions(100, 12)
    return fit_sasrec(
        chain(300, 9, 13),
        ITEMS,
        validation=(lists, torch.arange(100)),
        max_length=5,
        dim=16,
        blocks=1,
        lr=5e-3,
        negatives=negatives,
        max_epochs=epochs,
        seed=seed,
    )


@pytest.mark.parametrize("negatives", [None, 8])
def test_it_learns_a_planted_chain(negatives: int | None) -> None:
    module = train(negatives=negatives)
    lists, target = sessions(1000, 14)
    index = torch.arange(1000)
    scores = sasrec_scores(module, lists, index, batch_size=300)
    hr = rank_metrics(target_ranks(scores, lists.items, target), (1,), ITEMS)["hr@1"].mean().item()
    best = FOLLOWED + (1 - FOLLOWED) / ITEMS
    print(f"HR@1 {hr:.3f}, the best possible {best:.3f}, chance {1 / ITEMS:.3f}")
    assert hr >= 0.9 * best
    # Batches of another size add up in another order.
    assert torch.allclose(sasrec_scores(module, lists, index[[7, 3]]), scores[[7, 3]], atol=1e-4)
    assert not module.training


def test_a_fit_depends_on_its_seed_alone_and_keeps_the_best_epoch() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = train(epochs=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, third = train(epochs=3), train(epochs=3, seed=2)
    weights, again, other = (m.state_dict() for m in (first, second, third))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert any(not torch.equal(weights[name], other[name]) for name in weights)
    assert first.report["epochs"] == 3
    lists, target = sessions(100, 12)
    ranks = target_ranks(sasrec_scores(first, lists, torch.arange(100)), lists.items, target)
    ndcg = rank_metrics(ranks, (10,), ITEMS)["ndcg@10"].mean().item()
    assert first.report["best_value"] == pytest.approx(ndcg, abs=1e-6)
    assert first.model.items.weight[0].count_nonzero() == 0  # padding was never learnt


def test_training_leaves_out_what_is_behind_a_sequence() -> None:
    """The step's loss is the mean over real transitions, from the states of each alone."""
    torch.manual_seed(0)
    module = SASRecModule(n_items=ITEMS, max_length=6, dim=8, blocks=1, heads=2, dropout=0.0)
    batch = torch.where(torch.arange(7) < torch.tensor([2, 5, 4])[:, None], draw(15, 3, 7), 0)
    losses = []
    for row in batch.tolist():
        real = [item for item in row if item]
        for t in range(1, len(real)):
            logits = module.model.score(torch.tensor([real[:t]]), torch.arange(1, ITEMS + 1)[None])[0]
            losses.append(-logits.log_softmax(-1)[real[t] - 1].item())
    assert len(losses) == 8
    assert module.training_step(batch, 0).item() == pytest.approx(sum(losses) / 8, rel=1e-5)


def test_nothing_to_learn_from_or_to_choose_by() -> None:
    lists, _ = sessions(5, 16)
    with pytest.raises(UserError, match="no sequence"):
        fit_sasrec(torch.ones(3, 1, dtype=torch.int64), ITEMS, validation=(lists, torch.arange(5)))
    with pytest.raises(UserError, match="no validation"):
        fit_sasrec(chain(5, 4, 0), ITEMS, validation=(lists, torch.arange(0)))
