"""manifest.json of a run of the batch job: what it embeds, how, and which parts are there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvmr import strict_json
from mvmr.bundles.manifest import is_inside
from mvmr.errors import MvmrError, one_line, shorten
from mvmr.storage.atomic import is_disk_full

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Part:
    """A part as the manifest lists it; rows and errors together are its images."""

    file: str
    rows: int
    errors: int
    bytes: int
    sha256: str


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises: MvmrError for one that is missing, broken, or of a newer mvmr, or names a part in another folder.
    """
    try:
        content = strict_json.read(path)
        form = content["format"]
        if form == FORMAT:
            _check(content, path)
    except OSError as error:
        raise MvmrError(f"cannot read {path}: {error.strerror}; give the output of `mvmr embed`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = shorten(repr(error))
        raise MvmrError(f"{path} is not the manifest of a run of mvmr embed ({reason}); give another --out") from error
    if form != FORMAT:
        cure = f"this mvmr reads {FORMAT}; upgrade with `pip install -U mvmr`"
        raise MvmrError(f"{path} has format {shorten(repr(form))}, {cure}")
    return content


def _check(content: Mapping[str, Any], path: Path) -> None:
    """Refuse values that no run writes; raises ValueError, KeyError or TypeError, MvmrError for a part elsewhere."""
    if content["state"] not in ("running", "finished") or not isinstance(content["settings"], dict):
        raise ValueError("its state or its settings")
    parts = [Part(**part) for part in content["parts"]]
    for name, numbers in [("manifest", content), *((part.file, vars(part)) for part in parts)]:
        # Another path would let a stranger's run name any file of this machine.
        if not isinstance(name, str) or not is_inside(name) or "/" in name:
            raise MvmrError(f"{path} names the part {shorten(name)!r}, which is no file beside it; give another --out")
        for key in ("rows", "errors"):
            value = numbers[key]
            if type(value) is not int or value < 0:
                raise ValueError(f"{key} = {value!r} of {name}")


def run_id(settings: Mapping[str, Any]) -> str:
    """What a part carries to show which run it is of."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def failure_reason(error: BaseException) -> str:
    """A few words on why nothing could be written."""
    cause: BaseException | None = error
    while isinstance(cause, MvmrError):
        cause = cause.__cause__
    if is_disk_full(error):
        return "the disk is full"
    return (isinstance(cause, OSError) and cause.strerror) or one_line(cause or error)
