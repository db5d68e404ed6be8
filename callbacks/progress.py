"""One progress line per training epoch, with its rate and its loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_rec.policy.dpo import DPOPolicy
from lit_rec.run.progress import console, step


class EpochProgress(Callback):
    """Shows how far a training epoch is.

    Args:
        name: What is being trained.
        shown: Which of the epoch's metrics are told.
    """

    def __init__(self, name: str, shown: Sequence[str] = ("loss", "margin", "accuracy")) -> None:
        self.name, self.shown = name, shown
        self._context: Any = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the line."""
        description = f"{self.name} {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._context = step(description, len(trainer.train_dataloader or ()), "batches")
        self._step = self._context.__enter__()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Advance it."""
        self._step(1)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close it, and say how the epoch went."""
        self._context.__exit__(None, None, None)
        means: Mapping[str, Any] = pl_module.means() if isinstance(pl_module, DPOPolicy) else trainer.callback_metrics
        shown = (f"{name} {float(means[name]):.4f}" for name in self.shown if name in means)
        console.print("  " + "  ".join(shown), highlight=False)
