"""The models of a run, whatever its recipe: the answer store, the language model and the text encoder."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import EarlyStopping, ProgressBar, Timer
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig

from callbacks.health import Health
from lit_rec import distributed
from lit_rec.config import instantiate, plain
from lit_rec.errors import UserError
from lit_rec.knowledge.cache import SharedVectors
from lit_rec.knowledge.encoder import TextEncoder
from lit_rec.llm.loading import fingerprint, local_source
from lit_rec.llm.store import AnswerStore
from lit_rec.run.folder import RunFolder

UNFIT = (EarlyStopping, ProgressBar, Timer)  # callbacks that would end a fit of all rounds, or draw over its progress


def pick_device(accelerator: str) -> str:
    """The torch device a Lightning accelerator name means.

    Raises:
        UserError: A GPU was asked for and there is none.
    """
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            "a GPU was asked for and there is none",
            where="config key trainer.accelerator",
            why="torch.cuda.is_available() is false: no NVIDIA device, no driver, or a CPU build of torch",
            fix="use trainer.accelerator=auto (or cpu), or install a CUDA build of torch",
        )
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise UserError(
            f"trainer.accelerator: {accelerator} is not possible",
            where="config key trainer.accelerator",
            fix="use auto, cpu or gpu",
        )
    if accelerator == "cpu" or not torch.cuda.is_available():
        return "cpu"
    here, there = distributed.place().local_rank, torch.cuda.device_count()
    if there == 1:  # the scheduler shows each process its own
        return "cuda:0"
    if here >= there:
        raise UserError(
            f"process {here} of this machine has no GPU",
            where="config key trainer.devices",
            why=f"there are {there}",
            fix=f"use trainer.devices={there}, or trainer.accelerator=cpu",
        )
    return f"cuda:{here}"


def sharded(cfg: DictConfig) -> bool:
    """Whether the language model is cut among the processes."""
    return bool(cfg.trainer.strategy == "fsdp" and distributed.size() > 1)


def by_one(device: str) -> dict[str, Any]:
    """Lightning's arguments for a fit that every process does on its own, on its device."""
    kind, _, number = device.partition(":")
    return {"accelerator": "gpu", "devices": [int(number)]} if kind == "cuda" else {"accelerator": "cpu", "devices": 1}


def by_all(device: str) -> dict[str, Any]:
    """Lightning's arguments for a fit that all processes do together: DDP, where there are several."""
    here = distributed.place()
    if here.size == 1:
        return by_one(device)
    strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend=distributed.backend())
    return {
        "accelerator": "gpu" if device.startswith("cuda") else "cpu",
        "devices": here.local_size,
        "num_nodes": here.size // here.local_size,
        "strategy": strategy,
        "use_distributed_sampler": False,  # the data modules know whose turn it is
    }


def extra_callbacks(cfg: DictConfig) -> list[Any]:
    """The callbacks a user has named in the configuration, built anew.

    Raises:
        UserError: One would end the training before its last round, or draw a bar over the run's own progress.
    """
    made = {key: instantiate(node, f"callbacks.{key}") for key, node in cfg.callbacks.items()}
    for key, callback in made.items():
        if isinstance(callback, UNFIT):
            raise UserError(
                f"{type(callback).__name__} cannot take part",
                where=f"config key callbacks.{key}",
                why="one fit trains all rounds, as many as the configuration says, and shows their progress itself",
                fix="remove it; policy.rounds, policy.epochs and agent.epochs say how long is trained",
            )
    return list(made.values())


def callbacks_key(cfg: DictConfig) -> dict[str, Any]:
    """The user's own callbacks, where there are any: they may change what is trained."""
    return {"callbacks": plain(cfg.callbacks)} if cfg.callbacks else {}


def reranker_health(cfg: DictConfig) -> Health:
    """Looks after the training of one reranker."""
    return Health(cfg.trainer.bad_updates, name="the reranker's training", keys="reranker.lr")


class Models:
    """Device, store and encoder; each part is made when it is first needed.

    Args:
        cfg: The whole configuration.
        run: The run folder.
    """

    def __init__(self, cfg: DictConfig, run: RunFolder) -> None:
        self.cfg, self.run = cfg, run
        torch.set_num_threads(cfg.trainer.threads or torch.get_num_threads())
        self.cache = Path(cfg.run.cache).expanduser() if cfg.run.cache else None
        self.device = pick_device(cfg.trainer.accelerator)
        self.store = AnswerStore(Path(cfg.run.answers).expanduser())

    @cached_property
    def llm_key(self) -> dict[str, Any]:
        """Identity of the LLM; how many answers are under way at a time changes nothing.

        `dtype: auto` stays what it is: a run made on one machine is served by another. The store of answers tells what
        was computed in which type.
        """
        free, llm = ("batch_size", "server"), self.cfg.llm
        key = {k: v for k, v in plain(llm).items() if k not in free}
        key["server"] = None if llm.server is None else [llm.server.model, llm.server.revision]
        if llm.hub is not None:  # a wheel is known by its hash
            key["weights"] = fingerprint(local_source(llm, "llm", self.cache), llm.revision)
        return key

    @cached_property
    def encoder_key(self) -> dict[str, Any]:
        """Identity of the text encoder."""
        e = self.cfg.encoder
        source = local_source(e, "encoder", self.cache)
        return {"model": fingerprint(source, e.revision, "encoder"), "max_tokens": e.max_tokens, "dtype": e.dtype}

    def check_encoder(self, stage: str) -> None:
        """Tell of an encoder that cannot be had before the LLM works for hours; `stage` is the first that needs it.

        Raises:
            UserError: It cannot be fetched or loaded.
        """
        _ = self.encoder_key
        if not self.run.done(stage):
            _ = self.encoder.encoder

    @cached_property
    def encoder(self) -> SharedVectors:
        """The text encoder; where runs share their answers, they share vectors too."""
        e, answers = self.cfg.encoder, Path(self.cfg.run.answers).expanduser().resolve()

        def load() -> TextEncoder:
            return TextEncoder(
                local_source(e, "encoder", self.cache),
                device=self.device,
                dtype=e.dtype,
                batch_size=e.batch_size,
                max_tokens=e.max_tokens,
                revision=e.revision,
            )

        shared = not answers.is_relative_to(self.run.path.resolve())
        key = {**self.encoder_key, "batch_size": e.batch_size, "device": self.device}
        return SharedVectors(answers / "vectors" if shared else None, key, load)
