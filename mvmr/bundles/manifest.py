"""bundle.json: what a student bundle says about itself, read strictly because it may come from a stranger."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path, PurePosixPath
from typing import Any

from mvmr import strict_json
from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError, shorten, unknown

SCHEMA = 2
WIDEST = 2**20  # an embedding; what is wider is a mistake, or meant to take all memory
NAME = "bundle.json"
WEIGHTS = "{weights}"  # in what a teacher was called: its file, whose place is recorded beside it
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RECORD_KEYS = {"command": str, "data": str, "protocol": str, "values": dict}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of bundle.json.

    backbone, options: what the student is, see `mvmr.models.table`
    training: a JSON object: method, teachers (name, weights and identity of each, by the recipe's name for it; empty
        when self-supervised), data (name, fingerprint), seed, steps, recipe (resolved).
    metrics: records, each a JSON object with at least "command" (what made it), "data", "protocol" and
        "values" (numbers by name); a head's record also has "head".
    files: sha256 (hex) of every file of the bundle, by its path inside the bundle, with forward slashes.
    """

    schema: int
    mvmr_version: str
    created: str
    backbone: str
    options: Mapping[str, Any]
    embedding_dim: int
    preprocessing: Preprocess
    training: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    files: Mapping[str, str]

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the linear heads, sorted."""
        parts = [PurePosixPath(name).parts for name in self.files]
        return tuple(sorted(part[1] for part in parts if part[0] == "heads" and part[2:] == ("head.json",)))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `read` turns back into an equal manifest."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        return content | {
            "preprocessing": self.preprocessing.to_dict(),
            "metrics": list(self.metrics),
            "files": dict(sorted(self.files.items())),
        }


def read(path: Path) -> Manifest:
    """Read and check one bundle.json.

    Raises: MvmrError naming the file and what is wrong: unreadable, not JSON, a newer schema, a missing,
        unknown or mistyped key, a file path that leaves the bundle.
    """
    try:
        content = strict_json.read(path)
    except OSError as error:
        raise MvmrError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise MvmrError(f"{path} is not valid JSON ({error}); take the file from a whole copy of the bundle") from error
    return _parse(content, path)


def check_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a metrics record as a plain JSON object, or raise MvmrError for one that bundle.json cannot hold."""
    for key, kind in _RECORD_KEYS.items():
        if not isinstance(record.get(key), kind):
            seen = shorten(repr(record.get(key)))
            raise MvmrError(f"metrics record has {key} = {seen}; it must be of type {kind.__name__}")
    values: dict[str, int | float] = {}
    for name, value in record["values"].items():
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            whose, seen = shorten(record["protocol"]), f"{shorten(name)} = {shorten(repr(value))}"
            raise MvmrError(f"metrics record of {whose!r} has {seen}; give a finite number")
        values[name] = int(value) if isinstance(value, Integral) else float(value)  # numpy's numbers are not JSON
    return plain_json({**record, "values": values}, "metrics record")


def plain_json(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return `value` as JSON would give it back, or raise MvmrError if JSON cannot hold it.

    Tuples become lists. Text that is no Unicode (a folder's name may be any bytes) gets question marks.
    """
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        content: dict[str, Any] = json.loads(text.encode("utf-8", "replace"))
    except (TypeError, ValueError) as error:
        raise MvmrError(f"{what} cannot be written to {NAME}: {error}") from error
    return content


def _parse(content: object, path: Path) -> Manifest:
    if not isinstance(content, dict) or "schema" not in content:
        raise MvmrError(f"{path} is not a bundle's manifest: it has no schema version")
    schema = content["schema"]
    if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
        raise MvmrError(f"{path} has schema = {schema!r}; it must be a whole number from 1 to {SCHEMA}")
    if schema > SCHEMA:
        writer = " ".join(str(content.get("mvmr_version", "of another version")).split())[:40]
        raise MvmrError(
            f"{path} has schema {schema}, this mvmr reads up to {SCHEMA}; it was written by mvmr {writer}: "
            "upgrade with `pip install -U mvmr`"
        )
    if schema == 1:
        content = _from_schema_1(content)
    kinds = {field.name: _KINDS[field.name] for field in fields(Manifest)}
    if missing := [key for key in kinds if key not in content]:
        raise MvmrError(f"{path} lacks {', '.join(missing)}; take the file from a whole copy of the bundle")
    for key, value in content.items():
        if key not in kinds:
            raise MvmrError(f"{path}: {unknown('key', key, kinds)}")
        if not isinstance(value, kinds[key]) or (isinstance(value, bool) and kinds[key] is not bool):
            raise MvmrError(f"{path} has {key} = {shorten(value)!r}; it must be of type {kinds[key].__name__}")
    if not 1 <= content["embedding_dim"] <= WIDEST:
        raise MvmrError(f"{path} has embedding_dim = {content['embedding_dim']}; it must lie between 1 and {WIDEST}")
    _check_files(content["files"], path)
    try:
        preprocessing = Preprocess.from_dict(content["preprocessing"])
        metrics = tuple(check_record(record) for record in content["metrics"] if _is_object(record))
    except (MvmrError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise MvmrError(f"{path}: {error}") from error
    return Manifest(**(content | {"preprocessing": preprocessing, "metrics": metrics}))


def _from_schema_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest of before students were anything but ResNets."""
    renames = {"architecture": "backbone", "small_kernel": "options"}
    today = {renames.get(key, key): value for key, value in content.items()}
    if isinstance(today.get("options"), bool):
        today["options"] = {"small_kernel": today["options"]}
    return today | {"schema": SCHEMA}


_KINDS = {
    "schema": int,
    "mvmr_version": str,
    "created": str,
    "backbone": str,
    "options": dict,
    "embedding_dim": int,
    "preprocessing": dict,
    "training": dict,
    "metrics": list,
    "files": dict,
}


def _check_files(files: Mapping[str, object], path: Path) -> None:
    for name, digest in files.items():
        # A path that leaves the bundle would let a stranger's bundle name any file of this machine.
        if not is_inside(name):
            raise MvmrError(f"{path} lists the file {shorten(name)!r}, which is not a plain path inside the bundle")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise MvmrError(f"{path} lists {name} with sha256 {shorten(digest)!r}; it must be 64 hex digits")


def is_inside(name: str) -> bool:
    """Say whether `name` is a plain, printable, relative path with forward slashes that cannot leave its folder."""
    return name.isprintable() and not {"\\", ":"} & set(name) and not {"", ".", ".."} & set(name.split("/"))


def _is_object(value: object) -> bool:
    if not isinstance(value, dict):
        raise TypeError(f"metrics holds {shorten(value)!r}; each record must be an object")
    return True
