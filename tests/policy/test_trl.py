"""TRL's DPOTrainer is the oracle: same model, same pairs, same loss."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer

from lit_rec.policy.losses import preference_loss
from lit_rec.policy.sequences import answer_logps, collate, encode_chat
from tests.tiny import tiny_llama, word_tokenizer

WORDS = [f"w{i}" for i in range(40)]
PAIRS = [
    {
        "prompt": [{"role": "user", "content": " ".join(WORDS[i : i + 3 + 2 * i])}],
        "chosen": [{"role": "assistant", "content": " ".join(WORDS[2 * i : 2 * i + 3])}],
        "rejected": [{"role": "assistant", "content": " ".join(reversed(WORDS[i : i + 2 + i]))}],
    }
    for i in range(4)
]


def move_adapter(model: torch.nn.Module, seed: int) -> None:
    """Move the trained adapter away from zero, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    ("loss", "smoothing"),
    [("sigmoid", 0.0), ("sigmoid_norm", 0.0), ("ipo", 0.0), ("hinge", 0.0), ("robust", 0.1), ("sft", 0.0)],
)
def test_loss_and_gradient_equal_trl(loss: str, smoothing: float, tmp_path: Path) -> None:
    tokenizer, beta = word_tokenizer(WORDS), 0.1
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    # TRL keeps a copy of the adapter it is given as the reference: the untrained one, which changes nothing.
    model = get_peft_model(tiny_llama(47), lora)
    arguments = DPOConfig(
        output_dir=str(tmp_path),
        loss_type=[loss],
        beta=beta,
        label_smoothing=smoothing,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
    )
    trainer = DPOTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer
    )
    model = trainer.model.eval()
    move_adapter(model, 1)
    batch = next(iter(trainer.get_train_dataloader()))
    model.zero_grad()
    theirs = trainer._compute_loss(model, batch, return_outputs=False)
    theirs.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    examples = [
        encode_chat(tokenizer, p["prompt"], [p["chosen"][0]["content"], p["rejected"][0]["content"]], 512)
        for p in PAIRS
    ]
    ours_batch = collate(examples)
    logps = answer_logps(model, ours_batch)
    with torch.no_grad(), model.disable_adapter():
        reference = answer_logps(model, ours_batch)
    tokens = ours_batch["target_mask"].sum(-1)
    losses, chosen, rejected = preference_loss(
        *logps.unbind(1),
        *reference.unbind(1),
        chosen_tokens=tokens[:, 0],
        rejected_tokens=tokens[:, 1],
        loss=loss,
        beta=beta,
        label_smoothing=smoothing,
    )
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-4)
    assert expected
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)
