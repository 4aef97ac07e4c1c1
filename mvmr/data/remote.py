"""Files behind an address, by fsspec: found, read, and told from what is only out of reach for a while."""

from __future__ import annotations

import os
from typing import Any

import fsspec

from mvmr.data import decoding
from mvmr.data.image_bytes import Rejected
from mvmr.data.readable import too_many_bytes
from mvmr.errors import MvmrError, missing_extra

_TRIES = 3


def is_address(text: str) -> bool:
    """Say whether `text` is an address such as ``s3://bucket/prefix`` and no path."""
    return "://" in text


def file_system(address: str) -> Any:
    """The fsspec file system of an address; raises MvmrError where its package lacks, or nobody knows it."""
    try:
        return fsspec.core.url_to_fs(address)[0]
    except Exception as error:
        raise _refusal(address, error) from error


def find(address: str) -> tuple[Any, list[tuple[str, str]]]:
    """The file system, and name and state (size, and etag or time) of each file below `address` or matching its glob.

    Sorted by the bytes of their names.

    Raises: MvmrError when it can't be listed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(address)
        entries = fs.glob(path, detail=True) if _has_magic(path) else fs.find(path, detail=True)
        if not entries and not _has_magic(path) and fs.isfile(path):
            entries = {path: fs.info(path)}
    except Exception as error:  # each file system raises its own
        raise _refusal(address, error) from error
    files = [(name, state(info)) for name, info in entries.items() if info.get("type") == "file"]
    return fs, sorted(files, key=lambda file: os.fsencode(file[0]))


def expand(address: str) -> list[str]:
    """The addresses that the glob `address` matches, sorted; itself where it is no glob.

    Raises: MvmrError when it can't be listed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(address)
        return sorted(map(fs.unstrip_protocol, fs.glob(path))) if _has_magic(path) else [address]
    except Exception as error:
        raise _refusal(address, error) from error


def info(address: str) -> tuple[int, str]:
    """Size in bytes, and state, of one file; raises MvmrError when it can't be looked at."""
    try:
        fs, path = fsspec.core.url_to_fs(address)
        details = fs.info(path)
    except Exception as error:
        raise _refusal(address, error) from error
    return int(details.get("size") or 0), state(details)


def read(fs: Any, path: str, most: float) -> bytes | Rejected:
    """The bytes of one file; `Rejected` where there is none, or more of them than `most`.

    Raises: MvmrError for anything else after three tries: a network that is down must not make a million images count
        as unreadable.
    """
    for left in reversed(range(_TRIES)):
        try:
            content = bytes(fs.cat_file(path))  # to ask for the size before would be a request more for each
            return content if len(content) <= most else too_many_bytes(len(content), most)
        except (FileNotFoundError, IsADirectoryError) as error:
            return Rejected("unreadable", decoding.reason(error))
        except Exception as error:
            if not left:
                raise MvmrError(
                    f"cannot read {path}: {decoding.reason(error)}; check the connection and your credentials, then "
                    "go on with --resume"
                ) from error
    raise AssertionError("unreachable")


def open_stream(address: str) -> Any:
    """A binary stream of one large file, read from its beginning on; raises MvmrError when it can't be opened."""
    try:
        fs, path = fsspec.core.url_to_fs(address)
        return fs.open(path, "rb", block_size=8 * 2**20, cache_type="readahead")
    except Exception as error:
        raise _refusal(address, error) from error


def state(info: dict[str, Any]) -> str:
    """What changes when a file does: its size, and its etag or time where the file system knows one."""
    stamp = info.get("ETag") or info.get("LastModified") or info.get("mtime") or info.get("created") or ""
    return f"{info.get('size')} {stamp}"


def _has_magic(path: str) -> bool:
    return any(letter in path for letter in "*?[")


def _refusal(address: str, error: Exception) -> MvmrError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and (extra := missing_extra(cause)):
            return extra
        cause = cause.__cause__
    return MvmrError(f"cannot read {address}: {decoding.reason(error)}; check the address and your credentials")
