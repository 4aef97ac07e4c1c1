"""Memory that the C library keeps after it was freed."""

from __future__ import annotations

import contextlib
import ctypes


def trim() -> None:
    """Give it back to the system, where that is glibc's way; takes milliseconds."""
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        ctypes.CDLL(None).malloc_trim(0)
