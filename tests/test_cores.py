"""Cores: what the scheduler allows, and no more than a container's quota."""

import os
from pathlib import Path

import pytest

from mvmr import cores
from mvmr.cores import busy_cores, free_cores, usable_cores


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("6400000 100000", 8),
        ("max 100000", 8),
        ("nonsense", 8),
        (None, 8),
    ],
)
def test_a_containers_quota_counts(
    content: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "cpu.max").write_text(content)
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert usable_cores() == expected


def write_times(file: Path, work: list[int], idle: list[int]) -> None:
    lines = [f"cpu{core} {work[core]} 0 0 {idle[core]} 0 0 0 0 0 0" for core in range(len(work))]
    file.write_text("\n".join([f"cpu {sum(work)} 0 0 {sum(idle)} 0 0 0 0 0 0", *lines, "intr 1 2 3"]) + "\n")


@pytest.mark.parametrize(
    ("allowed", "busy", "quota", "free"),
    [
        ({0, 1, 2, 3}, 1.5, "max 100000", 2),
        ({0, 1, 2, 3}, 1.5, "100000 100000", 1),
        ({1, 2, 3}, 0.5, "max 100000", 3),
        ({1, 2, 3}, 0.5, "200000 100000", 2),  # the third is free for whom it may
        ({0}, 1.0, "max 100000", 1),
    ],
)
def test_cores_that_others_work_on_are_not_free(
    allowed: set[int], busy: float, quota: str, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = tmp_path / "stat"
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cores, "_STAT", stat)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed, raising=False)
    later = [200, 150, 100, 100], [100, 150, 200, 200]
    monkeypatch.setattr(cores.time, "sleep", lambda seconds: write_times(stat, *later))
    for call, expected in ((busy_cores, busy), (free_cores, free)):
        write_times(stat, [100] * 4, [100] * 4)
        assert call() == expected
    stat.unlink()
    monkeypatch.setattr(cores.time, "sleep", lambda seconds: None)
    assert busy_cores() == 0
