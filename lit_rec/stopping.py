"""Stopped from outside: Ctrl-C, a scheduler that takes the machine away. What is finished is kept, the rest resumes."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NAMES = ("SIGTERM", "SIGUSR1")  # what schedulers send ahead of a kill; SIGINT raises KeyboardInterrupt anyway


class Stop:
    """Which signal has stopped this process.

    Attributes:
        number: Of the signal; None: none has, or it was Ctrl-C.
    """

    number: int | None = None

    @property
    def code(self) -> int:
        """The exit code: 128 and the signal's number, as shells have it; a scheduler may requeue on it."""
        return 128 + (self.number or signal.SIGINT)

    def __str__(self) -> str:
        by = f"stopped by {signal.Signals(self.number).name}" if self.number else "interrupted"
        return f"{by}; the same command resumes"


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Let the signals that announce a kill end what is below as Ctrl-C would."""
    stop = Stop()

    def interrupt(number: int, frame: FrameType | None) -> None:
        stop.number = number
        raise KeyboardInterrupt

    numbers = [number for name in NAMES if (number := getattr(signal, name, None)) is not None]
    try:
        before = {number: signal.signal(number, interrupt) for number in numbers}
    except ValueError:  # not in the main thread, where no signal arrives
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
