"""Throughput of the server port against a server that answers after 200 ms, however many ask.

python -m tests.benchmarks.bench_server [concurrency ...]
"""

import subprocess
import sys
import tempfile
import time

from lit_rec.llm.server import ServerModel
from lit_rec.llm.store import AnswerStore
from tests.llm.stub_server import serving

DELAY = 0.2  # seconds per answer
WAVES = 25  # requests per slot
TARGET = 0.9  # of concurrency / DELAY answers per second


def measure(concurrency: int, url: str) -> float:
    """Share of the ideal throughput that is reached: from connecting to the last write, imports left out."""
    prompts = [[{"role": "user", "content": f"question {i} {'word ' * 200}"}] for i in range(concurrency * WAVES)]
    with tempfile.TemporaryDirectory() as folder:
        llm = ServerModel("m", [url], AnswerStore(folder), concurrency=concurrency)
        llm.answers([[{"role": "user", "content": "a first one, which imports what is needed"}]], [1])
        started, worked = time.perf_counter(), time.process_time()
        llm.answers(prompts, [1] * len(prompts))
        seconds, worked = time.perf_counter() - started, time.process_time() - worked
    rate, ideal = len(prompts) / seconds, concurrency / DELAY
    print(
        f"concurrency {concurrency:3d}: {rate:7.1f} of {ideal:7.1f} answers/s, {rate / ideal:.3f} of ideal "
        f"(target {TARGET}), {1000 * worked / len(prompts):.1f} ms of processor time each",
        flush=True,
    )
    return rate / ideal


def serve() -> None:
    """The stub in a process of its own, as a server is: it must not share the interpreter lock with its client."""
    with serving(delay=DELAY) as stub:
        print(stub.url, flush=True)
        sys.stdin.read()


def main(concurrencies: list[int]) -> int:
    """0 if every concurrency reaches the target."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_server", "serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        url = server.stdout.readline().strip()
        shares = [measure(n, url) for n in concurrencies]
        server.stdin.close()
    return int(min(shares) < TARGET)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        sys.exit(main([int(n) for n in sys.argv[1:]] or [4, 16]))
