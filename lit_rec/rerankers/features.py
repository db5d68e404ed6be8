"""From ids and knowledge to the vectors a reranker reads (METHODS 1.6)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_rec.kernels import calls
from lit_rec.kernels import layers as kernels
from lit_rec.knowledge.adaptor import HybridExpertAdaptor

USER, ITEM = "user", "item"


def initialise(module: nn.Module) -> None:
    """Initialise linear layers and embeddings as KAR does: Xavier normal weights, zeros for the rest."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.xavier_normal_(module.weight)
        if module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()


def perceptron(width: int, hidden: Sequence[int], dropout: float) -> nn.Sequential:
    """Linear-ReLU-Dropout for every hidden width, then one output.

    Raises:
        ValueError: when there is no hidden width, or one of less than 1.
    """
    if not hidden or min(hidden) < 1:
        raise ValueError(f"mlp needs one or more widths of at least 1, not {list(hidden)}")
    layers: list[nn.Module] = []
    for before, after in zip((width, *hidden), hidden, strict=False):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], 1))


def whole(mask: Tensor) -> bool:
    """Whether no place of a batch is padding; never so while a graph is exported, which must do for every batch."""
    return not torch.compiler.is_exporting() and bool(mask.all())


class ItemFeatures(nn.Module):
    """Embeddings of an item's id and of its attributes, and of a rating where there is one.

    An attribute with several values (a film's genres) is the mean of its values' embeddings, zero when there
    is none.

    Args:
        n_items: items without padding; ids run 1..n_items.
        attributes: [n_items + 1, A] int64 table of attribute values, 0 = padding, row 0 all padding.
        attribute_widths: how many columns of the table belong to each attribute, in order; empty: one
            attribute.
        first_attribute_only: read the first value of each attribute alone, as KAR does.
        dim: width of every embedding.
        rating_max: highest rating; half steps are told apart.
        rated: whether ratings are embedded too (for a history).
    """

    attributes: Tensor

    def __init__(
        self,
        n_items: int,
        attributes: Tensor | None = None,
        attribute_widths: Sequence[int] = (),
        *,
        first_attribute_only: bool = False,
        dim: int = 32,
        rating_max: float = 5.0,
        rated: bool = False,
    ) -> None:
        super().__init__()
        table = torch.zeros(n_items + 1, 0, dtype=torch.int64) if attributes is None else attributes
        widths = list(attribute_widths) or [w for w in [table.shape[1]] if w]
        if len(table) != n_items + 1 or sum(widths) != table.shape[1]:
            raise ValueError(
                f"an attribute table of shape {tuple(table.shape)} does not fit {n_items} items and the "
                f"attribute widths {widths}: it needs {n_items + 1} rows and {sum(widths)} columns"
            )
        if first_attribute_only:
            first = torch.tensor([sum(widths[:i]) for i in range(len(widths))], dtype=torch.int64)
            table, widths = table[:, first], [1] * len(widths)
        self.widths = widths
        self.register_buffer("attributes", table, persistent=False)
        self.item = nn.Embedding(n_items + 1, dim, padding_idx=0)
        self.attribute = nn.Embedding(int(table.max()) + 1, dim, padding_idx=0) if widths else None
        self.rating = nn.Embedding(round(2 * rating_max) + 1, dim, padding_idx=0) if rated else None
        self.dim = dim
        self.width = dim * (1 + len(widths))  # of a candidate
        self.history_width = self.width + dim  # of a history item, with its rating

    def forward(self, items: Tensor) -> Tensor:
        """Embed items of any shape [...]: [..., width]."""
        if calls.usable(self.item.weight, self.dim):
            values = self.item.weight[:0] if self.attribute is None else self.attribute.weight
            return kernels.embed(items, self.item.weight, self.attributes, self.widths, values)
        parts = [self.item(items)]
        if self.attribute is not None:
            # One bag per item and attribute: the mean over its values, without a tensor of all of them.
            for values in self.attributes[items].split(self.widths, dim=-1):
                bag = F.embedding_bag(values.flatten(0, -2), self.attribute.weight, mode="mean", padding_idx=0)
                parts.append(bag.view(*items.shape, self.dim))
        return torch.cat(parts, dim=-1)

    def history(self, items: Tensor, ratings: Tensor) -> Tensor:
        """Embed rated items: [..., history_width]."""
        if self.rating is None:
            raise ValueError("these features were made without ratings")
        level = (2 * ratings).round().long().clamp(0, self.rating.num_embeddings - 1)
        return torch.cat([self(items), self.rating(level)], dim=-1)


class Knowledge(nn.Module):
    """Knowledge vectors of users and items behind one hybrid-expert adaptor.

    Either side may be missing, and then has no part in the adaptor, which so has fewer parameters: the `item_only`
    control is made without user vectors. The matrices are buffers that no checkpoint holds: they are data, and large.

    Args:
        user_vectors: [U, d_u] or None.
        item_vectors: [n_items + 1, d_i] or None; row 0 is padding.
        adaptor: keyword arguments of `HybridExpertAdaptor`.
    """

    user_vectors: Tensor
    item_vectors: Tensor

    def __init__(
        self,
        user_vectors: Tensor | None,
        item_vectors: Tensor | None,
        adaptor: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        sides = {USER: user_vectors, ITEM: item_vectors}
        self.towers = {side: i for i, side in enumerate(s for s, v in sides.items() if v is not None)}
        for side in self.towers:
            self.register_buffer(f"{side}_vectors", sides[side], persistent=False)
        widths = [vectors.shape[1] for vectors in sides.values() if vectors is not None]
        self.adaptor = HybridExpertAdaptor(widths, **(adaptor or {})) if widths else None
        self.width = len(widths) * self.adaptor.out if self.adaptor else 0

    def adapt(self, side: str, vectors: Tensor) -> Tensor:
        """Adapt given vectors of one side: [N, d] to [N, out]. A side without knowledge gives [N, 0]."""
        if self.adaptor is None or side not in self.towers:
            return vectors.new_zeros(len(vectors), 0)
        return self.adaptor(vectors.to(self.adaptor.shared.weight1.dtype), self.towers[side])

    def adapt_rows(self, side: str, rows: Tensor) -> Tensor:
        """Adapt the vectors of users or items [...]: [..., out], each distinct row once."""
        if side not in self.towers:
            return rows.new_zeros(*rows.shape, 0, dtype=torch.float32)
        distinct, position = rows.unique(return_inverse=True)
        matrix: Tensor = getattr(self, f"{side}_vectors")
        return F.embedding(position, self.adapt(side, matrix[distinct]))
