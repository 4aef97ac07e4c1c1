"""Fixtures that several files of these tests need."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvmr.bundles import bundle as bundles
from mvmr.data import open_images
from tests.export.students import a_bundle
from tests.export.tensorrt.tensorrt_double import card, engine_bundle, no_card  # noqa: F401
from tests.making import SMALL

_MADE: dict[str, bytes] = {}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a head, not to be changed."""
    torch.set_num_threads(1)
    bundle = bundles.load(a_bundle(tmp_path_factory.mktemp("template") / "student"))
    classes = open_images("sample:patches", "test").classes or ()
    weight = np.random.default_rng(0).normal(size=(len(classes), SMALL.width))
    record = {"command": "c", "data": "sample:patches", "protocol": "linear", "values": {"top1": 1.0}}
    bundles.add_head(bundle, "photos", weight, np.zeros(len(classes)), classes, record)
    return bundle.path


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "runs" / "mine")
    return tmp_path / "runs" / "mine"


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's exporter takes seconds and gives the same every time (as test_graph holds): once is enough."""
    from mvmr.export.onnx import builder, graph  # here: some tests run where onnx is not installed

    def remember(student: Any, heads: Any, **options: Any) -> bytes:
        key = repr((student.identity, [head.name for head in heads], sorted(options.items())))
        if key not in _MADE:
            _MADE[key] = graph.to_onnx(student, heads, **options)
        return _MADE[key]

    monkeypatch.setattr(builder, "to_onnx", remember)


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvmr.models.student.Student.__call__", pytest.fail)
    monkeypatch.setattr("mvmr.export.onnx.builder.to_onnx", pytest.fail)
