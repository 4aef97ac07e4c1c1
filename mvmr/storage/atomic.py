"""Files that are whole or not there: written under a temporary name, fsynced, renamed."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mvmr.errors import MvmrError

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def cache_dir() -> Path:
    """Return the folder for what can be computed again: $MVMR_CACHE, $XDG_CACHE_HOME/mvmr or ~/.cache/mvmr.

    The folder is not created here; `atomic` creates it when a first file is written.
    """
    if mvmr_cache := os.environ.get("MVMR_CACHE"):
        return Path(mvmr_cache).expanduser()
    if xdg_cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg_cache).expanduser() / "mvmr"
    return Path.home() / ".cache" / "mvmr"


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written to it becomes `path` when the block ends well.

    The file is fsynced, renamed over `path`, and the folder fsynced, so a reader (or a machine that lost
    power) sees the old file or the new one, never a part. When the block raises, the temporary file is
    removed and `path` stays as it was. Missing parent folders are created. The temporary name keeps the
    suffix, because writers such as `numpy.save` look at it.

    Raises: MvmrError when the folder cannot be written to or the disk is full.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{os.urandom(4).hex()}.partial{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MvmrError(f"cannot create folder {target.parent}: {error.strerror}; choose another place") from error
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise MvmrError(f"disk full while writing {target}; free some space and run again") from error
        if isinstance(error, OSError) and error.filename in {str(temporary), os.fspath(temporary)}:
            raise MvmrError(f"cannot write {target}: {error.strerror}; check the folder's permissions") from error
        raise


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Say whether `error` means a full disk, also when a native writer has only passed on its text.

    safetensors and torch raise their own classes, with the operating system's words inside.
    """
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OSError) and current.errno in _DISK_FULL:
            return True
        if any(os.strerror(code) in str(current) for code in _DISK_FULL):
            return True
        current = current.__cause__ or current.__context__
    return False


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 through `atomic`."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as indented JSON through `atomic`; NaN and infinity are refused, for JSON has none.

    Raises: ValueError for NaN or infinity, TypeError for what JSON cannot hold; the old file stays.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
