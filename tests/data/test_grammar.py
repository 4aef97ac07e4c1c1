"""One grammar names images: every kind of it is opened alike by number and front to back, or refused by one of them."""

import io
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from mvmr.data import ImageSet, listing, open_images, opening
from mvmr.data.grammar import KINDS, Kind, parse
from mvmr.data.listing import open_source
from mvmr.data.readable import Item
from mvmr.errors import MvmrError
from tests.data.standard_sets import write_cifar, write_imagenet, write_stl10, write_voc07

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
NAMES = ["b/2.png", "a.png", "b/c/3.png", "Z.png", "b.png", "d 1.png"]


def write_photos(root: Path) -> Path:
    for number, name in enumerate(NAMES):
        path = root / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (40 * number, number, 0)).save(path)
    return root / "photos"


def write_list(root: Path) -> str:
    write_photos(root)
    lines = [f"photos/{name}" for name in NAMES[:-1]]  # in an order of its own
    (root / "chosen").write_text("\n".join([*lines, str(root / "photos" / NAMES[-1])]) + "\n")
    return f"list:{root}/chosen"


def write_table(root: Path) -> str:
    write_photos(root)
    (root / "chosen.csv").write_text("\n".join(["file", *(f"photos/{name}" for name in NAMES)]) + "\n")
    return f"table:{root}/chosen.csv"


def write_shards(root: Path) -> str:
    with tarfile.open(root / "s-0.tar", "w") as archive:
        archive.add(write_photos(root), "photos")
    return f"shards:{root}/s-{{0..0}}.tar"


def write_addressed(root: Path) -> str:
    photos = write_photos(root)
    fsspec.filesystem("memory").pipe({f"/grammar/{name}": (photos / name).read_bytes() for name in NAMES})
    return "memory://grammar"


@pytest.fixture
def spec_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Kind], str]:
    """What a user types for a kind of the table, with the images in their places."""
    writers: dict[str, Callable[[], object]] = {
        "folder": lambda: write_photos(tmp_path),
        "glob": lambda: f"{write_photos(tmp_path)}/**/*.png",
        "list": lambda: write_list(tmp_path),
        "table": lambda: write_table(tmp_path),
        "stl10": lambda: write_stl10(tmp_path),
        **dict.fromkeys(("cifar10", "cifar20", "cifar100"), lambda: write_cifar(tmp_path, monkeypatch)),
        "imagenet": lambda: write_imagenet(tmp_path),
        "voc07": lambda: write_voc07(tmp_path),
        "sample:patches": lambda: "sample:patches",
        "sample:digits": lambda: "sample:digits",
        "file": lambda: write_photos(tmp_path) / NAMES[0],
        "stdin": lambda: "-",
        "shards": lambda: write_shards(tmp_path),
        "address": lambda: write_addressed(tmp_path),
    }
    assert writers.keys() == KINDS.keys()
    return lambda kind: str(writers[kind.name]() or f"{kind.name}:{tmp_path}")


def all_images(spec: str) -> list[tuple[ImageSet, int]]:
    """All images of a description, known by number: those to train on, then those that are only tested on."""
    unlabelled, test = open_images(spec, "unlabelled"), open_images(spec, "test")
    names = set(unlabelled.keys)
    images = [(unlabelled, number) for number in range(len(unlabelled))]
    return images + [(test, number) for number in range(len(test)) if test.keys[number] not in names]


def pixels(item: Item) -> np.ndarray:
    content = item.read()
    assert isinstance(content, bytes)
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_kind_is_opened_by_both_sides_alike_or_refused_in_one_line(
    kind: Kind, spec_of: Callable[[Kind], str]
) -> None:
    spec = spec_of(kind)
    assert parse(spec).kind is kind
    if kind.refusal:
        with pytest.raises(MvmrError) as caught:
            open_images(spec)
        assert str(caught.value) == f"data {spec!r} {kind.refusal}"
        assert "only `mvmr embed`" in kind.refusal
        return
    images, source = all_images(spec), open_source(spec)
    items = list(source.items())
    assert (len(items), source.total, source.name) == (len(images), len(images), spec)
    assert [item.done for item in items] == list(range(1, len(items) + 1))
    for (image_set, number), item in zip(images, items, strict=True):
        assert item.path.endswith(image_set.keys[number])
        assert np.array_equal(pixels(item), np.asarray(image_set.load(number)))


def test_both_sides_have_an_opener_for_every_kind_they_take() -> None:
    assert listing._SOURCES.keys() == KINDS.keys()
    assert opening._SETS.keys() == {name for name, kind in KINDS.items() if not kind.refusal}


