"""The batched hybrid-expert adaptor against a loop over plain layers."""

import pytest
import torch
from torch import Tensor, nn

from lit_rec.knowledge.adaptor import Experts, HybridExpertAdaptor


def as_layers(experts: Experts, width: int) -> list[nn.Sequential]:
    made = []
    for expert in range(len(experts.weight1)):
        first, second = nn.Linear(width, experts.weight1.shape[1]), nn.Linear(*experts.weight2.shape[:0:-1])
        first.weight.data, first.bias.data = experts.weight1[expert, :, :width], experts.bias1[expert]
        second.weight.data, second.bias.data = experts.weight2[expert], experts.bias2[expert]
        made.append(nn.Sequential(first, nn.ReLU(), second, nn.ReLU()))
    return made


def by_loop(adaptor: HybridExpertAdaptor, x: Tensor, tower: int) -> Tensor:
    width = x.shape[1]
    layers = as_layers(adaptor.shared, width) + as_layers(adaptor.specific[tower], width)  # type: ignore[arg-type]
    gate = adaptor.gates[tower](x).softmax(dim=1)
    return sum(gate[:, e : e + 1] * layer(x) for e, layer in enumerate(layers))  # type: ignore[return-value]


@pytest.mark.parametrize("widths", [(24, 24), (48, 24)])
def test_equals_a_loop_over_experts(widths: tuple[int, int]) -> None:
    torch.manual_seed(1)
    adaptor = HybridExpertAdaptor(widths, shared=2, specific=3, hidden=16, out=8)
    for parameter in adaptor.parameters():  # biases too
        nn.init.normal_(parameter, std=0.3)
    for tower, width in enumerate(widths):
        x = torch.randn(7, width)
        torch.testing.assert_close(adaptor(x, tower), by_loop(adaptor, x, tower), atol=1e-6, rtol=1e-5)


def test_every_expert_learns() -> None:
    torch.manual_seed(1)
    adaptor = HybridExpertAdaptor((12, 12), hidden=16, out=8)
    (adaptor(torch.randn(64, 12), 0).sum() + adaptor(torch.randn(64, 12), 1).sum()).backward()
    for name, parameter in adaptor.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.flatten(1 if parameter.dim() > 1 else 0).abs().sum() > 0, name


def test_dropout_only_in_training() -> None:
    torch.manual_seed(1)
    adaptor = HybridExpertAdaptor((12,), dropout=0.5)
    x = torch.randn(5, 12)
    assert not torch.equal(adaptor(x, 0), adaptor(x, 0))
    adaptor.eval()
    assert torch.equal(adaptor(x, 0), adaptor(x, 0))
