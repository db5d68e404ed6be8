"""How fast the LLM was here the last time, so that a plan can say how long its work will take."""

import contextlib
import json
from pathlib import Path

from omegaconf import DictConfig

from lit_rec import distributed
from lit_rec.data.assets import cache_dir
from lit_rec.run.folder import digest, write_atomic

LEAST = 5.0  # seconds of work; less says nothing of a rate


def _file(cfg: DictConfig) -> Path:
    return (Path(cfg.run.cache).expanduser() if cfg.run.cache else cache_dir()) / "rates.json"


def _key(cfg: DictConfig) -> str:
    """What a rate depends on: the model, where it is, what it runs on."""
    where = None if cfg.llm.server is None else list(cfg.llm.server.urls)
    trainer = [cfg.trainer.accelerator, cfg.trainer.devices, cfg.trainer.threads, cfg.trainer.precision]
    return f"{cfg.llm.name} {digest([cfg.llm.hub, where, cfg.llm.quantization, cfg.llm.dtype, trainer])}"


def remember(cfg: DictConfig, unit: str, done: float, seconds: float) -> None:
    """Note a rate.

    Args:
        cfg: The configuration of the run.
        unit: "tokens" (written) or "titles" (scored).
        done: So many of them, by this process, which the others equal ...
        seconds: ... in this time; a short time is not noted.
    """
    if seconds < LEAST or done <= 0 or not distributed.main():
        return
    file, key = _file(cfg), _key(cfg)
    known = _read(file)
    known[key] = {**known.get(key, {}), unit: round(done * distributed.size() / seconds, 2)}
    with contextlib.suppress(OSError):  # a cache that cannot be written costs an estimate, not a run
        write_atomic(file, json.dumps(known, indent=1))


def rates(cfg: DictConfig) -> dict[str, float]:
    """Units per second of the last time, by unit; empty: this model has not worked here yet."""
    return _read(_file(cfg)).get(_key(cfg), {})


def _read(file: Path) -> dict[str, dict[str, float]]:
    try:
        found: dict[str, dict[str, float]] = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
