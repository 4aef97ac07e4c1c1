"""What `mvmr app` says when it can't start: one line and an exit status, before anything is embedded."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from mvmr.cli.main import main
from tests.serve import serving


def refusal(*arguments: str) -> str:
    done = CliRunner().invoke(main, ["app", *arguments])
    assert done.exit_code == 1, done.output
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no bundle below runs" in refusal("--port", "0")


def test_a_gallery_that_is_empty_or_not_there_or_not_given(tmp_path: Path) -> None:
    bundle = str(serving.bundle(tmp_path))
    (tmp_path / "empty").mkdir()
    assert "holds nothing" in refusal(bundle, "--gallery", str(tmp_path / "empty"), "--port", "0")
    assert "does not exist" in refusal(bundle, "--gallery", str(tmp_path / "gone"), "--port", "0")
    assert "--gallery photos/" in refusal(bundle, "--port", "0")


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert f"cannot listen at 127.0.0.1:{port}" in refusal(str(serving.bundle(tmp_path)), "--port", str(port))


def test_a_service_that_is_not_there_and_numbers_that_can_not_be(tmp_path: Path) -> None:
    bundle = str(serving.bundle(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    assert "can't be reached" in refusal("--service", url, "--gallery", "sample:digits", "--port", "0")
    assert "k = 0" in refusal(bundle, "--k", "0", "--port", "0")
    assert "limit of 2" in refusal(bundle, "--gallery", "sample:digits", "--limit", "1", "--port", "0")
