"""Adapters on servers: after every round each replica loads what was trained, while it goes on serving.

The calls are vLLM's: POST /v1/load_lora_adapter {"lora_name", "lora_path"} and /v1/unload_lora_adapter {"lora_name"},
which a server offers when it was started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. The path is the
servers' to read: a disk that they share with the training.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from openai import APIStatusError, APITimeoutError, OpenAIError
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_exponential

from lit_rec.errors import UserError
from lit_rec.llm.background import in_thread
from lit_rec.llm.endpoints import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    Endpoint,
    Endpoints,
    cause_of,
    explain,
    read_key,
    server_words,
    slow,
    transient,
    unreachable,
)
from lit_rec.run.progress import console

T = TypeVar("T")
NOT_ENABLED = re.compile(r"lora is not enabled|does not support lora", re.IGNORECASE)


class NoSuchCall(Exception):
    """The server cannot load adapters while it runs."""


class RemoteAdapters:
    """Gives every replica the adapters of a run.

    Args:
        endpoints: The replicas; what has failed is set aside there, so that it is not asked for answers either.
        api_key_env: Environment variable that holds the key, or None.
        max_retries: Attempts after the first, per replica.
        here: Folder below which adapters lie, on this machine.
        there: The same folder as the servers see it; None: under the same path.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        *,
        api_key_env: str | None = "OPENAI_API_KEY",
        max_retries: int = 3,
        here: Path | None = None,
        there: str | None = None,
    ) -> None:
        self.endpoints, self.api_key_env, self.max_retries = endpoints, api_key_env, max_retries
        self.here, self.there = here, there

    def serve(self, name: str, folder: Path, merged: Callable[[], Path]) -> str:
        """Have an adapter served under a name by every replica that is alive.

        A replica that serves a model of this name already, as an adapter or as itself, is left alone: a name says by
        its digest which weights it means. One that fails while others do not is set aside, with a warning.

        Args:
            name: What the adapter is asked for as; never used for other weights.
            folder: Where `save_adapter` wrote it.
            merged: Writes the model with this adapter merged into it, where servers have no such call; returns where.

        Returns:
            `name`, which answers are to be asked of.

        Raises:
            UserError: No replica has it: they cannot be reached, do not find the folder, or refuse it; or one of them
                has no such call, which takes another start with the merged model.
        """
        found = self._all(lambda one: self._load(one, name, self._seen(folder)))
        without = [one for one, error in found if isinstance(error, NoSuchCall)]
        if without:
            raise _to_be_started_anew(without, name, merged())
        failed = [(one, error) for one, error in found if error is not None]
        if len(failed) == len(found):
            raise self._told(*failed[0], name, folder)
        for one, error in failed:
            assert error is not None
            self.endpoints.set_aside(one, error)
        return name

    def drop(self, name: str) -> None:
        """Have an adapter forgotten, so that replicas have room for the next; one that fails is told about only."""
        for one, error in self._all(lambda one: self._unload(one, name)):
            if error is not None:
                told = f"warning: {one.url} keeps adapter {name} ({self._words(error)})"
                console.print(told, highlight=False, markup=False)

    # --- in the event loop --------------------------------------------------------------------------------------------

    def _all(self, call: Callable[[Endpoint], Coroutine[Any, Any, None]]) -> list[tuple[Endpoint, Exception | None]]:
        """Make a call at every replica that is alive, side by side; each with how it failed."""
        found: list[tuple[Endpoint, Exception | None]] = []

        async def work() -> None:
            async with self.endpoints.clients(read_key(self.api_key_env)):
                alive = [one for one in self.endpoints.all if one.alive]
                told = await asyncio.gather(*(call(one) for one in alive), return_exceptions=True)
                for one, error in zip(alive, told, strict=True):
                    if isinstance(error, BaseException) and not isinstance(error, OpenAIError | NoSuchCall):
                        raise error
                    found.append((one, error if isinstance(error, Exception) else None))

        in_thread(lambda _: work(), lambda _: None, 1)
        return found

    async def _load(self, one: Endpoint, name: str, path: str) -> None:
        if name in (await self._again(one.models) or ()):
            return
        try:
            await self._again(lambda: self._post(one, "load", {"lora_name": name, "lora_path": path}))
        except APIStatusError as error:
            if error.status_code == 400 and "already been loaded" in server_words(error, ""):
                return  # by an attempt whose answer was lost
            if _no_such_call(error):
                raise NoSuchCall from error
            raise
        except APITimeoutError:
            if name not in (await one.models() or ()):  # it may have come to an end all the same
                raise

    async def _unload(self, one: Endpoint, name: str) -> None:
        try:
            await self._again(lambda: self._post(one, "unload", {"lora_name": name}))
        except APIStatusError as error:
            if error.status_code not in (400, 404):  # it is not there, or there is no such call: nothing to forget
                raise

    async def _post(self, one: Endpoint, call: str, body: dict[str, str]) -> None:
        assert one.client is not None
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):  # success is told in words
            await one.client.post(f"/{call}_lora_adapter", cast_to=object, body=body)

    async def _again(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call again while another attempt may succeed; a slow one is not repeated."""
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.max_retries + 1),
            wait=wait_exponential(FIRST_PAUSE, LONGEST_PAUSE),
            retry=retry_if_exception(lambda e: transient(e) and not slow(e)),
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                return await call()
        raise AssertionError("the last attempt raises")

    # --- in words -----------------------------------------------------------------------------------------------------

    def _seen(self, folder: Path) -> str:
        """A folder's path as the servers see it."""
        path = folder.resolve()
        if self.there is None or self.here is None:
            return str(path)
        return f"{self.there.rstrip('/')}/{path.relative_to(self.here.resolve()).as_posix()}"

    def _words(self, error: Exception) -> str:
        return server_words(error, read_key(self.api_key_env)) if isinstance(error, APIStatusError) else cause_of(error)

    def _told(self, one: Endpoint, error: Exception, name: str, folder: Path) -> UserError:
        """What it means that no replica has the adapter."""
        if isinstance(error, APIStatusError) and error.status_code in (400, 404, 422):
            return UserError(
                f"{one.url} does not load the adapter in {folder}",
                where=f"adapter {name}",
                why=f"it was named {self._seen(folder)}; the server says: {self._words(error)}",
                fix="let the servers read the run folder (a shared disk), and name it as they see it in "
                "llm.server.run_folder; they are started with --enable-lora, and --max-lora-rank of at least "
                "policy.lora.r",
            )
        if unreachable(error):
            return self.endpoints.nobody(error, then="the same command goes on")
        key = read_key(self.api_key_env)
        return explain(error, one.url, model=name, key=key, variable=self.api_key_env, known=None)


def _to_be_started_anew(without: Sequence[Endpoint], name: str, folder: Path) -> UserError:
    """What to do where adapters cannot be loaded while servers run."""
    urls = ", ".join(one.url for one in without)
    return UserError(
        f"{urls} cannot load adapters while serving",
        where=f"adapter {name}",
        why="POST /v1/load_lora_adapter is not there, or not allowed",
        fix="either start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; or start the servers "
        f"with the merged model, which lies in {folder}: `vllm serve {folder} --served-model-name {name}`. Then the "
        "same command goes on",
    )


def _no_such_call(error: APIStatusError) -> bool:
    """Whether the server does not know the call, rather than the adapter."""
    said = server_words(error, "")
    if error.status_code in (400, 404, 500) and NOT_ENABLED.search(said):
        return True
    return error.status_code in (405, 501) or (error.status_code == 404 and "adapter" not in said.casefold())
