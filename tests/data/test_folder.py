"""Folders: layouts, classes, splits, strange names, links; and the memory of what was checked."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvmr.data import ImageSet, Split, checking, decoding, open_images
from mvmr.data.scan import Packed, printable
from mvmr.errors import MvmrError

Check = Callable[[bytes], int]


def draw(path: Path, value: int = 0, size: tuple[int, int] = (12, 9)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value % 256, value // 256, 7)).save(path)
    return path


def keys(folder: Path, split: Split = "unlabelled") -> list[str]:
    return list(open_images(folder, split).keys)


@pytest.fixture
def decoded_names(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The files decoded by the check, in the order of the list."""
    seen: list[bytes] = []

    def counting(path: bytes, check: Check = decoding.check) -> int:
        seen.append(os.path.basename(path))
        return check(path)

    monkeypatch.setattr(decoding, "check", counting)
    return seen


def test_any_depth_any_format_any_case_in_sorted_order(tmp_path: Path) -> None:
    names = ["b/z.JPG", "b/c/d/e.webp", "a.png", "b.tiff", "b-c/x.bmp", "b/q.GIF", "a/x.ppm", "z.jpeg", "b/y.jp2"]
    for number, name in enumerate(names):
        draw(tmp_path / name, number)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "b" / "labels.csv").write_text("no image")
    draw(tmp_path / ".hidden.png")
    draw(tmp_path / ".thumbnails" / "x.png")
    images = open_images(str(tmp_path), "unlabelled")
    assert list(images.keys) == sorted(names)
    assert len(images) == 9
    assert images.name == str(tmp_path)
    assert images.native_size is None
    assert images.skipped == ()
    assert images.load(list(images.keys).index("a.png")).getpixel((0, 0)) == (2, 0, 7)


def test_labels_are_the_folders_of_the_first_level(tmp_path: Path) -> None:
    for number in range(20):
        draw(tmp_path / ("cat" if number < 10 else "dog") / f"{number % 3}" / f"{number}.png", number)
    train, test = open_images(tmp_path, "train"), open_images(tmp_path, "test")
    for part in (train, test):
        assert part.classes == ("cat", "dog")
        assert part.labels is not None
        assert part.labels.dtype == np.int64
        assert part.labels.tolist() == [0 if key.startswith("cat") else 1 for key in part.keys]
    assert test.labels is not None
    assert np.bincount(test.labels).tolist() == [2, 2]
    assert sorted([*train.keys, *test.keys]) == keys(tmp_path)


def test_the_split_depends_on_names_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    for number in range(30):
        draw(first / f"{number}.png", number)
        draw(second / f"{number}.png", 29 - number)
    assert keys(first, "test") == keys(second, "test")
    assert len(keys(first, "test")) == 6
    before = set(keys(first, "test"))
    draw(first / "new.png")
    assert len(before ^ set(keys(first, "test"))) <= 2


@pytest.mark.parametrize("stray", ["stray.png", None])
def test_no_classes_when_an_image_lies_outside_or_there_is_one_folder(tmp_path: Path, stray: str | None) -> None:
    for number in range(10):
        draw(tmp_path / "cat" / f"{number}.png", number)
        if stray:
            draw(tmp_path / "dog" / f"{number}.png", number)
    if stray:
        draw(tmp_path / stray)
    images = open_images(tmp_path)
    assert images.classes is None
    assert images.labels is None


def test_unlabelled_reads_no_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        draw(tmp_path / str(number % 2) / f"{number}.png", number)

    def never(*_: object) -> None:
        raise AssertionError("a label was read")

    monkeypatch.setattr("mvmr.data.folder.folder_labels", never)
    images = open_images(tmp_path, "unlabelled")
    assert images.labels is None
    assert images.classes is None
    assert len([images.load(i) for i in range(len(images))]) == 10


@pytest.mark.parametrize("part", ["test", "val"])
def test_a_folder_with_splits_of_its_own(tmp_path: Path, part: str) -> None:
    for name in ("train/b/1.png", "train/c/2.png", "train/c/3.png", f"{part}/a/4.png", f"{part}/c/5.png", "aside.png"):
        draw(tmp_path / name)
    train, test = open_images(tmp_path), open_images(tmp_path, "test")
    assert list(train.keys) == ["train/b/1.png", "train/c/2.png", "train/c/3.png"]
    assert keys(tmp_path) == list(train.keys)
    assert list(test.keys) == [f"{part}/a/4.png", f"{part}/c/5.png"]
    # class a is missing in train, b in the other: the numbers mean the same in both all the same
    assert train.classes == test.classes == ("a", "b", "c")
    assert train.labels is not None
    assert test.labels is not None
    assert (train.labels.tolist(), test.labels.tolist()) == ([1, 2, 2], [0, 2])


def test_train_alone_is_an_ordinary_folder(tmp_path: Path) -> None:
    for number in range(10):
        draw(tmp_path / ("train" if number % 2 else "bus") / f"{number}.png", number)
    assert open_images(tmp_path).classes == ("bus", "train")


