"""Several processes on one run: which is which, what each does, and that together they come to the results of one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

import polars as pl
import psutil
import pytest
import torch

from lit_rec import distributed
from lit_rec.cli import main
from lit_rec.distributed import Place
from lit_rec.errors import UserError
from lit_rec.policy.pairs import PreferenceDataModule
from tests.worlds import BARE, World, make_world, means

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
WHOLE = [*BARE, "policy.rounds=2", "evaluation.controls.zero_shot=true", "trainer.devices=2"]


class TestWhichProcessThisIs:
    @pytest.mark.parametrize("env", [TORCHRUN, SRUN, {**SRUN, **TORCHRUN}])
    def test_told_by_a_launcher(self, env: dict[str, str]) -> None:
        assert distributed.discover(env) == Place(rank=5, size=8, local_rank=1, local_size=4)

    def test_a_launcher_that_does_not_tell_how_many_are_here(self) -> None:
        env = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}
        assert distributed.discover(env) == Place(5, 8, 1, 8)

    @pytest.mark.parametrize("env", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, {"SLURM_STEP_NUM_TASKS": "1"}])
    def test_no_launcher(self, env: dict[str, str]) -> None:
        assert distributed.discover(env) is None  # sbatch and salloc set SLURM_NTASKS without starting anything

    @pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_LOCALID"])
    def test_half_told(self, missing: str) -> None:
        with pytest.raises(UserError, match="not told which") as told:
            distributed.discover({name: value for name, value in SRUN.items() if name != missing})
        assert missing in str(told.value)

    @pytest.mark.parametrize(("devices", "fits"), [(1, True), (4, True), (2, False), (8, False)])
    def test_as_many_as_the_configuration_says(self, devices: int, fits: bool) -> None:
        if fits:
            return distributed.check(distributed.discover(TORCHRUN), devices)
        with pytest.raises(UserError, match="4 processes"):
            distributed.check(distributed.discover(TORCHRUN), devices)
        return None


class TestOneProcess:
    def test_does_everything(self) -> None:
        assert distributed.main()
        assert distributed.size() == 1
        assert list(distributed.share([3, 1, 2])) == [3, 1, 2]
        assert distributed.whole([3, 1]) == [3, 1]
        assert distributed.divide([lambda: "a", lambda: "b"]) == ["a", "b"]
        assert distributed.gathered(7) == [7]
        assert distributed.total({"a": 1.5}) == {"a": 1.5}


class TestSharesOfAnUpdate:
    """Batches of all processes together are the update of one: every pair once, weights that make the mean."""

    @pytest.mark.parametrize("size", [1, 2, 3, 5])
    @pytest.mark.parametrize(
        ("pairs", "batch", "accumulate"), [(23, 4, 3), (8, 2, 4), (5, 3, 1), (1, 2, 2), (12, 1, 5)]
    )
    def test_partition(
        self, monkeypatch: pytest.MonkeyPatch, size: int, pairs: int, batch: int, accumulate: int
    ) -> None:
        torch.manual_seed(0)
        losses = torch.rand(pairs)

        def module() -> PreferenceDataModule:
            data = PreferenceDataModule(None, batch_size=batch, accumulate=accumulate, max_length=9, seed=2)
            data.examples = [type("E", (), {"length": n % 7})() for n in range(pairs)]
            return data

        def items(rank: int, of: int) -> tuple[list[tuple[list[int], float]], int]:
            monkeypatch.setattr(distributed, "_place", Place(rank, of, rank, of))
            data = module()
            return list(data.train_dataloader().dataset), data.batches_per_update

        alone, per_update = items(0, 1)
        shares = [items(rank, size)[0] for rank in range(size)]
        mine = items(0, size)[1]
        assert len({len(share) for share in shares}) == 1  # else some would wait for ever
        counted = [i for share in shares for cut, weight in share if weight for i in cut]
        assert sorted(counted) == list(range(pairs))
        assert all(len(cut) <= batch for share in shares for cut, _ in share)

        def steps(parts: list[list[tuple[list[int], float]]], every: int) -> list[float]:
            """What Lightning and DDP make of it: summed batches divided by `every`, mean over the processes."""
            values = [[float(losses[cut].sum()) * weight / every for cut, weight in part] for part in parts]
            each = [sum(column) / len(parts) for column in zip(*values, strict=True)]
            return [sum(each[n : n + every]) for n in range(0, len(each), every)]

        assert steps(shares, mine) == pytest.approx(steps([alone], per_update))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("several"))


def start(world: World, *overrides: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lit_rec", "fit", "--config", world.config, *WHOLE, *overrides]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})},
    )


def rank_of(process: psutil.Process) -> str:
    try:
        return process.environ().get("RANK", "")
    except psutil.Error:
        return ""


@pytest.mark.slow
def test_one_is_killed_and_two_still_come_to_the_results_of_one(world: World) -> None:
    run = world.root / "two"
    going = start(world, f"run.dir={run}")
    try:
        while not (run / "stages/fold_0/round_1/answers/manifest.json").is_file():
            assert going.poll() is None, going.communicate()
            time.sleep(0.05)
        second = next(p for p in psutil.Process(going.pid).children() if rank_of(p) == "1")
        second.send_signal(signal.SIGKILL)
        _, said = going.communicate(timeout=60)
    finally:
        going.kill()
    assert going.returncode == 2
    assert "process 1 of the run ended (signal 9)" in said
    assert str(run / "processes/1/log.txt") in said
    assert not [p for p in psutil.process_iter() if str(run) in " ".join(_command(p))], "somebody is left"
    answers = (run / "answers/answers.jsonl").read_bytes()

    again = start(world, f"run.dir={run}", "trainer.strategy=fsdp")  # how the work is shared out may change in between
    out, said = again.communicate(timeout=300)
    assert again.returncode == 0, out + said
    assert (run / "answers/answers.jsonl").read_bytes().startswith(answers)  # nothing is asked for twice
    keys = [key for line in (run / "answers/answers.jsonl").open() for key in json.loads(line)]
    assert len(keys) == len(set(keys))

    alone = world.root / "one"
    assert main(["fit", "--config", world.config, *WHOLE, "trainer.devices=1", f"run.dir={alone}"]) == 0
    ours, theirs = means(run), means(alone)
    assert ours.keys() == theirs.keys()
    assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-3)
    for state in ("zero_shot", "round_1"):
        pairs = [pl.read_parquet(r / f"stages/fold_0/{state}/pairs_best_worst/pairs.parquet") for r in (run, alone)]
        assert pairs[0].equals(pairs[1])
        assert len(pairs[0])


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.slow
def test_a_mistake_of_the_user_is_told_once(world: World) -> None:
    going = start(world, f"run.dir={world.root / 'bad'}", f"data.root={world.root / 'nowhere'}")
    _, said = going.communicate(timeout=120)
    assert going.returncode == 2
    assert said.count("error:") == 1
    assert "nowhere" in said
    assert "Traceback" not in said
