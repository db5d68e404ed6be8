"""SASRec, self-attentive sequential recommendation (arXiv 1808.09781): the sequence model among the baselines."""

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from lit_rec.data.lists import ListSet
from lit_rec.data.sessions import SessionDataModule, batch_of
from lit_rec.data.splits import Splits
from lit_rec.errors import UserError
from lit_rec.metrics.ranking import ranking_metrics
from lit_rec.rerankers.training import KeepBest, quiet

FULL_SOFTMAX = 20_000  # up to so many items every item is a negative, unless it is said otherwise
MONITOR = "val/ndcg@10"


class _Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind a LayerNorm and beside a residual."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.feed_norm = nn.LayerNorm(dim)
        self.feed = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(dim, dim))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, dim] to [B, L, dim]; a place sees itself and those before it."""
        batch, length, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(batch, length, dim)))
        return x + self.drop(self.feed(self.feed_norm(x)))


class SASRec(nn.Module):
    """Self-attention over a sequence of items; the item embeddings also score what comes next.

    Sequences are left-aligned, so padding stands behind what is real and, attention being causal, is never seen by it.

    Args:
        n_items: Items without padding; ids run 1..n_items.
        max_length: Longest sequence that is read; of a longer one its last items.
        dim: Width of everything.
        blocks: Number of attention blocks.
        heads: Attention heads; they divide `dim`.
        dropout: On embeddings, attention and the blocks' layers.

    Raises:
        UserError: the heads do not divide the width, or a number is below 1.
    """

    def __init__(
        self, *, n_items: int, max_length: int, dim: int = 64, blocks: int = 2, heads: int = 2, dropout: float = 0.2
    ) -> None:
        super().__init__()
        if min(n_items, max_length, dim, blocks, heads) < 1 or dim % heads:
            raise UserError(
                f"SASRec cannot be built with max_length={max_length}, dim={dim}, blocks={blocks}, heads={heads}.",
                fix="Use numbers from 1 up, and a dim that heads divides.",
            )
        self.n_items, self.max_length = n_items, max_length
        self.items = nn.Embedding(n_items + 1, dim, padding_idx=0)
        self.positions = nn.Embedding(max_length, dim)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(_Block(dim, heads, dropout) for _ in range(blocks)))
        self.norm = nn.LayerNorm(dim)
        with torch.no_grad():
            for table in (self.items.weight[1:], self.positions.weight):
                nn.init.normal_(table, std=dim**-0.5)

    def forward(self, sequences: Tensor) -> Tensor:
        """States [B, L, dim] of sequences [B, L <= max_length]; the one of place t knows the items 0..t."""
        x = self.items(sequences) * self.items.embedding_dim**0.5 + self.positions.weight[: sequences.shape[1]]
        return self.norm(self.blocks(self.drop(x)))

    def score(self, history: Tensor, candidates: Tensor) -> Tensor:
        """Logits of what comes after a history.

        Args:
            history: [B, H] int64, left-aligned, 0 = padding, any length.
            candidates: [B, C] int64; padding gets the logit 0.

        Returns:
            [B, C].
        """
        length = (history > 0).sum(dim=1)
        width = int(length.max().clamp(1, self.max_length)) if len(history) else 1
        place = torch.arange(width, device=history.device) + (length - width).clamp(min=0)[:, None]
        recent = history.gather(1, place)
        last = (recent > 0).sum(dim=1).clamp(min=1) - 1
        state = self(recent)[torch.arange(len(history), device=history.device), last]
        return torch.einsum("bd,bcd->bc", state, self.items(candidates))


def next_item_loss(states: Tensor, targets: Tensor, table: Tensor, negatives: int) -> Tensor:
    """Cross-entropy of the next item under a softmax over the items.

    Args:
        states: [P, dim].
        targets: [P] int64, the items that came next.
        table: [n_items + 1, dim] item embeddings, row 0 = padding.
        negatives: 0: the softmax over all items. Else its denominator is estimated, without bias, from so many
            uniform draws that all rows share.

    Returns:
        Mean over rows, a scalar.
    """
    if negatives == 0:
        return F.cross_entropy(states @ table[1:].T, targets - 1)
    n_items = len(table) - 1
    drawn = torch.randint(1, n_items + 1, (negatives,), device=table.device)
    own = (states * table[targets]).sum(dim=1, keepdim=True)
    # The mean over draws times the number of items stands for the sum over all items but the target.
    others = states @ table[drawn].T + torch.log(own.new_tensor(n_items / negatives))
    others = others.masked_fill(drawn == targets[:, None], -torch.inf)
    return (torch.cat([own, others], dim=1).logsumexp(dim=1) - own.squeeze(1)).mean()


def windows(sequences: Tensor, max_length: int) -> Tensor:
    """Cut sequences into pieces of at most `max_length` + 1 items that share one item with the piece before.

    So every transition from an item to the next one is in exactly one piece.

    Args:
        sequences: [T, L] int64, left-aligned, 0 = padding.
        max_length: Inputs of a piece.

    Returns:
        [W, max_length + 1] int64; pieces without a transition are left out.
    """
    pieces = max(1, -(-(sequences.shape[1] - 1) // max_length))
    padded = F.pad(sequences, (0, pieces * max_length + 1 - sequences.shape[1]))
    cut = padded.unfold(1, max_length + 1, max_length).flatten(0, 1)
    return cut[cut[:, 1] > 0]


class SASRecModule(L.LightningModule):
    """Trains a SASRec: every place of a sequence predicts the item after it.

    Args:
        n_items: Items without padding.
        max_length: See `SASRec`, as are dim, blocks, heads and dropout.
        dim: Width.
        blocks: Attention blocks.
        heads: Attention heads.
        dropout: Dropout.
        lr: Adam's learning rate.
        negatives: See `next_item_loss`; None: all items up to `FULL_SOFTMAX` of them, 2,048 draws beyond.

    Attributes:
        report: How the training went: epochs, best_epoch (from 0), best_value (NDCG@10), seconds, windows.
    """

    def __init__(
        self,
        *,
        n_items: int,
        max_length: int,
        dim: int = 64,
        blocks: int = 2,
        heads: int = 2,
        dropout: float = 0.2,
        lr: float = 1e-3,
        negatives: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if negatives is None:
            negatives = 0 if n_items <= FULL_SOFTMAX else 2048
        self.lr, self.negatives = lr, negatives
        self.report: dict[str, Any] = {}
        self.model = SASRec(
            n_items=n_items, max_length=max_length, dim=dim, blocks=blocks, heads=heads, dropout=dropout
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of sequences [B, max_length + 1]."""
        batch = batch[:, : int((batch > 0).sum(dim=1).max())]
        targets = batch[:, 1:]
        states = self.model(batch[:, :-1])[targets > 0]
        return next_item_loss(states, targets[targets > 0], self.model.items.weight, self.negatives)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the NDCG@10 of sessions."""
        scores = self.model.score(batch["history_items"], batch["items"])
        values = ranking_metrics(scores, batch["labels"], batch["items"] > 0, (10,))["ndcg@10"]
        self.log(MONITOR, values.mean(), batch_size=len(values))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam with the paper's second moment."""
        return torch.optim.Adam(self.parameters(), lr=self.lr, betas=(0.9, 0.98), fused=True)


