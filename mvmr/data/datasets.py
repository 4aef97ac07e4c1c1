"""Standard data sets from their own files, put in place by the user: nothing is downloaded."""

import os
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from mvmr.data.folder import Opening, open_listed, open_parts
from mvmr.data.image_set import Arrays, ImageSet, Labels, digest, numbered_names
from mvmr.data.scan import Packed, printable, stat_files
from mvmr.errors import MvmrError

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_STL10_SIDE = 96
_STL10_BYTES = 3 * _STL10_SIDE * _STL10_SIDE


def stl10(root: str, opening: Opening) -> ImageSet:
    """Open STL10 from ROOT/stl10_binary; "unlabelled" is its training and its unlabelled images together (105,000).

    The files are mapped, not read: torchvision's reader takes 3 GB of memory, twice that while it joins them, and
    hashes all of it at each opening. The pixels are the same (tested).

    Raises: MvmrError when a file is missing or has an impossible size.
    """
    folder = os.path.abspath(os.path.join(root, "stl10_binary"))
    parts = {"train": ["train"], "test": ["test"], "unlabelled": ["train", "unlabeled"]}[opening.split]
    paths = [os.path.join(folder, f"{part}_X.bin") for part in parts]
    labelled = opening.split != "unlabelled"
    files = [*paths, os.path.join(folder, f"{parts[0]}_y.bin")] if labelled else paths
    _require(opening.name, files, f"unpack stl10_binary.tar.gz into {root}")
    counts = []
    for path in paths:
        count, remainder = divmod(os.path.getsize(path), _STL10_BYTES)
        if remainder or not count:
            raise MvmrError(
                f"data {opening.name!r}: {path} is damaged: {os.path.getsize(path)} bytes are not a whole number of "
                f"{_STL10_SIDE} px images; unpack stl10_binary.tar.gz again"
            )
        counts.append(count)
    stamps = [f"{os.path.basename(p)} {os.path.getsize(p)} {os.stat(p).st_mtime_ns}".encode() for p in paths]
    return ImageSet(
        name=opening.name,
        split=opening.split,
        source=Stl10(tuple(paths), tuple(counts), opening.split),
        fingerprint=digest([b"stl10", *stamps]),
        read_labels=partial(_stl10_labels, files[-1], counts[0]) if labelled else None,
        classes=_stl10_classes(folder) if labelled else None,
        native_size=_STL10_SIDE,
    )


@dataclass(frozen=True)
class Stl10:
    """The images of one or more STL10 files, one after the other; opened anew in each process."""

    paths: tuple[str, ...]
    counts: tuple[int, ...]
    prefix: str

    @property
    def keys(self) -> Sequence[str]:
        return numbered_names(self.prefix, sum(self.counts))

    @cached_property
    def maps(self) -> tuple[npt.NDArray[np.uint8], ...]:
        shape = (3, _STL10_SIDE, _STL10_SIDE)
        files = zip(self.paths, self.counts, strict=True)
        return tuple(np.memmap(path, np.uint8, "r", shape=(count, *shape)) for path, count in files)

    def __reduce__(self) -> tuple[type["Stl10"], tuple[object, ...]]:
        return Stl10, (self.paths, self.counts, self.prefix)  # without `maps`, which would be copied whole

    def load(self, index: int) -> Image.Image:
        for pixels in self.maps:
            if index < len(pixels):
                # stored channel by channel, each one column by column
                return Image.fromarray(np.ascontiguousarray(pixels[index].transpose(2, 1, 0)))
            index -= len(pixels)
        raise IndexError(index)


