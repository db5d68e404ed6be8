"""Throughput of the server port against a server that answers after 200 ms, however many ask."""

import sys
import tempfile
import time

from lit_rec.llm.server import ServerModel
from lit_rec.llm.store import AnswerStore
from tests.benchmarks.harness import Row
from tests.benchmarks.processes import side, tell
from tests.llm.stub_server import serving

DELAY = 0.2  # seconds per answer
REQUESTS = 1_000
TARGET = 0.9  # of concurrency / DELAY answers per second


def measure(concurrency: int, url: str) -> Row:
    """Answers per second against the ideal: from connecting to the last write, imports left out."""
    prompts = [[{"role": "user", "content": f"question {i} {'word ' * 200}"}] for i in range(REQUESTS)]
    with tempfile.TemporaryDirectory() as folder:
        llm = ServerModel("m", [url], AnswerStore(folder), concurrency=concurrency)
        llm.answers([[{"role": "user", "content": "a first one, which imports what is needed"}]], [1])
        started, worked = time.perf_counter(), time.process_time()
        llm.answers(prompts, [1] * len(prompts))
        taken, worked = time.perf_counter() - started, time.process_time() - worked
    rate, ideal = len(prompts) / taken, concurrency / DELAY
    work = f"{len(prompts):,} requests to a server that takes 200 ms, {concurrency} at a time"
    note = f"{1000 * worked / len(prompts):.1f} ms of processor time each"
    return Row(work, "the ideal", rate, ideal, "answers/s", rate / ideal, TARGET, note)


def serve() -> None:
    """The stub in a process of its own, as a server is: it must not share the interpreter lock with its client."""
    with serving(delay=DELAY) as stub:
        tell(stub.url)
        sys.stdin.read()


def run(full: bool = False) -> list[Row]:
    """One row per concurrency."""
    with side(["-m", "tests.benchmarks.bench_server"]) as server:
        url = server.told()
        return [measure(n, url) for n in (8, 16)]


if __name__ == "__main__":
    serve()