def fit_sasrec(
    sequences: Tensor,
    n_items: int,
    *,
    validation: tuple[ListSet, Tensor],
    max_length: int = 50,
    dim: int = 64,
    blocks: int = 2,
    heads: int = 2,
    dropout: float = 0.2,
    lr: float = 1e-3,
    negatives: int | None = None,
    batch_size: int = 64,
    max_epochs: int = 100,
    patience: int = 10,
    seed: int = 1,
    accelerator: str = "cpu",
    devices: int | list[int] = 1,
) -> SASRecModule:
    """Train a SASRec and keep the epoch with the best NDCG@10 on validation sessions.

    The result depends on the seed and the arguments alone: the global random state is neither read nor moved.

    Args:
        sequences: [T, L] int64 training sequences, left-aligned, 0 = padding.
        n_items: Items without padding.
        validation: Sessions as lists, and the numbers [n] of those that choose the epoch.
        max_length: Longest input; longer sequences are cut into pieces, longer sessions lose their oldest items.
        dim: Width.
        blocks: Attention blocks.
        heads: Attention heads.
        dropout: Dropout.
        lr: Adam's learning rate.
        negatives: See `SASRecModule`.
        batch_size: Sequences per step.
        max_epochs: Most epochs.
        patience: Epochs without improvement before stopping.
        seed: Of initialisation, dropout, negatives and the order of sequences.
        accelerator: Lightning's.
        devices: number of devices, or which GPU.

    Returns:
        The module of the chosen epoch, in evaluation mode, on the CPU.

    Raises:
        UserError: there is nothing to learn from or to choose by, or the sizes do not fit each other.
    """
    started = time.perf_counter()
    lists, index = validation
    if not len(index):
        raise UserError("SASRec has no validation sessions to choose its epoch by.", fix="Hold out some sessions.")
    with isolate_rng(), quiet():
        torch.manual_seed(seed)
        module = SASRecModule(
            n_items=n_items,
            max_length=max_length,
            dim=dim,
            blocks=blocks,
            heads=heads,
            dropout=dropout,
            lr=lr,
            negatives=negatives,
        )
        cut = windows(sequences, max_length)
        if not len(cut):
            raise UserError("SASRec has no sequence of two items to learn from.", fix="Use more training sessions.")
        keep = KeepBest(MONITOR)
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=devices,
            max_epochs=max_epochs,
            callbacks=[EarlyStopping(MONITOR, mode="max", patience=patience), keep],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        order = RandomSampler(cut, generator=torch.Generator().manual_seed(seed))
        batches = DataLoader(cut, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None)  # type: ignore[arg-type,var-annotated]
        nobody = torch.zeros(0, dtype=torch.int64)
        judges = SessionDataModule(
            lists, Splits(nobody, lists.user[index], nobody), batch_size=batch_size, with_history=True
        )
        trainer.fit(module, batches, judges.val_dataloader())
        module.cpu().load_state_dict(keep.weights)
    module.trainer = None
    module.report = {
        "epochs": len(keep.history),
        "best_epoch": keep.best_epoch,
        "best_value": keep.best_value,
        "windows": len(cut),
        "seconds": time.perf_counter() - started,
    }
    return module.eval()


@torch.no_grad()
def sasrec_scores(module: SASRecModule, lists: ListSet, index: Tensor, batch_size: int = 1024) -> Tensor:
    """Logits of the candidates of sessions.

    Args:
        module: What `fit_sasrec` returned.
        lists: Sessions as lists.
        index: [n] session numbers.
        batch_size: Sessions at a time.

    Returns:
        [n, C] float32.
    """
    module.eval()
    scores = [torch.zeros(0, lists.items.shape[1])]
    for part in index.split(batch_size):
        batch = batch_of(lists, part, history=True)
        scores.append(module.model.score(batch["history_items"], batch["items"]).float())
    return torch.cat(scores)
