"""A language model that is trained here and sampled on servers, which load its adapter after every round."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_rec import distributed
from lit_rec.llm.adapters_remote import RemoteAdapters
from lit_rec.llm.endpoints import Endpoints
from lit_rec.llm.language_model import BASE, LanguageModel
from lit_rec.llm.loading import write_merged
from lit_rec.llm.prompts import Messages
from lit_rec.llm.sampler import SamplingSettings
from lit_rec.llm.server import Progress, ServerModel
from lit_rec.llm.store import Answer
from lit_rec.run.folder import publish
from lit_rec.schema import ServerConfig


class ServedLanguageModel(LanguageModel):
    """Trains in process; answers come from replicas of the same model behind an OpenAI-compatible server.

    Untrained, it is asked for as `server.model`; with an adapter as `MODEL-DIGEST`, the digest being that of the
    adapter's weights, so that a name never means others. Adapters are written below the run folder, where the servers
    read them; an adapter that is no longer the present one is forgotten by them.

    Args:
        *args: As of `LanguageModel`.
        server: Where the replicas are.
        run: The run folder.
        **kwargs: As of `LanguageModel`.
    """

    def __init__(self, *args: Any, server: ServerConfig, run: Path, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server, self.run = server, run
        self.endpoints = Endpoints(list(server.urls), patience=server.retries, timeout=server.timeout)
        self.remote = RemoteAdapters(
            self.endpoints, api_key_env=server.key_env, max_retries=server.retries, here=run, there=server.run_folder
        )
        self._served: str | None = None  # the adapter that replicas have loaded

    @property
    def served_name(self) -> str:
        """What the model is asked for as, in its present state."""
        if self.adapter == BASE:
            return self.server.model
        return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', self.server.model).strip('-')}-{self.adapter}"

    def check(self) -> None:
        """Ask every replica whether it has the untrained model.

        Raises:
            UserError: None can be reached, or one lists models and not this one.
        """
        self._model(self.server.model).check()

    def answers(
        self,
        prompts: Sequence[Messages],
        counts: Sequence[int],
        *,
        settings: SamplingSettings | None = None,
        progress: Progress | None = None,
    ) -> list[list[Answer]]:
        """Answers of the servers, as `LanguageModel.answers`; they are asked for what the store lacks alone.

        Raises:
            UserError: The servers cannot be reached or do not take the adapter; what was answered before is kept.
        """
        model = self._model(self.served_name)
        keys = model.keys(prompts, counts, settings or self.settings)
        if distributed.main() and any(key not in self.store for ks in keys for key in ks):
            self._serve()
        return model.answers(prompts, counts, settings=settings, progress=progress)

    def _model(self, name: str) -> ServerModel:
        model = ServerModel.configured(self.server, self.cfg, self.store, seed=self.seed, model=name)
        model.endpoints = self.endpoints  # a replica that was set aside stays so
        return model

    def _serve(self) -> None:
        """Have the present adapter loaded by every replica."""
        if self.adapter == BASE or self._served == self.served_name:
            return
        folder = self.run / "adapters" / self.adapter
        if not folder.is_dir():
            work = folder.with_name(f".{folder.name}.tmp")
            work.mkdir(parents=True, exist_ok=True)
            self.save_adapter(work)
            publish(work, folder)

        def merged() -> Path:
            return write_merged(self.cfg, folder, self.run / "merged" / self.adapter, self.cache)

        before, self._served = self._served, self.remote.serve(self.served_name, folder, merged)
        if before is not None:
            self.remote.drop(before)
