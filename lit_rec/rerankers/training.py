"""Train one reranker, choose its epoch, keep it."""

import json
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping
from lightning.pytorch.utilities.seed import isolate_rng
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_rec.data.lists import ListSet
from lit_rec.data.sessions import SessionDataModule
from lit_rec.data.splits import Splits
from lit_rec.errors import UserError
from lit_rec.rerankers.module import RerankerModule, require_rows
from lit_rec.threads import one_thread

SMALL = 2048  # candidates of a batch; from there on a second thread brings more than handing it work costs (measured)
Selection = Literal["validation", "last", "test_kar"]


@dataclass
class FittedReranker:
    """A trained reranker and how its training went.

    Attributes:
        module: the module with the weights of the chosen epoch, in evaluation mode, on the CPU.
        best_epoch: the chosen epoch, from 0.
        best_value: its selection metric; nan when nothing was measured.
        history: one dictionary of plain numbers per epoch: epoch, seconds, train/loss, val/user/...,
            val/list/....
        seconds: wall-clock of the whole fit.
    """

    module: RerankerModule
    best_epoch: int
    best_value: float
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


class KeepBest(Checkpoint):
    """Keep the best epoch's weights in memory, and every epoch's metrics.

    It is a `Checkpoint` so that Lightning calls it after all the others, when the epoch's metrics are
    complete.

    Args:
        monitor: metric to choose by, higher is better; None keeps the last epoch.
    """

    def __init__(self, monitor: str | None) -> None:
        self.monitor = monitor
        self.best_epoch, self.best_value = -1, float("nan")
        self.weights: dict[str, Tensor] = {}
        self.history: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the epoch's clock."""
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the epoch's metrics, and its weights where they are the best so far."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        seconds = time.perf_counter() - self._start
        self.history.append({"epoch": trainer.current_epoch, "seconds": seconds, **metrics})
        value = metrics[self.monitor] if self.monitor else float("nan")
        if self.monitor is None or self.best_epoch < 0 or value > self.best_value:
            self.best_epoch, self.best_value = trainer.current_epoch, value
            self.weights = {name: w.detach().cpu().clone() for name, w in pl_module.state_dict().items()}


def fit_reranker(
    *,
    lists: ListSet,
    train_users: Tensor,
    validation_users: Tensor | None = None,
    test_users: Tensor | None = None,
    n_items: int,
    attributes: Tensor | None = None,
    attribute_widths: Sequence[int] = (),
    user_vectors: Tensor | None = None,
    item_vectors: Tensor | None = None,
    selection: Selection = "validation",
    metric: str = "ndcg@5",
    batch_size: int = 256,
    max_epochs: int = 50,
    patience: int = 5,
    seed: int = 1,
    accelerator: str = "cpu",
    devices: int | list[int] = 1,
    strategy: str = "auto",
    precision: Any = "32-true",
    callbacks: Sequence[Callback] = (),
    logger: Any = False,
    **module_args: Any,
) -> FittedReranker:
    """Train a reranker with one Lightning Trainer.

    The result depends on the seed and the arguments alone: the global random state is neither read nor moved.

    Args:
        lists: the candidate lists of all users.
        train_users: user rows whose lists are trained on.
        validation_users: user rows that choose the epoch and stop the training under `validation`.
        test_users: looked at only under `test_kar`.
        n_items: items without padding.
        attributes: [n_items + 1, A] int64 attribute table, or None.
        attribute_widths: columns of the table per attribute; empty: all to one.
        user_vectors: [U, d_u] knowledge, or None.
        item_vectors: [n_items + 1, d_i] knowledge, or None.
        selection: `validation`: the epoch with the best user-mean `metric` of validation users, early
            stopping after `patience` epochs without a better one. `last`: the last epoch. `test_kar`: the
            epoch with the best MAP at the metric's cut-off on TEST users, mean over lists, as KAR chooses:
            only to compare with published numbers.
        metric: what `validation` maximises.
        batch_size: lists per step and device.
        max_epochs: most epochs, at least 1.
        patience: epochs without improvement before stopping (not under `last`).
        seed: of initialisation, dropout and the order of lists.
        accelerator: Lightning's, as are devices, strategy and precision.
        devices: number of devices, or which GPU.
        strategy: Lightning's strategy.
        precision: Lightning's precision.
        callbacks: more Lightning callbacks.
        logger: Lightning logger, or False.
        **module_args: passed to `RerankerModule`: architecture, architecture_args, loss, temperature, lr, ...

    Returns:
        The reranker of the chosen epoch.

    Raises:
        UserError: when the users to train on or to select by have no lists, the knowledge has too few rows, or there is
            no epoch.
    """
    started = time.perf_counter()
    if selection not in ("validation", "last", "test_kar"):
        raise UserError(f"There is no selection {selection!r}.", fix="Write validation, last or test_kar.")
    if max_epochs < 1:
        raise UserError(f"A reranker cannot be trained for {max_epochs} epochs.", fix="Set max_epochs to 1 or more.")
    require_rows(user_vectors, int(lists.user.max()) + 1 if len(lists.user) else 0, "user_vectors")
    by_test, nobody = selection == "test_kar", torch.zeros(0, dtype=torch.int64)
    judges = test_users if by_test else validation_users
    splits = Splits(train_users, nobody if judges is None else judges, nobody)
    if not len(lists.of_users(splits.train)):
        raise UserError("None of the training users has a candidate list.", fix="Use more users or a smaller history.")
    measured = bool(len(lists.of_users(splits.validation)))
    if selection != "last" and not measured:
        raise UserError(
            f"selection={selection} has no lists to choose the epoch on.",
            fix="Hold out users with lists, or choose selection=last.",
        )
    cut = metric.partition("@")[2]
    monitor = {"validation": f"val/user/{metric}", "test_kar": f"val/list/map@{cut}"}.get(selection)

    with isolate_rng(), quiet():
        torch.manual_seed(seed)
        module = RerankerModule(
            n_items=n_items,
            attributes=attributes,
            attribute_widths=attribute_widths,
            user_vectors=user_vectors,
            item_vectors=item_vectors,
            metrics=list(dict.fromkeys([metric, f"ndcg@{cut}", f"map@{cut}"])),
            convention="kar" if by_test else "standard",
            **module_args,
        )
        keep = KeepBest(monitor)
        stop = [EarlyStopping(monitor, mode="max", patience=patience)] if monitor else []
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=devices,
            strategy=strategy,
            precision=precision,
            max_epochs=max_epochs,
            callbacks=[*callbacks, *stop, keep],
            logger=logger,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        history = module.uses_history
        data = SessionDataModule(lists, splits, batch_size=batch_size, with_history=history, seed=seed)
        small = batch_size * lists.items.shape[1] < SMALL
        with one_thread(small and isinstance(trainer.accelerator, CPUAccelerator)):
            trainer.fit(module, data.train_dataloader(), data.val_dataloader() if measured else None)
        module.cpu().load_state_dict(keep.weights)
    module.trainer = None
    seconds = time.perf_counter() - started
    return FittedReranker(module.eval(), keep.best_epoch, keep.best_value, keep.history, seconds)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Lightning says at every start: devices, worker counts, logging intervals."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            yield
    finally:
        log.setLevel(level)


