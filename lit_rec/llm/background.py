"""An event loop in a thread of its own, and its results in the caller's thread."""

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def in_thread(
    work: Callable[[Callable[[T], None]], Coroutine[Any, Any, None]], keep: Callable[[list[T]], None], most: int
) -> None:
    """Run `work` in its own thread, since the caller may be inside an event loop already (Jupyter).

    What it puts is handed to `keep` in the caller's thread as it comes, at most `most` at a time: writing to disk does
    not hold up the work. Whatever ends the work, what was put before is kept.

    Args:
        work: Makes the coroutine, given the function it puts its results with.
        keep: Takes results.
        most: Results `keep` takes at a time.

    Raises:
        BaseException: What `work` or `keep` raised; Ctrl-C cancels the work.
    """
    arrived: queue.SimpleQueue[T | None] = queue.SimpleQueue()
    running: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
    failed: list[BaseException] = []
    batch: list[T] = []

    async def main() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        running.put(lambda: loop.call_soon_threadsafe(task.cancel))
        await work(arrived.put)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failed.append(error)
        finally:
            arrived.put(None)
            running.put(lambda: None)  # where no loop could be made, there is nothing to cancel

    def drain() -> None:
        more = True
        while more:
            while len(batch) < most and (not batch or not arrived.empty()):
                one = arrived.get()
                if one is None:
                    more = False
                    break
                batch.append(one)
            if batch:
                keep(batch)
                batch.clear()

    thread = threading.Thread(target=run, name="event-loop", daemon=True)
    thread.start()
    cancel = running.get()
    try:
        drain()
    except BaseException as error:
        if thread.is_alive():
            cancel()
        thread.join()
        if not isinstance(error, Exception):  # Ctrl-C: `keep` itself works
            arrived.put(None)  # the thread's own may have been read already
            drain()
        raise
    thread.join()
    if failed:
        raise failed[0]
