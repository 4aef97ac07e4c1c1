import errno
import json
import os
from pathlib import Path

import pytest

from mvmr.errors import MvmrError
from mvmr.storage.atomic import atomic, cache_dir, is_disk_full, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_publishes_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "weights.npy"
    with atomic(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == target.suffix
        temporary.write_bytes(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert names(target.parent) == ["weights.npy"]


def test_atomic_keeps_the_old_file_when_the_block_raises(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(KeyboardInterrupt), atomic(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_atomic_names_a_full_disk(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    with pytest.raises(MvmrError, match=r"disk full while writing .*a\.bin"), atomic(target) as temporary:
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_known_from_the_system_and_from_a_native_writer() -> None:
    with pytest.raises(OSError, match="space") as caught, Path("/dev/full").open("wb", buffering=0) as file:
        file.write(b"x")
    assert is_disk_full(caught.value)
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(RuntimeError("shape mismatch"))


def test_atomic_where_a_folder_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MvmrError, match="cannot create folder"), atomic(tmp_path / "file" / "a.txt"):
        pytest.fail("the block must not run")


def test_write_json_refuses_nan_and_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"ä": [1, 2.5, None]})
    with pytest.raises(ValueError, match="JSON"):
        write_json(target, {"loss": float("nan")})
    assert json.loads(target.read_text(encoding="utf-8")) == {"ä": [1, 2.5, None]}


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MVMR_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("MVMR_CACHE")
    assert cache_dir() == tmp_path / "shared" / "mvmr"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "mvmr"
    assert not cache_dir().exists()
