import pytest
import torch

from lit_rec.data.splits import split_users
from lit_rec.errors import UserError


@pytest.mark.parametrize("protocol", ["kar", "strict"])
@pytest.mark.parametrize("n", [10, 97, 943])
@pytest.mark.parametrize("folds", [1, 3, 5])
def test_parts_are_disjoint_and_cover_everybody(protocol, n, folds):
    tested = []
    for fold in range(folds):
        s = split_users(n, protocol=protocol, fold=fold, folds=folds, seed=2)
        for part in (s.train, s.validation, s.test):
            assert part.dtype == torch.int64
            assert torch.equal(part, part.sort().values)
        assert torch.cat([s.train, s.validation, s.test]).sort().values.tolist() == list(range(n))
        tested += s.test.tolist()
    if folds > 1:
        assert sorted(tested) == list(range(n))


def test_kar_tests_the_last_tenth_by_id():
    s = split_users(6040, protocol="kar", validation=0)
    assert s.test.tolist() == list(range(5436, 6040))
    assert s.train.tolist() == list(range(5436))
    assert not len(s.validation)


@pytest.mark.parametrize("protocol", ["kar", "strict"])
def test_shares_are_as_asked(protocol):
    s = split_users(1000, protocol=protocol, test=0.2, validation=0.05)
    assert (len(s.train), len(s.validation), len(s.test)) == (750, 50, 200)
    s = split_users(1000, protocol=protocol, folds=4, fold=3, test=0.9, validation=0.05)  # folds decide, not `test`
    assert (len(s.train), len(s.validation), len(s.test)) == (700, 50, 250)
    s = split_users(1000, protocol=protocol, test=0)
    assert (len(s.train), len(s.validation), len(s.test)) == (900, 100, 0)


def test_kar_draws_validation_users_from_all_training_users():
    s = split_users(1000, protocol="kar", seed=1)
    assert s.test.tolist() == list(range(900, 1000))
    assert 300 < s.validation.float().mean() < 600
    assert s.validation.tolist() != split_users(1000, protocol="kar", seed=2).validation.tolist()


def test_the_seed_decides():
    a, b, c = split_users(100, seed=1), split_users(100, seed=1), split_users(100, seed=2)
    assert torch.equal(a.test, b.test)
    assert not torch.equal(a.test, c.test)


@pytest.mark.parametrize(
    "options",
    [{"fold": 5, "folds": 5}, {"fold": -1}, {"n": 3}, {"n": 20, "validation": 0.01}, {"test": 0.95, "validation": 0.1}],
)
def test_impossible_splits_are_errors(options):
    options = {"n": 100} | options
    with pytest.raises(UserError) as error:
        split_users(options.pop("n"), **options)
    assert "evaluation." in error.value.where
