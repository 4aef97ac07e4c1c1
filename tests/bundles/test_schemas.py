"""Manifests of earlier schemas are read as they were meant."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mvmr.bundles import bundle as bundles
from mvmr.errors import MvmrError
from tests.making import write_bundle

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


def downgrade(folder: Path, **changes: object) -> None:
    """Let a bundle's manifest be one of schema 1, of before students were anything but ResNets."""
    content = json.loads((folder / "bundle.json").read_text())
    options, backbone = content.pop("options"), content.pop("backbone")
    old = {"schema": 1, "architecture": backbone, "small_kernel": options["small_kernel"]}
    (folder / "bundle.json").write_text(json.dumps(content | old | changes))


def test_a_bundle_of_schema_1_is_the_same_student_in_the_same_space(tmp_path: Path) -> None:
    sample = write_bundle(tmp_path / "b")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    before = sample.student().embed(pixels)
    downgrade(sample.path)
    read = bundles.load(sample.path)
    assert read.manifest == sample.manifest
    assert read.space_id == sample.space_id
    assert read.student().embed(pixels).equal(before)
    assert json.loads((bundles.add_files(read, {"note.txt": b"a"}).path / "bundle.json").read_text())["schema"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"small_kernel": 1}, "options = '1'; it must be of type dict"), ({"architecture": 5}, "backbone = '5'")],
)
def test_a_manifest_of_schema_1_that_lies_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    sample = write_bundle(tmp_path / "b")
    downgrade(sample.path, **changes)
    with pytest.raises(MvmrError, match=message):
        bundles.load(sample.path)
