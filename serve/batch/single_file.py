"""All parts of a finished run as one file, Parquet or NumPy; they lie in ``FILE.partial/`` until it is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from mvmr.errors import MvmrError
from mvmr.serve.batch import columns
from mvmr.serve.batch.manifest import MANIFEST, Part, failure_reason, read_manifest
from mvmr.serve.batch.parts import ERRORS, Parts
from mvmr.storage import staging
from mvmr.storage.atomic import atomic, write_json
from mvmr.storage.runs import check_same, differences

SUFFIXES = (".parquet", ".npy")


def check_place(target: Path) -> None:
    """Refuse a target that can be neither a folder of parts nor one file of a known kind; raises MvmrError."""
    if target.suffix in SUFFIXES and target.is_dir():
        raise MvmrError(f"{target} is a folder; give the name of a new file, or of a folder without {target.suffix}")
    if target.suffix not in SUFFIXES and target.is_file():
        raise MvmrError(f"{target} is a file; give a folder, or a file that ends in .parquet or .npy")


def working_folder(target: Path) -> Path:
    """Where the parts of `target` are while it is made: itself, where it is a folder."""
    return target.with_name(f"{target.name}.partial") if target.suffix in SUFFIXES else target


def manifest_file(target: Path) -> Path:
    """Where the manifest of a finished output is."""
    return target.with_suffix(f".{MANIFEST}") if target.suffix in SUFFIXES else target / MANIFEST


def errors_file(target: Path) -> Path:
    """Where the unreadable images of a finished output are listed."""
    return target.with_suffix(f".{ERRORS}") if target.suffix in SUFFIXES else target / ERRORS


def paths_file(target: Path) -> Path:
    """Where the paths of the rows of a ``.npy`` file are, a line to a row."""
    return target.with_suffix(".paths.txt")


def read_finished(target: Path, settings: Mapping[str, Any], *, resume: bool) -> dict[str, Any] | None:
    """The manifest of the one file `target`, when this very run has finished it before; None where it is not there.

    Raises: MvmrError for a file of another run, or when `resume` was not asked for.
    """
    if target.suffix not in SUFFIXES or not os.path.lexists(target):
        return None
    if not manifest_file(target).is_file():
        raise MvmrError(f"{target} exists and has no {manifest_file(target).name} beside it; give another --out")
    manifest = read_manifest(manifest_file(target))
    if not resume:
        raise MvmrError(f"{target} holds finished embeddings ({manifest['rows']} rows); give another --out")
    check_same(target, differences(manifest["settings"], settings), cure="another --out")
    clear(target)
    return manifest


def gather(parts: Parts, target: Path) -> None:
    """Put all rows into the one file `target`, what stands beside it first; nothing to do where it is a folder.

    Raises: MvmrError when the disk is full; the parts stay.
    """
    if target.suffix not in SUFFIXES:
        return
    try:
        with atomic(errors_file(target)) as temporary:
            shutil.copyfile(parts.folder / ERRORS, temporary)
        with atomic(target) as temporary:
            _parquet(parts, temporary) if target.suffix == ".parquet" else _npy(parts, temporary, target)
            size, digest = temporary.stat().st_size, staging.digest(temporary) or ""
            part = Part(target.name, parts.rows, parts.errors, size, digest)
            write_json(manifest_file(target), parts.content | {"parts": [part.__dict__]})
    except (MvmrError, OSError) as error:
        raise MvmrError(
            f"cannot write {target}: {failure_reason(error)}; all parts of it are whole in {parts.folder}: mend this "
            "and run again with --resume"
        ) from error


def clear(target: Path) -> None:
    """Remove the parts once the one file is there."""
    if target.suffix in SUFFIXES and target.exists():
        shutil.rmtree(working_folder(target), ignore_errors=True)


def _parquet(parts: Parts, temporary: Path) -> None:
    with columns.writer(temporary, parts.schema) as writer:
        writer.write_table(parts.schema.empty_table())
        for part in parts.done:
            writer.write_table(_table(parts, part).replace_schema_metadata(parts.schema.metadata))


def _npy(parts: Parts, temporary: Path, target: Path) -> None:
    dim = parts.schema.field("embedding").type.list_size
    header = {"descr": "<f4", "fortran_order": False, "shape": (parts.rows, dim)}
    with temporary.open("wb") as file, atomic(paths_file(target)) as paths, paths.open("w", encoding="utf-8") as lines:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts.done:
            table = _table(parts, part)
            for chunk in table["embedding"].chunks:
                file.write(chunk.flatten().to_numpy().astype("<f4", copy=False).tobytes())
            lines.writelines(f"{path}\n" for path in table["path"].to_pylist())


def _table(parts: Parts, part: Part) -> pa.Table:
    return parquet.read_table(parts.folder / part.file)
