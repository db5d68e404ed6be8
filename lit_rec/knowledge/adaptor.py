"""The hybrid-expert adaptor: from the text encoder's space to the recommender's (KAR; METHODS 1.6)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_rec.kernels import calls
from lit_rec.kernels import layers as kernels


class Experts(nn.Module):
    """Several perceptrons of one shape as stacked weights: Linear-ReLU-Dropout-Linear-ReLU-Dropout."""

    def __init__(self, count: int, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(torch.empty(count, hidden, width))
        self.bias1 = nn.Parameter(torch.zeros(count, hidden))
        self.weight2 = nn.Parameter(torch.empty(count, out, hidden))
        self.bias2 = nn.Parameter(torch.zeros(count, out))
        for expert in range(count):  # each expert is its own matrix: the fans of the stack would be wrong
            nn.init.xavier_normal_(self.weight1[expert])
            nn.init.xavier_normal_(self.weight2[expert])


class HybridExpertAdaptor(nn.Module):
    """Adapt several inputs (the user's and the item's knowledge) with shared and with own experts.

    For input t: out_t = sum over the experts e in [shared, own of t] of gate_t(x_t)[e] * e(x_t), with
    gate_t = softmax(Linear(x_t)). All experts of an input run as two matrix products, not one call per
    expert.

    Inputs may differ in width (a user vector made of two texts, say): a shared expert then reads a narrower
    input with the leading columns of its first layer.

    Args:
        widths: width of each input.
        shared: number of experts shared by all inputs.
        specific: number of experts each input has for itself.
        hidden: width of an expert's hidden layer.
        out: width of an expert's output.
        dropout: after both layers of an expert; KAR trains with 0.
    """

    def __init__(
        self,
        widths: Sequence[int],
        shared: int = 2,
        specific: int = 5,
        hidden: int = 128,
        out: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.out, self.dropout = out, dropout
        self.shared = Experts(shared, max(widths), hidden, out)
        self.specific = nn.ModuleList(Experts(specific, width, hidden, out) for width in widths)
        self.gates = nn.ModuleList(nn.Linear(width, shared + specific) for width in widths)
        for gate in self.gates:
            nn.init.xavier_normal_(gate.weight)  # type: ignore[arg-type]
            nn.init.zeros_(gate.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, tower: int) -> Tensor:
        """Adapt rows of input number `tower`.

        Args:
            x: [N, width of the input].
            tower: which input it is, as numbered in `widths`.

        Returns:
            [N, out].
        """
        own: Experts = self.specific[tower]  # type: ignore[assignment]
        gate: nn.Linear = self.gates[tower]  # type: ignore[assignment]
        dropped, both = self.training and self.dropout > 0, (x.device, x.dtype)
        plain = not (dropped or x.requires_grad) and both == (gate.weight.device, gate.weight.dtype)
        if plain and calls.usable(x, x.shape[1], self.out) and gate.out_features:
            return kernels.mix_experts(x, *self.shared.parameters(), *own.parameters(), gate.weight, gate.bias)
        weight1 = torch.cat([self.shared.weight1[:, :, : x.shape[1]], own.weight1])  # [E, hidden, width]
        bias1 = torch.cat([self.shared.bias1, own.bias1])
        weight2 = torch.cat([self.shared.weight2, own.weight2])  # [E, out, hidden]
        bias2 = torch.cat([self.shared.bias2, own.bias2])
        # Experts x features x rows: both products and their gradients then read and write whole blocks.
        hidden = torch.addmm(bias1.view(-1, 1), weight1.flatten(0, 1), x.t()).relu_()  # in place: by far the largest
        hidden = F.dropout(hidden, self.dropout, self.training).unflatten(0, bias1.shape)  # [E, hidden, N]
        out = torch.baddbmm(bias2.unsqueeze(2), weight2, hidden).relu_()
        out = F.dropout(out, self.dropout, self.training)  # [E, out, N]
        return (out * gate(x).softmax(dim=1).t().unsqueeze(1)).sum(0).t()
