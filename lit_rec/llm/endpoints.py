"""The addresses a language model is served at: which one is asked next, and what their errors mean to a user."""

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from openai import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    DefaultAioHttpClient,
    Timeout,
)

from lit_rec.checks import check_url
from lit_rec.errors import UserError
from lit_rec.run.progress import console
from lit_rec.secrets import HIDDEN, SHORTEST, hide, read_secret

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two attempts, doubled each time
LONGEST_RETRY_AFTER = 600.0  # seconds; a server that asks to wait longer is told about instead
LOOPBACK = ("localhost", "127.0.0.1", "::1")
NO_KEY = "none"  # local servers take any key, and the client insists on one
TOO_LONG = re.compile(
    r"context.{0,20}(length|size|window)|too many tokens|prompt is too long|max_new_tokens.{0,9}must be", re.I
)
AGAIN = {408, 409, 425, 429}  # and everything from 500 on


class Malformed(Exception):
    """The body of an answer is no chat completion."""


class NoneLeft(Exception):
    """Every URL was set aside."""


def read_key(variable: str | None) -> str:
    """The key in an environment variable; `NO_KEY` where there is none.

    Raises:
        UserError: It cannot be sent in a header.
    """
    key = read_secret(variable) if variable else ""
    if not key.isascii() or not key.isprintable():
        raise UserError(
            "the key holds characters that cannot be sent",
            where=f"environment variable {variable}",
            fix="copy the key again: it is plain ASCII on one line",
        )
    return key or NO_KEY


def retry_after(error: BaseException | None) -> float | None:
    """Seconds the server asks to wait before the next attempt, None if it does not say."""
    if not isinstance(error, APIStatusError):
        return None
    value = error.response.headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if seconds == seconds else None


def slow(error: BaseException | None) -> bool:
    """Whether an answer took too long. A connection that broke is no slow answer, though aiohttp calls it a timeout."""
    return isinstance(error, APITimeoutError) and type(error.__cause__).__name__ != "ConnectTimeout"


def unreachable(error: BaseException | None) -> bool:
    """Whether the server could not be talked to at all; a slow answer is another matter."""
    return isinstance(error, APIConnectionError) and not slow(error)


