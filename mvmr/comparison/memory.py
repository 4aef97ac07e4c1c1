"""The most memory that some work takes."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Memory:
    """MiB. ``base`` when measuring began, ``peak`` the most since, ``added`` the difference: what the work takes."""

    kind: str
    base: float
    peak: float
    added: float


class HighWater:
    """Peak memory from now on: what CUDA's allocator handed out, elsewhere the resident set of this process."""

    def __init__(self, device: str):
        gc.collect()
        self._before = 0.0  # the peak until something was left out
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self.forget()
            self.base = float(torch.cuda.memory_allocated())
            return
        _give_back()
        self.forget()
        self.base = _resident_high_water()

    def forget(self) -> None:
        """Let the mark fall back to what is held now (not on macOS); ``base`` stays."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif (reset := Path("/proc/self/clear_refs")).exists():
            reset.write_text("5")

    @contextmanager
    def leave_out(self) -> Iterator[None]:
        """What is done inside doesn't count."""
        self._before = self._peak()
        yield
        self.forget()

    def _peak(self) -> float:
        now = float(torch.cuda.max_memory_allocated()) if self.cuda else _resident_high_water()
        return max(self._before, now)

    def read(self) -> Memory:
        """The high-water mark since this object was made."""
        peak = self._peak()
        base, peak, added = (round(v / _MIB, 2) for v in (self.base, peak, peak - self.base))
        kind = "torch.cuda.max_memory_allocated" if self.cuda else "resident set, high-water mark of a fresh process"
        return Memory(kind=kind, base=base, peak=peak, added=added)


def _give_back() -> None:
    """Let glibc return what earlier work has freed, or it would be taken for what is held now."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _resident_high_water() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss, which a process takes over from the one that started it
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) * 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
