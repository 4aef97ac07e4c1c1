"""The standard data sets, read from small files in their true formats."""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from mvmr.data import ImageSet, Split, open_images
from mvmr.data.datasets import VOC_CLASSES
from mvmr.errors import MvmrError
from tests.data.standard_sets import (
    STL10_NAMES,
    annotation,
    dump,
    md5,
    photo,
    write_cifar,
    write_imagenet,
    write_stl10,
    write_voc07,
)


def arrays(images: ImageSet) -> np.ndarray:
    return np.stack([np.asarray(images.load(i)) for i in range(len(images))])


@pytest.fixture
def stl10(tmp_path: Path) -> Path:
    write_stl10(tmp_path)
    return tmp_path


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_cifar(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    write_voc07(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("split", "theirs"), [("train", "train"), ("test", "test"), ("unlabelled", "train+unlabeled")])
def test_stl10_equals_torchvisions_reader(
    stl10: Path, monkeypatch: pytest.MonkeyPatch, split: Split, theirs: str
) -> None:
    for listed in ("train_list", "test_list"):
        names = [name for name, _ in getattr(datasets.STL10, listed)]
        sums = [[name, md5(stl10 / "stl10_binary" / name)] for name in names]
        monkeypatch.setattr(datasets.STL10, listed, sums)
    reference = datasets.STL10(str(stl10), split=theirs)
    images = open_images(f"stl10:{stl10}", split)
    assert len(images) == len(reference)
    assert images.native_size == 96
    for index in range(len(reference)):
        assert np.array_equal(np.asarray(images.load(index)), np.asarray(reference[index][0]))
    if split == "unlabelled":
        assert images.labels is None
        assert images.classes is None
    else:
        assert images.labels is not None
        assert images.labels.dtype == np.int64
        assert images.labels.tolist() == [int(label) for label in reference.labels]
        assert images.classes == tuple(STL10_NAMES)


def test_stl10_is_sent_to_workers_by_name_not_by_content(stl10: Path) -> None:
    images = open_images(f"stl10:{stl10}", "unlabelled")
    last = images.load(10).tobytes()
    sent = pickle.dumps(images)
    assert len(sent) < 2000
    assert pickle.loads(sent).load(10).tobytes() == last


def test_stl10_without_its_unlabelled_part_can_still_be_evaluated(stl10: Path) -> None:
    (stl10 / "stl10_binary" / "unlabeled_X.bin").unlink()
    (stl10 / "stl10_binary" / "class_names.txt").unlink()
    images = open_images(f"stl10:{stl10}", "test")
    assert images.classes == tuple(STL10_NAMES)
    with pytest.raises(MvmrError, match=r"unlabeled_X\.bin is missing; unpack stl10_binary\.tar\.gz"):
        open_images(f"stl10:{stl10}", "unlabelled")


def test_damaged_stl10_files_are_named(stl10: Path) -> None:
    folder = stl10 / "stl10_binary"
    (folder / "train_y.bin").write_bytes(b"\x01" * 6)
    images = open_images(f"stl10:{stl10}")
    with pytest.raises(MvmrError, match=r"train_y\.bin is damaged"):
        _ = images.labels
    (folder / "train_y.bin").write_bytes(b"\x00" * 7)
    with pytest.raises(MvmrError, match=r"train_y\.bin is damaged"):
        _ = open_images(f"stl10:{stl10}").labels
    (folder / "train_X.bin").write_bytes(b"\x00" * 27647)
    with pytest.raises(MvmrError, match="27647 bytes are not a whole number"):
        open_images(f"stl10:{stl10}")


def test_the_fingerprint_of_stl10_follows_its_files(stl10: Path) -> None:
    prints = {open_images(f"stl10:{stl10}", split).fingerprint for split in ("train", "test", "unlabelled")}
    (stl10 / "stl10_binary" / "train_X.bin").write_bytes(b"\x07" * 27648 * 2)
    prints.add(open_images(f"stl10:{stl10}").fingerprint)
    assert len(prints) == 4


@pytest.mark.parametrize("split", ["train", "test", "unlabelled"])
@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_equals_torchvisions_reader(cifar: Path, kind: str, split: Split) -> None:
    reader = datasets.CIFAR10 if kind == "cifar10" else datasets.CIFAR100
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = reader(str(cifar), train=split != "test")
    images = open_images(f"{kind}:{cifar}", split)
    assert np.array_equal(arrays(images), np.stack([np.asarray(image) for image, _ in reference]))
    assert images.native_size == 32
    if split == "unlabelled":
        assert images.labels is None
    else:
        assert images.labels is not None
        assert images.labels.dtype == np.int64
        assert images.labels.tolist() == reference.targets
        assert images.classes == tuple(reference.classes)
    assert pickle.loads(pickle.dumps(images)).load(1).tobytes() == images.load(1).tobytes()


def test_cifar20_has_the_coarse_labels_of_cifar100(cifar: Path) -> None:
    for split in ("train", "test"):
        fine = open_images(f"cifar100:{cifar}", "test" if split == "test" else "train")
        coarse = open_images(f"cifar20:{cifar}", "test" if split == "test" else "train")
        assert np.array_equal(arrays(fine), arrays(coarse))
        assert coarse.classes == tuple(f"coarse{i}" for i in range(20))
        assert fine.labels is not None
        assert coarse.labels is not None
        assert coarse.labels.tolist() == (fine.labels // 5).tolist()
        assert fine.fingerprint == coarse.fingerprint


def test_a_cifar_file_that_is_not_the_published_one_is_not_unpickled(cifar: Path) -> None:
    class Sly:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return pytest.fail, ("a stranger's pickle was run",)

    dump(cifar / "cifar-100-python" / "train", Sly())
    for kind in ("cifar100", "cifar20"):
        with pytest.raises(MvmrError, match="md5"):
            open_images(f"{kind}:{cifar}")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("stl10", "stl10_binary/train_X.bin is missing; unpack stl10_binary.tar.gz into data"),
        ("cifar10", "cifar-10-batches-py/data_batch_1 is missing; unpack cifar-10-python.tar.gz into data"),
        ("cifar20:/d", "/d/cifar-100-python/train is missing; unpack cifar-100-python.tar.gz into /d"),
        ("imagenet:/d", "/d/train is missing; put the class folders"),
        ("voc07:/d", "/d/VOCdevkit/VOC2007/ImageSets/Main/trainval.txt is missing; unpack VOCtrainval_06-Nov-2007.tar"),
    ],
)
def test_missing_files_are_named_with_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MvmrError) as raised:
        open_images(spec)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_imagenet_class_folders(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    train, test = open_images(f"imagenet:{tmp_path}"), open_images(f"imagenet:{tmp_path}", "test")
    assert train.classes == test.classes == ("n01440764", "n01443537", "n02102040")
    assert train.labels is not None
    assert test.labels is not None
    assert train.labels.tolist() == test.labels.tolist() == [0, 1, 2]
    assert test.keys[0] == "val/n01440764/ILSVRC2012_val_00000000.JPEG"
    unlabelled = open_images(f"imagenet:{tmp_path}", "unlabelled")
    assert unlabelled.labels is None
    assert unlabelled.fingerprint == train.fingerprint


@pytest.mark.parametrize(("part", "split"), [("train", "train"), ("val", "test")])
def test_one_part_of_imagenet_is_enough(tmp_path: Path, part: str, split: Split) -> None:
    for wnid in ("n01440764", "n01443537"):
        photo(tmp_path / part / wnid / "1.JPEG")
    images = open_images(f"imagenet:{tmp_path}", split)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1]