def test_the_fingerprint_follows_the_data(tmp_path: Path) -> None:
    for number in range(5):
        draw(tmp_path / f"{number}.png", number)
    first = open_images(tmp_path, "unlabelled").fingerprint
    assert len(first) == 64
    assert open_images(tmp_path, "unlabelled").fingerprint == first
    seen = {first}
    draw(tmp_path / "5.png")
    seen.add(open_images(tmp_path, "unlabelled").fingerprint)
    os.rename(tmp_path / "5.png", tmp_path / "6.png")
    seen.add(open_images(tmp_path, "unlabelled").fingerprint)
    os.utime(tmp_path / "0.png", ns=(1, 1))
    seen.add(open_images(tmp_path, "unlabelled").fingerprint)
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (b"with space.png", "with space.png"),
        (b"two\nlines.png", "two\\nlines.png"),
        (b"tab\tand\rreturn.png", "tab\\tand\\rreturn.png"),
        (b"latin-\xe9.png", "latin-\\xe9.png"),
        ("größe-写真-🐈.png".encode(), "größe-写真-🐈.png"),
        (b"back\\slash.png", "back\\\\slash.png"),
        (b"quote'\".png", "quote'\".png"),
        (b"-rf.png", "-rf.png"),
        (b"[bold]red.png", "[bold]red.png"),
        (b"line\xe2\x80\xa8separator.png", "line\\u2028separator.png"),
        (b"lone-\xed\xa0\x80-surrogate.png", "lone-\\xed\\xa0\\x80-surrogate.png"),
    ],
)
def test_strange_names_have_keys_of_one_valid_line(tmp_path: Path, name: bytes, key: str) -> None:
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "plain.png")
    folder = os.fsencode(tmp_path) + b"/odd\xff\nfolder"
    os.mkdir(folder)
    os.rename(tmp_path / "plain.png", folder + b"/" + name)
    images = open_images(tmp_path, "unlabelled")
    assert list(images.keys) == [f"odd\\xff\\nfolder/{key}"]
    assert len(images.keys[0].encode("utf-8").splitlines()) == 1
    assert images.load(0).getpixel((0, 0)) == (1, 2, 3)
    assert pickle.loads(pickle.dumps(images)).load(0).getpixel((0, 0)) == (1, 2, 3)


def test_distinct_names_have_distinct_keys() -> None:
    names = [b"a\n", b"a\\n", b"a\\\\n", b"a\xff", b"a\\xff", "a\u2028".encode(), b"a\\u2028"]
    assert len({printable(name) for name in names}) == len(names)


def test_a_link_that_loops_or_leads_back_adds_nothing(tmp_path: Path) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    for number in range(3):
        draw(home / "real" / f"{number}.png", number)
    draw(outside / "deep" / "x.png")
    (home / "again").symlink_to(home / "real")
    (home / "real" / "loop").symlink_to(home)
    (home / "up").symlink_to(tmp_path)
    (home / "far").symlink_to(outside)
    (home / "far2").symlink_to(outside)
    (outside / "deep" / "loop").symlink_to(outside)
    (outside / "back").symlink_to(home)
    (home / "linked.png").symlink_to(outside / "deep" / "x.png")
    assert keys(home) == ["far/deep/x.png", "linked.png", "real/0.png", "real/1.png", "real/2.png"]


def test_a_linked_root_and_linked_splits(tmp_path: Path) -> None:
    draw(tmp_path / "a" / "cat" / "1.png")
    draw(tmp_path / "b" / "dog" / "2.png")
    home = tmp_path / "home"
    home.mkdir()
    (home / "train").symlink_to(tmp_path / "a")
    (home / "test").symlink_to("../b")
    (tmp_path / "link").symlink_to(home)
    assert keys(tmp_path / "link", "train") == ["train/cat/1.png"]
    assert open_images(tmp_path / "link", "test").classes == ("cat", "dog")


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    assert keys(tmp_path) == ["a.png"]


def test_a_relative_path_outlives_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "photos" / "a.png", 5)
    monkeypatch.chdir(tmp_path)
    images = open_images("photos/", "unlabelled")
    monkeypatch.chdir("/")
    assert images.name == "photos/"
    assert images.load(0).getpixel((0, 0)) == (5, 0, 7)


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "photos" / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert keys(Path("~/photos")) == ["a.png"]


def test_each_file_is_decoded_once_until_it_changes(tmp_path: Path, decoded_names: list[bytes]) -> None:
    for number in range(40):
        draw(tmp_path / f"{number}.png", number)
    (tmp_path / "bad.png").write_bytes(b"bad")
    first = open_images(tmp_path, max_unreadable=0.1)
    assert len(decoded_names) == 41
    decoded_names.clear()
    again = open_images(tmp_path, max_unreadable=0.1)
    assert decoded_names == []
    assert again.skipped == first.skipped
    assert again.short_sides is not None
    assert again.short_sides.tolist() == [9] * len(again)
    draw(tmp_path / "7.png", 99, (5, 5))
    os.utime(tmp_path / "7.png", ns=(10**18, 10**18))
    draw(tmp_path / "bad.png")
    draw(tmp_path / "new.png")
    mended = open_images(tmp_path, "unlabelled")
    assert sorted(decoded_names) == [b"7.png", b"bad.png", b"new.png"]
    assert mended.skipped == ()
    assert mended.smaller_than(9) == 1


