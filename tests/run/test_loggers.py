"""Curves beside TensorBoard: real MLflow on a folder, CSV, and W&B where it is installed."""

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import wandb as lightning_wandb
from mlflow import MlflowClient
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rec.cli import main
from lit_rec.errors import UserError
from lit_rec.run.loggers import make_board
from lit_rec.schema import LoggingConfig
from tests.worlds import BARE, World, assert_told, make_unified_world


def config(folder: Path, *kinds: str, **options: Any) -> Any:
    logging = OmegaConf.structured(LoggingConfig(**{"mlflow_uri": f"file:{folder}/mlruns", **options}))
    logging.to = list(kinds)
    return OmegaConf.create({"name": "mine", "logging": logging})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_unified_world(tmp_path_factory.mktemp("loggers"))
    assert main(["fit", "--config", made.config, *BARE, "logging.to=[tensorboard,csv,mlflow]"]) == 0
    return made


def tensorboard(world: World, name: str, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(world.run / "tensorboard" / name))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


@pytest.mark.parametrize(
    ("name", "tag"),
    [("fold_0", "policy/loss"), ("fold_0", "rounds/heldout_reward"), ("fold_0/hints/ppo", "losses/policy_loss")],
)
def test_all_loggers_hold_the_same_numbers(world: World, name: str, tag: str) -> None:
    expected = tensorboard(world, name, tag)
    assert expected
    client = MlflowClient(tracking_uri=f"file:{world.run}/mlruns")
    experiment = client.get_experiment_by_name("lit_rec")
    run = next(r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name == f"tiny/{name}")
    history = client.get_metric_history(run.info.run_id, tag)
    assert [(m.step, pytest.approx(m.value, abs=1e-6)) for m in history] == expected
    with (world.run / "csv" / name / "metrics.csv").open() as file:
        found = [(int(row["step"]), float(row[tag])) for row in csv.DictReader(file) if row[tag]]
    assert [(step, pytest.approx(value, abs=1e-6)) for step, value in found] == expected


def test_words_are_kept_where_there_is_a_place_for_them(world: World) -> None:
    texts = [file.read_text() for file in (world.run / "mlruns").rglob("artifacts/hints/kept/1.md")]
    assert len(texts) == 1
    assert "other sessions" in texts[0]


def test_a_resumed_run_goes_on_and_loses_nothing(tmp_path: Path) -> None:
    cfg = config(tmp_path, "csv", "mlflow")
    for step in (0, 1):
        board = make_board(cfg, tmp_path, "fold_0")
        board.scalars({"loss": 1.0 - step}, step)
        board.flush()
    client = MlflowClient(tracking_uri=f"file:{tmp_path}/mlruns")
    runs = client.search_runs([client.get_experiment_by_name("lit_rec").experiment_id])
    assert len(runs) == 1
    assert [(m.step, m.value) for m in client.get_metric_history(runs[0].info.run_id, "loss")] == [(0, 1.0), (1, 0.0)]
    lines = [(tmp_path / "csv" / name / "metrics.csv").read_text() for name in ("fold_0", "fold_0_2")]
    assert ["1.0" in lines[0], "0.0" in lines[1]] == [True, True]


def test_no_logger_at_all(tmp_path: Path) -> None:
    board = make_board(config(tmp_path), tmp_path, "fold_0")
    board.scalars({"loss": 1.0}, 0)
    board.text("a", "b", 0)
    board.flush()
    assert board.loggers == []
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_wandb, "_WANDB_AVAILABLE", False)
    with pytest.raises(UserError, match="wandb is not installed") as caught:
        make_board(config(tmp_path, "wandb"), tmp_path, "fold_0")
    assert "loggers" in caught.value.fix


def test_a_server_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"MLflow cannot be reached at http://127\.0\.0\.1:9"):
        make_board(config(tmp_path, "mlflow", mlflow_uri="http://127.0.0.1:9"), tmp_path, "fold_0")


def test_a_login_that_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class UsageError(Exception):
        __module__ = "wandb.errors"

    class Refused:
        def __init__(self, **_: object) -> None: ...

        @property
        def experiment(self) -> None:
            raise UsageError("No API key configured. Use `wandb login`")

    monkeypatch.setattr("lit_rec.run.loggers.WandbLogger", Refused)
    with pytest.raises(UserError, match="Weights & Biases cannot be used") as caught:
        make_board(config(tmp_path, "wandb"), tmp_path, "fold_0")
    assert "No API key" in caught.value.why


def test_loggers_are_asked_before_the_llm(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    line = ["fit", "--config", world.config, *BARE, f"run.dir={tmp_path}/run", f"run.answers={tmp_path}/answers"]
    away = ["logging.to=[mlflow]", "logging.mlflow_uri=http://127.0.0.1:9"]
    assert_told(capsys, main([*line, *away]), "MLflow cannot be reached")
    assert not (tmp_path / "answers" / "answers.jsonl").read_text()


def test_an_unknown_logger_is_told(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert_told(capsys, main(["fit", "--config", world.config, "logging.to=[tensorbord]"]), "tensorbord", "logging.to")


def test_wandb_offline(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    board = make_board(config(tmp_path, "wandb", offline=True), tmp_path, "fold_0")
    board.scalars({"loss": 0.5}, 3)
    board.histogram("rewards", [0.1, 0.2], 3)
    board.text("hints", "Prefer old films.", 3)
    board.flush()
    wandb.finish()
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    assert list(runs[0].glob("*.wandb"))
