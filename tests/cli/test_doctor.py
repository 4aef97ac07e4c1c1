import json
import sys
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from mvmr.cli.doctor import examine
from mvmr.cli.main import main
from mvmr.cli.support import Support
from mvmr.cli.table import COMMANDS
from mvmr.errors import EXTRAS
from mvmr.export.tensorrt import rtx_build, rtx_provider
from mvmr.export.tensorrt.check import data_centre
from tests.export.tensorrt import tensorrt_rtx


def test_every_command_is_examined() -> None:
    assert list(examine().commands) == list(COMMANDS)
    assert {entry.extra for entry in COMMANDS.values()} <= {None, *EXTRAS}


def test_a_complete_machine_is_ready(cache: Path) -> None:
    report = examine()
    assert set(report.commands.values()) == {None}
    assert report.machine.cores >= 1
    assert report.cache.path == str(cache)
    assert report.cache.writable
    assert report.cache.free > 0
    assert None not in report.extras["train"].values()


def test_two_builds_of_onnxruntime_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine().problems == ()
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.31.1" if name == "onnxruntime-gpu" else real(name))
    (problem,) = examine().problems
    assert "pip uninstall -y onnxruntime" in problem


def test_an_install_without_torch_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in EXTRAS["train"]:
        monkeypatch.setitem(sys.modules, package, None)
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["devices"] == []
    assert report["commands"]["info"] is None
    assert report["commands"]["distill"].endswith("pip install 'mvmr[train]'")
    shown = CliRunner().invoke(main, ["doctor"])
    assert shown.exit_code == 0
    if report["tensorrt"]["version"] is None:
        assert "mvmr export --trt" in " ".join(shown.stdout.split())
    assert "mvmr[train]" in shown.stdout


def test_each_tensorrt_says_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_rtx.require_wheels()
    rtx = examine().tensorrt_rtx
    assert rtx.version == rtx_provider.version()
    assert rtx.export is None  # takes no GPU
    monkeypatch.setattr(rtx_build, "bindings_version", lambda: "1.6.0.9")
    assert "which don't fit it" in str(examine().tensorrt_rtx.export)
    shown = " ".join(CliRunner().invoke(main, ["doctor"]).stdout.split())
    assert f"TensorRT for RTX │ {rtx.version}" in shown
    assert "1.6.0.9" in shown
    for package in (rtx_provider.PACKAGE, rtx_build.BINDINGS):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(rtx_build, "bindings_version", lambda: None)
    assert "not installed: pip install 'mvmr[rtx]'" in str(examine().tensorrt_rtx)
    assert str(Support(version="11.4.0", export=None, serve="lacks a GPU")) == (
        "11.4.0\nexport: ready\nserve: lacks a GPU"
    )


def test_the_data_centres_tensorrt_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["TensorrtExecutionProvider"])
    check = data_centre("11.4.0.106")
    assert check.version == "11.4.0.106"
    assert "torch finds no CUDA device" in str(check.export)
    assert check.serve is None


def test_broken_packages_are_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "onnxruntime"):
        broken = ModuleType(name)
        broken.__spec__ = ModuleSpec(name, loader=None)
        monkeypatch.setitem(sys.modules, name, broken)
    report = examine()
    assert report.devices == ()
    assert report.onnxruntime is None
    assert [problem.split()[0] for problem in report.problems] == ["torch", "onnxruntime"]
    assert CliRunner().invoke(main, ["doctor"]).exit_code == 0


def test_a_cache_that_cannot_be_a_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MVMR_CACHE", str(tmp_path / "file"))
    assert not examine().cache.writable
    assert "NOT WRITABLE" in CliRunner().invoke(main, ["doctor"]).stdout
