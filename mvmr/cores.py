"""How many processor cores this process may use."""

import math
import os
import time
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_STAT = Path("/proc/stat")


def usable_cores() -> int:
    """Cores this process may run on: a container's or a job's share, not the machine's.

    A container's limit bounds the time of its threads, not their number; more threads than that only wait.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text(encoding="ascii").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no such limit reads "max"
        return cores


def busy_cores(seconds: float = 0.1) -> float:
    """How many of the cores this process may run on were at work for others, on average of a moment; 0 if unknown.

    Called before work begins: what this process does itself counts as others'.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    before = _core_times(allowed)
    time.sleep(seconds)
    after = _core_times(allowed)
    shares = [
        (now[0] - then[0]) / (now[1] - then[1]) for then, now in zip(before, after, strict=True) if now[1] > then[1]
    ]
    return sum(shares)


def free_cores() -> int:
    """Usable cores that nobody else works on, at least 1.

    Threads of one computation wait for each other at every step: on a core that somebody else has, all wait for his
    turn to end, and two threads may be ten times slower than one.
    """
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else usable_cores()
    return max(1, min(usable_cores(), every - round(busy_cores())))


def _core_times(cores: set[int]) -> list[tuple[int, int]]:
    """Ticks at work, and in all, of each of these cores since the machine was started."""
    try:
        lines = [line.split() for line in _STAT.read_text(encoding="ascii").splitlines() if line.startswith("cpu")]
        times = {int(name[3:]): list(map(int, ticks)) for name, *ticks in lines if name != "cpu"}
    except (OSError, ValueError):  # not Linux
        return []
    # user, nice, system, idle, waiting for a disk, interrupts (two kinds), stolen; guests are in user already
    whole = {core: (sum(ticks[:8]), ticks[3] + ticks[4]) for core, ticks in times.items() if core in cores}
    return [(total - idle, total) for _, (total, idle) in sorted(whole.items())]
