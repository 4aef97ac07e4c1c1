"""A file of embeddings as a file: damage, the order of its rows, and the memory that it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mvmr.distillation.teachers import rows_file
from mvmr.distillation.teachers.remembered import open_or_recall
from mvmr.distillation.teachers.rows_file import RowsFile
from mvmr.distillation.teachers.spec import parse_specs
from mvmr.distillation.teachers.teacher import TeacherGone
from mvmr.errors import MvmrError
from tests.distill.test_stored_rows import numbered, write

COUNT = 10_000


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(COUNT, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def file(rows: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> RowsFile:
    folder = tmp_path_factory.mktemp("file")
    table = {"path": [f"{number:05}.jpg" for number in range(COUNT)], "embedding": list(rows)}
    return RowsFile(write(folder / "rows.parquet", table), None, None)


@pytest.mark.parametrize("held", [2**24, 9_000])
@pytest.mark.parametrize("order", ["ascending", "descending", "with gaps", "shuffled", "with copies", "all one"])
def test_rows_come_in_the_order_that_is_asked_for(
    file: RowsFile, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch, order: str, held: int
) -> None:
    monkeypatch.setattr(rows_file, "_HELD", held)
    random = np.random.default_rng(1)
    numbers = {
        "ascending": np.arange(COUNT),
        "descending": np.arange(COUNT)[::-1],
        "with gaps": np.flatnonzero(random.random(COUNT) < 0.3),
        "shuffled": random.permutation(COUNT),
        "with copies": random.integers(0, COUNT, 9_000),
        "all one": np.full(5_000, 4_321),
    }[order]
    blocks = list(file.gather(numbers))
    assert max(map(len, blocks)) <= 1024
    np.testing.assert_array_equal(np.concatenate(blocks), rows[numbers])


# -- damage


def damage(file: Path, place: str) -> None:
    """Overwrite a piece of a whole file."""
    content = bytearray(file.read_bytes())
    begin, end = {"footer": (-150, -8), "data": (10, 60), "end": (-8, -4)}[place]
    content[begin:end] = b"\xff" * len(content[begin:end])
    file.write_bytes(content)


@pytest.mark.parametrize("place", ["footer", "data", "end"])
def test_a_damaged_file_is_refused_and_never_recalled_from_the_cache(tmp_path: Path, place: str) -> None:
    file = write(tmp_path / "rows.parquet", {"path": ["a", "b"], "embedding": numbered(2)})
    (spec,) = parse_specs(f"rows:{file}")
    assert open_or_recall(spec, None, device="cpu").dim == 3
    damage(file, place)
    with pytest.raises(MvmrError, match=r"rows\.parquet is not a whole Parquet file \(.*; make it again") as excinfo:
        open_or_recall(spec, None, device="cpu")
    assert not isinstance(excinfo.value, TeacherGone)
    assert "\n" not in str(excinfo.value)
    file.unlink()
    assert open_or_recall(spec, None, device="cpu").dim == 3


def test_a_name_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    names = pa.array([b"a", b"\xff\xfe"]).view(pa.string())
    file = write(tmp_path / "rows.parquet", {"path": names, "embedding": numbered(2)})
    with pytest.raises(MvmrError, match=r"is not a whole Parquet file \(.*UTF8"):
        RowsFile(file, None, None)


# -- memory

MEASURE = """
import resource, sys, numpy as np
from pathlib import Path
from mvmr.distillation.teachers.rows_file import RowsFile
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
file = RowsFile(Path(sys.argv[1]), None, None)
numbers = np.arange(int(sys.argv[2]))
for order in (numbers, numbers[::-1]):
    assert sum(len(rows) for rows in file.gather(order)) == len(numbers)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("group", [4096, 60_000])
def test_a_file_of_any_size_and_order_takes_little_memory(tmp_path: Path, group: int) -> None:
    """A quarter of a gigabyte of rows in the file."""
    count, width = 60_000, 1024
    schema = pa.schema([("path", pa.string()), ("embedding", pa.list_(pa.float32(), width))])
    values = pa.array(np.random.default_rng(0).standard_normal(count * width, np.float32))
    columns = [pa.array(map(str, range(count))), pa.FixedSizeListArray.from_arrays(values, width)]
    table = pa.Table.from_arrays(columns, schema=schema)
    parquet.write_table(
        table, tmp_path / "rows.parquet", row_group_size=group, compression="none", use_dictionary=False
    )
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "rows.parquet"), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200
