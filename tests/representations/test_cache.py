"""Rows computed once: what is kept, what is computed again, and what a killed run leaves."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mvmr.data.image_set import Arrays, ImageSet, numbered_names
from mvmr.errors import MvmrError
from mvmr.representations.cache import represent
from mvmr.storage import row_store
from mvmr.storage.row_store import cached_rows

COUNT, WIDTH = 10, 3
ROWS = torch.arange(COUNT * WIDTH, dtype=torch.float32).reshape(COUNT, WIDTH) / 7
KEY = {"weights": "a", "images": "b"}


def batches(start: int) -> Iterator[Tensor]:
    for begin in range(start, COUNT, 4):
        yield ROWS[begin : begin + 4]


def never(start: int) -> Iterator[Tensor]:
    raise AssertionError(f"rows from {start} on were computed again")
    yield


def stopping_after(rows: int) -> Callable[[int], Iterator[Tensor]]:
    def some(start: int) -> Iterator[Tensor]:
        yield from ROWS[start:rows].split(2)
        raise KeyboardInterrupt

    return some


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_rows_are_computed_once_and_read_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.npy"
    first = cached_rows(path, key=KEY, count=COUNT, batches=batches)
    again = cached_rows(path, key=KEY, count=COUNT, batches=never, width=WIDTH)
    assert np.array_equal(first, ROWS)
    assert np.array_equal(again, ROWS)
    assert isinstance(again, np.memmap)
    assert again.dtype == np.float32
    assert not again.flags.writeable
    assert files(path.parent) == {"rows.npy", "rows.npy.json"}


def test_any_floating_type_is_kept_as_float32(tmp_path: Path) -> None:
    rows = cached_rows(tmp_path / "r.npy", key=KEY, count=COUNT, batches=lambda start: iter([ROWS.double()]))
    assert rows.dtype == np.float32
    assert np.array_equal(rows, ROWS)


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path, starts = tmp_path / "rows.npy", []

    def noting(start: int) -> Iterator[Tensor]:
        starts.append(start)
        return batches(start)

    with pytest.raises(KeyboardInterrupt):
        cached_rows(path, key=KEY, count=COUNT, batches=stopping_after(6))
    assert not path.exists()
    rows = cached_rows(path, key=KEY, count=COUNT, batches=noting)
    assert starts == [6]
    assert np.array_equal(rows, ROWS)


@pytest.mark.parametrize("cut", [1, 4 * WIDTH - 1, 4 * WIDTH, 10**4])
def test_half_a_row_of_a_partial_file_is_thrown_away(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.npy"
    with pytest.raises(KeyboardInterrupt):
        cached_rows(path, key=KEY, count=COUNT, batches=stopping_after(6))
    partial = tmp_path / "rows.npy.partial"
    os.truncate(partial, max(0, partial.stat().st_size - cut))  # as a machine that lost power may leave it
    assert np.array_equal(cached_rows(path, key=KEY, count=COUNT, batches=batches), ROWS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_batch_and_says_how_far_it_came(tmp_path: Path, number: signal.Signals) -> None:
    def signalled(start: int) -> Iterator[Tensor]:
        yield ROWS[:4]
        os.kill(os.getpid(), number)
        yield ROWS[4:8]
        yield from never(8)

    before = signal.getsignal(number)
    words = "8 of 10 images of CLIP of photos are kept; type the same command to go on"
    with pytest.raises(KeyboardInterrupt, match=words):
        cached_rows(tmp_path / "r.npy", key=KEY, count=COUNT, batches=signalled, label="CLIP of photos")
    assert signal.getsignal(number) is before
    rows = cached_rows(tmp_path / "r.npy", key=KEY, count=COUNT, batches=lambda start: iter([ROWS[start:]]))
    assert np.array_equal(rows, ROWS)


def test_a_run_stopped_after_its_last_row_only_renames(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    with pytest.raises(KeyboardInterrupt):
        cached_rows(path, key=KEY, count=COUNT, batches=stopping_after(COUNT))
    assert np.array_equal(cached_rows(path, key=KEY, count=COUNT, batches=never), ROWS)


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from mvmr.storage.row_store import cached_rows

def dying(start):
    for row in range(4):
        yield torch.arange(3 * row, 3 * row + 3)[None] / 7
    os.kill(os.getpid(), signal.SIGKILL)

cached_rows(Path(sys.argv[1]), key={"weights": "a", "images": "b"}, count=10, batches=dying)
"""


