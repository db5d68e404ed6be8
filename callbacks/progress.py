"""One progress line per training epoch, with its rate and its loss."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_rec.policy.dpo import DPOPolicy
from lit_rec.run.progress import console, step


class EpochProgress(Callback):
    """Shows how far an epoch of preference training is.

    Args:
        name: What is being trained.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._context: Any = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the line."""
        description = f"{self.name}: DPO epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._context = step(description, len(trainer.train_dataloader or ()), "batches")
        self._step = self._context.__enter__()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Advance it."""
        self._step(1)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close it, and say how the epoch went."""
        self._context.__exit__(None, None, None)
        means = pl_module.means() if isinstance(pl_module, DPOPolicy) else {}
        shown = (f"{name} {means[name]:.4f}" for name in ("loss", "margin", "accuracy") if name in means)
        console.print("  " + "  ".join(shown), highlight=False)
