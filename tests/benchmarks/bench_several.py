"""Sampling by two processes, a core each, against one process on one core: the same request, the same answers."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from tests.benchmarks.harness import Row
from tests.benchmarks.worlds import smollm_name

SAMPLES, NEW, BATCH = 4, 32, 16
CODE = """
import json, os, sys, time
rank = int(os.environ["RANK"])
os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
import torch
torch.set_num_threads(1)
from lit_rec import distributed
from lit_rec.llm.sampler import SamplingSettings
from tests.benchmarks.worlds import native, smollm, text
distributed.start(distributed.discover())
folder, many = sys.argv[1], int(sys.argv[2])
llm, _ = smollm(folder, dtype=native())
llm.cfg.batch_size = int(sys.argv[3])
prompts = [[{"role": "user", "content": text(160, n)}] for n in range(many)]
settings = SamplingSettings(int(sys.argv[5]), temperature=1.0, top_p=0.95)
_ = llm.model
distributed.barrier()
began = time.perf_counter()
answers = llm.answers(prompts, [int(sys.argv[4])] * many, settings=settings)
taken = time.perf_counter() - began
tokens = sum(one.tokens for found in answers for one in found)
if rank == 0:
    print("TOOK", json.dumps([tokens, taken, [one.text for found in answers for one in found]]))
distributed.leave()
"""


def measure(processes: int, many: int) -> tuple[float, list[str]]:
    """Tokens per second, and the answers."""
    with tempfile.TemporaryDirectory() as store, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        env = {**os.environ, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        sizes = [str(n) for n in (many, BATCH, SAMPLES, NEW)]
        going = [
            subprocess.Popen(
                [sys.executable, "-c", CODE, store, *sizes],
                env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[2],
            )
            for rank in range(processes)
        ]
        said = [one.communicate()[0] for one in going]

    line = next(line for line in said[0].splitlines() if line.startswith("TOOK "))
    tokens, taken, texts = json.loads(line[5:])
    return tokens / taken, texts


def run(full: bool = False) -> list[Row]:
    """New tokens per second of the whole request."""
    many = 64 if full else 8
    one, two, same = [], [], True
    for _ in range(3 if full else 2):
        slow, first = measure(1, many)
        fast, second = measure(2, many)
        one.append(slow)
        two.append(fast)
        same &= first == second
    assert same, "two processes wrote something else than one"
    ratio = median(two) / median(one)
    work = f"{many} prompts x {SAMPLES} answers of {smollm_name()}, two processes of a core each"
    return [Row(work, "one process on one core", median(two), median(one), "tokens/s", ratio, 1.6, "the same answers")]
