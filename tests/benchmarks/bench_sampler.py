"""N = 10 answers per prompt against transformers' generate at its best batch size, and its continuous batching."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count

import torch
from transformers import GenerationConfig

from lit_rec.llm.language_model import LanguageModel
from lit_rec.llm.sampler import SamplingSettings
from tests.benchmarks.harness import Row, interleave
from tests.benchmarks.worlds import native, smollm, smollm_name, text

SAMPLES, NEW, SIZES, MORE_SIZES = 10, 64, (1, 2), (1, 2, 4, 8)  # prompts at a time; with --full
DISTRIBUTION = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}


@torch.inference_mode()
def generated(model: torch.nn.Module, prompts: list[list[int]], size: int, new: int = NEW) -> None:
    """`size` prompts at a time; nothing ends early."""
    settings = GenerationConfig(
        **DISTRIBUTION,
        num_return_sequences=SAMPLES,
        max_new_tokens=new,
        min_new_tokens=new,
        pad_token_id=0,
    )
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(t)) + t for t in batch], device=model.device)  # type: ignore[arg-type]
        seen = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in batch], device=ids.device)
        found = model.generate(input_ids=ids, attention_mask=seen, generation_config=settings)  # type: ignore[operator]
        assert found.shape == (len(batch) * SAMPLES, width + new), found.shape


def continuous(model: torch.nn.Module, prompts: list[list[int]]) -> None:
    """Every answer a request of its own; -1 ends none of them."""
    settings = GenerationConfig(**DISTRIBUTION, max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0)
    wanted = [prompt for prompt in prompts for _ in range(SAMPLES)]
    found = model.generate_batch(wanted, generation_config=settings)  # type: ignore[operator]
    assert len(found) == len(wanted)
    assert all(len(answer.generated_tokens) == NEW for answer in found.values())


def request(llm: LanguageModel, many: int, new: int = NEW) -> tuple[Callable[[], None], list[list[int]]]:
    """Ours, ten answers each to `many` prompts, others every time, for the store must not answer; a peer's prompts."""
    prompts = [[{"role": "user", "content": text(480, n)}] for n in range(many)]
    settings = SamplingSettings(new, temperature=1.0, top_p=0.95)
    calls = count(1)

    def ours() -> None:
        asked = next(calls)
        fresh = [[{"role": "user", "content": f"{asked} {p[0]['content']}"}] for p in prompts]
        found = llm.answers(fresh, [SAMPLES] * many, settings=settings)
        assert [len(answers) for answers in found] == [SAMPLES] * many
        assert {answer.tokens for answers in found for answer in answers} == {new}

    llm.model.eval()
    return ours, [llm.tokenize(p) for p in prompts]


@contextmanager
def endless(llm: LanguageModel) -> Iterator[None]:
    """Nothing that we sample ends early meanwhile."""
    llm.__dict__["stop_ids"] = list
    try:
        yield
    finally:
        del llm.__dict__["stop_ids"]


def run(full: bool = False) -> list[Row]:
    """New tokens per second; nothing ends early on either side."""
    many, sizes = (64, MORE_SIZES) if full else (2, SIZES)
    with tempfile.TemporaryDirectory() as store:
        llm, _ = smollm(store, dtype=native())
        ours, tokens = request(llm, many)
        few = tokens if full else tokens[:1]  # continuous batching: its rate is that of ten requests as of twenty
        peers = {}
        for size in sizes:
            asked = tokens if full else tokens[:size]
            peers[f"generate, {size} at a time"] = (partial(generated, llm.model, asked, size), len(asked))
        peers["continuous batching"] = (partial(continuous, llm.model, few), len(few))
        with llm.model.disable_adapter(), endless(llm):
            mine, *others = interleave(ours, *(call for call, _ in peers.values()), repeats=1)
    rate = many * SAMPLES * NEW / mine
    rates = {name: n * SAMPLES * NEW / t for (name, (_, n)), t in zip(peers.items(), others, strict=True)}
    best = max(rates.values())
    mean = sum(map(len, tokens)) / many
    work = f"{SAMPLES} answers of {NEW} tokens to {many} prompts of {mean:.0f} tokens, {smollm_name()}, {native()}"
    note = ", ".join(f"{name}: {value:.1f}" for name, value in rates.items())
    note += "; each timed once" + ("" if full else ", those that take one prompt at a time on the first of both")
    return [Row(work, "transformers, the best way", rate, best, "tokens/s", rate / best, 1.5, note)]
