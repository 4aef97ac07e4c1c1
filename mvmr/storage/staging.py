"""Change several files of a folder at one moment, whatever the moment at which the process is killed.

The folder has an index: one file that lists the sha256 of every other. New content waits below `.staged/`; writing the
new index (one rename) is the change itself; then the files are moved to their places. Between the two, `locate` finds
them where they wait. What waits without being in the index is left over from a change that never happened.
"""

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from mvmr.errors import MvmrError
from mvmr.storage.atomic import atomic, sync

FOLDER = ".staged"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.partial(\..+)?")  # as `mvmr.storage.atomic.atomic` names them


def digest(path: Path) -> str | None:
    """Return the sha256 of a file as 64 hex digits, None when there is no such file, or a pipe or device in its place.

    Raises: MvmrError when it is there but cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device would be read for ever
            return None
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise MvmrError(f"cannot read {path}: {error.strerror}; check its permissions and the disk") from error


def locate(folder: Path, name: str, sha256: str) -> Path:
    """Return where the file `name` with this sha256 is: waiting, or (unless it is damaged) in its place."""
    waiting = folder / FOLDER / name
    return waiting if digest(waiting) == sha256 else folder / name


def located_digest(folder: Path, name: str, sha256: str) -> str | None:
    """Return the digest of what `locate` would return, in one look: it may be moved to its place meanwhile."""
    waiting = digest(folder / FOLDER / name)
    return waiting if waiting == sha256 else digest(folder / name)


def stage(folder: Path, name: str, content: bytes | Path) -> str:
    """Let `content` (bytes, or a file to copy) wait to become the file `name`; return its sha256."""
    waiting = folder / FOLDER / name
    with atomic(waiting) as temporary:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            shutil.copyfile(content, temporary)
    _sync_up(waiting.parent, folder)
    return digest(waiting) or ""


def settle(folder: Path, index: Mapping[str, str]) -> None:
    """Move what waits and is in the index (sha256 by name) to its place; remove what else is left over."""
    if (folder / FOLDER).exists():
        for name, sha256 in index.items():
            waiting, target = folder / FOLDER / name, folder / name
            if digest(waiting) == sha256:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(waiting, target)
                _sync_up(target.parent, folder)
        shutil.rmtree(folder / FOLDER)
    sweep(folder)


def sweep(folder: Path) -> None:
    """Remove the temporary files that a killed `atomic` left in `folder` (not below it)."""
    for stray in folder.iterdir() if folder.is_dir() else ():
        if _TEMPORARY.fullmatch(stray.name) and stray.is_file():
            stray.unlink()


def backup_path(folder: Path) -> Path:
    """Return where `exchange` keeps the old `folder` while the new one takes its place."""
    return folder.with_name(f".{folder.name}.replaced")


def exchange(new: Path, folder: Path, index: str) -> None:
    """Rename `new` to `folder`; what stands there, if anything, is moved aside first and removed after.

    index: the file that makes a folder worth reading; removed first, so that half an old folder is never read.

    Raises: OSError when the rename is not possible; what stood there stands there again.
    """
    old = backup_path(folder)
    if folder.exists():
        _remove(old, index)
        os.rename(folder, old)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(new, folder)
    except BaseException:
        if old.exists():
            os.rename(old, folder)
        raise
    sync(folder.parent)
    _remove(old, index)


def _remove(folder: Path, index: str) -> None:
    if folder.exists():
        (folder / index).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _sync_up(low: Path, high: Path) -> None:
    # A new folder's name is as much at risk from a power cut as a new file's.
    for folder in (low, *low.parents):
        sync(folder)
        if folder == high:
            break
