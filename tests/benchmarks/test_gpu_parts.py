"""The parts of the measurements on a GPU do what they measure, on a machine without; how fast is not tested."""

import asyncio
import importlib
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvmr.bundles import bundle as bundles
from mvmr.bundles.preprocess import Preprocess
from mvmr.data import open_images

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks find each other as scripts do: beside themselves."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_jpegs_are_all_different_and_decode(tmp_path: Path) -> None:
    files = importlib.import_module("jpegs").write_jpegs(tmp_path, 5)
    assert len({file.read_bytes() for file in files}) == 5
    for file in files:
        with Image.open(file) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (500, 375))
            assert np.asarray(image).std() > 20


def test_a_clock_measures_the_steps_after_the_first_and_ends_the_run() -> None:
    distil_speed = importlib.import_module("distil_speed")
    clock = distil_speed.Clock("cpu", warmup=1, ends_at=0.0)
    asked, before = [], signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        assert list(clock.read(iter(range(6)))) == list(range(6))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked == [signal.SIGTERM]  # once, as a user would, and not before a step was measured
    clock = distil_speed.Clock(
        "cpu", warmup=1, ends_at=0.0, asked=[0.0, 10.0, 12.0, 14.0], came=[9.0, 10.5, 12.5, 14.5]
    )
    assert clock.figures(batch=8) == {
        "steps": 2, "images_per_s": 4.0, "step_ms": 2000.0, "input_share": 0.25, "loop_input_share": 0.25,
    }  # fmt: skip


@pytest.mark.slow
def test_distil_speed_distils_from_files_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    distil_speed = importlib.import_module("distil_speed")
    tiny = {"teacher": "ViT-S-32", "student": "resnet18", "size": 32, "batch": 4, "images": 8}
    found = distil_speed.run(distil_speed.Sizes(**tiny, seconds=1.0, warmup=1), "cpu", tmp_path)
    assert found["steps"] >= 1
    assert found["images_per_s"] > 0
    assert found["teacher_images_per_s"] > 0
    assert 0 <= found["input_share"] <= 1
    assert found["jpeg_bytes"] > 10_000
    assert str(tmp_path) not in json.dumps(found)
    assert (tmp_path / "student.partial" / "checkpoint.pt").exists()


@pytest.fixture
def bodies(tmp_path: Path) -> list[bytes]:
    files = importlib.import_module("jpegs").write_jpegs(tmp_path / "bodies", 6)
    return [file.read_bytes() for file in files]


@pytest.mark.slow
def test_a_soak_counts_answers_refusals_and_what_is_wrong(bodies: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    soak = importlib.import_module("soak")
    monkeypatch.setattr(soak, "_WARM_UP", 0.0)
    monkeypatch.setattr(soak, "_CHECKED", 1)
    sizes = soak.Sizes(backbone="resnet18", size=32, at_once=4, queue=4, seconds=1.2)

    def right(images: Any) -> Any:
        return images[:, ::8, ::8].reshape(len(images), -1).astype(np.float32)

    def mixed_up(images: Any) -> Any:
        return right(images)[::-1]

    for engine, good in ((right, True), (mixed_up, False)):
        count = asyncio.run(soak.soak(engine, Preprocess.for_size(32), bodies, sizes, "cpu"))
        found = soak.figures(count, sizes.seconds, "cpu")
        assert found["checked"] == len(count.answered) > 0
        assert (found["wrong"] == 0) is good
        assert found["refused"] > 0
        assert found["images_per_s"] > 0
        assert found["resident_mib"]["end"] > 0
        assert "device_mib" not in found


@pytest.mark.slow
def test_a_student_in_torch_embeds_as_the_library_does(tmp_path: Path, bodies: list[bytes]) -> None:
    students = importlib.import_module("students")
    images = open_images(str(tmp_path / "bodies"), "unlabelled")
    path = students.random_bundle(tmp_path, images, backbone="resnet18", size=32)
    bundle = bundles.load(path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    wanted = bundle.student()(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(students.torch_engine(bundle, "cpu")(pixels), wanted, rtol=1e-3, atol=1e-3)
    halves = students.torch_engine(bundle, "cpu", dtype=torch.bfloat16, channels_last=True)(pixels)
    assert np.linalg.norm(halves - wanted) < 0.2 * np.linalg.norm(wanted)
    assert bundle.student().encoder.conv1.weight.dtype == torch.float32


def test_the_rate_of_matrix_products_is_measured() -> None:
    assert importlib.import_module("measure").matrix_tflops("cpu", torch.float32) > 0