def save_reranker(fitted: FittedReranker, folder: Path) -> None:
    """Write a reranker as `reranker.safetensors` and `reranker.json`, without the knowledge matrices."""
    folder.mkdir(parents=True, exist_ok=True)
    module = fitted.module
    table = {"data.attributes": module.features.attributes} if module.features.widths else {}
    tensors = {name: tensor.contiguous() for name, tensor in (module.state_dict() | table).items()}
    save_file(tensors, folder / "reranker.safetensors")
    about = {
        "arguments": dict(module.hparams),
        "best_epoch": fitted.best_epoch,
        "best_value": None if fitted.best_value != fitted.best_value else fitted.best_value,
        "seconds": fitted.seconds,
        "history": fitted.history,
    }
    (folder / "reranker.json").write_text(json.dumps(about, indent=1))


def load_reranker(
    folder: Path, *, user_vectors: Tensor | None = None, item_vectors: Tensor | None = None
) -> FittedReranker:
    """Read what `save_reranker` wrote, with the knowledge it was trained with.

    Args:
        folder: where it was saved.
        user_vectors: [U, d_u] as in training; other users are welcome, another width is not.
        item_vectors: [n_items + 1, d_i] as in training.

    Raises:
        UserError: when the folder holds no reranker, or the knowledge does not fit it.
    """
    if not (folder / "reranker.json").is_file():
        raise UserError("There is no saved reranker here.", where=str(folder))
    about = json.loads((folder / "reranker.json").read_text())
    weights = load_file(folder / "reranker.safetensors")
    attributes = weights.pop("data.attributes", None)
    arguments = about["arguments"]
    if attributes is not None and arguments["first_attribute_only"]:
        arguments |= {"attribute_widths": [1] * attributes.shape[1]}  # the table was saved as it is used
    module = RerankerModule(attributes=attributes, user_vectors=user_vectors, item_vectors=item_vectors, **arguments)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            "The saved reranker does not fit the knowledge given.",
            where=str(folder),
            why=str(error),
            fix="Give the user and item vectors of the encoder it was trained with.",
        ) from error
    best = float("nan") if about["best_value"] is None else about["best_value"]
    return FittedReranker(module.eval(), about["best_epoch"], best, about["history"], about["seconds"])
