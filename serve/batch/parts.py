"""The output of a batch job while it grows: Parquet parts, each whole or not there, and a manifest that lists them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from mvmr.data.image_bytes import Rejected
from mvmr.errors import MvmrError
from mvmr.serve.batch import columns
from mvmr.serve.batch.manifest import FORMAT, MANIFEST, Part, failure_reason, read_manifest, run_id
from mvmr.storage import staging
from mvmr.storage.atomic import atomic, write_json
from mvmr.storage.lock import LOCK, claim
from mvmr.storage.runs import check_same, differences

ERRORS = "errors.parquet"
_ERRORS_OF_PARTS = "errors"


class Parts:
    """The parts in a folder, made by `open_parts`.

    ``part-00000.parquet`` and so on hold the readable images, each a stretch of the source; the unreadable ones of a
    part go to ``errors/part-00000.parquet``, which is written before it, and all of them to ``errors.parquet`` in the
    end. A part is there when its file is; the manifest follows.
    """

    def __init__(self, folder: Path, schema: pa.Schema, content: dict[str, Any], done: Sequence[Part]):
        self.folder, self.content, self.done = folder, content, list(done)
        self.run = run_id(content["settings"])
        self.schema = schema

    @property
    def rows(self) -> int:
        """Rows in all whole parts."""
        return sum(part.rows for part in self.done)

    @property
    def errors(self) -> int:
        """Unreadable images among those of the whole parts."""
        return sum(part.errors for part in self.done)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return bool(self.content["state"] == "finished")

    def write(self, table: pa.Table, rejected: Sequence[tuple[str, Rejected]]) -> None:
        """Add the next part; raises MvmrError naming it when the disk is full or refuses."""
        number = len(self.done)
        path = self.folder / part_name(number)
        metadata = {"mvmr_run": self.run, "mvmr_part": str(number), "mvmr_errors": str(len(rejected))}
        schema = self.schema.with_metadata({**(self.schema.metadata or {}), **metadata})
        try:
            if rejected:
                _write(self.folder / _ERRORS_OF_PARTS / path.name, columns.errors(rejected))
            _write(path, table.replace_schema_metadata(schema.metadata))
            part = Part(path.name, table.num_rows, len(rejected), path.stat().st_size, staging.digest(path) or "")
            self.done.append(part)
            self._save()
        except (MvmrError, OSError) as error:
            raise MvmrError(
                f"cannot write {path}: {failure_reason(error)}; the {number} parts before it are whole: mend this and "
                "go on with --resume"
            ) from error

    def finish(self) -> None:
        """Gather the unreadable images of all parts, and say in the manifest that all is there."""
        with atomic(self.folder / ERRORS) as temporary, columns.writer(temporary, columns.ERRORS) as writer:
            writer.write_table(columns.errors([]))
            for part in self.done:
                if part.errors:
                    writer.write_table(parquet.read_table(self.folder / _ERRORS_OF_PARTS / part.file))
        self.content |= {"state": "finished", "finished": _now()}
        self._save()
        self.tidy()

    def abandon(self) -> None:
        """Take back that a run has begun."""
        (self.folder / MANIFEST).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove what is of no more use once all is finished."""
        shutil.rmtree(self.folder / _ERRORS_OF_PARTS, ignore_errors=True)

    def _save(self) -> None:
        total = {"rows": self.rows, "errors": self.errors, "parts": [asdict(part) for part in self.done]}
        self.content |= total
        write_json(self.folder / MANIFEST, self.content)


def check(folder: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Look whether a run of these settings may begin, or go on, in `folder`; changes nothing.

    Raises: MvmrError where it holds something else, another run, or a run while `resume` was not asked for.
    """
    try:
        inside = {entry.name for entry in folder.iterdir()} if os.path.lexists(folder) else set()
    except OSError as error:
        raise MvmrError(f"{folder} can't be the output folder: {error.strerror}; give another --out") from error
    if MANIFEST not in inside:
        if strange := sorted(name for name in inside if not name.startswith(".")):
            raise MvmrError(
                f"{folder} holds {strange[0]!r} and no run of mvmr embed; it stays untouched: give another --out"
            )
        return
    manifest = read_manifest(folder / MANIFEST)
    if not resume:
        if manifest["state"] == "finished":
            raise MvmrError(f"{folder} holds finished embeddings ({manifest['rows']} rows); give another --out")
        raise MvmrError(f"{folder} holds an unfinished run; go on with it by --resume, or give another --out")
    check_same(folder, differences(manifest["settings"], settings), cure="another --out")


@contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other processes out of it that ask; what killed processes left half written goes.

    Raises: MvmrError when it can't be made, or another process works in it.
    """
    with claim(folder, "writing"):
        try:
            staging.sweep(folder)
            staging.sweep(folder / _ERRORS_OF_PARTS)
            yield
        finally:
            if folder.is_dir() and {entry.name for entry in folder.iterdir()} <= {LOCK}:  # nothing came of it
                shutil.rmtree(folder, ignore_errors=True)


def open_parts(
    folder: Path, schema: pa.Schema, settings: Mapping[str, Any], facts: Mapping[str, Any], *, resume: bool
) -> Parts:
    """Begin a run in a claimed folder, or go on behind the last of its whole parts.

    settings: what must be the same to go on, JSON values by name; facts: what else the manifest is to say
    Raises: as `check`.
    """
    check(folder, settings, resume=resume)
    if not (folder / MANIFEST).exists():
        content = {"format": FORMAT, **facts, "created": _now(), "state": "running", "settings": dict(settings)}
        parts = Parts(folder, schema, content, [])
        parts._save()
        return parts
    content = read_manifest(folder / MANIFEST)
    listing = [Part(**part) for part in content["parts"]]
    is_whole = (folder / ERRORS).is_file() and all(_is_as_listed(folder, part) for part in listing)
    if content["state"] == "finished" and is_whole:
        return Parts(folder, schema, content, listing)
    content["state"] = "running"  # when it was finished, some of it was lost since: it is made again
    done: list[Part] = []
    while (part := _read_part(folder, len(done), listing, run_id(settings))) is not None:
        done.append(part)
    return Parts(folder, schema, content, done)


def _is_as_listed(folder: Path, part: Part) -> bool:
    path = folder / part.file
    return path.is_file() and path.stat().st_size == part.bytes


def _read_part(folder: Path, number: int, listing: Sequence[Part], run: str) -> Part | None:
    """Part `number`, if it is there in full and of this run, with its unreadable images."""
    path = folder / part_name(number)
    try:
        if number < len(listing) and not _is_as_listed(folder, listing[number]):
            return None
        footer = parquet.read_metadata(path)
        metadata = footer.metadata or {}
        if (metadata.get(b"mvmr_run"), metadata.get(b"mvmr_part")) != (run.encode(), str(number).encode()):
            return None
        errors = int(metadata[b"mvmr_errors"])
        if errors and parquet.read_metadata(folder / _ERRORS_OF_PARTS / path.name).num_rows != errors:
            return None
        if number < len(listing):
            return listing[number]
        return Part(path.name, footer.num_rows, errors, path.stat().st_size, staging.digest(path) or "")
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None


def part_name(number: int) -> str:
    """The file name of a part."""
    return f"part-{number:05d}.parquet"


def _write(path: Path, table: pa.Table) -> None:
    with atomic(path) as temporary, columns.writer(temporary, table.schema) as writer:
        writer.write_table(table)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
