"""The standard data sets in their true formats, with few images, for tests."""

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

STL10_NAMES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


class OldPickler(pickle.Pickler):
    """Writes arrays as the numpy that made the published files did: `dtype('u1', 0, 1)`."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.dtype):
            return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented


def dump(path: Path, value: object) -> None:
    data = io.BytesIO()
    OldPickler(data, protocol=2).dump(value)
    path.write_bytes(data.getvalue())


def photo(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (value, 2, 3)).save(path)


def annotation(name: str, objects: list[tuple[str, int]]) -> str:
    items = "".join(
        f"<object><name>{kind}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult>"
        "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
        for kind, difficult in objects
    )
    return (
        f"<annotation><folder>VOC2007</folder><filename>{name}.jpg</filename><size><width>40</width><height>30</height>"
        f"<depth>3</depth></size><segmented>0</segmented>{items}</annotation>"
    )


def write_stl10(root: Path) -> None:
    """STL10 as it is published, with few images."""
    folder = root / "stl10_binary"
    folder.mkdir()
    random = np.random.default_rng(0)
    for part, count in (("train", 7), ("test", 5), ("unlabeled", 4)):
        random.integers(0, 256, (count, 3, 96, 96), np.uint8).tofile(folder / f"{part}_X.bin")
        if part != "unlabeled":
            (np.arange(count) * 3 % 10 + 1).astype(np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(STL10_NAMES) + "\n")
    (folder / "fold_indices.txt").write_text("0 1 2 \n3 4 5 \n")


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10 and CIFAR-100 as they are published, with few images; torchvision is told their md5."""
    random = np.random.default_rng(1)
    ten, hundred = root / "cifar-10-batches-py", root / "cifar-100-python"
    ten.mkdir()
    hundred.mkdir()

    def rows(count: int) -> np.ndarray:
        return random.integers(0, 256, (count, 3072), np.uint8)

    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        files = [f"{number}_{i}.png" for i in range(3)]
        labels = [number, 9, (number * 7) % 10]
        dump(ten / name, {"batch_label": name, "labels": labels, "data": rows(3), "filenames": files})
    dump(ten / "batches.meta", {"num_cases_per_batch": 3, "label_names": STL10_NAMES, "num_vis": 3072})
    for name, count in (("train", 8), ("test", 4)):
        fine = [(i * 37 + count) % 100 for i in range(count)]
        entry = {"filenames": [f"{i}.png" for i in range(count)], "batch_label": name, "fine_labels": fine}
        dump(hundred / name, entry | {"coarse_labels": [label // 5 for label in fine], "data": rows(count)})
    names = {"fine_label_names": [f"fine{i}" for i in range(100)]}
    dump(hundred / "meta", names | {"coarse_label_names": [f"coarse{i}" for i in range(20)]})
    for reader in (datasets.CIFAR10, datasets.CIFAR100):
        folder = root / reader.base_folder
        for listing in ("train_list", "test_list"):
            sums = [[name, md5(folder / name)] for name, _ in getattr(reader, listing)]
            monkeypatch.setattr(reader, listing, sums)
        monkeypatch.setattr(reader, "meta", reader.meta | {"md5": md5(folder / reader.meta["filename"])})


def write_imagenet(root: Path) -> None:
    """Class folders for training and validation, an image in each."""
    for number, wnid in enumerate(("n01440764", "n01443537", "n02102040")):
        photo(root / "train" / wnid / f"{wnid}_{number}.JPEG")
        photo(root / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG")


def write_voc07(root: Path) -> None:
    """VOC2007 as it is published: three images to train on, one to test."""
    home = root / "VOCdevkit" / "VOC2007"
    for folder in ("Annotations", "ImageSets/Main"):
        (home / folder).mkdir(parents=True)
    shown: dict[str, list[tuple[str, int]]] = {
        "000005": [("chair", 0), ("chair", 1), ("person", 1)],
        "000007": [("car", 0)],
        "000009": [("horse", 1), ("horse", 0), ("person", 0), ("tvmonitor", 1)],
        "000001": [("dog", 0), ("person", 0)],
    }
    for number, (name, objects) in enumerate(shown.items()):
        photo(home / "JPEGImages" / f"{name}.jpg", number)
        (home / "Annotations" / f"{name}.xml").write_text(annotation(name, objects))
    (home / "ImageSets" / "Main" / "trainval.txt").write_text("000005\n000007\n000009\n")
    (home / "ImageSets" / "Main" / "test.txt").write_text("000001\n")
