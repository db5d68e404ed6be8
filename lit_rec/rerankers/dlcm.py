"""DLCM, the Deep Listwise Context Model (arXiv 1804.05936), in the form of KAR's code (METHODS 1.6)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_rec.kernels import calls, recurrent
from lit_rec.rerankers.features import whole


class DLCM(nn.Module):
    """A GRU reads the candidates in list order; each state is scored against the final one.

    score_i = Linear(tanh(Linear(BN(final state))) * BN(state_i)). KAR's two-way softmax over two outputs is
    the sigmoid of their difference, so one output, a logit, is the same model.

    Args:
        width: width of a candidate's vector.
        hidden: width of the GRU's state.
        dropout: on the final state's projection; KAR trains with 0.
    """

    uses_history = False
    default_loss = "bce"

    def __init__(self, width: int, hidden: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.gru = nn.GRU(width, hidden, batch_first=True)
        self.final_norm = nn.BatchNorm1d(hidden)
        self.final = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)
        self.state_norm = nn.BatchNorm1d(hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Score candidates.

        Args:
            x: [B, C, width].
            mask: [B, C] bool; candidates first, padding after them.

        Returns:
            Logits [B, C]; those of padding mean nothing.
        """
        norms = self.final_norm, self.state_norm
        dropped = self.training and self.dropout.p > 0
        lengths = None
        if not dropped and calls.usable(x, self.gru.input_size, self.gru.hidden_size):
            lengths = calls.lengths_of(mask)
        if lengths is not None:
            return recurrent.score_against_final(x, lengths, self.gru, norms, self.final, self.score)
        states = recurrent.states(self.gru, x)
        final = states[:, -1]
        if not whole(mask):  # the final state is that of the last candidate, not of the padding behind it
            end = mask.sum(dim=1).clamp(min=1) - 1
            final = states[torch.arange(len(states), device=states.device), end]
        context = self.dropout(torch.tanh(self.final(_normalise(self.final_norm, final))))
        return self.score(context.unsqueeze(1) * self._normalised(states, mask)).squeeze(-1)

    def _normalised(self, states: Tensor, mask: Tensor) -> Tensor:
        """Batch-normalise the states; padding neither enters the statistics nor the score."""
        if (
            torch.compiler.is_exporting()
        ):  # rows are normalised one by one then, padding does no harm, and shapes stay open
            return self.state_norm(states.transpose(1, 2)).transpose(1, 2)
        if whole(mask):
            return _normalise(self.state_norm, states.flatten(0, 1)).view_as(states)
        real = _normalise(self.state_norm, states[mask])
        return torch.zeros_like(states).masked_scatter(mask.unsqueeze(-1), real)


def _normalise(norm: nn.BatchNorm1d, rows: Tensor) -> Tensor:
    """Batch-normalise rows [N, D]; a single row, without a variance, takes the running statistics."""
    if norm.training and len(rows) == 1:
        return F.batch_norm(rows, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return norm(rows)
