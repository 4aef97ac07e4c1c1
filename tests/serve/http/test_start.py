"""What keeps `mvmr serve` from starting is one line, before the door opens."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from mvmr.bundles import bundle as bundles
from mvmr.cli.main import main
from mvmr.export.artifacts import ARTIFACTS
from mvmr.serve.http import run
from tests.serve import serving
from tests.serve.serving import damage

FP32 = ARTIFACTS["onnx"].file


class Started(Exception):
    """It has opened its door."""


@pytest.fixture
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def raise_started(*arguments: object) -> None:
        raise Started

    monkeypatch.setattr(run, "_run", raise_started)


def refusal(*argv: str | Path) -> str:
    """The one line that the command ends with; click says how it is used before, where a value is none for a flag."""
    result = CliRunner().invoke(main, ["serve", *map(str, argv), *([] if "--port" in argv else ["--port", "0"])])
    lines = result.stderr.splitlines()
    if result.exit_code == 2:
        assert lines.pop(0).startswith("Usage: ")
        return lines[-1].removeprefix("Error: ")
    assert result.exit_code == 1, result.exception or result.output
    (line,) = lines
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize(
    ("name", "content", "listed", "fault"),
    [
        ("bundle.json", b"{", False, "bundle.json is not valid JSON"),
        ("bundle.json", None, False, "it holds no bundle.json"),
        (FP32, None, False, "onnx/encoder.fp32.onnx is missing"),
        (FP32, b"", False, "onnx/encoder.fp32.onnx has changed since it was written"),
        (FP32, b"not an ONNX file", True, "onnxruntime cannot load"),
        ("onnx/encoder.fp32.json", b"{}", False, "onnx/encoder.fp32.json has changed"),
        ("onnx/encoder.fp32.json", b'{"canary": "***"}', True, "encoder.fp32.json is not the report of an export"),
        ("onnx/encoder.fp32.json", b'{"canary": 5}', True, "encoder.fp32.json is not the report of an export"),
        ("onnx/encoder.fp32.json", b'{"canary": "AAAA"}', True, "encoder.fp32.json is not the report of an export"),
        ("onnx/encoder.fp32.json", b'{"canary": "AAAAAAAAAAAAAAAA"}', True, "encoder.fp32.json is not the report"),
        ("heads/animals/head.safetensors", b"", False, "heads/animals/head.safetensors has changed"),
        ("heads/animals/head.json", None, False, "heads/animals/head.json is missing"),
    ],
)  # fmt: skip
def test_a_bundle_that_cannot_be_read(
    path: Path, tmp_path: Path, name: str, content: bytes | None, listed: bool, fault: str
) -> None:
    mine = serving.copy_bundle(path, tmp_path)
    damage(mine, name, content, listed=listed)
    message = refusal(mine)
    assert fault in message
    assert str(mine) in message


@pytest.mark.usefixtures("no_start")
def test_no_bundle_or_nothing_exported(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(tmp_path / "gone") == f"no bundle at {tmp_path / 'gone'}: there is no such folder"
    monkeypatch.chdir(tmp_path)
    assert "no bundle below runs" in refusal()
    assert "has no int8 file; make it by `mvmr export" in refusal(path, "--precision", "int8")
    manifest = json.loads((path / "bundle.json").read_text())
    mine = serving.copy_bundle(path, tmp_path)
    manifest["files"] = {name: digest for name, digest in manifest["files"].items() if not name.startswith("onnx")}
    (mine / "bundle.json").write_text(json.dumps(manifest))
    assert f"bundle {mine} has nothing exported" in refusal(mine)


@pytest.mark.usefixtures("no_start")
def test_an_export_of_another_student(path: Path, tmp_path: Path) -> None:
    mine = serving.copy_bundle(path, tmp_path)
    manifest = json.loads((mine / "bundle.json").read_text())
    manifest["files"][bundles.ENCODER] = "0" * 64
    (mine / "bundle.json").write_text(json.dumps(manifest))
    assert f"{FP32}: it is stale, made from another student" in refusal(mine)


@pytest.mark.usefixtures("no_start")
def test_a_port_in_use(path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        message = refusal(path, "--port", str(port))
    assert message == f"cannot listen at 127.0.0.1:{port}: Address already in use; give another --port"


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--port", "70000"], "70000"),
        (["--port", "-1"], "-1"),
        (["--host", "256.0.0.1"], "cannot listen at 256.0.0.1:0"),
        (["--host", "192.0.2.1"], "Cannot assign requested address"),
        (["--precision", "fp64"], "unknown precision 'fp64'"),
        (["--provider", "cdua"], "unknown provider 'cdua'"),
        (["--provider", "cuda"], "has no cuda"),
        (["--queue", "10"], "max_items = 64 is more than queue = 10 holds"),
        (["--queue", "0"], "queue = 0 must be at least 1"),
        (["--max-body-mb", "0"], "0.0 must lie between"),
        (["--max-body-mb", "nan"], "nan must lie between"),
        (["--decode-seconds", "nan"], "nan"),
        (["--format", "JPG"], "unknown format 'JPG'; did you mean 'JPEG'"),
        (["--grace", "nan"], "nan must lie between"),
        (["--drain", "nan"], "nan must lie between"),
        (["--api-keys", "gone"], "cannot read the API keys in gone: No such file"),
        (["--tls-cert", "gone"], "https takes both --tls-cert and --tls-key"),
        (["--tls-cert", "gone", "--tls-key", "gone"], "cannot use gone with gone: No such file"),
        (["--tls-cert", __file__, "--tls-key", __file__], Path(__file__).name),
        (["--index", "gone"], "no index at gone"),
    ],
)
def test_settings_that_cannot_be(path: Path, options: list[str], fault: str) -> None:
    assert fault in refusal(path, *options)


@pytest.mark.usefixtures("no_start")
def test_what_is_refused_here_would_start_without_the_fault(path: Path) -> None:
    result = CliRunner().invoke(main, ["serve", str(path), "--port", "0"])
    assert isinstance(result.exception, Started)


@pytest.mark.slow
def test_as_a_process_it_says_one_line_and_ends(path: Path, tmp_path: Path) -> None:
    mine = serving.copy_bundle(path, tmp_path)
    damage(mine, FP32, b"")
    message = serving.refusal(mine)
    assert message.startswith(f"bundle {mine} is damaged: {FP32} has changed since it was written")
