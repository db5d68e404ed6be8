"""A DPO update, LoRA on SmolLM2-135M, against TRL's DPOTrainer: seconds and memory, every side in a process of its own.

echo go | python -m tests.benchmarks.bench_dpo ours|trl|trl_precomputed BATCHES    (one side: its seconds and its peak)
"""

import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lit_rec.llm.language_model import LanguageModel
from lit_rec.policy.losses import preference_loss
from lit_rec.policy.sequences import answer_logps, collate, encode_chat
from tests.benchmarks.harness import Row, now, seconds
from tests.benchmarks.processes import Side, side, tell
from tests.benchmarks.worlds import native, smollm, smollm_name, text

if TYPE_CHECKING:
    from trl import DPOTrainer

BATCH, PROMPT, ANSWER = 2, 470, 100  # words: prompts of 527 tokens with the quickstart's model
ALIKE = 1e-4  # of losses, gradient norms and the reference's log-probabilities, relative, in float32
Pair = dict[str, list[dict[str, str]]]
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def pairs(count: int, prompt: int = PROMPT, answer: int = ANSWER, seed: int = 0) -> list[Pair]:
    """The same pairs for all sides, others for every seed."""

    def said(role: str, words: int, seed: int) -> list[dict[str, str]]:
        return [{"role": role, "content": text(words, seed)}]

    return [
        {
            "prompt": said("user", prompt, n),
            "chosen": said("assistant", answer, 10_000 + n),
            "rejected": said("assistant", answer, 20_000 + n),
        }
        for n in range(30_000 * seed, 30_000 * seed + count)
    ]


def updater(llm: LanguageModel, size: int = BATCH) -> Callable[[list[Pair]], tuple[Tensor, float]]:
    """Our update, `size` pairs at a time; bfloat16 where the model is.

    It returns the reference's log-probabilities [pairs, 2] and the mean loss.
    """
    optimizer = torch.optim.AdamW([p for p in llm.model.parameters() if p.requires_grad], lr=5e-5)
    device = llm.model.device
    lower = torch.autocast(device.type, torch.bfloat16, enabled=llm.model.dtype == torch.bfloat16)

    def update(given: list[Pair]) -> tuple[Tensor, float]:
        examples = [
            encode_chat(llm.tokenizer, p["prompt"], [p["chosen"][0]["content"], p["rejected"][0]["content"]], 2048)
            for p in given
        ]
        batches = [collate(examples[i : i + size]) for i in range(0, len(examples), size)]
        batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
        llm.model.eval()
        with torch.no_grad(), llm.reference("base"), lower:
            known = [answer_logps(llm.model, batch) for batch in batches]
        llm.model.train()
        mean = torch.zeros((), device=device)
        for batch, reference in zip(batches, known, strict=True):
            with lower:
                logps = answer_logps(llm.model, batch)
            length = batch["target_mask"].sum(-1)
            losses, *_ = preference_loss(
                *logps.unbind(1),
                *reference.unbind(1),
                chosen_tokens=length[:, 0],
                rejected_tokens=length[:, 1],
                loss="sigmoid",
                beta=0.1,
                label_smoothing=0.0,
            )
            loss = losses.mean() / len(batches)
            loss.backward()
            mean += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return torch.cat(known), float(mean)

    return update


