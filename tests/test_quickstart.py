"""The README's first command, whole: two processes come to the results of one."""

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from tests.worlds import means

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The quickstart by one process and by two, each of one thread, neither with the other's answers."""
    folders = [tmp_path_factory.mktemp(name) / "run" for name in ("one", "two")]
    command = [sys.executable, "-m", "lit_rec", "fit", "--config", "configs/quickstart.yaml", "--quiet"]
    for devices, run in enumerate(folders, start=1):
        given = [f"run.dir={run}", f"run.answers={run.parent}", f"trainer.devices={devices}", "trainer.threads=1"]
        done = subprocess.run(
            [*command, *given], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return folders


@pytest.mark.slow
@pytest.mark.registry
def test_two_processes_come_to_the_results_of_one(runs: list[Path]) -> None:
    tables = [means(run) for run in runs]
    assert {"zero_shot", "random_pairs", "round_1", "round_2"} <= {row for row, *_ in tables[0]}
    assert tables[1] == pytest.approx(tables[0], abs=1e-3)


@pytest.mark.slow
@pytest.mark.registry
@pytest.mark.parametrize("part", ["zero_shot/pairs_best_worst", "zero_shot/pairs_random", "round_1/pairs_best_worst"])
def test_two_processes_make_the_pairs_of_one(runs: list[Path], part: str) -> None:
    one, two = (pl.read_parquet(run / f"stages/fold_0/{part}/pairs.parquet") for run in runs)
    assert len(one)
    rewards = ["chosen_reward", "rejected_reward"]
    assert one.drop(rewards).equals(two.drop(rewards))
    for name in rewards:
        assert two[name].to_list() == pytest.approx(one[name].to_list(), abs=1e-5)
