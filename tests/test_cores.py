"""Cores: what the scheduler allows, and no more than a container's quota."""

import os
from pathlib import Path

import pytest

from mvmr import cores
from mvmr.cores import usable_cores


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