def test_the_documentation_has_the_table() -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.endswith(("| all |", "| `mvmr embed` |"))]
    assert rows == [
        f"| `{kind.example}` | {kind.meaning} | {'`mvmr embed`' if kind.refusal else 'all'} |"
        for kind in KINDS.values()
    ]


@pytest.mark.parametrize("opener", [open_images, open_source], ids=["by number", "front to back"])
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("lst:photos.txt", "unknown data 'lst'; did you mean 'list:'?"),
        ("shard:s.tar.zst", "unknown data 'shard'; did you mean 'shards:'?"),
        ("parquet:x", "unknown data 'parquet'; Known: stl10, "),
        ("stl11", "unknown data 'stl11'; did you mean 'stl10'?"),
        ("sample:patch", "unknown sample 'sample:patch'; did you mean 'sample:patches'?"),
        (
            "gone/photos",
            "/gone/photos does not exist; give a folder of images or a quoted glob, list:FILE, table:FILE, shards:",
        ),
        ("gone/*.png", "no image file matches "),
        ("list:gone", "cannot read the list "),
    ],
)
def test_what_is_unknown_or_missing_is_refused_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opener: Callable[[str], object], spec: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MvmrError) as caught:
        opener(spec)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    if message.startswith("unknown data"):
        names = re.findall(r"[\w:]+", message.partition("Known: ")[2])
        assert {"list:", "shards:", "address", "folder", "glob", "voc07", "sample:digits"} <= set(names)


def test_a_name_comes_before_a_folder_and_what_is_there_before_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("stl10", "a[1]", "b.tar", "sample"):
        (tmp_path / name).mkdir()
    names = [parse(text).kind.name for text in ("stl10", "./stl10", "a[1]", "a[2]", "b.tar", "c.tar", "sample")]
    assert names == ["stl10", "folder", "folder", "glob", "folder", "shards", "folder"]


@pytest.mark.parametrize("kind", ["glob", "list"])
def test_a_glob_and_a_list_are_split_without_labels(kind: str, spec_of: Callable[[Kind], str]) -> None:
    spec = spec_of(KINDS[kind])
    train, test, unlabelled = (open_images(spec, split) for split in ("train", "test", "unlabelled"))
    assert sorted([*train.keys, *test.keys]) == sorted(unlabelled.keys)
    assert len(test) == 1
    assert train.labels is train.classes is test.labels is None


def test_a_glob_of_all_is_the_folder(spec_of: Callable[[Kind], str], tmp_path: Path) -> None:
    globbed = open_images(spec_of(KINDS["glob"]), "unlabelled")
    folder = open_images(tmp_path / "photos", "unlabelled")
    assert list(globbed.keys) == list(folder.keys)
    assert globbed.fingerprint == folder.fingerprint


def test_a_list_keeps_its_order_and_what_it_names_in_vain_is_left_out(
    spec_of: Callable[[Kind], str], tmp_path: Path
) -> None:
    spec = spec_of(KINDS["list"])
    with (tmp_path / "chosen").open("a") as file:
        file.write("photos/gone.png\n")
    with pytest.raises(MvmrError, match=r"1 of 7 image files .*photos/gone\.png \(missing"):
        open_images(spec, "unlabelled")
    images = open_images(spec, "unlabelled", max_unreadable=0.2)
    assert [os.path.basename(key) for key in images.keys] == [os.path.basename(name) for name in NAMES]
    assert [skipped.key for skipped in images.skipped] == ["photos/gone.png"]


def test_a_list_of_addresses_is_refused_where_images_are_known_by_number(tmp_path: Path) -> None:
    (tmp_path / "far.txt").write_text("s3://bucket/a.jpg\n")
    with pytest.raises(MvmrError, match=r"far\.txt' lists addresses, which only `mvmr embed` reads as yet: copy"):
        open_images(tmp_path / "far.txt")


def test_an_unreadable_image_of_a_data_set_is_the_jobs_to_report(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    (bad := tmp_path / "train" / "n01440764" / "bad.JPEG").write_bytes(b"no image")
    items = {item.path: item for item in open_source(f"imagenet:{tmp_path}").items()}
    assert len(items) == 7
    assert items["train/n01440764/bad.JPEG"].read() == bad.read_bytes()


def test_a_data_set_can_be_gone_on_with_and_shared() -> None:
    source = open_source("sample:digits")
    assert [item.path for item in source.items(1199)][:2] == ["train/01199", "test/00000"]
    pieces = [source.share(number, 3) for number in range(3)]
    assert [item.path for piece in pieces for item in piece.items()] == [item.path for item in source.items()]
    assert source.fingerprint == open_source("sample:digits").fingerprint != open_source("sample:patches").fingerprint