@pytest.mark.slow
def test_kill_9_loses_no_finished_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    run = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not path.exists()
    rows = cached_rows(path, key=KEY, count=COUNT, batches=lambda start: iter([ROWS[start:]] if start == 4 else []))
    assert np.array_equal(rows, ROWS)


def test_another_key_or_count_or_width_computes_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    cached_rows(path, key=KEY, count=COUNT, batches=batches)
    rows = cached_rows(path, key=KEY | {"weights": "c"}, count=COUNT, batches=lambda start: iter([-ROWS]))
    assert np.array_equal(rows, -ROWS)
    fewer = cached_rows(path, key=KEY, count=4, batches=lambda start: iter([ROWS[:4]]))
    assert np.array_equal(fewer, ROWS[:4])
    narrower = cached_rows(path, key=KEY, count=4, batches=lambda start: iter([ROWS[:4, :1]]), width=1)
    assert np.array_equal(narrower, ROWS[:4, :1])


def test_a_partial_file_of_another_key_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    with pytest.raises(KeyboardInterrupt):
        cached_rows(path, key={"weights": "old"}, count=COUNT, batches=stopping_after(6))
    assert np.array_equal(cached_rows(path, key=KEY, count=COUNT, batches=lambda start: iter([-ROWS])), -ROWS)


def test_old_rows_never_stand_under_a_new_key(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    cached_rows(path, key={"weights": "old"}, count=COUNT, batches=batches)
    with pytest.raises(KeyboardInterrupt):
        cached_rows(path, key=KEY, count=COUNT, batches=stopping_after(0))
    assert np.array_equal(cached_rows(path, key=KEY, count=COUNT, batches=lambda start: iter([-ROWS])), -ROWS)


@pytest.mark.parametrize("wrong", [ROWS[:7], torch.cat([ROWS, ROWS]), ROWS[0]])
def test_a_wrong_number_or_shape_of_rows_is_a_programming_error(tmp_path: Path, wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="my rows"):
        cached_rows(tmp_path / "rows.npy", key=KEY, count=COUNT, batches=lambda start: iter([wrong]), label="my rows")
    assert not (tmp_path / "rows.npy").exists()


def test_nan_stops_and_names_the_row(tmp_path: Path) -> None:
    bad = ROWS.clone()
    bad[7, 1] = float("nan")
    with pytest.raises(MvmrError, match=r"teacher of photos: row 7 holds NaN") as caught:
        cached_rows(
            tmp_path / "rows.npy",
            key=KEY,
            count=COUNT,
            batches=lambda start: iter(bad[start:].split(5)),
            label="teacher of photos",
        )
    assert "\n" not in str(caught.value)


def test_no_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MvmrError, match="no images"):
        cached_rows(tmp_path / "rows.npy", key=KEY, count=0, batches=batches)


def test_a_full_disk_and_a_bad_folder_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(MvmrError, match=r"disk full.*MVMR_CACHE"):
        patch.setattr(row_store, "sync", full)
        cached_rows(tmp_path / "rows.npy", key=KEY, count=COUNT, batches=batches)
    (tmp_path / "file").touch()
    with pytest.raises(MvmrError, match="Not a directory") as caught:
        cached_rows(tmp_path / "file" / "rows.npy", key=KEY, count=COUNT, batches=batches)
    assert "\n" not in str(caught.value)


def test_two_at_once_compute_the_rows_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, begun, go = tmp_path / "rows.npy", threading.Event(), threading.Event()
    results: list[np.memmap] = []

    def slowly(start: int) -> Iterator[Tensor]:
        begun.set()
        go.wait(10)
        yield from batches(start)

    first = threading.Thread(target=lambda: results.append(cached_rows(path, key=KEY, count=COUNT, batches=slowly)))
    second = threading.Thread(target=lambda: results.append(cached_rows(path, key=KEY, count=COUNT, batches=never)))
    first.start()
    assert begun.wait(10)
    second.start()
    second.join(0.3)
    assert second.is_alive()
    go.set()
    first.join(10)
    second.join(10)
    assert len(results) == 2
    assert all(np.array_equal(rows, ROWS) for rows in results)
    assert "waiting for another run" in caplog.text