def cifar(root: str, opening: Opening, *, kind: str) -> ImageSet:
    """Open cifar10, cifar100 or cifar20 (CIFAR-100 with its 20 coarse classes) through torchvision's reader.

    The files are pickles; the reader compares their md5 with the published ones before it opens them.

    Raises: MvmrError when a file is missing or is not the published one.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    reader: type[CIFAR10] = CIFAR10 if kind == "cifar10" else CIFAR100
    part = "test" if opening.split == "test" else "train"
    folder = os.path.abspath(os.path.join(root, reader.base_folder))
    parts = [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]
    paths = [os.path.join(folder, name) for name, _ in parts]
    _require(opening.name, paths, f"unpack {reader.filename} into {root}")
    data = _read_cifar(reader, root, part, opening.name)
    labelled = opening.split != "unlabelled"
    coarse = kind == "cifar20"
    entries = reader.test_list if part == "test" else reader.train_list
    files = [os.path.join(folder, name) for name, _ in entries]
    classes = _unpickle(paths[-1])["coarse_label_names"] if coarse else data.classes
    fine = np.array(data.targets, np.int64)
    return ImageSet(
        name=opening.name,
        split=opening.split,
        source=Arrays(data.data, numbered_names(part, len(data.data))),
        fingerprint=digest([reader.base_folder.encode(), *(str(md5).encode() for _, md5 in entries)]),
        read_labels=(partial(_coarse_labels, files) if coarse else partial(np.copy, fine)) if labelled else None,
        classes=tuple(classes) if labelled else None,
        native_size=32,
    )


def imagenet(root: str, opening: Opening) -> ImageSet:
    """Open ILSVRC class folders ROOT/train/n01440764/... and ROOT/val/n01440764/...; "test" is val.

    Raises: MvmrError when a folder is missing, or its images do not lie in class folders.
    """
    part = "val" if opening.split == "test" else "train"
    top = os.path.abspath(root)
    _require(opening.name, [os.path.join(top, part)], f"put the class folders (n01440764, ...) under {root}/{part}")
    # one of the two may be absent, when it is not the one asked for
    train, val = (name if os.path.isdir(os.path.join(top, name)) else part for name in ("train", "val"))
    images = open_parts(os.fsencode(top), train.encode(), val.encode(), opening)
    if images.classes is None and opening.split != "unlabelled":
        raise MvmrError(
            f"data {opening.name!r}: the images in {top}/{part} do not lie in class folders (n01440764, ...); "
            "sort them into one folder a class"
        )
    return images


def voc07(root: str, opening: Opening) -> ImageSet:
    """Open ROOT/VOCdevkit/VOC2007 through torchvision's reader; "train" and "unlabelled" are trainval.

    Labels: int64 [N, 20]: 1 where the class is present, 0 where only objects marked "difficult" show it, else -1.

    Raises: MvmrError when a file is missing; reading the labels also when an annotation is damaged.
    """
    from torchvision.datasets import VOCDetection

    image_set, archive = (
        ("test", "VOCtest_06-Nov-2007.tar") if opening.split == "test" else ("trainval", "VOCtrainval_06-Nov-2007.tar")
    )
    home = os.path.abspath(os.path.join(root, "VOCdevkit", "VOC2007"))
    listing = os.path.join(home, "ImageSets", "Main", f"{image_set}.txt")
    _require(opening.name, [listing], f"unpack {archive} into {root}")
    data = VOCDetection(root, year="2007", image_set=image_set)
    names = Packed.of(os.fsencode(f"JPEGImages/{os.path.basename(path)}") for path in data.images)
    if len(names) == 0:
        raise MvmrError(f"data {opening.name!r}: {listing} names no images; unpack {archive} into {root} again")
    images = open_listed(stat_files(os.fsencode(home), names), opening)
    if opening.split == "unlabelled":
        return images
    annotations = tuple(os.path.abspath(path) for path in data.annotations)
    return replace(images, read_labels=partial(_voc_labels, annotations), classes=VOC_CLASSES)


def _require(name: str, paths: Sequence[str], remedy: str) -> None:
    for path in paths:
        if not os.path.exists(path):
            file = printable(os.fsencode(path))
            raise MvmrError(f"data {name!r}: {file} is missing; {remedy} (nothing is downloaded)")


def _stl10_labels(path: str, count: int) -> Labels:
    numbers = np.fromfile(path, np.uint8).astype(np.int64) - 1
    if len(numbers) != count or numbers.min() < 0 or numbers.max() >= len(STL10_CLASSES):
        raise MvmrError(
            f"{path} is damaged: it should hold {count} numbers from 1 to 10; unpack stl10_binary.tar.gz again"
        )
    return numbers


def _stl10_classes(folder: str) -> tuple[str, ...]:
    try:
        with open(os.path.join(folder, "class_names.txt"), encoding="utf-8") as file:
            names = tuple(file.read().split())
    except FileNotFoundError:
        return STL10_CLASSES
    return names if len(names) == len(STL10_CLASSES) else STL10_CLASSES


def _read_cifar(reader: "type[CIFAR10]", root: str, part: str, name: str) -> "CIFAR10":
    try:
        with warnings.catch_warnings():
            # pickled by a numpy of 2009, in a spelling that today's numpy warns about
            warnings.filterwarnings("ignore", message=r"dtype\(\): align")
            return reader(root, train=part == "train")
    except RuntimeError as error:
        raise MvmrError(
            f"data {name!r}: a file under {os.path.join(root, reader.base_folder)} is not the published one (its md5 "
            f"differs); unpack {reader.filename} again"
        ) from error


def _unpickle(path: str) -> dict[str, Sequence[str]]:
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"dtype\(\): align")
        values: dict[str, Sequence[str]] = pickle.load(file, encoding="latin1")
        return values


def _coarse_labels(paths: Sequence[str]) -> Labels:
    return np.concatenate([np.array(_unpickle(path)["coarse_labels"], np.int64) for path in paths])


def _voc_labels(annotations: Sequence[str]) -> Labels:
    from xml.etree.ElementTree import ParseError, parse

    labels = np.full((len(annotations), len(VOC_CLASSES)), -1, np.int64)
    for row, path in enumerate(annotations):
        try:
            objects = parse(path).getroot().findall("object")
            for item in objects:
                column = VOC_CLASSES.index(item.findtext("name", "").strip())
                difficult = item.findtext("difficult", "0").strip() == "1"
                labels[row, column] = max(labels[row, column], 0 if difficult else 1)
        except (OSError, ParseError, ValueError) as error:
            raise MvmrError(f"{path} is not a VOC annotation ({error}); unpack the annotations again") from error
    return labels
