"""Updates that would ruin a model are never made: the training stops, or goes on without them."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks.health import FEWEST, MOST_SKIPPED, Health
from lit_rec.errors import UserError

STEPS = FEWEST + 14


class Tiny(L.LightningModule):
    """One linear layer; what its loss is multiplied by stands in the data."""

    def __init__(self, *, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)
        self.weights: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        x, factor = batch
        loss = (self.layer(x).square().mean() + 1) * factor.mean()
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def on_train_batch_end(self, *_: Any) -> None:
        self.weights.append(self.layer.weight.detach().clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(
    health: Health, bad: dict[int, float], *, module: Tiny | None = None, steps: int = STEPS, **options: Any
) -> Tiny:
    """Train with factors of the loss that are 1 but where `bad` says otherwise."""
    factors = torch.ones(steps)
    for step, factor in bad.items():
        factors[step] = factor
    data = DataLoader(TensorDataset(torch.ones(steps, 2), factors), batch_size=1)
    module = module or Tiny()
    settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_checkpointing": False, **options}
    L.Trainer(callbacks=[health], **settings).fit(module, data)
    return module


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched(factor: float, manual: bool) -> None:
    module = Tiny(manual=manual)
    with pytest.raises(UserError, match="stopped before it could spoil the weights") as caught:
        fit(Health(name="round 1", keys="policy.lr and policy.beta"), {5: factor}, module=module)
    assert caught.value.what.startswith("round 1")
    assert caught.value.where == "config keys policy.lr and policy.beta"
    assert "update 6: the loss is" in caught.value.why
    assert "trainer.bad_updates=skip" in caught.value.fix
    assert len(module.weights) == 5
    assert torch.equal(module.layer.weight, module.weights[-1])  # the last good state


@pytest.mark.parametrize("manual", [False, True])
def test_skip_leaves_the_update_out_and_says_so(manual: bool, capsys: pytest.CaptureFixture[str]) -> None:
    health = Health("skip", name="round 1")
    module = fit(health, {3: math.nan, 9: math.inf}, module=Tiny(manual=manual))
    assert health.skipped == 2
    same = [n for n in range(1, STEPS) if torch.equal(module.weights[n], module.weights[n - 1])]
    assert same == [3, 9]  # AdamW's moments and weight decay moved nothing there
    told = capsys.readouterr().out
    assert told.count("left out") == 2
    assert "round 1: epoch 1, update 4 left out (the loss is nan); 1 so far" in " ".join(told.split())


def test_an_update_is_left_out_with_all_its_accumulated_batches() -> None:
    health = Health("skip")
    module = fit(health, {3: math.nan}, accumulate_grad_batches=2, gradient_clip_val=1.0)
    changed = [n for n in range(1, 10) if not torch.equal(module.weights[n], module.weights[n - 1])]
    assert changed == [1, 5, 7, 9]  # every second batch ends an update; the one of batches 2 and 3 is not made
    assert torch.isfinite(module.layer.weight).all()


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_an_explosion_is_one_beside_what_is_usual(policy: str) -> None:
    health, late = Health(policy), FEWEST + 5
    fit(health, {2: 1e5, FEWEST - 1: 1e5})  # too early to say what is usual
    assert health.skipped == 0
    health = Health(policy)
    if policy == "stop":
        with pytest.raises(UserError, match="stopped") as caught:
            fit(health, {late: 1e5})
        assert "times what is usual" in caught.value.why
    else:
        fit(health, {late: 1e5, late + 2: 50.0})  # the second is large, and no explosion
        assert health.skipped == 1


def test_what_does_not_end_is_not_skipped_for_ever() -> None:
    bad = dict.fromkeys(range(4, 4 + MOST_SKIPPED + 1), math.nan)
    with pytest.raises(UserError, match="stopped") as caught:
        fit(Health("skip"), bad, steps=40)
    assert f"{MOST_SKIPPED + 1} updates in a row" in caught.value.why
    bad.pop(10)  # one good update in between
    health = Health("skip")
    fit(health, bad, steps=40)
    assert health.skipped == MOST_SKIPPED


def test_without_trouble_nothing_changes() -> None:
    with_it, without = fit(Health(), {}), Tiny()
    fit(Health(limit=math.inf), {}, module=without)
    torch.manual_seed(0)
    assert torch.equal(with_it.layer.weight, without.layer.weight)


def test_a_resumed_fit_knows_what_is_usual(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    health = Health("skip")
    data = DataLoader(TensorDataset(torch.ones(FEWEST, 2), torch.ones(FEWEST)), batch_size=1)
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    keep = ModelCheckpoint(tmp_path, filename="last")
    L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[health, keep], **options).fit(Tiny(), data)
    again = Health("skip")
    bad = DataLoader(TensorDataset(torch.ones(FEWEST, 2), torch.tensor([1e6] + [1.0] * (FEWEST - 1))), batch_size=1)
    trainer = L.Trainer(accelerator="cpu", max_epochs=2, callbacks=[again], enable_checkpointing=False, **options)
    trainer.fit(Tiny(), bad, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert again.skipped == 1
