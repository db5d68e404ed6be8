"""What `export` writes of Re2LLM, read back."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lit_rec.agent.hints import HintBase
from lit_rec.agent.policy import HintPolicy
from lit_rec.cli import main
from tests.session_worlds import make_session_world
from tests.worlds import World, assert_told

LEAN = ["agent.rounds=1", "agent.seeds=1", "ranking.templates=[favorites_v1]", "ranking.priors=[0.0]"]
LEAN = [*LEAN, "ranking.lengths=[0.0]", "evaluation.rows.sasrec=false", "evaluation.rows.full_information=false"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_session_world(tmp_path_factory.mktemp("sessions"))
    assert main(["fit", "--config", made.config, *LEAN]) == 0
    return made


def test_export(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert main(["export", "--config", world.config, *LEAN, "--output", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {"hints.json", "agent", "README.md", "export.json"}
    assert HintBase.load(out / "hints.json").texts == HintBase.load(world.run / "hints.json").texts
    mine, kept = (HintPolicy.load(folder / "agent") for folder in (out, world.run))
    states = torch.randn(5, kept.shape["dim"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(mine(states), kept(states))
    assert load_file(out / "agent/policy.safetensors").keys() == kept.state_dict().keys()

    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", (out / "README.md").read_text(), re.DOTALL).groups()  # type: ignore[union-attr]
    front = yaml.safe_load(head)
    metrics = {m["type"]: m["value"] for m in front["model-index"][0]["results"][0]["metrics"]}
    lines = json.loads((world.run / "results.json").read_text())
    wanted = {r["metric"]: r["mean"] for r in lines if (r["row"], r["split"]) == ("ppo", "test")}
    assert metrics == {name: wanted[name] for name in ("hr@5", "ndcg@5")}
    assert "| no_hint |" in body
    assert f"{len(kept.hints)} hints in the base" in body
    monkeypatch.chdir(out)
    found: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", body, re.DOTALL)[0], found)
    assert len(found["hints"]) == found["policy"].n_actions - 1


@pytest.mark.parametrize("option", ["--merged", "--onnx"])
def test_what_there_is_not(option: str, world: World, tmp_path: Path, capsys: Any) -> None:
    line = ["export", "--config", world.config, *LEAN, "--output", str(tmp_path / "x"), option]
    assert_told(capsys, main(line), f"{option} is for recipe rlrf")
    assert not (tmp_path / "x").exists()


def test_no_hints(world: World, tmp_path: Path, capsys: Any) -> None:
    off = [f"evaluation.rows.{row}=false" for row in ("ppo", "oracle", "best_fixed_hint", "random_hint")]
    line = ["export", "--config", world.config, *LEAN, *off, "--output", str(tmp_path / "x")]
    assert_told(capsys, main(line), "no hints", "evaluation.rows")
