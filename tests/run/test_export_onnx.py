"""Every reranker as ONNX, run by ONNX Runtime on lists of the test's own, against torch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rec.errors import UserError
from lit_rec.rerankers.module import RerankerModule
from lit_rec.run import export_reranker
from lit_rec.run.export_reranker import export_onnx

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
N, USERS = 40, 9


def reranker(architecture: str, *, user: bool, item: bool, attributes: bool, **arguments: Any) -> RerankerModule:
    torch.manual_seed(0)
    table = torch.randint(0, 8, (N + 1, 3))
    table[0] = 0
    module = RerankerModule(
        n_items=N,
        architecture=architecture,
        dim=8,
        attributes=table if attributes else None,
        attribute_widths=[2, 1] if attributes else [],
        user_vectors=torch.randn(USERS, 12) if user else None,
        item_vectors=torch.randn(N + 1, 6) if item else None,
        adaptor={"out": 8, "hidden": 8},
        architecture_args=arguments,
    ).eval()
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm1d):  # as after training: no identity
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return module


@pytest.mark.parametrize(
    ("architecture", "user", "item", "attributes"),
    [
        ("dlcm", True, True, True),
        ("prm", False, False, True),
        ("setrank", True, False, False),
        ("mir", True, True, True),
    ],
)
def test_parity(architecture: str, user: bool, item: bool, attributes: bool, tmp_path: Path) -> None:
    module = reranker(architecture, user=user, item=item, attributes=attributes)
    path = tmp_path / "reranker.onnx"
    about = export_onnx(module, path, candidates=6, history=4)
    assert about["difference"] < 1e-4
    assert about["lists"] >= 50
    assert ("user_vectors" in about["inputs"]) == user
    session = ort.InferenceSession(path)
    shapes = {given.name: given.shape for given in session.get_inputs()}
    assert shapes["items"] == ["batch", "candidates"]
    assert session.get_outputs()[0].shape == ["batch", "candidates"]
    draw = torch.Generator().manual_seed(7)
    for batch, width, past in ((1, 1, 1), (1, 6, 4), (5, 11, 9)):
        lists = {"user": torch.randint(USERS, (batch,), generator=draw)}
        lists["items"] = torch.randint(1, N + 1, (batch, width), generator=draw)
        lists["history_items"] = torch.randint(1, N + 1, (batch, past), generator=draw)
        lists["history_ratings"] = torch.randint(1, 11, (batch, past), generator=draw) / 2
        if batch > 1:
            lists["items"][0, 2:] = 0
            lists["history_items"][1] = 0  # nobody's history
        given = {name: tensor.numpy() for name, tensor in lists.items() if name in shapes}
        if user:
            given["user_vectors"] = module.knowledge.user_vectors[lists["user"]].numpy()
        with torch.no_grad():
            wanted = module(lists)
        found = torch.from_numpy(session.run(None, given)[0])
        assert found.shape == wanted.shape
        assert (found - wanted)[lists["items"] > 0].abs().max() < 1e-5


def test_a_graph_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = reranker("setrank", user=False, item=False, attributes=False)
    init = export_reranker.ServedReranker.__init__

    def off(self: Any, given: RerankerModule) -> None:
        init(self, given)
        self.table[1:] += 0.1

    monkeypatch.setattr(export_reranker.ServedReranker, "__init__", off)
    with pytest.raises(UserError, match="differs from torch") as told:
        export_onnx(module, tmp_path / "x.onnx", candidates=6, history=4)
    assert "0.0001" in str(told.value)
