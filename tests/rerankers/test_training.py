"""Fitting: it learns what there is to learn, chooses the right epoch, repeats itself, survives the disk."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lit_rec.errors import UserError
from lit_rec.kernels import calls
from lit_rec.rerankers.module import ARCHITECTURES
from lit_rec.rerankers.rewards import score_lists
from lit_rec.rerankers.training import fit_reranker, load_reranker, save_reranker


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_knowledge_makes_the_difference(world: Any, architecture: str) -> None:
    """Knowledge, and for MIR the history as well, tells who loves what; nothing else does."""
    arguments = {"architecture": architecture, "temperature": 0.3}
    informed = fit_reranker(**arguments, **world.arguments())
    blind = fit_reranker(**arguments, **world.arguments(knowledge=False))
    assert informed.best_value > 0.9
    if architecture == "mir":
        assert blind.best_value > 0.85
    else:
        assert blind.best_value < informed.best_value - 0.2


def test_the_best_epoch_is_kept(world: Any) -> None:
    fitted = fit_reranker(**world.arguments() | {"max_epochs": 4, "lr": 0.05})
    values = [epoch["val/user/ndcg@5"] for epoch in fitted.history]
    assert len(values) == 4
    assert fitted.best_epoch == values.index(max(values))
    assert fitted.best_value == max(values)
    again = fit_reranker(
        selection="last",
        **world.arguments() | {"max_epochs": fitted.best_epoch + 1, "lr": 0.05},
    )
    assert math.isnan(again.best_value)
    assert again.best_epoch == fitted.best_epoch
    index = torch.arange(20)
    torch.testing.assert_close(
        score_lists(fitted.module, world.lists, index), score_lists(again.module, world.lists, index)
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_take_training_the_same_course_as_torch(
    world: Any, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if calls.library() is None:
        pytest.skip("no C compiler")
    # SetRank's own loss has a temperature of .03, by which rounding grows: torch's two precisions part there too.
    arguments = world.arguments() | {"architecture": architecture, "max_epochs": 3, "loss": "bce"}
    ours = fit_reranker(**arguments)
    monkeypatch.setattr(calls, "library", lambda: None)
    theirs = fit_reranker(**arguments)
    for name in ("train/loss", "val/user/ndcg@5"):
        course, expected = ([epoch[name] for epoch in fitted.history] for fitted in (ours, theirs))
        assert course == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize(("architecture", "side"), [("dlcm", "item_vectors"), ("mir", "user_vectors"), ("prm", "none")])
def test_knowledge_is_read_in_the_precision_of_the_weights(
    world: Any, precision: str, architecture: str, side: str
) -> None:
    """With both sides' knowledge, and with one side left out."""
    arguments = world.arguments() | {"max_epochs": 1, "architecture": architecture, "precision": precision}
    fitted = fit_reranker(**{name: value for name, value in arguments.items() if name != side})
    assert fitted.module.knowledge.adaptor.shared.weight1.dtype != torch.float32
    assert 0 < fitted.best_value <= 1
    assert score_lists(fitted.module, world.lists, torch.arange(9)).isfinite().all()


def test_early_stopping(world: Any) -> None:
    fitted = fit_reranker(**world.arguments() | {"max_epochs": 9, "patience": 1, "lr": 0.0, "architecture": "setrank"})
    assert len(fitted.history) == 2


def test_kar_chooses_on_the_test_users(world: Any) -> None:
    arguments = world.arguments() | {"max_epochs": 3, "validation_users": None}
    fitted = fit_reranker(test_users=world.validation, selection="test_kar", **arguments)
    assert fitted.best_value == max(epoch["val/list/map@5"] for epoch in fitted.history)
    assert fitted.module.convention == "kar"


def test_a_seed_decides_everything(world: Any) -> None:
    def fit(seed: int) -> dict[str, torch.Tensor]:
        arguments = world.arguments() | {"max_epochs": 1, "seed": seed, "adaptor": {"dropout": 0.2}}
        return fit_reranker(**arguments).module.state_dict()

    torch.manual_seed(0)
    one, state = fit(3), torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())  # the caller's random state is untouched
    torch.manual_seed(99)
    two, other = fit(3), fit(4)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_quiet_and_open_to_callbacks(world: Any, capfd: pytest.CaptureFixture[str]) -> None:
    class Count(Callback):
        epochs = 0

        def on_train_epoch_end(self, *_: object) -> None:
            self.epochs += 1

    count = Count()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_reranker(callbacks=[count], **world.arguments() | {"max_epochs": 2})
    assert count.epochs == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("architecture", ["dlcm", "mir"])
@pytest.mark.parametrize("first", [False, True])
def test_save_and_load(world: Any, tmp_path: Path, architecture: str, first: bool) -> None:
    arguments = world.arguments() | {"max_epochs": 1, "attributes": world.attributes.repeat(1, 2)}
    fitted = fit_reranker(
        architecture=architecture,
        architecture_args={"dropout": 0.1},
        first_attribute_only=first,
        **arguments,
    )
    save_reranker(fitted, tmp_path / "reranker")
    assert {file.name for file in (tmp_path / "reranker").iterdir()} == {
        "reranker.safetensors",
        "reranker.json",
    }
    loaded = load_reranker(tmp_path / "reranker", user_vectors=world.user_vectors, item_vectors=world.item_vectors)
    index = torch.arange(50)
    expected = score_lists(fitted.module, world.lists, index)
    assert torch.equal(score_lists(loaded.module, world.lists, index), expected)
    assert (loaded.best_epoch, loaded.best_value) == (fitted.best_epoch, fitted.best_value)
    assert loaded.history == fitted.history
    with pytest.raises(UserError, match="does not fit"):
        load_reranker(tmp_path / "reranker")
    with pytest.raises(UserError, match="no saved reranker"):
        load_reranker(tmp_path)


def test_mistakes_are_explained(world: Any) -> None:
    arguments = world.arguments()
    with pytest.raises(UserError, match="None of the training users"):
        fit_reranker(**arguments | {"train_users": torch.tensor([], dtype=torch.int64)})
    with pytest.raises(UserError, match="no lists to choose the epoch on"):
        fit_reranker(**arguments | {"validation_users": None})
    with pytest.raises(UserError, match="no selection"):
        fit_reranker(selection="best", **arguments)  # type: ignore[arg-type]
