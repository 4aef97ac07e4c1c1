"""Ctrl-C and SIGTERM as a request: the loop ends its step and saves before it stops."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """Whether a stop was asked for."""

    requested: bool = False


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM inside the block into ``stop.requested``; a second one acts at once.

    Where the same signal has killed a worker process first, the error this makes is a KeyboardInterrupt.
    Outside the main thread signals can't be caught, and nothing is changed.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        for signum, handler in handlers.items():
            signal.signal(signum, handler)

    for number in handlers:
        signal.signal(number, request)
    try:
        yield stop
    except RuntimeError as error:  # as torch's loader raises it
        if stop.requested:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
