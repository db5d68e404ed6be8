"""How cost grows with the work: users, answers per user, list length and rounds, at four sizes each, and its exponent.

A fifth and smaller size shows what does not grow at all. Without it, and with the shortest times rather than medians,
an exponent above what is asked for was found in two of five series that grew linearly, with a shared machine's noise;
now it is in one of 25, and an exponent of 1.3 in 24 of 25 (simulated: 8% noise, a fifth of all times a quarter short).

python -m tests.benchmarks growth [--plot FILE.svg]
"""

import contextlib
import io
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from lit_rec.data.sessions import SessionDataModule
from lit_rec.rerankers.module import RerankerModule
from lit_rec.rerankers.rewards import answer_rewards
from tests.benchmarks.bench_reranker import train_ours
from tests.benchmarks.harness import Row, seconds
from tests.benchmarks.worlds import GENRE, ITEMS, lists

WIDTH, LISTS_PER_USER = 64, 10
NOISE = 0.15  # an exponent is measured no better than this
REPEATS, FEWER = 5, 2  # the sizes in turn, so often; fewer of whole runs


def exponent(sizes: Sequence[float], taken: Sequence[float]) -> float:
    """The e of a + b * n ** e, by least squares of relative errors with a and b not below 0, from .20 to 4.00.

    A slope of logarithms alone would look flatter than the growth is, because of the constant a.

    >>> exponent([1, 2, 4, 8], [5 + 3 * n for n in (1, 2, 4, 8)])
    1.0
    >>> exponent([1, 2, 4, 8], [5 + 3 * n**2 for n in (1, 2, 4, 8)])
    2.0
    """
    times = np.asarray(taken, dtype=float)
    found = {}
    for e in np.arange(20, 401) / 100:
        grown = (np.asarray(sizes, dtype=float) / max(sizes)) ** e
        columns = np.stack([np.ones_like(times), grown], axis=1) / times[:, None]
        factors = np.linalg.lstsq(columns, np.ones_like(times))[0]
        if factors.min() < 0:  # growth alone
            factors = np.array([0, columns[:, 1].sum() / (columns[:, 1] ** 2).sum()])
        found[float(e)] = float(((columns @ factors - 1) ** 2).sum())
    return min(found, key=found.__getitem__)


def medians(sizes: Sequence[int], cost: Callable[[int], float], repeats: int = REPEATS) -> list[float]:
    """What every size takes, the sizes in turn so that a noisy minute hits all of them."""
    turns = [[cost(n) for n in sizes] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def rerank(users: int = 100, answers: int = 4, size: int = 10) -> float:
    """Seconds of an epoch of a reranker with knowledge and of the rewards of all answers."""
    source, splits = lists(users * LISTS_PER_USER, size=size, users=users)
    draw = torch.Generator().manual_seed(0)
    vectors = {
        "user_vectors": torch.randn(users, WIDTH, generator=draw),
        "item_vectors": torch.randn(ITEMS + 1, WIDTH, generator=draw),
    }
    module = RerankerModule(n_items=ITEMS, attributes=GENRE, **vectors)
    given = torch.randn(users * answers, WIDTH, generator=draw), torch.arange(users).repeat_interleave(answers)

    def work() -> None:
        train_ours(module, SessionDataModule(source, splits, batch_size=256).train_dataloader())
        answer_rewards(module, source, *given)

    return seconds(work)


def rounds(count: int, folder: Path) -> float:
    """Seconds of a whole run of a tiny model with so many rounds."""
    from lit_rec.cli import main
    from tests.worlds import BARE, make_world

    world = make_world(Path(tempfile.mkdtemp(dir=folder)) / "world")

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main(["fit", "--config", world.config, *BARE, f"policy.rounds={count}"]) == 0

    return seconds(run)


def run(full: bool = False, plot: str | None = None) -> list[Row]:
    """Exponents: 1 is linear."""
    scale = 4 if full else 1
    found: dict[str, tuple[list[int], list[float]]] = {}
    rerank()  # imports, threads
    with tempfile.TemporaryDirectory() as work:
        rounds(1, Path(work))
        cases: dict[str, tuple[list[int], Callable[[int], float]]] = {
            "users": ([25, 100, 200, 400, 800], lambda n: rerank(users=n * scale)),
            "answers per user": ([2, 10, 20, 40, 80], lambda n: rerank(answers=n * scale)),
            "candidates per list": ([5, 10, 20, 40, 80], lambda n: rerank(users=200 * scale, size=n)),
            "rounds": ([1, 2, 4, 8], lambda n: rounds(n * scale, Path(work))),
        }
        for what, (sizes, cost) in cases.items():
            taken = medians(sizes, cost, FEWER if what == "rounds" else REPEATS)
            found[what] = ([n * (1 if what.startswith("cand") else scale) for n in sizes], taken)
    if plot:
        draw(found, Path(plot))
    rows = []
    for what, (sizes, taken) in found.items():
        power = exponent(sizes, taken)
        note = ", ".join(f"{n}: {t:.2f} s" for n, t in zip(sizes, taken, strict=True))
        work_done = f"cost of {sizes[-4]} to {sizes[-1]} {what}"
        rows.append(Row(work_done, "linear growth", power, 1.0, "exponent", 1 / power, 1 / (1 + NOISE), note))
    return rows


def draw(found: dict[str, tuple[list[int], list[float]]], file: Path) -> None:
    """Write the curves, both axes logarithmic, with a linear one for comparison."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.6), layout="constrained")
    for axes, (what, (sizes, taken)) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        axes.loglog(sizes, taken, "o-", label="measured")
        axes.loglog(sizes, [taken[0] * n / sizes[0] for n in sizes], ":", color="grey", label="linear")
        axes.set(xlabel=what, title=f"exponent {exponent(sizes, taken):.2f}", xticks=sizes, xticklabels=sizes)
        axes.minorticks_off()
    figure.axes[0].set_ylabel("seconds")
    figure.axes[0].legend()
    figure.savefig(file)
