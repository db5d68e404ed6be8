"""MIR, multi-level interaction reranking (arXiv 2204.11370), the one reranker that reads the user's history.

KAR's code computes the knowledge vector and never uses it in MIR; here it is part of every candidate's
vector. KAR's attention has one weight per list position, which ties a model to one list length and to the
order of candidates that are a set; here the weights are dot products of the same co-attention features, for
lists of any length and order.
"""

import torch
from torch import Tensor, nn

from lit_rec.kernels import recurrent
from lit_rec.rerankers.attention import self_attention
from lit_rec.rerankers.features import perceptron


class SetToListAttention(nn.Module):
    """Co-attention between a set of candidates V and a list of past items Q.

    The affinity A = tanh(Q W V^T + field-level term) says how each past item bears on each candidate; the
    field-level term compares the embeddings inside the vectors (item with item, genre with genre, rating with
    genre, ...) by one shared bilinear form and mixes the pairs of fields. Features of either side then take
    in the other one through A.

    Args:
        candidate: width of V, a multiple of `field`.
        history: width of Q, a multiple of `field`.
        field: width of one embedding.
        hidden: width of the co-attention features.

    Raises:
        ValueError: when a width is no multiple of `field`.
    """

    def __init__(self, candidate: int, history: int, field: int, hidden: int) -> None:
        super().__init__()
        for name, width in (("candidates", candidate), ("past items", history)):
            if width % field:
                raise ValueError(f"the width of {name}, {width}, must be a multiple of field, {field}")
        self.field, self.scale = field, hidden**-0.5
        self.item_form = nn.Linear(candidate, history, bias=False)
        self.field_form = nn.Linear(field, field, bias=False)
        self.field_pairs = nn.Linear(candidate // field, history // field, bias=False)
        self.candidate_feature = nn.Linear(candidate, hidden, bias=False)
        self.history_feature = nn.Linear(history, hidden, bias=False)

    def forward(self, v: Tensor, v_mask: Tensor, q: Tensor, q_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attend from each candidate to the candidates and to the history.

        Args:
            v: candidates [B, C, candidate].
            v_mask: [B, C] bool.
            q: history [B, H, history].
            q_mask: [B, H] bool; a user without history gets zeros.

        Returns:
            Attended candidates [B, C, candidate] and attended history [B, C, history].
        """
        fields = self.field_form(v.unflatten(-1, (-1, self.field)))  # [B, C, fields of V, field]
        fields = self.field_pairs(fields.transpose(-1, -2)).transpose(-1, -2).flatten(-2)  # [B, C, history]
        affinity = torch.tanh((self.item_form(v) + fields) @ q.transpose(1, 2))  # [B, C, H]
        affinity = affinity * v_mask.unsqueeze(2) * q_mask.unsqueeze(1)
        feature_v, feature_q = self.candidate_feature(v), self.history_feature(q)
        h_v = torch.tanh(feature_v + affinity @ feature_q)
        h_q = torch.tanh(feature_q + affinity.transpose(1, 2) @ feature_v)
        to_v = (h_v @ h_v.transpose(1, 2) * self.scale).masked_fill(~v_mask.unsqueeze(1), -1e9).softmax(dim=-1)
        to_q = (h_v @ h_q.transpose(1, 2) * self.scale).masked_fill(~q_mask.unsqueeze(1), -1e9).softmax(dim=-1)
        return to_v @ v, (to_q * q_mask.unsqueeze(1)) @ q


class MIR(nn.Module):
    """Self-attention over candidates, a GRU over the history, attention between both, then a perceptron.

    Args:
        width: width of a candidate's vector, divisible by `heads` and by `field`.
        history_width: width of a past item's vector (with its rating), divisible by `field`.
        field: width of one embedding.
        hidden: width of the GRU's state, divisible by `field`.
        heads: attention heads.
        mlp: hidden widths of the perceptron.
        dropout: in the attention and the perceptron; KAR trains with 0.

    Raises:
        ValueError: when `width`, `history_width` or `hidden` is no multiple of `field`.
    """

    uses_history = True
    default_loss = "bce"

    def __init__(
        self,
        width: int,
        history_width: int,
        field: int = 32,
        hidden: int = 64,
        heads: int = 2,
        mlp: tuple[int, ...] = (200, 80),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if hidden % field:
            raise ValueError(f"hidden must be a multiple of field, {field}, not {hidden}")
        if width % field:
            raise ValueError(
                f"the width of a candidate's vector, {width}, must be a multiple of field, {field}: so must the "
                "adaptor's out"
            )
        self.intra = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.gru = nn.GRU(history_width, hidden, batch_first=True)
        listed = history_width + hidden
        self.set_to_list = SetToListAttention(2 * width, listed, field, hidden)
        self.mlp = perceptron(3 * width + 2 * listed, mlp, dropout)

    def forward(self, x: Tensor, mask: Tensor, history: Tensor, history_mask: Tensor) -> Tensor:
        """Score candidates.

        Args:
            x: [B, C, width], in any order.
            mask: [B, C] bool, true where there is a candidate.
            history: [B, H, history_width], oldest first, padding at the end.
            history_mask: [B, H] bool.

        Returns:
            Logits [B, C]; those of padding mean nothing.
        """
        context = self_attention(self.intra, x, mask)
        past = torch.cat([history, recurrent.states(self.gru, history)], dim=-1) * history_mask.unsqueeze(-1)
        candidates = torch.cat([x, context], dim=-1)
        v, q = self.set_to_list(candidates, mask, past, history_mask)
        mean = past.sum(dim=1) / history_mask.sum(dim=1, keepdim=True).clamp(min=1)
        return self.mlp(torch.cat([v, q, x, mean.unsqueeze(1).expand(-1, x.shape[1], -1)], dim=-1)).squeeze(-1)
