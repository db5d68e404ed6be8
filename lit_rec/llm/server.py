"""A language model behind an OpenAI-compatible server (vLLM, llama.cpp, transformers serve, OpenAI)."""

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from openai import APIConnectionError, OpenAIError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from lit_rec import distributed
from lit_rec.errors import UserError
from lit_rec.llm.background import in_thread
from lit_rec.llm.endpoints import (
    Endpoint,
    Endpoints,
    Malformed,
    NoneLeft,
    explain,
    hide_key,
    pause,
    read_key,
    retry_after,
    transient,
    unreachable,
)
from lit_rec.llm.prompts import Messages
from lit_rec.llm.sampler import SamplingSettings
from lit_rec.llm.store import Answer, AnswerStore, answer_key
from lit_rec.schema import LLMConfig, ServerConfig

LONGEST_BODY = 10_000  # characters looked at; messages show fewer
Progress = Callable[[int, int], None]
Put = Callable[[tuple[str, Answer]], None]

for _name in ("openai", "httpx", "httpx2"):  # a line per request, with its address
    logging.getLogger(_name).setLevel(logging.WARNING)


@dataclass
class Usage:
    """What was asked of the servers, and what it took.

    Attributes:
        requests: Requests sent, retries included.
        retries: Requests sent again.
        prompt_tokens: Tokens of the prompts, as the servers count them.
        completion_tokens: Tokens of the answers.
        stored: Answers that came from the store.
        empty: Answers without any text.
        unmetered: Answers whose server told no token counts.
    """

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    stored: int = 0
    empty: int = 0
    unmetered: int = 0


