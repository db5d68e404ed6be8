"""What a GPU adds to the table: larger batches in bfloat16, beside the peers on the same card and what it can do.

The card's ceilings are measured in the same run: the rate of a large bfloat16 product, and of copying. MFU is the
products that an update makes, over its time, over the former; bandwidth is what decoding has to read, once a token the
weights and the keys and values of every prompt and of what its answers have added, over its time, over the latter.
"""

import gc
import tempfile
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_rec.llm.language_model import LanguageModel
from tests.benchmarks.bench_dpo import pairs, trl_updater, updater
from tests.benchmarks.bench_sampler import SAMPLES, endless, generated, request
from tests.benchmarks.harness import Row, seconds
from tests.benchmarks.worlds import smollm, smollm_name

PAIRS, PROMPTS, NEW, SIZES, REPEATS = 16, 64, 64, (16, 64), 3


def run(full: bool = False) -> list[Row]:
    """Rows of the GPU at hand; none where there is none."""
    if not torch.cuda.is_available():
        return []
    rate, copying = ceilings("cuda")
    with tempfile.TemporaryDirectory() as folder:
        llm, source = smollm(folder, device="cuda", dtype="bfloat16")
        rows = sampling(llm, copying, PROMPTS, NEW, SIZES)
        return rows + tuning(llm, source, folder, rate, PAIRS, 8 if full else 2)


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call, what it has queued on the device included."""

    def whole() -> None:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return seconds(whole)


def ceilings(device: str, size: int = 8192, copied: int = 1 << 30) -> tuple[float, float]:
    """Operations per second of a large bfloat16 product, and bytes per second of copying (read and written)."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    block = torch.zeros(copied, dtype=torch.uint8, device=device)
    for call in (lambda: a @ b, block.clone):
        timed(call)
    product = median(timed(lambda: a @ b) for _ in range(9))
    copy = median(timed(block.clone) for _ in range(9))
    return 2 * size**3 / product, 2 * copied / copy


def peak(call: Callable[[], float]) -> tuple[float, float]:
    """What a call returns, and the gigabytes that tensors took on the GPU meanwhile (0 without one)."""
    gc.collect()
    if not torch.cuda.is_available():
        return call(), 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return call(), torch.cuda.max_memory_allocated() / 2**30


def tuning(
    llm: LanguageModel, source: str, folder: str, rate: float, size: int, accumulate: int, words: int = 470
) -> list[Row]:
    """A DPO update of `size` x `accumulate` pairs with its reference, against TRL's better setting.

    Both sides: an update of short pairs, one of the size that counts, then the median of some. Each update has pairs of
    its own, because TRL keeps the reference's log-probabilities of a data set. Afterwards the LLM is on the CPU: ours
    must not be on the card while the peer's memory is measured.
    """
    count = size * accumulate
    few, first = pairs(size, 20, 10), pairs(count, words, words // 4)
    given = [pairs(count, words, words // 4, seed) for seed in range(1, 1 + REPEATS)]
    gpu = llm.model.device.type == "cuda"
    update = updater(llm, size)
    update(few)
    with FlopCounterMode(display=False) as counter:
        update(first)
    mine, used = peak(lambda update=update: median(timed(partial(update, some)) for some in given))  # type: ignore[misc]
    del update  # and its optimizer
    llm.model.to("cpu")
    theirs: dict[str, tuple[float, float]] = {}
    for name, precompute in (("reference on the way", False), ("precomputed reference", True)):
        trl = trl_updater(folder, source, precompute, accumulate, size, gpu)
        for warm in (few, first):
            trl(warm)
        theirs[name] = peak(lambda trl=trl: median(trl(some) for some in given))  # type: ignore[misc]
    best = min(theirs, key=lambda name: theirs[name][0])
    least = min(memory for _, memory in theirs.values())
    work = f"DPO update with its reference, LoRA, bfloat16 on the GPU, {size} x {accumulate} pairs"
    share = counter.get_total_flops() / mine / rate
    note = f"MFU {share:.1%} of the {rate / 1e12:,.3g} TFLOP/s of a large product; TRL: {best}"
    rows = [Row(work, "TRL DPOTrainer", mine, theirs[best][0], "s", theirs[best][0] / mine, 2.0, note)]
    if gpu:
        note = "each side's tensors with the other's off the card"
        rows.append(Row(f"{work}: memory", "TRL DPOTrainer", used, least, "GB", least / used, 1 / 0.6, note))
    return rows


def sampling(llm: LanguageModel, copying: float, many: int, new: int, sizes: tuple[int, ...]) -> list[Row]:
    """Ten answers each to `many` prompts in one batch, against `generate` at its best batch size.

    The adapter is off on both sides (an untrained one is never on where we sample); each call is warm, and a median.
    """
    llm.cfg.batch_size = many * SAMPLES
    ours, tokens = request(llm, many, new)
    calls = [ours, *(partial(generated, llm.model, tokens, n, new) for n in sizes)]
    with endless(llm), llm.model.disable_adapter():
        mine, *times = (median([timed(call) for _ in range(1 + REPEATS)][1:]) for call in calls)
    others = dict(zip(sizes, times, strict=True))
    made, best = many * SAMPLES * new, min(others.values())
    kept = sum(map(len, tokens)) / many + SAMPLES * new / 2  # of a prompt, and of all its answers half way
    share = new * read_per_token(llm, many, kept) / mine / copying
    note = ", ".join(f"{n} prompts at a time: {made / t:,.0f}" for n, t in others.items())
    note += f"; {share:.1%} of the {copying / 1e9:,.0f} GB/s of copying"
    work = f"{SAMPLES} answers of {new} tokens to {many} prompts, {smollm_name()} on the GPU"
    return [Row(work, "transformers' generate", made / mine, made / best, "tokens/s", best / mine, 1.5, note)]


def read_per_token(llm: LanguageModel, rows: int, length: float) -> float:
    """Bytes that a step of decoding reads: all weights, and keys and values of `length` tokens for each of `rows`."""
    shape, width = llm.model.config, llm.model.dtype.itemsize
    weights = sum(p.numel() * p.element_size() for p in llm.model.parameters())
    head = shape.hidden_size // shape.num_attention_heads
    return weights + rows * length * 2 * shape.num_hidden_layers * shape.num_key_value_heads * head * width