def test_flat_validation_images_of_imagenet_are_explained(tmp_path: Path) -> None:
    for wnid in ("n01440764", "n01443537"):
        photo(tmp_path / "train" / wnid / "1.JPEG")
    photo(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(MvmrError, match="sort them into one folder a class"):
        open_images(f"imagenet:{tmp_path}", "test")


def test_voc07_labels_say_present_absent_or_difficult(voc: Path) -> None:
    train, test = open_images(f"voc07:{voc}"), open_images(f"voc07:{voc}", "test")
    assert list(train.keys) == [f"JPEGImages/{name}.jpg" for name in ("000005", "000007", "000009")]
    assert list(test.keys) == ["JPEGImages/000001.jpg"]
    assert train.classes == VOC_CLASSES
    assert len(VOC_CLASSES) == 20
    assert train.labels is not None
    assert train.labels.dtype == np.int64
    named = [{VOC_CLASSES[c]: int(row[c]) for c in np.flatnonzero(row > -1)} for row in train.labels]
    assert named == [{"chair": 1, "person": 0}, {"car": 1}, {"horse": 1, "person": 1, "tvmonitor": 0}]
    assert train.load(1).size == (40, 30)


def test_voc07_pretrains_without_annotations(voc: Path) -> None:
    for path in (voc / "VOCdevkit" / "VOC2007" / "Annotations").iterdir():
        path.write_text("not XML")
    images = open_images(f"voc07:{voc}", "unlabelled")
    assert len(images) == 3
    assert images.labels is None
    with pytest.raises(MvmrError, match=r"000005\.xml is not a VOC annotation"):
        _ = open_images(f"voc07:{voc}").labels


def test_an_unreadable_voc07_image_takes_its_label_with_it(voc: Path) -> None:
    (voc / "VOCdevkit" / "VOC2007" / "JPEGImages" / "000005.jpg").unlink()
    images = open_images(f"voc07:{voc}", max_unreadable=0.5)
    assert [skipped.key for skipped in images.skipped] == ["JPEGImages/000005.jpg"]
    assert images.labels is not None
    assert images.labels.shape == (2, 20)
    assert images.labels[0, VOC_CLASSES.index("car")] == 1
    with pytest.raises(MvmrError, match="1 of 3 image files"):
        open_images(f"voc07:{voc}")


def test_an_unknown_voc07_class_is_refused(voc: Path) -> None:
    path = voc / "VOCdevkit" / "VOC2007" / "Annotations" / "000007.xml"
    path.write_text(annotation("000007", [("unicorn", 0)]))
    with pytest.raises(MvmrError, match=r"000007\.xml"):
        _ = open_images(f"voc07:{voc}").labels