class ServerModel:
    """Answers chat prompts through one or more replicas of a server.

    Args:
        model: The name the server knows the model by.
        urls: Base URLs of the replicas.
        store: Where answers are kept.
        settings: The distribution answers are drawn from.
        seed: Of the sampling; every answer has a seed of its own, made from its key.
        api_key_env: Environment variable that holds the key; None or unset: a placeholder is sent.
        concurrency: Requests under way at a time, over all URLs.
        timeout: Seconds an answer may take.
        max_retries: Attempts after the first, per request and per URL that cannot be reached.
        batch_size: Answers written to the store at a time, at most; none waits for others.
        revision: Part of the answers' keys: tells apart models that were served under one name.
    """

    def __init__(
        self,
        model: str,
        urls: Sequence[str],
        store: AnswerStore,
        *,
        settings: SamplingSettings | None = None,
        seed: int = 0,
        api_key_env: str | None = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout: float = 120.0,
        max_retries: int = 6,
        batch_size: int = 32,
        revision: str = "",
    ) -> None:
        for name, value, least in (
            ("concurrency", concurrency, 1),
            ("retries", max_retries, 0),
            ("urls", len(urls), 1),
        ):
            if value < least:
                raise UserError(f"at least {least} is needed", where=f"config key llm.server.{name}")
        if not timeout > 0:
            raise UserError("a timeout is more than 0 seconds", where="config key llm.server.timeout")
        self.model, self.store, self.settings, self.seed = model, store, settings or SamplingSettings(), seed
        self.api_key_env, self.concurrency, self.max_retries = api_key_env, concurrency, max_retries
        self.batch_size = max(batch_size, 1)
        self.endpoints = Endpoints(urls, patience=max_retries, timeout=timeout)
        self.fingerprint = json.dumps(["server", model, revision])  # neither address nor key: both may change
        self.usage = Usage()

    @classmethod
    def configured(
        cls, server: ServerConfig, cfg: LLMConfig, store: AnswerStore, *, seed: int, model: str = ""
    ) -> "ServerModel":
        """A model behind a server, as a configuration names it.

        Args:
            server: `llm.server`.
            cfg: `llm`: how it is sampled.
            store: Where answers are kept.
            seed: Of the sampling.
            model: Another name than `llm.server.model`, of an adapter for instance.
        """
        return cls(
            model or server.model,
            list(server.urls),
            store,
            settings=SamplingSettings(cfg.max_new_tokens, cfg.temperature, cfg.top_p),
            seed=seed,
            api_key_env=server.key_env,
            concurrency=server.concurrency,
            timeout=server.timeout,
            max_retries=server.retries,
            batch_size=cfg.batch_size,
            revision=server.revision,
        )

    def check(self) -> None:
        """Ask every URL for its models, once.

        Raises:
            UserError: No URL can be reached, the key is refused, or a server lists models and not this one.
        """
        in_thread(lambda _: self._check(), lambda _: None, 1)

    def keys(self, prompts: Sequence[Messages], counts: Sequence[int], settings: SamplingSettings) -> list[list[str]]:
        """The keys of answers 0..counts[i]-1 to every prompt."""
        shape = {**asdict(settings), "seed": self.seed}
        return [
            [answer_key(self.fingerprint, p, shape, j) for j in range(n)] for p, n in zip(prompts, counts, strict=True)
        ]

    def answers(
        self,
        prompts: Sequence[Messages],
        counts: Sequence[int],
        *,
        settings: SamplingSettings | None = None,
        progress: Progress | None = None,
    ) -> list[list[Answer]]:
        """Answers 0..counts[i]-1 to every prompt, from the store where it has them.

        Every answer is one request. What arrives is kept, whatever happens afterwards.

        Args:
            prompts: Chat messages.
            counts: Answers wanted per prompt.
            settings: The distribution; default: the constructor's.
            progress: Called with (answers, new tokens); new tokens are 0 for stored answers.

        Returns:
            `counts[i]` answers for each prompt.

        Raises:
            UserError: The servers cannot be reached, refuse the request or keep failing.
        """
        settings = settings or self.settings
        keys = self.keys(prompts, counts, settings)
        wanted = Counter(key for ks in keys for key in ks)
        lacking = self.store.lacking(wanted)
        todo = {key: p for p, ks in zip(prompts, keys, strict=True) for key in ks if key in lacking}
        stored = sum(n for key, n in wanted.items() if key not in todo)
        self.usage.stored += stored
        if progress is not None:
            progress(stored, 0)

        def keep(batch: list[tuple[str, Answer]]) -> None:
            self.store.add(batch)
            if progress is not None:
                progress(sum(wanted[key] for key, _ in batch), sum(answer.tokens for _, answer in batch))

        if todo and distributed.main():  # the servers are what takes time: one process asks for all
            try:
                in_thread(lambda put: self._ask_all(todo, settings, put), keep, self.batch_size)
            except UserError as error:
                kept = sum(key in self.store for key in wanted)
                fix = f"{error.fix}; {kept} of {len(wanted)} answers are kept: starting again goes on from there"
                raise UserError(error.what, where=error.where, why=error.why, fix=fix.removeprefix("; ")) from None
        self.store.learn(distributed.agreed({key: self.store[key] for key in todo} if distributed.main() else {}))
        return [[self.store[key] for key in ks] for ks in keys]

    # --- in the event loop --------------------------------------------------------------------------------------------

    async def _check(self) -> None:
        async with self.endpoints.clients(read_key(self.api_key_env)):
            found = await asyncio.gather(*(one.models() for one in self.endpoints.all), return_exceptions=True)
            pairs = list(zip(self.endpoints.all, found, strict=True))
            for one, models in pairs:
                if isinstance(models, list) and not self._listed(models):
                    raise UserError(
                        f"{one.url} has no model {self.model!r}",
                        where="config key llm.server.model",
                        why=f"it has {', '.join(models[:10])}",
                        fix="use one of these names, or start the server with this model",
                    )
                if isinstance(models, BaseException) and not unreachable(models):
                    raise await self._explained(models, one) if isinstance(models, OpenAIError) else models
            down = [(one, error) for one, error in pairs if isinstance(error, BaseException)]
            if len(down) == len(pairs):
                raise self.endpoints.nobody(down[0][1])
            for one, error in down:
                self.endpoints.set_aside(one, error)

    def _listed(self, models: Sequence[str]) -> bool:
        """Whether the model is among those listed; `transformers serve` lists no local folders and no revisions."""
        return self.model in models or self.model.split("@")[0] in models or self.model.startswith(("/", ".", "~"))

    async def _ask_all(self, todo: dict[str, Messages], settings: SamplingSettings, put: Put) -> None:
        """Ask for every answer; `put` has each as it arrives.

        After a failure nothing new is asked, but what is under way is waited for: it is paid for.
        """
        room = asyncio.Semaphore(self.concurrency)
        failures: list[Exception] = []
        under_way: set[asyncio.Task[None]] = set()

        async def ask(key: str, prompt: Messages) -> None:
            try:
                put((key, await self._answer(key, prompt, settings)))
            except Exception as error:
                failures.append(error)
            finally:
                room.release()

        async with self.endpoints.clients(read_key(self.api_key_env)):
            try:
                for key, prompt in todo.items():
                    await room.acquire()  # tasks are made as there is room: a request may be 100,000 prompts
                    if failures:
                        break
                    task = asyncio.create_task(ask(key, prompt))
                    under_way.add(task)
                    task.add_done_callback(under_way.discard)
                await asyncio.gather(*under_way)
            except BaseException:  # cancelled
                for task in under_way:
                    task.cancel()
                raise
        if failures:
            raise failures[0]

    async def _answer(self, key: str, prompt: Messages, settings: SamplingSettings) -> Answer:
        """One answer, after as many attempts as it takes and is allowed."""
        last: list[Endpoint] = []  # the URL that failed this request

        def stop(state: RetryCallState) -> bool:
            # A URL that cannot be reached has attempts of its own, until it is set aside.
            if unreachable(_error(state)):
                return state.attempt_number > (self.max_retries + 1) * len(self.endpoints.all)
            return state.attempt_number > self.max_retries

        def wait(state: RetryCallState) -> float:
            if unreachable(_error(state)):
                return 0.0  # `pick` waits until a URL has rested
            asked = retry_after(_error(state))
            return pause(state.attempt_number) if asked is None else asked + pause(1) / 4

        retrying = AsyncRetrying(stop=stop, wait=wait, retry=retry_if_exception(transient), reraise=True)
        try:
            return await retrying(self._attempt, key, prompt, settings, last)
        except NoneLeft:
            raise self.endpoints.nobody(self.endpoints.last_error) from None
        except (OpenAIError, Malformed) as error:
            raise await self._explained(error, last[-1]) from None

    async def _attempt(self, key: str, prompt: Messages, settings: SamplingSettings, last: list[Endpoint]) -> Answer:
        one = await self.endpoints.pick(last[-1] if last else None)
        self.usage.retries += bool(last)
        last.append(one)
        assert one.client is not None
        one.in_flight, one.asked, started = one.in_flight + 1, one.asked + 1, time.monotonic()
        self.usage.requests += 1
        try:
            # Plain dictionaries: the client's typed requests and answers would cost a third more processor time.
            body = await one.client.post(
                "/chat/completions",
                cast_to=object,
                body={
                    "model": self.model,
                    "messages": prompt,
                    "temperature": settings.temperature,
                    "top_p": settings.top_p,
                    "max_tokens": settings.max_new_tokens,
                    "seed": int(key[:8], 16) >> 1,  # 31 bits: what every server takes
                },
            )
        except APIConnectionError as error:
            if unreachable(error):
                self.endpoints.failed(one, started, error)
            raise
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise Malformed(f"the body is no JSON: {error}") from None
        finally:
            one.in_flight -= 1
        one.failures, one.rest_until = 0, 0.0
        return self._read(body)

    def _read(self, body: Any) -> Answer:
        """Take the answer out of a chat completion."""
        try:
            choice = body["choices"][0]
            text, finish = choice["message"].get("content") or "", choice.get("finish_reason") or "unknown"
            if not isinstance(text, str) or not isinstance(finish, str):
                raise TypeError("content and finish_reason are to be texts")
        except (AttributeError, TypeError, IndexError, KeyError) as error:
            raise Malformed(f"the body is no chat completion ({error!r}): {str(body)[:LONGEST_BODY]}") from None
        usage = body.get("usage")
        told = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
        prompt_tokens, tokens = (n if isinstance(n, int) else 0 for n in told)
        self.usage.unmetered += not all(isinstance(n, int) for n in told)
        self.usage.prompt_tokens += prompt_tokens
        self.usage.completion_tokens += tokens
        text = hide_key(text, read_key(self.api_key_env)).strip()  # it is kept, shown and sent again
        self.usage.empty += not text
        return Answer(text=text, tokens=tokens, finish=finish)

    async def _explained(self, error: BaseException, one: Endpoint) -> UserError:
        known = None
        if getattr(error, "status_code", 0) == 404:
            try:
                known = await one.models()
            except OpenAIError:
                known = None  # the message is about the first error
        key = read_key(self.api_key_env)
        return explain(error, one.url, model=self.model, key=key, variable=self.api_key_env, known=known)


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None