def transient(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    if isinstance(error, APIStatusError):
        hopeless = error.code == "insufficient_quota" or (retry_after(error) or 0) > LONGEST_RETRY_AFTER
        return not hopeless and (error.status_code in AGAIN or error.status_code >= 500)
    return isinstance(error, APIConnectionError | Malformed)


def pause(failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubled each time, and never in step with others."""
    return min(FIRST_PAUSE * 2.0 ** (failures - 1), LONGEST_PAUSE) * random.uniform(0.75, 1.25)


class Endpoint:
    """One base URL and how it has fared.

    Attributes:
        alive: False once it was set aside.
        failures: Failed connections in a row.
        in_flight: Requests under way.
        asked: Requests ever sent.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.client: AsyncOpenAI | None = None
        self.alive, self.failures, self.in_flight, self.asked = True, 0, 0, 0
        self.rest_until = 0.0

    async def models(self) -> list[str] | None:
        """Names of the models the server lists; None if it does not list any.

        Raises:
            OpenAIError: It cannot be reached, or it refuses the key.
        """
        assert self.client is not None
        try:
            page = await self.client.models.list()
            return [model.id for model in page.data] or None
        except APIStatusError as error:
            if error.status_code in (401, 403):
                raise
        except (ValueError, TypeError, AttributeError):  # a body that is no list of models
            pass
        return None


class Endpoints:
    """All base URLs of a model: the least busy one is asked; one that cannot be reached rests, then is set aside.

    Args:
        urls: Base URLs of replicas.
        patience: Failed connections in a row after which a URL is set aside, less one.
        timeout: Seconds an answer may take.
    """

    def __init__(self, urls: Sequence[str], *, patience: int, timeout: float) -> None:
        self.all = [Endpoint(url) for url in dict.fromkeys(map(check_url, urls))]
        self.patience, self.timeout = patience, timeout
        self.last_error: BaseException = NoneLeft("no request was sent")

    def nobody(self, error: BaseException, then: str = "") -> UserError:
        """What to say where none of them can be reached; `then` is what follows once one can."""
        return UserError(
            f"no server answers at {', '.join(one.url for one in self.all)}",
            where="config key llm.server.urls",
            why=cause_of(error),
            fix="; ".join(filter(None, ("start the server, or correct the address", then))),
        )

    @asynccontextmanager
    async def clients(self, key: str) -> AsyncIterator[None]:
        """Connections for one request of many answers; what was set aside stays so, unless nothing else is left."""
        none_left = not any(one.alive for one in self.all)
        timeout = Timeout(self.timeout, connect=min(self.timeout, 10.0), pool=None)
        async with AsyncExitStack() as stack:
            for one in self.all:
                # A proxy of the environment cannot reach this machine's own loopback.
                direct = urlsplit(one.url).hostname in LOOPBACK
                http = DefaultAioHttpClient(trust_env=not direct, timeout=timeout)
                one.client = await stack.enter_async_context(
                    AsyncOpenAI(base_url=one.url, api_key=key, max_retries=0, timeout=timeout, http_client=http)
                )
                one.alive, one.failures, one.in_flight, one.rest_until = one.alive or none_left, 0, 0, 0.0
            yield

    async def pick(self, avoid: Endpoint | None = None) -> Endpoint:
        """The least busy URL, not `avoid` if there is another; waits while all of them rest.

        A URL that failed is tried again by one request alone.

        Raises:
            NoneLeft: All were set aside.
        """
        while True:
            alive = [one for one in self.all if one.alive]
            if not alive:
                raise NoneLeft
            now = time.monotonic()
            free = [one for one in alive if not one.failures or (now >= one.rest_until and not one.in_flight)]
            if free:
                return min(free, key=lambda one: (one is avoid, one.in_flight, one.asked))
            await asyncio.sleep(0.02)

    def failed(self, one: Endpoint, started: float, error: BaseException) -> None:
        """Note that a request sent at `started` could not reach this URL."""
        if not one.alive or started < one.rest_until:
            return  # one of many that failed together
        one.failures += 1
        one.rest_until = time.monotonic() + pause(one.failures)
        if one.failures > self.patience:
            self.set_aside(one, error)

    def set_aside(self, one: Endpoint, error: BaseException) -> None:
        """Ask this URL no more."""
        one.alive, self.last_error = False, error
        left = sum(other.alive for other in self.all)
        if left:
            told = f"warning: {one.url} is set aside ({cause_of(error)}); {left} of {len(self.all)} servers go on"
            console.print(told, highlight=False, markup=False)


def cause_of(error: BaseException) -> str:
    """The innermost cause of a failed connection, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return hide(" ".join(f"{type(error).__name__}: {error}".split()))[:200]


def hide_key(text: str, key: str) -> str:
    """A server's words without the key that was sent to it; one as short as a word is none, and may be among them."""
    return text.replace(key, HIDDEN) if len(key) >= SHORTEST else text


def server_words(error: APIError | Malformed, key: str) -> str:
    """What the server said, in one line, without the key."""
    said = str(error.message if isinstance(error, APIError) else error)
    if isinstance(error, APIStatusError) and isinstance(error.body, dict):
        said = str(error.body.get("message") or error.body.get("detail") or said)
    return hide_key(" ".join(said.split()), key)[:300]


def explain(
    error: BaseException, url: str, *, model: str, key: str, variable: str | None, known: Sequence[str] | None
) -> UserError:
    """What a failed request means and what to do about it.

    Args:
        error: As the client raised it, after all attempts.
        url: Whom it was sent to.
        model: The model asked for.
        key: The key, never shown.
        variable: The environment variable of the key.
        known: Models the server lists.
    """
    status = error.status_code if isinstance(error, APIStatusError) else 0
    said = server_words(error, key) if isinstance(error, APIError | Malformed) else cause_of(error)
    if status in (401, 403):
        missing = f"environment variable {variable} is not set" if variable else "no key is sent"
        refused = f"it refuses the key in the environment variable {variable}"
        return UserError(
            f"{url} does not let us in (status {status})",
            where="config key llm.server.key_env",
            why=missing if key == NO_KEY else refused,
            fix=f"put a key of this server into {variable}" if variable else "name the variable that holds the key",
        )
    if status == 404:
        listed = f"the server has {', '.join(known[:10])}" if known else f"the server says: {said}"
        return UserError(
            f"{url} has no model {model!r}, or answers no chats at this address",
            where="config keys llm.server.model and llm.server.urls",
            why=listed,
            fix="use a name the server knows; base URLs mostly end in /v1",
        )
    code = error.code if isinstance(error, APIError) else None
    if status in (400, 413, 422) and (code == "context_length_exceeded" or TOO_LONG.search(said)):
        return UserError(
            "prompt and answer are longer than the context of the server's model",
            where=f"{url}, model {model!r}",
            why=f"the server says: {said}",
            fix="a smaller ranking.history, or fewer new tokens (ranking.max_new_tokens, reflection.max_new_tokens, "
            "llm.max_new_tokens), or start the server with a longer context",
        )
    if slow(error):
        return UserError(
            f"{url} took too long again and again",
            where="config key llm.server.timeout",
            fix="a longer llm.server.timeout, or a smaller llm.server.concurrency",
        )
    if isinstance(error, Malformed):
        return UserError(f"{url} sends no chat completions", where="config key llm.server.urls", why=said)
    if unreachable(error):
        return UserError(
            f"{url} breaks the connection again and again", where="config key llm.server.urls", why=cause_of(error)
        )
    busy = status in AGAIN or status >= 500
    asked = retry_after(error)
    if asked is not None and asked > LONGEST_RETRY_AFTER:
        said = f"asks to wait {asked:.0f} s; {said}"
    return UserError(
        f"{url} {'kept failing' if busy else 'refuses the request'} (status {status})",
        where=f"model {model!r}",
        why=f"the server says: {said}" if said else "",
        fix="wait, lower llm.server.concurrency or raise llm.server.retries" if busy else "see what the server says",
    )
