"""SetRank (arXiv 1912.05891), in the form of KAR's code (METHODS 1.6)."""

from torch import Tensor, nn

from lit_rec.rerankers.attention import score_in_context
from lit_rec.rerankers.features import perceptron


class SetRank(nn.Module):
    """PRM without positions: the score of a candidate does not depend on the order of the list.

    Args:
        width: width of a candidate's vector, divisible by `heads`.
        heads: attention heads.
        mlp: hidden widths of the perceptron.
        dropout: in the attention and the perceptron; KAR trains with 0.
    """

    uses_history = False
    default_loss = "attention_rank"

    def __init__(self, width: int, heads: int = 2, mlp: tuple[int, ...] = (200, 80), dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.mlp = perceptron(2 * width, mlp, dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Score candidates.

        Args:
            x: [B, C, width], in any order.
            mask: [B, C] bool, true where there is a candidate.

        Returns:
            Logits [B, C]; those of padding mean nothing.
        """
        return score_in_context(self.attention, self.mlp, x, mask)
