"""N = 10 answers per prompt against transformers' generate at its best batch size."""

import tempfile

import torch

from lit_rec.llm.sampler import SamplingSettings
from tests.benchmarks.harness import Row, interleave
from tests.benchmarks.worlds import smollm, text

PROMPTS, SAMPLES, NEW, SIZES = 6, 10, 64, (1, 2, 3)


def run() -> list[Row]:
    """New tokens per second; nothing ends early on either side."""
    with tempfile.TemporaryDirectory() as store:
        llm, _ = smollm(store)
        prompts = [[{"role": "user", "content": text(480, n)}] for n in range(PROMPTS)]
        tokens = [llm.tokenize(p) for p in prompts]
        llm.model.eval()
        settings = SamplingSettings(NEW, temperature=1.0, top_p=0.95)
        asked = 0

        def ours() -> None:
            nonlocal asked
            asked += 1  # other prompts every time: the store must not answer
            fresh = [[{"role": "user", "content": f"{asked} {p[0]['content']}"}] for p in prompts]
            llm.answers(fresh, [SAMPLES] * PROMPTS, settings=settings)

        @torch.inference_mode()
        def peer(size: int) -> None:
            for start in range(0, PROMPTS, size):
                batch = tokens[start : start + size]
                width = max(map(len, batch))
                ids = torch.tensor([[0] * (width - len(t)) + t for t in batch])
                seen = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in batch])
                llm.model.generate(
                    input_ids=ids,
                    attention_mask=seen,
                    do_sample=True,
                    top_p=0.95,
                    top_k=0,
                    temperature=1.0,
                    num_return_sequences=SAMPLES,
                    max_new_tokens=NEW,
                    min_new_tokens=NEW,
                    pad_token_id=0,
                )

        stop = llm.stop_ids
        llm.__dict__["stop_ids"] = []
        try:
            taken = interleave(ours, *(lambda size=size: peer(size) for size in SIZES), repeats=1)
        finally:
            llm.__dict__["stop_ids"] = stop
    made = PROMPTS * SAMPLES * NEW
    mean = sum(map(len, tokens)) / PROMPTS
    work = f"{SAMPLES} answers of {NEW} tokens to {PROMPTS} prompts of {mean:.0f} tokens, SmolLM2-135M"
    best = min(taken[1:])
    peer = "transformers generate, best of 3 batch sizes"
    return [Row(work, peer, made / taken[0], made / best, "tokens/s", best / taken[0], 1.5)]