def trl_trainer(
    folder: str, source: str, precompute: bool, accumulate: int, size: int, gpu: bool, lower: bool
) -> "Callable[[list[Pair], torch.nn.Module], DPOTrainer]":
    """Makes TRL's trainer of some pairs: our rates, beta and adapter, and no clipping of gradients, for we do none.

    Its `padding_free` is no setting to try: TRL 1.16 says that it is disabled, and pads.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,
        learning_rate=5e-5,
        beta=0.1,
        max_grad_norm=0.0,
        max_length=None,
        precompute_ref_log_probs=precompute,
        gradient_checkpointing=False,
        use_cpu=not gpu,
        bf16=lower,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )

    return lambda given, model: DPOTrainer(
        model=model,  # type: ignore[arg-type]
        args=arguments,
        train_dataset=Dataset.from_list(given),
        processing_class=AutoTokenizer.from_pretrained(source),
        peft_config=LoraConfig(**LORA),  # type: ignore[arg-type]
    )


def trl_updater(
    folder: str, source: str, precompute: bool, accumulate: int, size: int = BATCH, gpu: bool = False
) -> Callable[[list[Pair]], float]:
    """The same update by TRL; it returns its seconds, which begin where its data is tokenized."""
    from transformers import AutoModelForCausalLM

    lower = gpu or native() == "bfloat16"
    made = trl_trainer(folder, source, precompute, accumulate, size, gpu, lower)

    def update(given: list[Pair]) -> float:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16 if lower else torch.float32)
        started = now()
        trainer = made(given, model)
        started = started if precompute else now()  # where it is precomputed, the constructor may do it
        trainer.train()
        return now() - started

    return update


def apart(llm: LanguageModel, source: str, folder: str, words: int = 60) -> dict[str, float]:
    """How far both sides are apart in float32, relative, with the same adapter, drawn so that it changes answers."""
    from transformers import AutoModelForCausalLM

    given, norms = pairs(BATCH, words, words // 3), []
    torch.manual_seed(0)
    with torch.no_grad():
        adapter = {n: torch.randn_like(p) * 0.02 for n, p in llm.model.named_parameters() if p.requires_grad}
        for name, weights in adapter.items():
            llm.model.get_parameter(name).copy_(weights)

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        norms.append(torch.nn.utils.get_total_norm([p.grad for g in optimizer.param_groups for p in g["params"]]))

    hook = register_optimizer_step_pre_hook(look)
    reference, loss = updater(llm)(given)
    found = {"reference": reference, "loss": torch.tensor(loss), "gradient": norms[0]}
    norms.clear()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    trainer = trl_trainer(folder, source, True, 1, BATCH, False, False)(given, model)
    with torch.no_grad():
        for name, weights in adapter.items():
            trainer.model.get_parameter(name).copy_(weights)
    loss = trainer.train().training_loss
    hook.remove()
    columns = [torch.tensor(trainer.train_dataset[f"ref_{kind}_logps"][:]) for kind in ("chosen", "rejected")]
    theirs = {"reference": torch.stack(columns, dim=1), "loss": torch.tensor(loss), "gradient": norms[0]}
    return {name: float(((found[name] - theirs[name]).abs() / theirs[name].abs()).max()) for name in found}


def timed(update: Callable[[list[Pair]], object]) -> Callable[[list[Pair]], float]:
    """The update, which then returns its seconds."""
    return lambda given: seconds(lambda: update(given))


def serve(name: str, accumulate: int) -> None:
    """One side: for every line that is asked, an update of 2 x `accumulate` pairs, or how far both are apart."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "ours":
            update = timed(updater(smollm(folder, dtype=native())[0]))
        else:
            update = trl_updater(folder, smollm(folder)[1], name == "trl_precomputed", accumulate)
        update(pairs(BATCH, 20, 10))  # warm
        for wanted in sys.stdin:
            if wanted == "apart\n":
                tell(apart(*smollm(folder), folder))
            else:
                taken = update(pairs(BATCH * accumulate))
                tell({"seconds": taken, "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20})


def run(full: bool = False) -> list[Row]:
    """Seconds and gigabytes of one update with its reference; ours before and between the peer's settings."""
    accumulate = 8 if full else 1  # the batches of an update follow one another: the ratio does not depend on it
    peers: dict[str, dict[str, float]] = {}
    turns = []

    def started(name: str) -> AbstractContextManager[Side]:
        return side(["-m", "tests.benchmarks.bench_dpo", name, str(accumulate)])

    with started("ours") as ours:
        for name in ("trl", "trl_precomputed"):
            turns.append(ours.work())
            with started(name) as peer:
                peers[name] = peer.work()
                differing = peer.work("apart") if name == "trl_precomputed" else {}
    assert max(differing.values()) < ALIKE, differing
    size = f"{BATCH} x {accumulate} pairs, prompts of 527 tokens"
    work = f"DPO update with its reference, LoRA, {smollm_name()}, {native()}, {size}"
    best = min(peers, key=lambda name: peers[name]["seconds"])
    least = min(one["gigabytes"] for one in peers.values())
    a, b = statistics.mean(one["seconds"] for one in turns), peers[best]["seconds"]
    used = max(one["gigabytes"] for one in turns)
    who = "TRL DPOTrainer, best of two settings"
    same = "in float32 apart by at most " + ", ".join(f"{value:.0e} ({name})" for name, value in differing.items())
    return [
        Row(work, who, a, b, "s", b / a, 2.0, f"best: {best}; ours the mean of two; {same}"),
        Row(f"{work}: memory", who, used, least, "GB", least / used, 1 / 0.6, "peak of the whole process"),
    ]


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
