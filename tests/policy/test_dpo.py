"""The DPO module's parts by hand; its loss against TRL's is in test_trl.py."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from callbacks.preferences import reference_logps
from lit_rec.llm.language_model import LanguageModel
from lit_rec.llm.store import AnswerStore
from lit_rec.policy.dpo import DPOPolicy
from lit_rec.policy.losses import preference_loss
from lit_rec.policy.sequences import Example, answer_logps, collate
from lit_rec.schema import LLMConfig, LoraConfig, PolicyConfig
from tests.tiny import save_llm


@pytest.mark.parametrize(
    ("schedule", "warmup", "wanted"),
    [
        ("linear", 0.0, [1, 0.75, 0.5, 0.25]),
        ("constant", 0.0, [1, 1, 1, 1]),
        ("linear", 0.5, [1 / 3, 2 / 3, 1, 0.5]),
    ],
)
def test_learning_rate_over_a_round(schedule: str, warmup: float, wanted: list[float]) -> None:
    cfg = PolicyConfig(lr=8.0, schedule=schedule, warmup=warmup)
    rates = []
    for done in range(4):
        trainer = SimpleNamespace(global_step=10 + done)
        module: Any = SimpleNamespace(trainer=trainer, round_started_at=10, cfg=cfg, updates_per_round=4)
        rates.append(DPOPolicy._learning_rate(module))
    assert rates == pytest.approx([8 * share for share in wanted])


@pytest.mark.parametrize(("keep", "left"), [(True, 1), (False, 0)])
def test_a_round_begins_with_the_optimiser_it_is_told_to(keep: bool, left: int) -> None:
    cfg = PolicyConfig(epochs=3, keep_optimizer=keep)
    for epoch, wanted in ((3, left), (4, 1)):  # the first epoch of the second round, and one within it
        optimizer = SimpleNamespace(state={"moments": 1})
        trainer = SimpleNamespace(optimizers=[optimizer], global_step=7)
        DPOPolicy.on_train_epoch_start(beginning(epoch, cfg=cfg, trainer=trainer))
        assert len(optimizer.state) == wanted


def beginning(epoch: int, *, seed: int = 1, rank: int = 0, **more: Any) -> Any:
    """What a module is as far as the start of an epoch asks."""
    known: dict[str, Any] = {
        "cfg": PolicyConfig(epochs=3, keep_optimizer=True),
        "trainer": SimpleNamespace(global_step=7),
    }
    mode = SimpleNamespace(training=False)
    rest = {"train": lambda: setattr(mode, "training", True), "mode": mode, "round_started_at": 0}
    return SimpleNamespace(**known | rest | more, llm=SimpleNamespace(seed=seed), current_epoch=epoch, global_rank=rank)


def test_training_goes_on_in_training_mode() -> None:
    """Resumed from a checkpoint, a model is as it was loaded: in evaluation mode."""
    module = beginning(1)
    DPOPolicy.on_train_epoch_start(module)
    assert module.mode.training


def test_chance_goes_by_the_batch() -> None:
    drawn: dict[tuple[int, ...], torch.Tensor] = {}
    for disturbed in (0, 5):
        for seed, epoch, batch, rank in ((1, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (2, 0, 0, 0)):
            torch.rand(disturbed)
            DPOPolicy.on_train_batch_start(beginning(epoch, seed=seed, rank=rank), {}, batch)
            found = torch.rand(3)
            assert torch.equal(drawn.setdefault((seed, epoch, batch, rank), found), found)
    assert len({tuple(found.tolist()) for found in drawn.values()}) == 5


def test_smoothed_dpo_and_the_rewards_by_hand() -> None:
    chosen, rejected = torch.tensor([-3.0, -1.0]), torch.tensor([-2.0, -4.0])
    ref_chosen, ref_rejected, tokens = torch.tensor([-2.5, -2.0]), torch.tensor([-2.0, -3.0]), torch.tensor([2, 5])
    losses, good, bad = preference_loss(
        chosen, rejected, ref_chosen, ref_rejected,
        chosen_tokens=tokens, rejected_tokens=tokens, beta=0.3, label_smoothing=0.2,
    )  # fmt: skip
    margin = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    torch.testing.assert_close(losses, -0.8 * F.logsigmoid(margin) - 0.2 * F.logsigmoid(-margin))
    torch.testing.assert_close(good, 0.3 * (chosen - ref_chosen))
    torch.testing.assert_close(bad, 0.3 * (rejected - ref_rejected))


@pytest.mark.parametrize("reference", ["base", "previous"])
def test_reference_is_what_the_configuration_says_and_belongs_to_its_pair(tmp_path: Path, reference: str) -> None:
    folder, rng = save_llm(tmp_path / "llm", [f"w{i}" for i in range(40)]), random.Random(0)
    cfg = LLMConfig(name="tiny", hub=str(folder), dtype="float32")
    llm = LanguageModel(cfg, LoraConfig(r=4), AnswerStore(tmp_path / "answers"), device="cpu", seed=1)
    for name, p in llm.model.named_parameters():
        if "lora_B" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    policy = DPOPolicy(llm, PolicyConfig(reference=reference)).eval()
    trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=torch.enable_grad))
    policy._trainer = trainer
    examples = [Example([rng.randrange(4, 40) for _ in range(n)], [[5, 6], [7, 8, 9]]) for n in (3, 9, 5, 2, 12)]
    found = reference_logps(policy, examples, 1)
    with torch.no_grad():
        own = torch.cat([answer_logps(llm.model, collate([one])) for one in examples])
        with llm.model.disable_adapter():
            base = torch.cat([answer_logps(llm.model, collate([one])) for one in examples])
    assert not torch.allclose(own, base, atol=1e-2)
    torch.testing.assert_close(found, base if reference == "base" else own, atol=1e-4, rtol=1e-4)
