"""Sampling by two processes, a core each, against one process on one core: the same request, the same answers."""

import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median

from tests.benchmarks.harness import Row
from tests.benchmarks.processes import side
from tests.benchmarks.worlds import smollm_name

SAMPLES, NEW, BATCH = 4, 32, 16
CODE = """
import os, sys, time
rank = int(os.environ["RANK"])
os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
import torch
torch.set_num_threads(1)
from lit_rec import distributed
from lit_rec.llm.sampler import SamplingSettings
from tests.benchmarks.processes import tell
from tests.benchmarks.worlds import native, smollm, text
distributed.start(distributed.discover())
folder, many, batch, samples, new = sys.argv[1], *map(int, sys.argv[2:])
llm, _ = smollm(folder, dtype=native())
llm.cfg.batch_size = batch
settings = SamplingSettings(new, temperature=1.0, top_p=0.95)
_ = llm.model
for turn, _ in enumerate(sys.stdin):
    # Others every time, for the store must not answer.
    prompts = [[{"role": "user", "content": text(160, turn * many + n)}] for n in range(many)]
    distributed.barrier()
    began = time.perf_counter()
    answers = llm.answers(prompts, [samples] * many, settings=settings)
    taken = time.perf_counter() - began
    tokens = sum(one.tokens for found in answers for one in found)
    tell([tokens / taken, [one.text for found in answers for one in found]])
distributed.leave()
"""


@contextmanager
def sampling(processes: int, many: int) -> Iterator[Callable[[], tuple[float, list[str]]]]:
    """So many processes; every call gives tokens per second of a request, and its answers."""
    with ExitStack() as stack:
        store = stack.enter_context(tempfile.TemporaryDirectory())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        asked = ["-c", CODE, store, *(str(n) for n in (many, BATCH, SAMPLES, NEW))]
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        sides = [stack.enter_context(side(asked, env | rank)) for rank in ranks]

        def request() -> tuple[float, list[str]]:
            for one in sides:
                one.ask()
            rate, texts = [one.told() for one in sides][0]
            return rate, texts

        yield request


def run(full: bool = False) -> list[Row]:
    """New tokens per second of the whole request."""
    many = 64 if full else 8
    with sampling(1, many) as one, sampling(2, many) as two:
        found = [(one(), two()) for _ in range(3 if full else 2)]
    assert all(alone[1] == both[1] for alone, both in found), "two processes wrote something else than one"
    slow, fast = (median(rate for rate, _ in rates) for rates in zip(*found, strict=True))
    work = f"{many} prompts x {SAMPLES} answers of {smollm_name()}, two processes of a core each"
    return [Row(work, "one process on one core", fast, slow, "tokens/s", fast / slow, 1.6, "the same answers")]
