"""The rerankers' formulas (METHODS 1.6) by loops over candidates, and the sizes of KAR's code."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_rec.knowledge.adaptor import HybridExpertAdaptor
from lit_rec.rerankers.dlcm import DLCM
from lit_rec.rerankers.features import initialise
from lit_rec.rerankers.mir import SetToListAttention
from lit_rec.rerankers.module import RerankerModule
from lit_rec.rerankers.prm import PRM


def moved(module: Any) -> Any:
    """With weights and statistics that leave no term at 0 or 1."""
    torch.manual_seed(0)
    for p in module.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.4)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.running_mean.normal_()  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return module.eval()


def normalised(norm: nn.BatchNorm1d, value: Tensor) -> Tensor:
    return (value - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias  # type: ignore[operator]


@torch.no_grad()
def test_dlcm() -> None:
    model = moved(DLCM(6))
    x, mask = torch.randn(3, 5, 6), torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    found = model(x, mask)
    for b in range(3):
        n = int(mask[b].sum())
        states = model.gru(x[b : b + 1, :n])[0][0]
        phi = torch.tanh(normalised(model.final_norm, states[-1]) @ model.final.weight.T + model.final.bias)
        wanted = (phi * normalised(model.state_norm, states)) @ model.score.weight[0] + model.score.bias
        torch.testing.assert_close(found[b, :n], wanted, atol=1e-5, rtol=1e-5)


def test_positions_are_those_of_the_transformer_but_for_the_first() -> None:
    table = PRM(8).positions
    assert table[0].eq(0).all()
    for place in range(1, 20):
        for column in range(8):
            angle = place / 10000 ** (2 * (column // 2) / 8)
            wanted = math.sin(angle) if column % 2 == 0 else math.cos(angle)
            assert table[place, column].item() == pytest.approx(wanted, abs=1e-5)


@torch.no_grad()
def test_set_to_list_attention() -> None:
    model = moved(SetToListAttention(8, 12, 4, 5))
    v, q = torch.randn(2, 3, 8), torch.randn(2, 4, 12)
    v_mask, q_mask = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    v_mask[0, 2:], q_mask[1, 2:] = False, False
    to_v, to_q = model(v, v_mask, q, q_mask)
    for b in range(2):
        own, past = v[b][v_mask[b]], q[b][q_mask[b]]
        affinity = torch.zeros(len(own), len(past))
        for i in range(len(own)):
            fields = [model.field_form.weight @ own[i, 4 * f : 4 * f + 4] for f in range(2)]
            pairs = model.field_pairs.weight
            mixed = torch.cat([pairs[g, 0] * fields[0] + pairs[g, 1] * fields[1] for g in range(3)])
            for j in range(len(past)):
                affinity[i, j] = torch.tanh((model.item_form.weight @ own[i] + mixed) @ past[j])
        of_own, of_past = own @ model.candidate_feature.weight.T, past @ model.history_feature.weight.T
        h_own, h_past = torch.tanh(of_own + affinity @ of_past), torch.tanh(of_past + affinity.T @ of_own)
        attended = (h_own @ h_own.T / 5**0.5).softmax(-1) @ own, (h_own @ h_past.T / 5**0.5).softmax(-1) @ past
        torch.testing.assert_close((to_v[b][v_mask[b]], to_q[b][v_mask[b]]), attended, atol=1e-5, rtol=1e-4)


def test_sizes_are_those_of_kar() -> None:
    adaptor = HybridExpertAdaptor((24, 24))
    own: nn.Module = adaptor.specific[0]
    assert adaptor.shared.weight1.shape == (2, 128, 24)
    assert own.weight1.shape == (5, 128, 24)
    assert own.weight2.shape == (5, adaptor.out, 128) == (5, 32, 128)
    assert DLCM(6).gru.hidden_size == 64
    module = RerankerModule(n_items=5)
    assert module.temperature == 0.03
    assert module.features.item.weight.shape == (6, 32)


def test_weights_begin_as_xavier_has_them() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(300, 100)
    initialise(layer)
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    assert layer.bias.eq(0).all()
