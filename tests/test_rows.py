"""Who every reranker of a run is trained on, and what it is given to read."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_rec.cli import main
from lit_rec.recipes import ground, judge, rows
from tests.worlds import BARE, make_world

NAMES = ["no_knowledge", "item_only", "history_shuffled", "history_only", "shuffled", "zero_shot", "round_1"]


@dataclass(frozen=True)
class Seen:
    """Arguments of every call, the split, the vectors of items and histories."""

    rows: dict[str, list[dict[str, Any]]]
    judge: list[dict[str, Any]]
    lists: list[dict[str, Any]]
    parts: dict[str, Tensor]
    known: dict[str, Tensor]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    world = make_world(tmp_path_factory.mktemp("world"))
    calls: dict[str, list[dict[str, Any]]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((rows, "fit_reranker"), (judge, "cross_fit"), (ground, "build_lists")):
            real, mine = getattr(module, name), calls.setdefault(name, [])

            def spy(*args: Any, _real: Any = real, _mine: list[dict[str, Any]] = mine, **given: Any) -> Any:
                _mine.append(given)
                return _real(*args, **given)

            patch.setattr(module, name, spy)
        on = [f"evaluation.controls.{name}=true" for name in NAMES if name != "round_1"]
        assert main(["fit", "--config", world.config, *BARE, *on, "evaluation.seeds=2", "reranker.max_epochs=1"]) == 0
    fits = calls["fit_reranker"]
    assert len(fits) == 2 * len(NAMES)
    return Seen(
        {name: fits[2 * n : 2 * n + 2] for n, name in enumerate(NAMES)},
        calls["cross_fit"],
        calls["build_lists"],
        load_file(world.run / "stages/fold_0/split/users.safetensors"),
        load_file(world.run / "stages/knowledge/vectors.safetensors"),
    )


def test_nobody_is_trained_on_who_is_held_out(seen: Seen) -> None:
    for call in [*seen.judge, *(fit for fits in seen.rows.values() for fit in fits)]:
        assert torch.equal(call["train_users"], seen.parts["train"])
        assert torch.equal(call["validation_users"], seen.parts["validation"])
    assert [call["folds"] for call in seen.judge] == [2]
    assert torch.equal(seen.lists[0]["train_users"], seen.parts["train"])


def test_seeds_of_a_row_differ(seen: Seen) -> None:
    assert all(first["seed"] != second["seed"] for first, second in seen.rows.values())


def test_what_the_rows_read(seen: Seen) -> None:
    told = {name: (fits[0]["user_vectors"], fits[0]["item_vectors"]) for name, fits in seen.rows.items()}
    assert told["no_knowledge"] == (None, None)
    assert told["item_only"][0] is None
    assert all(torch.equal(told[name][1], seen.known["items"]) for name in NAMES if name != "no_knowledge")
    assert torch.equal(told["history_only"][0], seen.known["history"])
    for mixed, own in (("history_shuffled", "history_only"), ("shuffled", "zero_shot")):
        others, mine = told[mixed][0], told[own][0]
        assert (others == mine).all(1).sum() < len(mine) / 2  # a tiny LLM writes some texts twice
        assert sorted(map(tuple, others.tolist())) == sorted(map(tuple, mine.tolist()))
