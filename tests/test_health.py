"""Updates that would ruin a model are never made: the training stops, or goes on without them."""

import math
import statistics
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks.health import FEWEST, MOST_SKIPPED, Health
from lit_rec.agent.ppo import FullInformationAgent, PPOSettings
from lit_rec.agent.training import fit_agent
from lit_rec.data.lists import ListSet
from lit_rec.data.sessions import SessionDataModule
from lit_rec.data.splits import Splits
from lit_rec.errors import UserError
from lit_rec.recipes.agents import health as agent_health

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


class Late:
    """Rewards of hints that are all zero at first: all that the first gradients hold is the entropy bonus."""

    def __init__(self) -> None:
        self.left = FEWEST

    def rewards(self, sessions: Tensor, actions: Tensor) -> Tensor:
        return torch.zeros(len(sessions))

    def matrix(self, sessions: Tensor) -> Tensor:
        self.left -= 1
        return torch.zeros(len(sessions), 3) if self.left >= 0 else torch.tensor([0.0, 1.0, -1.0]).expand(8, 3)


def test_the_first_rewards_are_no_explosion() -> None:
    """The norm is a thousand times what it was without anything to learn, and what it always is where there is."""
    states, everybody = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64)
    none = torch.zeros(0, dtype=torch.long)
    lists = ListSet(everybody, everybody[:, None], torch.zeros(64, 1), everybody[:, None], torch.zeros(64, 1))
    data = SessionDataModule(lists, Splits(everybody, none, none), batch_size=8, seed=0)
    agent = FullInformationAgent(
        states, Late(), train_sessions=everybody, settings=PPOSettings(update_epochs=1, entropy_coef=1e-3)
    )
    agent.set_hints(torch.eye(2, 4), torch.ones(2, dtype=torch.bool))
    cfg = OmegaConf.create({"trainer": {"bad_updates": "stop"}, "agent": {"max_grad_norm": 0.5}})
    health = agent_health(cfg)
    fit_agent(agent, data, max_epochs=4, callbacks=[health])
    norms = [float(norm) for norm in health.state_dict()["norms"]]
    assert norms[FEWEST] > health.limit * statistics.median(norms[:FEWEST])


@pytest.mark.parametrize("clip", [0.5, 1.0])
def test_an_explosion_is_one_where_gradients_are_clipped(clip: float) -> None:
    late = FEWEST + 5
    with pytest.raises(UserError, match="stopped"):
        fit(Health(), {late: 1e5}, gradient_clip_val=clip)
    health = Health()
    fit(health, dict.fromkeys(range(late), 1e-6), gradient_clip_val=clip)  # then a million times what was usual
    assert health.skipped == 0


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
