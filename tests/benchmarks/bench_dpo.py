"""A DPO update, LoRA on SmolLM2-135M, against TRL's DPOTrainer: seconds and memory, every side in a process of its own.

python -m tests.benchmarks.bench_dpo ours|trl|trl_precomputed BATCHES    (one side; prints its seconds and its peak)
"""

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable

import torch

from lit_rec.llm.language_model import LanguageModel
from lit_rec.policy.losses import preference_loss
from lit_rec.policy.sequences import answer_logps, collate, encode_chat
from tests.benchmarks.harness import Row, now
from tests.benchmarks.worlds import native, smollm, text

BATCH, PROMPT, ANSWER = 2, 470, 100  # words: about 600 and 128 tokens
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def pairs(count: int, prompt: int = PROMPT, answer: int = ANSWER) -> list[dict[str, list[dict[str, str]]]]:
    """The same pairs for all sides."""

    def said(role: str, words: int, seed: int) -> list[dict[str, str]]:
        return [{"role": role, "content": text(words, seed)}]

    return [
        {
            "prompt": said("user", prompt, n),
            "chosen": said("assistant", answer, 100 + n),
            "rejected": said("assistant", answer, 200 + n),
        }
        for n in range(count)
    ]


def updater(llm: LanguageModel, size: int = BATCH) -> Callable[[list[dict[str, list[dict[str, str]]]]], None]:
    """Our update, the reference's log-probabilities included, `size` pairs at a time; bfloat16 where the model is."""
    optimizer = torch.optim.AdamW([p for p in llm.model.parameters() if p.requires_grad], lr=5e-5)
    device = llm.model.device
    lower = torch.autocast(device.type, torch.bfloat16, enabled=llm.model.dtype == torch.bfloat16)

    def update(given: list[dict[str, list[dict[str, str]]]]) -> None:
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
            (losses.mean() / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def ours(folder: str, accumulate: int) -> float:
    """One update of 2 x `accumulate` pairs."""
    update = updater(smollm(folder, dtype=native())[0])
    update(pairs(BATCH, 20, 10))  # warm
    wanted = pairs(BATCH * accumulate)
    started = now()
    update(wanted)
    return now() - started


def trl_updater(
    folder: str, source: str, precompute: bool, accumulate: int, size: int = BATCH, gpu: bool = False
) -> Callable[[list[dict[str, list[dict[str, str]]]]], float]:
    """The same update by TRL; it returns its seconds, which begin where its data is tokenized."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    lower = gpu or native() == "bfloat16"
    arguments = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,
        learning_rate=5e-5,
        beta=0.1,
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

    def update(given: list[dict[str, list[dict[str, str]]]]) -> float:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16 if lower else torch.float32)
        started = now()
        trainer = DPOTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(given),
            processing_class=AutoTokenizer.from_pretrained(source),
            peft_config=LoraConfig(**LORA),  # type: ignore[arg-type]
        )
        started = started if precompute else now()  # where it is precomputed, the constructor may do it
        trainer.train()
        return now() - started

    return update


def trl(folder: str, precompute: bool, accumulate: int) -> float:
    """TRL's update of as many pairs."""
    update = trl_updater(folder, smollm(folder)[1], precompute, accumulate)
    update(pairs(BATCH, 20, 10))  # warm
    return update(pairs(BATCH * accumulate))


def side(name: str, accumulate: int) -> None:
    """Run one side and print what it took."""
    with tempfile.TemporaryDirectory() as folder:
        taken = ours(folder, accumulate) if name == "ours" else trl(folder, name == "trl_precomputed", accumulate)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": taken, "gigabytes": peak}))


def run(full: bool = False) -> list[Row]:
    """Seconds and gigabytes of one update with its reference."""
    accumulate = 8 if full else 1  # the batches of an update follow one another: the ratio does not depend on it
    found: dict[str, dict[str, float]] = {}
    for name in ("ours", "trl", "trl_precomputed"):
        command = [sys.executable, "-m", "tests.benchmarks.bench_dpo", name, str(accumulate)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found[name] = json.loads(done.stdout.strip().splitlines()[-1])
    size = f"{BATCH} x {accumulate} pairs, prompts about 600 tokens"
    work = f"DPO update with its reference, LoRA, SmolLM2-135M, {native()}, {size}"
    best = min(("trl", "trl_precomputed"), key=lambda name: found[name]["seconds"])
    least = min(found[name]["gigabytes"] for name in ("trl", "trl_precomputed"))
    a, b = found["ours"]["seconds"], found[best]["seconds"]
    used = found["ours"]["gigabytes"]
    peer = "TRL DPOTrainer, best of two settings"
    return [
        Row(work, peer, a, b, "s", b / a, 2.0, f"best: {best}"),
        Row(f"{work}: memory", peer, used, least, "GB", least / used, 1 / 0.6, "peak of the whole process"),
    ]


if __name__ == "__main__":
    side(sys.argv[1], int(sys.argv[2]))
