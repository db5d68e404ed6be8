"""The outer loop: which round it is, what happens between rounds, and a checkpoint that can be resumed from."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint

from lit_rec import distributed
from lit_rec.run.folder import canonical, differences, other_configuration, publish


class RoundHooks(Callback):
    """A callback with two more hooks. Write a subclass, name it under `callbacks:` in the YAML, and it takes part.

    `policy` is what is trained: the `DPOPolicy` or the `PPOAgent`. `trainer.datamodule` serves the round's pairs or the
    sessions; `rounds.loop` (a `Loop` or a `HintLoop` of lit_rec.recipes) has what was made so far.
    """

    def begin_round(self, trainer: L.Trainer, policy: Any, rounds: "RoundCallback", number: int) -> None:
        """Called before the first epoch of round `number` (1, 2, ...)."""

    def end_round(self, trainer: L.Trainer, policy: Any, rounds: "RoundCallback", number: int) -> None:
        """Called after the last epoch of round `number`; after a restart it may be called again."""


class RoundCallback(Checkpoint):
    """Counts rounds within ONE Trainer.fit and calls the hooks between them.

    It is a `Checkpoint` so that Lightning calls it when the module and all other callbacks are done with the epoch.

    The checkpoint is written when an epoch has ended and BEFORE the hooks of a finished round run: hooks sample and
    encode for hours at full size, and a run killed there resumes behind the round, not in front of its last epoch.

    Args:
        loop: The stages of this split.
        policy_name: "round" (states round_1, round_2, ...) or the name of a one-round control.
        rounds: Number of rounds.
        epochs: Epochs per round.
        checkpoint: Where the fit can be resumed from.
        key: Every configuration value that the fit depends on: nothing else goes on from its checkpoint.
    """

    def __init__(
        self,
        loop: Any,
        policy_name: str,
        rounds: int,
        epochs: int,
        checkpoint: Path,
        key: Mapping[str, Any],
    ) -> None:
        self.loop, self.policy_name, self.rounds, self.epochs = loop, policy_name, rounds, epochs
        self.checkpoint, self.key = checkpoint, canonical(dict(key))
        self.trained = 0  # epochs
        self.seconds: dict[int, float] = {}  # of training, per round
        self._epoch_began = 0.0

    def state_of(self, number: int) -> str:
        """Name of the LLM's state after round `number` = 1, 2, ..."""
        return f"round_{number}" if self.policy_name == "round" else self.policy_name

    def pairs_from(self, number: int) -> str:
        """Name of the state whose answers are the pairs of round `number`."""
        return self.loop.pairs_from(self.policy_name, number)

    def state_dict(self) -> dict[str, Any]:
        """Epochs trained, and under which settings."""
        return {"trained": self.trained, "seconds": self.seconds, "key": json.dumps(self.key)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Epochs trained before the run was stopped.

        Raises:
            UserError: They were trained with other settings.
        """
        if found := differences(json.loads(state_dict["key"]), self.key):
            fix = "restore the value, choose another run.dir, or start anew with --fresh (LLM answers are kept)"
            raise other_configuration(self.loop.run.path, str(self.checkpoint), found, fix)
        self.trained = int(state_dict["trained"])
        self.seconds = dict(state_dict["seconds"])

    def spent(self, number: int, since: float) -> None:
        """Count the time since then (`time.perf_counter`) as training of round `number`."""
        self.seconds[number] = self.seconds.get(number, 0.0) + time.perf_counter() - since

    @property
    def finished(self) -> int:
        """Rounds whose last epoch is trained."""
        return self.trained // self.epochs

    def passed(self, number: int) -> bool:
        """Whether the weights are those of a later epoch than the last one of round `number`."""
        return self.trained > number * self.epochs

    def cost(self, number: int) -> dict[str, float]:
        """What a manifest says of the training of a round, which went on before its stage was built."""
        return {"training_seconds": round(self.seconds.get(number, 0.0), 1)}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up where the checkpoint left off: visit what is finished, end the round that was being ended, go on."""
        for number in range(1, self.finished + 1):
            self._call("end_round", trainer, pl_module, number)
        if self.finished < self.rounds:
            self._call("begin_round", trainer, pl_module, self.finished + 1)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the clock."""
        self._epoch_began = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save; after the last epoch of a round end it and begin the next one."""
        ended = (trainer.current_epoch + 1) % self.epochs == 0
        self.trained = trainer.current_epoch + 1
        self.spent(trainer.current_epoch // self.epochs + 1, self._epoch_began)
        self._save(trainer)
        if ended:
            self._call("end_round", trainer, pl_module, self.finished)
            if self.finished < self.rounds:
                self._call("begin_round", trainer, pl_module, self.finished + 1)

    def _save(self, trainer: L.Trainer) -> None:
        """Have a whole checkpoint or the one before; all processes save, what process 0 has written counts."""
        temporary = self.checkpoint.with_suffix(f".tmp{distributed.place().rank or ''}")
        trainer.save_checkpoint(temporary)
        if distributed.main():
            publish(temporary, self.checkpoint)
        else:
            temporary.unlink(missing_ok=True)

    def _call(self, hook: str, trainer: L.Trainer, policy: L.LightningModule, number: int) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RoundHooks):
                getattr(callback, hook)(trainer, policy, self, number)
