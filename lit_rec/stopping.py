"""Stopped from outside: Ctrl-C, a scheduler that takes the machine away. What is finished is kept, the rest resumes."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")  # Ctrl-C, and what schedulers send ahead of a kill


class Stopped(KeyboardInterrupt):
    """What a signal raises.

    Its own class, since Python ends as if killed by SIGINT, whatever the exit code, once a plain KeyboardInterrupt has
    left an `exec`, and imports are full of those.
    """


class Stop:
    """Which signal has stopped this process.

    Attributes:
        number: Of the signal; None: none has.
    """

    number: int | None = None

    @property
    def code(self) -> int:
        """The exit code: 128 and the signal's number, as shells have it; a scheduler may requeue on it."""
        return 128 + (self.number or signal.SIGINT)

    def __str__(self) -> str:
        by = "interrupted" if self.number in (None, signal.SIGINT) else f"stopped by {signal.Signals(self.number).name}"
        return f"{by}; the same command resumes"


_at_work: Stop | None = None


@contextmanager
def stoppable(*, last: bool = False) -> Iterator[Stop]:
    """Let the signals that announce a kill end what is below; whatever is raised once `number` is set is their doing.

    An import that is broken off may end with any exception, and Lightning turns an interrupt into SystemExit. What is
    raised where Python throws exceptions away (a `__del__`, a callback) is raised once more a moment later.

    Args:
        last: Only the end of the process follows: signals that come then are ignored, for all is done and kept.
    """
    global _at_work
    if _at_work is not None:  # an outer one is listening already
        yield _at_work
        return
    stop = Stop()

    def interrupt(number: int, frame: FrameType | None) -> None:
        stop.number = number
        raise Stopped

    def thrown_away(what: "sys.UnraisableHookArgs") -> None:
        if isinstance(what.exc_value, Stopped) and stop.number is not None:
            threading.Timer(0.05, os.kill, [os.getpid(), stop.number]).start()
        else:
            hook(what)

    numbers = [number for name in NAMES if (number := getattr(signal, name, None)) is not None]
    ignored = [number for number in numbers if signal.getsignal(number) == signal.SIG_IGN]  # as `nohup` and `&` ask for
    try:
        before = {number: signal.signal(number, interrupt) for number in numbers if number not in ignored}
    except ValueError:  # not in the main thread, where no signal arrives
        yield stop
        return
    hook, sys.unraisablehook = sys.unraisablehook, thrown_away
    _at_work = stop
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last else handler)
        _at_work, sys.unraisablehook = None, hook
