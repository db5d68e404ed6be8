"""Updates that would ruin a model: a loss or a gradient that is no number, or a gradient that explodes."""

import math
import statistics
from collections import deque
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_rec.errors import UserError
from lit_rec.run.progress import console

REMEMBERED = 64  # updates whose gradients say what is usual
FEWEST = 16  # before so many, nothing is
ABOVE_CLIP = 10  # times the norm that gradients are scaled down to; what is less is clipped, and no explosion
MOST_SKIPPED = 20  # in a row: float16's scaling takes up to 16 to settle, after that nothing will


class Health(Callback):
    """Looks at every update before it is made, and stops the training or leaves the update out.

    A bad update is never made, so that the weights stay the last good ones, and so does the last checkpoint. It is bad
    where the loss or the gradient's norm is no finite number, or where the norm is `limit` times as large as the
    median of the last updates and, where gradients are clipped, also far above what they are clipped to: a model that
    had next to nothing to learn from is not ruined by its first ordinary update. All processes decide alike.

    It works for automatic and for manual optimisation and with accumulated gradients. The Trainer clips gradients after
    it; a module that clips its own does so before it. Where Lightning scales losses (float16), what overflows is the
    scaler's to deal with.

    Args:
        policy: "stop" (with a message that says what to change) or "skip" (and say so).
        name: What is being trained, for messages.
        keys: Configuration keys that cure it, for the message.
        limit: How many times the usual norm is an explosion.
        clip: The norm to which a module scales its gradients down; what the Trainer clips to is read from it.

    Attributes:
        skipped: Updates left out so far.
    """

    def __init__(
        self,
        policy: str = "stop",
        *,
        name: str = "the training",
        keys: str = "lr",
        limit: float = 1000.0,
        clip: float = 0.0,
    ) -> None:
        self.policy, self.name, self.keys, self.limit, self.clip = policy, name, keys, limit, clip
        self.skipped = self._in_a_row = 0
        self._norms: deque[float] = deque(maxlen=REMEMBERED)
        self._loss: Tensor | None = None  # the worst since the last update

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Note the loss; nothing waits for the device here."""
        found = loss.detach()
        self._loss = found if self._loss is None else torch.where(found.isfinite(), self._loss, found)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Judge the update that is about to be made."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters])) if parameters else 0.0
        why = self._trouble(trainer, norm)
        self._loss = None
        alike: Any = trainer.strategy.reduce_boolean_decision(why is not None, all=False)
        if not alike:
            if math.isfinite(norm):
                self._norms.append(norm)
            self._in_a_row = 0
            return
        self._in_a_row += 1
        why = why or "in another process"
        place = f"epoch {trainer.current_epoch + 1}, update {trainer.global_step + 1}"
        if self.policy == "stop" or self._in_a_row > MOST_SKIPPED:
            raise self._stopped(f"{place}: {why}")
        for parameter in parameters:  # an optimiser passes over what has no gradient, its moments included
            parameter.grad = None
        self.skipped += 1
        told = f"warning: {self.name}: {place} left out ({why}); {self.skipped} so far"
        console.print(told, highlight=False, markup=False)

    def _trouble(self, trainer: L.Trainer, norm: float) -> str | None:
        """What is wrong with an update; None if nothing is."""
        if self._loss is not None and not bool(self._loss.isfinite()):
            return f"the loss is {float(self._loss)}"
        if not math.isfinite(norm):
            scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
            return None if scaled else f"the gradient's norm is {norm}"
        usual = statistics.median(self._norms) if len(self._norms) >= FEWEST else 0.0
        ordinary = ABOVE_CLIP * (trainer.gradient_clip_val or self.clip)
        if usual > 0 and norm > max(self.limit * usual, ordinary):
            return f"the gradient's norm is {norm:.3g}, {norm / usual:.0f} times what is usual"
        return None

    def _stopped(self, why: str) -> UserError:
        tried = f"{self._in_a_row} updates in a row were left out; " if self.policy == "skip" else ""
        skip = "" if self.policy == "skip" else ", or trainer.bad_updates=skip to leave such updates out"
        return UserError(
            f"{self.name} went wrong and was stopped before it could spoil the weights",
            where=f"config keys {self.keys}",
            why=f"{tried}{why}",
            fix=f"a smaller learning rate, or 32-bit precision (trainer.precision=32-true){skip}; what was finished "
            "before is kept",
        )

    def state_dict(self) -> dict[str, Any]:
        """What is usual, and how many were left out: plain numbers."""
        return {"norms": list(self._norms), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run was stopped."""
        self._norms.extend(state_dict["norms"])
        self.skipped = int(state_dict["skipped"])
