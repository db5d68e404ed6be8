"""Memory over ten rounds of a tiny model: what a round needs is given back before the next."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.worlds import BARE, make_world

MEASURE = """
import gc, json, sys
import torch
from lit_rec.cli import main
from lit_rec.policy.pairs import PreferenceDataModule

found, set_round = [], PreferenceDataModule.set_round

def note(self, *args, **kwargs):
    set_round(self, *args, **kwargs)
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    pages = int(open("/proc/self/statm").read().split()[1])
    found.append([len(tensors), sum(t.nbytes for t in tensors), pages * 4096])

PreferenceDataModule.set_round = note
code = main(sys.argv[1:])
print("FOUND", json.dumps(found))
sys.exit(code)
"""


@pytest.mark.slow
def test_ten_rounds_need_no_more_than_three(tmp_path: Path) -> None:
    world = make_world(tmp_path, users=12)
    command = [sys.executable, "-c", MEASURE, "fit", "--config", world.config, *BARE, "policy.rounds=10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    counts, held, resident = zip(*json.loads(line[6:]), strict=True)
    assert len(counts) == 10
    assert counts[9] <= counts[2] + 5, counts  # tensors alive, at the same point of each round
    assert held[9] <= 1.01 * held[2], held  # their bytes
    assert resident[9] - resident[2] < 30 * 2**20, resident  # of the process: what the allocator keeps varies a little