def test_an_interrupted_check_is_not_lost(
    tmp_path: Path, decoded_names: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(200):
        draw(tmp_path / f"{number:03d}.png", number)
    count_up = decoding.check

    def interrupt(path: bytes) -> int:
        if path.endswith(b"150.png"):
            raise KeyboardInterrupt
        return count_up(path)

    monkeypatch.setattr(checking, "_CHUNK", 10)
    monkeypatch.setattr(decoding, "check", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_images(tmp_path, "unlabelled")
    monkeypatch.setattr(decoding, "check", count_up)
    decoded_names.clear()
    assert len(open_images(tmp_path, "unlabelled")) == 200
    assert sorted(decoded_names) == [f"{number:03d}.png".encode() for number in range(150, 200)]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no zip", b"x" * 1000])
def test_a_damaged_memory_costs_time_only(
    tmp_path: Path, cache: Path, decoded_names: list[bytes], damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    draw(tmp_path / "a.png")
    open_images(tmp_path, "unlabelled")
    (memory,) = (cache / "checked").iterdir()
    memory.write_bytes(damage)
    assert keys(tmp_path) == ["a.png"]
    assert decoded_names == [b"a.png", b"a.png"]
    assert "checking all images again" in caplog.text
    assert keys(tmp_path) == ["a.png"]
    assert len(decoded_names) == 2


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    draw(tmp_path / "photos" / "a.png")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MVMR_CACHE", str(tmp_path / "file"))
    assert keys(tmp_path / "photos") == ["a.png"]
    assert "cannot remember" in caplog.text


def test_a_file_that_went_bad_later_is_named(tmp_path: Path) -> None:
    path = draw(tmp_path / "a.png")
    images = open_images(tmp_path, "unlabelled")
    path.unlink()
    with pytest.raises(MvmrError, match=r"cannot read image .*a\.png: missing"):
        images.load(0)
    path.write_bytes(b"")
    with pytest.raises(MvmrError, match=r"empty file \(0 bytes\)"):
        images.load(0)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("missing/", "does not exist"),
        ("/nowhere/at/all", "/nowhere/at/all does not exist"),
        ("file.png", "is a file, not a folder"),
        ("empty", "holds nothing"),
        ("texts", "holds 2 other files, but no images"),
        ("stl100", "did you mean 'stl10'"),
        ("CIFAR-10", "did you mean 'cifar10'"),
        ("cifr10:/data", "did you mean 'cifar10'"),
        ("sample:patchs", "did you mean 'sample:patches'"),
        ("sample:", "unknown sample"),
        ("smaple:patches", "did you mean 'sample:patches'"),
    ],
)
def test_what_is_not_there_is_said_on_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "file.png")
    (tmp_path / "empty" / "er").mkdir(parents=True)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "texts" / "b.csv").write_text("b")
    with pytest.raises(MvmrError) as raised:
        open_images(spec)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_unknown_split_and_impossible_share() -> None:
    with pytest.raises(MvmrError, match="did you mean 'unlabelled'"):
        open_images("sample:digits", "unlabeled")  # type: ignore[arg-type]
    with pytest.raises(MvmrError, match="between 0 and 1"):
        open_images("sample:digits", max_unreadable=5)


def test_one_image_has_no_test_split(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    assert len(open_images(tmp_path, "train")) == 1
    with pytest.raises(MvmrError, match="no images in the 'test' split"):
        open_images(tmp_path, "test")


def test_a_folder_named_like_a_data_set_is_reached_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "stl10" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert len(open_images("./stl10", "unlabelled")) == 1
    with pytest.raises(MvmrError, match=r"stl10_binary/train_X\.bin is missing"):
        open_images("stl10")


def test_progress_is_shown_only_when_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "a.png")
    open_images(tmp_path, "unlabelled")
    assert capfd.readouterr() == ("", "")
    os.utime(tmp_path / "a.png", ns=(1, 1))
    open_images(tmp_path, "unlabelled", progress=True)
    assert "checking images" in capfd.readouterr().err


def test_packed_names_are_a_sequence() -> None:
    names = [b"a", b"", b"long name", b"\xff\n"]
    packed = Packed.of(names)
    assert list(packed) == names
    assert [packed[i] for i in range(-4, 4)] == names + names
    assert packed[1:3] == names[1:3]
    assert len(packed) == 4
    with pytest.raises(IndexError):
        packed[4]


def test_many_files_stay_small_in_memory(tmp_path: Path) -> None:
    for number in range(300):
        draw(tmp_path / f"image-number-{number:06d}.png", number, (1, 1))
    images: ImageSet = open_images(tmp_path, "unlabelled")
    assert len(pickle.dumps(images)) < 300 * (len("image-number-000000.png") + 8 * 5) + 2000
