"""JSON that may come from a stranger: what Python's own reader chokes on, or takes too kindly, is a ValueError."""

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from mvmr.errors import MvmrError

MOST_BYTES = 2**26
DEEPEST = 64
_LARGEST = 2**63 - 1


def read(path: Path) -> Any:
    """Read a JSON file.

    Raises: OSError when it can't be read, a FIFO or a device among them, which would never end; ValueError as `parse`
        does, or for more than 64 MiB.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    if status.st_size > MOST_BYTES:
        raise ValueError(f"{status.st_size:,} bytes are too many")
    return parse(path.read_text(encoding="utf-8"))


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises: ValueError, in one line, for what is no JSON, NaN and infinity, numbers beyond 64 bits, text that is no
        Unicode, or values nested more than `DEEPEST` deep.
    """
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite, parse_int=_whole)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} deep") from None
    check_depth(value)
    json.dumps(value, ensure_ascii=False).encode()  # escapes such as \ud800 make text that can't be written anywhere
    return value


def read_object(path: Path, what: str) -> dict[str, Any]:
    """Read a file of the bundle, index or run that must hold a JSON object.

    what: "the description of a head"
    Raises: MvmrError naming the file, in one line.
    """
    try:
        content = read(path)
    except OSError as error:
        raise MvmrError(f"cannot read {path}: {error.strerror}; take a whole copy") from error
    except ValueError as error:
        raise MvmrError(f"{path} is not {what}: {error}; take a whole copy") from error
    if not isinstance(content, dict):
        raise MvmrError(f"{path} is not {what}: it holds no JSON object; take a whole copy")
    return content


def check_depth(value: object) -> None:
    """Raise ValueError for lists and tables nested more than `DEEPEST` deep, where code that walks them would fail."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise ValueError(f"nested more than {DEEPEST} deep")


def _inside(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > 20 or abs(int(text)) > _LARGEST:
        raise ValueError(f"the number {text[:20]} is too large")
    return int(text)
