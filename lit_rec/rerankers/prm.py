"""PRM, the Personalised Re-ranking Model (arXiv 1904.06813), in the form of KAR's code (METHODS 1.6)."""

import torch
from torch import Tensor, nn

from lit_rec.errors import UserError
from lit_rec.rerankers.attention import bce_in_context, score_in_context
from lit_rec.rerankers.features import perceptron


def sinusoids(length: int, width: int) -> Tensor:
    """Return the fixed position encoding of the Transformer paper, [length, width]; row 0 is all zeros, as in KAR."""
    column = torch.arange(width)
    angle = torch.arange(length).unsqueeze(1) / 10000 ** (2 * torch.div(column, 2, rounding_mode="floor") / width)
    table = torch.where(column % 2 == 0, angle.sin(), angle.cos())
    table[:1] = 0  # cosines included
    return table


class PRM(nn.Module):
    """Self-attention over candidates that know their position, then a perceptron on [attention ; input].

    Args:
        width: width of a candidate's vector, divisible by `heads`.
        heads: attention heads. KAR has 2, the original 1.
        mlp: hidden widths of the perceptron.
        positions: `fixed` sinusoids (KAR), or `learned` (the original).
        max_length: most candidates of a list, where positions are learned; fixed ones go on beyond.
        dropout: in the attention and the perceptron; KAR trains with 0.
    """

    uses_history = False
    default_loss = "bce"

    def __init__(
        self,
        width: int,
        heads: int = 2,
        mlp: tuple[int, ...] = (200, 80),
        positions: str = "fixed",
        max_length: int = 100,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if positions not in ("fixed", "learned"):
            raise ValueError(f"positions must be fixed or learned, not {positions!r}")
        table = sinusoids(max_length, width) if positions == "fixed" else 0.02 * torch.randn(max_length, width)
        self.learned = positions == "learned"
        self.positions = nn.Parameter(table, requires_grad=self.learned)
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.mlp = perceptron(2 * width, mlp, dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Score candidates.

        Args:
            x: [B, C, width], in the order whose positions count.
            mask: [B, C] bool, true where there is a candidate.

        Returns:
            Logits [B, C]; those of padding mean nothing.

        Raises:
            UserError: when there are more candidates than positions were learned for.
        """
        return score_in_context(self.attention, self.mlp, x + self._places(x.shape[1]), mask)

    def bce(self, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """The loss `bce` of the scores, there and back in one pass where there are kernels.

        Args:
            x: As for `forward`, and so is mask.
            mask: See x.
            labels: [B, C].
        """
        return bce_in_context(self.attention, self.mlp, x + self._places(x.shape[1]), mask, labels)

    def _places(self, length: int) -> Tensor:
        """The encoding of so many positions, [length, width]."""
        known, width = self.positions.shape
        if torch.compiler.is_exporting() or length <= known:  # a graph's lengths stay open
            return self.positions[:length]
        if self.learned:
            raise UserError(
                f"a list of {length} candidates is too long for this reranker",
                where="reranker.args.max_length",
                why=f"PRM has learned {known} positions",
                fix=f"give it at most {known} candidates, or train with +reranker.args.max_length={length}",
            )
        return sinusoids(length, width).to(self.positions)
