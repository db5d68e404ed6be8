"""Where curves go: TensorBoard, CSV, Weights & Biases, MLflow, any number of them side by side."""

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from omegaconf import DictConfig

from lit_rec import distributed
from lit_rec.errors import UserError
from lit_rec.run.folder import MLFLOW_RUNS, WANDB_RUN, write_atomic


@dataclass
class Board:
    """One set of curves, such as those of a policy on a fold.

    Attributes:
        name: Of the set; slashes make folders.
        loggers: Lightning's, for the Trainer.
    """

    name: str
    loggers: list[Logger] = field(default_factory=list)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step."""
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, value in values.items():
                    logger.experiment.add_scalar(name, value, step)
            else:
                logger.log_metrics(dict(values), step)

    def histogram(self, name: str, values: Any, step: int) -> None:
        """A distribution; where a logger has no such thing, its mean is there as a number already."""
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_histogram(name, values, step)
            elif isinstance(logger, WandbLogger):
                import wandb

                logger.experiment.log({f"{self.name}/{name}": wandb.Histogram(values)})

    def text(self, name: str, text: str, step: int) -> None:
        """Words to read; CSV has no place for them, and the run folder keeps them all anyway."""
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(name, text, step)
            elif isinstance(logger, WandbLogger):
                logger.log_text(key=name, columns=["step", "text"], data=[[str(step), text]])
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_text(logger.run_id, text, f"{name}/{step}.md")

    def flush(self) -> None:
        """Let a reader see what there is."""
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()
            else:
                logger.save()


def make_board(cfg: DictConfig, folder: Path, name: str) -> Board:
    """The loggers that `logging.to` names; of several processes the first one logs.

    Args:
        cfg: The configuration.
        folder: The run folder.
        name: Of the curves.

    Raises:
        UserError: A package is missing, or a tracking service cannot be reached or does not let us in.
    """
    return Board(name, list(_loggers(cfg, folder, name)) if distributed.main() else [])


def _loggers(cfg: DictConfig, folder: Path, name: str) -> Iterable[Logger]:
    made = {"tensorboard": _tensorboard, "csv": _csv, "wandb": _wandb, "mlflow": _mlflow}
    for kind in dict.fromkeys(cfg.logging.to):
        try:
            yield made[kind](cfg, folder, name)
        except ModuleNotFoundError as error:
            raise UserError(
                f"{kind} is not installed",
                where="config key logging.to",
                why=str(error)[:200],
                fix='pip install -c constraints.txt -e ".[loggers]"',
            ) from error


def _tensorboard(cfg: DictConfig, folder: Path, name: str) -> Logger:
    return TensorBoardLogger(str(folder), name="tensorboard", version=name, default_hp_metric=False)


def _csv(cfg: DictConfig, folder: Path, name: str) -> Logger:
    """A resumed run writes beside what is there: Lightning's logger would begin by deleting it."""
    version, number = name, 1
    while (folder / "csv" / version / "metrics.csv").exists():
        number += 1
        version = f"{name}_{number}"
    return CSVLogger(str(folder), name="csv", version=version)


@contextmanager
def _told(package: str, what: str, *, where: str, fix: str) -> Iterator[None]:
    """Say in words what a tracking service, or the way to it, has raised."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in (package, "requests", "urllib3"):
            raise
        raise UserError(what, where=where, why=" ".join(str(error).split())[:200], fix=fix) from error


def _wandb(cfg: DictConfig, folder: Path, name: str) -> Logger:
    """All curves of a run are one W&B run, told apart by their names: a process has one run at a time."""
    logger = WandbLogger(
        project=cfg.logging.project,
        name=cfg.name,
        id=_wandb_id(folder),
        resume="allow",
        save_dir=str(folder),
        offline=cfg.logging.offline,
        prefix=name,
    )
    fix = "log in with `wandb login`, or keep the curves below the run folder: logging.offline=true"
    with _told("wandb", "Weights & Biases cannot be used", where="config key logging.to", fix=fix):
        _ = logger.experiment  # logs in
    return logger


def _wandb_id(folder: Path) -> str:
    """The W&B run of a run folder, which a resumed run finds again."""
    file = folder / WANDB_RUN
    if not file.is_file():
        write_atomic(file, secrets.token_hex(8))
    return file.read_text()


def _mlflow(cfg: DictConfig, folder: Path, name: str) -> Logger:
    uri = cfg.logging.mlflow_uri
    if uri.startswith("file:"):  # MLflow keeps working with folders, but wants to be asked
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    file = folder / MLFLOW_RUNS
    known: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
    logger = MLFlowLogger(
        experiment_name=cfg.logging.project,
        run_name=f"{cfg.name}/{name}",
        tracking_uri=uri,
        run_id=known.get(name),
        synchronous=True,
    )
    fix = "start the tracking server, or name a folder: file:/somewhere/mlruns"
    with _told("mlflow", f"MLflow cannot be reached at {uri}", where="config key logging.mlflow_uri", fix=fix):
        run = str(logger.run_id)
    write_atomic(file, json.dumps({**known, name: run}, indent=1))
    return logger
