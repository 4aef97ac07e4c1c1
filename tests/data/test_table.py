"""Tables of images: which columns hold what, classes, splits, and every way a table can be wrong."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mvmr.data import open_images
from mvmr.data.listing import open_source
from mvmr.errors import MvmrError
from mvmr.evaluation.protocols import Labelled

SPECIES = ["cat" if number % 4 else "dog, small" for number in range(20)]


def write_photos(folder: Path) -> list[str]:
    (folder / "photos").mkdir()
    names = [f"photos/{number:02}.png" for number in range(20)]
    for number, name in enumerate(names):
        Image.new("RGB", (9, 8), (10 * number, 0, 0)).save(folder / name)
    return names


def write_csv(
    folder: Path, header: str = "file,label", rows: list[str] | None = None, *, encoding: str = "utf-8"
) -> str:
    names = write_photos(folder)
    lines = rows or [f'{name},"{label}"' for name, label in zip(names, SPECIES, strict=True)]
    (folder / "labels.csv").write_text("\n".join([header, *lines]) + "\n", encoding=encoding)
    return str(folder / "labels.csv")


@pytest.mark.parametrize("prefix", ["", "table:"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # as spreadsheets save it
def test_labels_of_a_csv_file(tmp_path: Path, prefix: str, encoding: str) -> None:
    data = prefix + write_csv(tmp_path, encoding=encoding)
    parts = [open_images(data, split) for split in ("train", "test")]
    assert [len(part) for part in parts] == [16, 4]
    assert Labelled.of(*parts).classes == ("cat", "dog, small")
    for part in parts:
        assert part.labels is not None
        for row, key in enumerate(part.keys):
            assert part.classes is not None
            assert part.classes[part.labels[row]] == SPECIES[int(key[-6:-4])]
            assert part.load(row).getpixel((0, 0)) == (10 * int(key[-6:-4]), 0, 0)
    everything = open_images(data, "unlabelled")
    assert (len(everything), everything.labels) == (20, None)
    sent = pickle.loads(pickle.dumps(parts[0]))
    assert np.array_equal(sent.labels, parts[0].labels)


def test_a_parquet_file_with_other_names_and_splits_of_its_own(tmp_path: Path) -> None:
    names = write_photos(tmp_path)
    columns = {"path": names, "kind": [number % 12 for number in range(20)], "fold": ["train"] * 14 + ["val"] * 6}
    pq.write_table(pa.table(columns), tmp_path / "all.parquet")
    data = f"table:{tmp_path}/all.parquet?file=path&label=kind&split=fold"
    train, test, unlabelled = (open_images(data, split) for split in ("train", "test", "unlabelled"))
    assert list(train.keys) == list(unlabelled.keys) == names[:14]
    assert list(test.keys) == names[14:]
    assert train.classes == test.classes == tuple(map(str, range(12)))  # as numbers: 2 before 10
    assert list(test.labels) == [2, 3, 4, 5, 6, 7]
    assert unlabelled.labels is None


def test_a_table_without_labels_names_images(tmp_path: Path) -> None:
    data = write_csv(tmp_path, "file", ["photos/03.png", "photos/01.png"])
    assert list(open_images(data, "unlabelled").keys) == ["photos/03.png", "photos/01.png"]
    assert open_images(data, "train").labels is None
    source = open_source(data)
    assert [source.key(name) for name in source.names] == [f"{tmp_path}/photos/03.png", f"{tmp_path}/photos/01.png"]


@pytest.mark.parametrize(
    ("header", "rows", "query", "message"),
    [
        ("path,label", ["a.png,cat"], "", r"no column 'file'; it has 'path', 'label': .*\?file=COLUMN"),
        ("file,label", ["a.png,cat"], "?label=kind", "no column 'kind'"),
        ("file,label", ["a.png,cat"], "?labels=kind", "unknown column 'labels'; did you mean 'label'"),
        ("file,label", ["a.png,cat"], "?label", r"write FILE\?file=COLUMN"),
        ("file,label", ["a.png,cat", ",dog"], "", "row 2: no path"),
        ("file,label", ["a.png,cat", "b.png,"], "", "row 2: no label"),
        ("file,label", ["a.png,cat", "b.png,dog", "a.png,dog"], "", r"a.png is in rows 1 and 3"),
        ("file,label", ["a.png,cat,dog"], "", "row 1: 3 values for 2 columns"),
        ("file,label", ["s3://bucket/a.png,cat"], "", "row 1: s3://bucket/a.png is an address"),
        ("file,label,split", ["a.png,cat,dev"], "", "split 'dev' should be one of train, test, val"),
        ("file,label,split", ["a.png,cat,train"], "", "no row of the table is in the 'test' split"),
        ("file,label", ['a.png,"cat'], "", "no CSV file in UTF-8"),
    ],
)
def test_what_is_wrong_is_said_with_its_row(
    tmp_path: Path, header: str, rows: list[str], query: str, message: str
) -> None:
    data = "table:" + write_csv(tmp_path, header, rows) + query
    with pytest.raises(MvmrError, match=message):
        open_images(data, "test")


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("file,label\n")
    (tmp_path / "odd.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG")
    for name, message in {
        "empty.csv": "is empty",
        "header.csv": "has no rows",
        "odd.parquet": "is no Parquet file",
        "picture.csv": "no CSV file in UTF-8",
        "gone.csv": "cannot read the table .*gone.csv",
    }.items():
        with pytest.raises(MvmrError, match=message):
            open_images(f"table:{tmp_path}/{name}", "train")


def test_images_that_are_not_there_count_as_unreadable(tmp_path: Path) -> None:
    data = write_csv(tmp_path, "file,label", [f"photos/{n:02}.png,{n % 2}" for n in range(20)] + ["photos/gone.png,1"])
    with pytest.raises(MvmrError, match=r"1 of 21 image files .* cannot be read.*photos/gone.png"):
        open_images(data, "train")
    assert len(open_images(data, "unlabelled", max_unreadable=0.1)) == 20
