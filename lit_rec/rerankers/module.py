"""The one LightningModule that trains any reranker."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lit_rec.errors import UserError
from lit_rec.extensions import find, is_path
from lit_rec.metrics.ranking import Convention, parse_metric, ranking_metrics
from lit_rec.metrics.torch_metrics import DistinctMeans
from lit_rec.rerankers.dlcm import DLCM
from lit_rec.rerankers.features import ITEM, USER, ItemFeatures, Knowledge, initialise
from lit_rec.rerankers.losses import bce, get_loss
from lit_rec.rerankers.mir import MIR
from lit_rec.rerankers.prm import PRM
from lit_rec.rerankers.setrank import SetRank

ARCHITECTURES: dict[str, type[nn.Module]] = {"dlcm": DLCM, "prm": PRM, "setrank": SetRank, "mir": MIR}


def architecture_of(name: str) -> Any:
    """The class of an architecture, a built-in one or the path of your own."""
    return ARCHITECTURES.get(name) or find(name, "reranker.architecture")


def loss_of(architecture: str, loss: str) -> str:
    """The name of a loss; what `default` stands for depends on the architecture.

    >>> loss_of("dlcm", "default"), loss_of("setrank", "default"), loss_of("setrank", "attention")
    ('bce', 'attention_rank', 'attention')
    """
    return getattr(architecture_of(architecture), "default_loss", "bce") if loss == "default" else loss


def require_rows(vectors: Tensor | None, rows: int, name: str) -> None:
    """Refuse knowledge without a row for everybody.

    Raises:
        UserError: when vectors [n, d] have fewer rows than that, or another shape.
    """
    if vectors is not None and (vectors.dim() != 2 or len(vectors) < rows):
        raise UserError(
            f"{name} must be [{rows} or more, width], not {list(vectors.shape)}.",
            where=name,
            why="Every user row, and every item id after the padding's row 0, has its vector there.",
            fix="Give users or items that nothing is known of a row of zeros.",
        )


class RerankerModule(L.LightningModule):
    """A reranker with its item features and knowledge (METHODS 1.6).

    A batch is a dictionary of tensors: user [B], items [B, C] (0 = padding, at the end), labels [B, C], list
    [B] (the list's index), and for MIR history_items and history_ratings [B, H]. A candidate's vector is
    [item id ; attributes ; the user's knowledge ; the item's knowledge].

    The attribute table and the knowledge matrices are data: non-persistent buffers, in no checkpoint. What
    `save_hyperparameters` keeps is plain values.

    Args:
        n_items: items without padding; ids run 1..n_items.
        architecture: `dlcm`, `prm`, `setrank` or `mir`, or the path of a class: `callbacks.mine.MyReranker`, a Module
            made with the width of a candidate's vector, whose forward takes (x [B, C, width], mask [B, C]) and gives
            logits [B, C].
        architecture_args: keyword arguments of the architecture's class.
        loss: a name in `lit_rec.rerankers.losses.LOSSES`; `default` is the architecture's own in KAR's code:
            attention_rank for SetRank, bce for the others.
        temperature: T of the attention and softmax losses, and so of `soft` rewards by a reranker trained with them.
        lr: Adam's learning rate.
        weight_decay: Adam's L2 penalty.
        dim: width of every embedding.
        attributes: [n_items + 1, A] int64, 0 = padding; None without attributes.
        attribute_widths: columns of the table that belong to each attribute; empty: all to one.
        first_attribute_only: read only the first value of each attribute, as KAR does.
        rating_max: highest rating of a history.
        user_vectors: [U, d_u] float, or None.
        item_vectors: [n_items + 1, d_i] float, or None.
        adaptor: keyword arguments of `HybridExpertAdaptor`.
        metrics: what validation measures, such as `ndcg@5`.
        convention: of the validation metrics.

    Raises:
        UserError: on an unknown architecture, loss or metric, arguments the architecture does not take, or item vectors
            with too few rows.
    """

    def __init__(
        self,
        *,
        n_items: int,
        architecture: str = "dlcm",
        architecture_args: Mapping[str, Any] | None = None,
        loss: str = "default",
        temperature: float = 0.03,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        dim: int = 32,
        attributes: Tensor | None = None,
        attribute_widths: Sequence[int] = (),
        first_attribute_only: bool = False,
        rating_max: float = 5.0,
        user_vectors: Tensor | None = None,
        item_vectors: Tensor | None = None,
        adaptor: Mapping[str, Any] | None = None,
        metrics: Sequence[str] = ("ndcg@5", "map@5"),
        convention: Convention = "standard",
    ) -> None:
        super().__init__()
        # Plain copies: a DictConfig or a tuple subclass in a checkpoint would break resuming.
        architecture_args, adaptor = dict(architecture_args or {}), dict(adaptor or {})
        attribute_widths, metrics = [int(w) for w in attribute_widths], [str(m) for m in metrics]
        self.save_hyperparameters(ignore=["attributes", "user_vectors", "item_vectors"])
        if architecture not in ARCHITECTURES and not is_path(architecture):
            raise UserError(
                f"There is no reranker {architecture!r}.",
                fix=f"Write one of {', '.join(ARCHITECTURES)}, or the path of your own: callbacks.mine.MyReranker.",
            )
        kind = architecture_of(architecture)
        self.uses_history: bool = getattr(kind, "uses_history", False)
        self.loss = get_loss(loss_of(architecture, loss))
        self.temperature, self.lr, self.weight_decay = temperature, lr, weight_decay
        self.metrics, self.convention = metrics, convention
        self.cuts = sorted({parse_metric(name)[1] for name in metrics})

        self.features = ItemFeatures(
            n_items,
            attributes,
            attribute_widths,
            first_attribute_only=first_attribute_only,
            dim=dim,
            rating_max=rating_max,
            rated=self.uses_history,
        )
        require_rows(item_vectors, n_items + 1, "item_vectors")
        self.knowledge = Knowledge(user_vectors, item_vectors, adaptor)
        width = self.features.width + self.knowledge.width
        if self.uses_history:
            architecture_args = {
                "history_width": self.features.history_width,
                "field": dim,
                **architecture_args,
            }
        try:
            self.ranker = kind(width, **architecture_args)
        except (TypeError, ValueError, AssertionError) as error:
            raise UserError(
                f"The reranker {architecture!r} cannot be built.",
                where="reranker.args",
                why=str(error),
                fix=f"See the arguments of {kind.__module__}.{kind.__name__} (candidate width {width}).",
            ) from error
        self.features.apply(initialise)
        self.ranker.apply(initialise)
        self.validation = DistinctMeans(distributed_available_fn=self._together)
        self._epoch_loss = torch.zeros(())
        self._epoch_steps = 0

    @property
    def score_temperature(self) -> float:
        """By what a logit is divided before a softmax over the list makes it the probability that was trained."""
        return 1.0 if self.loss is bce else self.temperature

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Score the lists of a batch: logits [B, C]; those of padding mean nothing."""
        known = self._known(batch)
        return self.score(batch["items"], *known, batch.get("history_items"), batch.get("history_ratings"))

    def _known(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Adapted knowledge of users [B, w] and items [B, C, w]."""
        return self.knowledge.adapt_rows(USER, batch["user"]), self.knowledge.adapt_rows(ITEM, batch["items"])

    def _vectors(self, items: Tensor, user_knowledge: Tensor, item_knowledge: Tensor) -> Tensor:
        """What a candidate is to the ranker, [B, C, width]."""
        users = user_knowledge.unsqueeze(1).expand(-1, items.shape[1], -1)
        own = self.features(items)  # a side without knowledge has no columns, and no precision of its own
        sides = [side.to(own) for side in (users, item_knowledge) if side.shape[-1]]
        return torch.cat([own, *sides], dim=-1) if sides else own

    def score(
        self,
        items: Tensor,
        user_knowledge: Tensor,
        item_knowledge: Tensor,
        history_items: Tensor | None = None,
        history_ratings: Tensor | None = None,
    ) -> Tensor:
        """Score lists whose knowledge is adapted already.

        Args:
            items: [B, C], 0 = padding.
            user_knowledge: [B, w], w = 0 without user knowledge.
            item_knowledge: [B, C, w], w = 0 without item knowledge.
            history_items: [B, H], needed by MIR alone.
            history_ratings: [B, H], needed by MIR alone.

        Returns:
            Logits [B, C].
        """
        x, mask = self._vectors(items, user_knowledge, item_knowledge), items > 0
        if not self.uses_history:
            return self.ranker(x, mask)
        if history_items is None or history_ratings is None:
            raise ValueError("MIR reads the user's history: the batch needs history_items and history_ratings")
        return self.ranker(x, mask, self.features.history(history_items, history_ratings), history_items > 0)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        items, labels = batch["items"], batch["labels"]
        if self.loss is bce and hasattr(self.ranker, "bce"):  # which has a way of its own to it, of the same result
            loss = self.ranker.bce(self._vectors(items, *self._known(batch)), items > 0, labels)
        else:
            loss = self.loss(self(batch), labels, items > 0, self.temperature)
        # Summed here and logged once an epoch: logging at every step costs more than a step of these models.
        self._epoch_loss = self._epoch_loss.to(loss.device) + loss.detach()
        self._epoch_steps += 1
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the mean loss of the epoch."""
        self.log("train/loss", self._epoch_loss / max(1, self._epoch_steps))
        self._epoch_loss, self._epoch_steps = torch.zeros_like(self._epoch_loss), 0

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure one batch of validation lists."""
        values = ranking_metrics(self(batch), batch["labels"], batch["items"] > 0, self.cuts, self.convention)
        self.validation.update(torch.stack([values[m] for m in self.metrics], dim=1), batch["user"], batch["list"])

    def on_validation_epoch_end(self) -> None:
        """Log `val/user/<metric>` and `val/list/<metric>`: means over users and lists, of all ranks."""
        by_user, by_list = self.validation.compute()
        self.validation.reset()
        for unit, means in (("user", by_user), ("list", by_list)):
            for name, mean in zip(self.metrics, means, strict=True):
                self.log(f"val/{unit}/{name}", mean, rank_zero_only=False)

    def _together(self) -> bool:
        """Whether other processes are at work on this very fit; they may be at work on fits of their own."""
        return self.trainer.world_size > 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as in KAR."""
        return torch.optim.Adam(self.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=True)