@dataclass(frozen=True)
class MeanColour:
    """The mean colour of an image, and twice it."""

    name: str = "mean/colour"
    identity: str = "0123456789abcdef0123456789abcdef"

    def prepare(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def __call__(self, batch: Tensor) -> Tensor:
        mean = batch.float().mean((2, 3))
        return torch.cat([mean, 2 * mean], dim=1)


PIXELS = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)
IMAGES = ImageSet(
    name="noise", split="train", source=Arrays(PIXELS, numbered_names("train", len(PIXELS))), fingerprint="f" * 64
)
MEANS = PIXELS.astype(np.float32).mean((1, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_represent_gives_row_i_for_image_i(cache: Path, workers: int) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    rows = represent(IMAGES, MeanColour(), batch_size=4, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_allclose(rows, np.concatenate([MEANS, 2 * MEANS], 1), rtol=1e-5)
    assert (cache / "representations" / f"mean_colour-0123456789abcdef-{'f' * 16}.npy").is_file()


def test_represent_never_reads_a_label() -> None:
    def labels() -> np.ndarray:
        raise AssertionError("a label was read")

    assert represent(replace(IMAGES, read_labels=labels), MeanColour()).shape == (11, 6)


def test_represent_computes_again_for_other_weights_or_images() -> None:
    represent(IMAGES, MeanColour())
    assert len(represent(IMAGES.subset([3, 1]), MeanColour())) == 2
    doubled = replace(IMAGES, fingerprint="e" * 64, source=Arrays(PIXELS[::-1], numbered_names("train", 11)))
    np.testing.assert_allclose(represent(doubled, MeanColour())[:, :3], MEANS[::-1], rtol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"prepare": 4}, r"the preprocessing of mean colour failed on train/00004: RuntimeError: of image 4"),
        ({"shape": 5}, r"the preprocessing of mean colour gives \[3, 8, 8\] for one image and \[3, 7, 8\] for another"),
        ({"forward": 2}, r"mean colour failed on images \[2, 3, 8, 8\]: RuntimeError: of a last batch"),
    ],
)
def test_code_of_a_user_that_fails_is_one_line(workers: int, faults: dict[str, int], message: str) -> None:
    with pytest.raises(MvmrError, match=message):
        represent(IMAGES, Faulty(faults), batch_size=3, workers=workers)


class Faulty:
    name, identity, plain = "mean colour", "fedcba9876543210" * 2, MeanColour()

    def __init__(self, faults: dict[str, int]) -> None:
        self.faults = faults

    def prepare(self, image: Image.Image) -> Tensor:
        number = int(np.flatnonzero((np.asarray(image) == PIXELS).all((1, 2, 3)))[0])
        if number == self.faults.get("prepare"):
            raise RuntimeError(f"of image {number}")
        tensor = self.plain.prepare(image)
        return tensor[:, 1:] if number == self.faults.get("shape") else tensor

    def __call__(self, batch: Tensor) -> Tensor:
        if len(batch) == self.faults.get("forward"):
            raise RuntimeError("of a last batch")
        return self.plain(batch)


class Unreadable:
    keys = numbered_names("train", len(PIXELS))

    def load(self, index: int) -> Image.Image:
        if index == 6:
            raise MvmrError("train/00006 cannot be read: truncated")
        return Image.fromarray(PIXELS[index])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_one_line_also_from_a_worker(workers: int) -> None:
    with pytest.raises(MvmrError) as caught:
        represent(replace(IMAGES, source=Unreadable()), MeanColour(), batch_size=3, workers=workers)
    assert str(caught.value) == "train/00006 cannot be read: truncated"
    assert np.array_equal(represent(IMAGES, MeanColour(), batch_size=3), represent(IMAGES, MeanColour()))
