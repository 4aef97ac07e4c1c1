"""Which images an artifact is verified with, and int8 calibrated with."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.errors import MvmrError
from mvmr.export.images import choose_calibration_images, choose_verification_images

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


def saying(path: Path, training: object) -> Bundle:
    """The bundle with another training record."""
    content = json.loads((path / "bundle.json").read_text()) | {"training": training}
    (path / "bundle.json").write_text(json.dumps(content))
    return bundles.load(path)


def photos(folder: Path, count: int, *, classes: int = 1) -> str:
    for number in range(count):
        subfolder = folder / f"class {number % classes}" if classes > 1 else folder
        subfolder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(subfolder / f"{number:03}.png")
    return str(folder)


@pytest.mark.slow
def test_images_are_held_out_where_the_data_have_some(path: Path, tmp_path: Path) -> None:
    images, origin = choose_verification_images(bundles.load(path))
    assert (len(images), origin["data"], origin["split"], origin["held_out"]) == (256, "sample:patches", "test", True)
    assert list(images.keys) == list(choose_verification_images(bundles.load(path))[0].keys)  # the same ones every time
    assert len(set(images.labels.tolist())) == 17
    photos(tmp_path / "split" / "train", 30)
    data = photos(tmp_path / "split" / "test", 20)
    bundle = saying(path, {"data": {"name": str(Path(data).parent), "split": "unlabelled"}})
    images, origin = choose_verification_images(bundle)
    assert (len(images), origin["split"], origin["held_out"], origin["images_wanted"]) == (20, "test", True, 256)


def test_images_of_a_folder_in_one_piece_have_been_seen(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its test split is a share of what was trained on."""
    data = photos(tmp_path / "photos", 40)
    images, origin = choose_verification_images(
        saying(path, {"data": {"name": data, "split": "unlabelled"}}), progress=True
    )
    assert (len(images), origin["split"], origin["held_out"]) == (40, "unlabelled", False)
    assert f"verifying with all 40 images of {data}, fewer than 256" in capsys.readouterr().err
    bundle = saying(path, {"data": {"name": photos(tmp_path / "few", 120, classes=2), "split": "train"}})
    images, origin = choose_verification_images(bundle)  # fine-tuned on the training split alone
    assert (origin["split"], origin["held_out"]) == ("test", True)
    assert 16 <= len(images) < 60


def test_of_other_data_nobody_knows_whether_they_were_seen(path: Path, tmp_path: Path) -> None:
    images, origin = choose_verification_images(bundles.load(path), photos(tmp_path / "photos", 20))
    assert (len(images), origin["held_out"]) == (20, None)


@pytest.mark.parametrize("training", [{}, {"data": None}, {"data": "sample:patches"}, {"data": {"name": 3}}])
def test_a_bundle_that_does_not_say_its_data_needs_some(path: Path, training: object) -> None:
    bundle = saying(path, training)
    with pytest.raises(MvmrError, match="--data"):
        choose_verification_images(bundle)
    with pytest.raises(MvmrError, match="--calibration"):
        choose_calibration_images(bundle)
    assert choose_verification_images(bundle, "sample:digits")[1]["data"] == "sample:digits"


def test_training_data_that_are_gone_are_one_line(path: Path, tmp_path: Path) -> None:
    bundle = saying(path, {"data": {"name": str(tmp_path / "gone"), "split": "unlabelled"}})
    with pytest.raises(MvmrError, match=r"training data can't be opened .*gone does not exist.*give images: --data"):
        choose_verification_images(bundle)


def test_too_few_images_are_one_line(path: Path, tmp_path: Path) -> None:
    with pytest.raises(MvmrError, match="has 15 images, verifying takes at least 16; give more: --data"):
        choose_verification_images(bundles.load(path), photos(tmp_path / "few", 15))
    with pytest.raises(MvmrError, match="has 99 images, int8 takes at least 100 to calibrate; give more: --calib"):
        choose_calibration_images(bundles.load(path), photos(tmp_path / "more", 99))


def test_int8_is_calibrated_on_training_images(path: Path) -> None:
    images = choose_calibration_images(bundles.load(path))
    assert len(images) == 256
    assert not {*images.keys} & {*choose_verification_images(bundles.load(path))[0].keys}
