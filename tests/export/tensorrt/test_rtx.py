"""TensorRT for RTX: a session by onnxruntime's plug-in calls, on a double; what is missing, told; for real on a GPU.

The double stands for the plug-in and its GPU alone, and computes on the processor; onnxruntime's own classes take the
calls where they can without a GPU, and a test below holds the others to their signatures.
"""

import ctypes.util
import functools
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

from mvmr.cli.main import main
from mvmr.errors import MvmrError
from mvmr.export.onnx.graph import to_onnx
from mvmr.export.onnx.session import Session
from mvmr.export.tensorrt import rtx_build, rtx_provider
from tests.export.onnx.test_session import SIZE, a_model, images
from tests.export.tensorrt import tensorrt_rtx
from tests.export.tensorrt.tensorrt_double import cosines, small_student

NEEDS_DRIVER = "needs an NVIDIA GPU and its driver; libcuda.so.1 is not here"
STATE = onnxruntime.capi.onnxruntime_pybind11_state


class Plugin:
    """onnxruntime with TensorRT for RTX of `version` registered, on a GPU with this PCI id (None: on none).

    calls: what was asked of onnxruntime, in order; runs: the batches; providers: what a session says it runs on.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, *, gpu: int | None = 0x2684) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.runs: list[int] = []
        self.providers = [rtx_provider.PROVIDER, "CPUExecutionProvider"]
        self.refusal: Exception | None = None
        self.gpus = [] if gpu is None else [device(gpu), device(gpu + 1)]
        self._registered = False
        self._real = onnxruntime.InferenceSession
        self.install(monkeypatch, folder)
        # What was registered before is forgotten, and what this test registers when it ends.
        monkeypatch.setattr(rtx_provider, "_register", functools.cache(rtx_provider._register.__wrapped__))
        monkeypatch.setattr(onnxruntime, "register_execution_provider_library", self.register)
        monkeypatch.setattr(onnxruntime, "get_ep_devices", self.devices)
        monkeypatch.setattr(onnxruntime, "SessionOptions", lambda: settings(self))
        monkeypatch.setattr(onnxruntime, "InferenceSession", self.session)

    def install(self, monkeypatch: pytest.MonkeyPatch, folder: Path, version: str = "1.7.1") -> None:
        package = folder / version / rtx_provider.PACKAGE
        package.mkdir(parents=True)
        (package / f"libtensorrt_rtx.so.{version}").touch()
        (package / "libtensorrt_onnxparser_rtx.so.9.9.9").touch()
        name = f"def get_ep_name(): return {rtx_provider.PROVIDER!r}\n"
        (package / "__init__.py").write_text(f"{name}def get_library_path(): return 'plugin.so'\n")
        monkeypatch.syspath_prepend(folder / version)
        forget(monkeypatch, rtx_provider.PACKAGE)

    def register(self, registration_name: str, path: str) -> None:
        self.calls.append(("register", registration_name, path))
        if self.refusal is not None:
            raise self.refusal
        if self._registered:
            raise STATE.Fail("EP library is already registered")
        self._registered = True

    def devices(self) -> list[Any]:
        return [device(0, "CPUExecutionProvider"), *(self.gpus if self._registered else [])]

    def session(self, model: str | bytes, options: Any, *, providers: Any, enable_fallback: int) -> Any:
        if providers is not None:
            return self._real(model, providers=providers, enable_fallback=enable_fallback)
        self.calls.append(("session", options.entries["session.disable_cpu_ep_fallback"]))
        session = self._real(model, providers=["CPUExecutionProvider"])
        run = session.run

        def record(names: Sequence[str], feed: Mapping[str, np.ndarray]) -> Any:
            self.runs.append(len(feed["image"]))
            return run(names, feed)

        session.run, session.get_providers = record, lambda: self.providers
        return session


def forget(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Have a package imported anew, now and again after the test."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, package)


def settings(plugin: Plugin) -> Any:
    options = SimpleNamespace(entries={})
    options.add_session_config_entry = options.entries.__setitem__
    options.add_provider_for_devices = lambda devices, settings: plugin.calls.append(("add", devices, settings))
    return options


def device(number: int, name: str = rtx_provider.PROVIDER) -> Any:
    return SimpleNamespace(ep_name=name, device=SimpleNamespace(device_id=number))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Plugin:
    return Plugin(monkeypatch, tmp_path / "site")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "m.onnx").write_bytes(a_model())
    return tmp_path / "onnx" / "m.onnx"


def refusal(call: Callable[..., object], *arguments: Any, **options: Any) -> str:
    with pytest.raises(MvmrError) as excinfo:
        call(*arguments, **options)
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


# A session


def test_a_session_is_started_by_the_plug_in_calls(plugin: Plugin, file: Path) -> None:
    Session(file, provider="tensorrt-rtx")
    (kernels,) = (folder for folder in file.parent.iterdir() if folder.is_dir())
    assert plugin.calls == [
        ("register", rtx_provider.PROVIDER, "plugin.so"),
        (
            "add",
            plugin.gpus[:1],  # the plug-in takes one device to a session
            {
                "nv_profile_min_shapes": f"image:1x{SIZE}x{SIZE}x3",
                "nv_profile_opt_shapes": f"image:8x{SIZE}x{SIZE}x3",
                "nv_profile_max_shapes": f"image:64x{SIZE}x{SIZE}x3",
                "nv_runtime_cache_path": str(kernels),
            },
        ),
        ("session", "1"),
    ]
    Session(file, provider="tensorrt-rtx", options={"enable_cuda_graph": "1"})
    assert [call[0] for call in plugin.calls].count("register") == 1  # a second one is an error
    assert plugin.calls[-2][2]["enable_cuda_graph"] == "1"


@pytest.mark.parametrize(("count", "parts"), [(1, [1]), (64, [64]), (65, [64, 1]), (130, [64, 64, 2])])
def test_a_batch_larger_than_it_compiled_for_goes_through_in_parts(
    count: int, parts: list[int], plugin: Plugin, file: Path
) -> None:
    outputs = Session(file, provider="tensorrt-rtx")(images(count))
    assert plugin.runs == parts
    wanted = Session(file)(images(count))
    assert list(outputs) == list(wanted)
    for name, rows in wanted.items():
        np.testing.assert_array_equal(outputs[name], rows)


def test_the_calls_are_those_of_onnxruntime() -> None:
    """Those that the double takes in onnxruntime's place."""
    real = onnxruntime.SessionOptions()
    with pytest.raises(Exception, match="Must provide one or more OrtEpDevice"):
        real.add_provider_for_devices([], {"nv_runtime_cache_path": "folder"})
    with pytest.raises(Exception, match="nowhere"):
        onnxruntime.register_execution_provider_library(rtx_provider.PROVIDER, "/nowhere/plugin.so")
    (cpu,) = (device for device in onnxruntime.get_ep_devices() if device.ep_name == "CPUExecutionProvider")
    assert isinstance(cpu.device.device_id, int)
    real.add_provider_for_devices([cpu], {})
    session = onnxruntime.InferenceSession(a_model(), real, providers=None, enable_fallback=0)
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_a_silent_fall_back_to_the_cpu_is_an_error(plugin: Plugin, file: Path) -> None:
    plugin.providers = ["CPUExecutionProvider"]
    reason = refusal(Session, file, provider="tensorrt-rtx")
    assert reason.startswith("onnxruntime fell back to CPUExecutionProvider from tensorrt-rtx")


def test_a_part_left_to_the_processor_is_an_error(
    plugin: Plugin, file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In onnxruntime's own words: it takes our settings, and no provider that would take the graph."""

    def session(model: str, ours: Any, *, providers: Any, enable_fallback: int) -> Any:
        theirs = STATE.SessionOptions()
        theirs.log_severity_level = ours.log_severity_level
        for key, value in ours.entries.items():
            theirs.add_session_config_entry(key, value)
        return plugin._real(model, theirs, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    reason = refusal(Session, file, provider="tensorrt-rtx")
    assert reason == f"tensorrt-rtx leaves a part of {file} to the processor; use cpu, or another provider"
    assert capfd.readouterr() == ("", "")


# Its compiled kernels


def test_another_version_gpu_or_file_has_kernels_of_its_own(
    plugin: Plugin, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = plugin.gpus[0]
    first = rtx_provider.kernels_of(file, gpu)
    assert first.is_dir()
    assert first.parent == file.parent
    assert first.name.startswith("rtx1.7.1-gpu2684-")
    assert rtx_provider.kernels_of(file, gpu) == first
    assert rtx_provider.kernels_of(file, plugin.gpus[1]) != first
    plugin.install(monkeypatch, tmp_path / "newer", "1.10.0")
    assert rtx_provider.kernels_of(file, gpu).name.startswith("rtx1.10.0-gpu2684-")
    file.write_bytes(a_model(metadata={"heads": "{}"}))
    assert rtx_provider.kernels_of(file, gpu).name.rpartition("-")[2] != first.name.rpartition("-")[2]


def test_kernels_go_to_the_cache_where_the_bundle_cannot_be_written(plugin: Plugin, file: Path, cache: Path) -> None:
    beside = rtx_provider.kernels_of(file, plugin.gpus[0])
    beside.rmdir()
    beside.touch()  # no folder can be made there
    folder = rtx_provider.kernels_of(file, plugin.gpus[0])
    assert folder == cache / "tensorrt-rtx" / beside.name
    assert folder.is_dir()
    assert rtx_provider.kernels_of(file.read_bytes(), plugin.gpus[0]) == folder
    shutil.rmtree(cache / "tensorrt-rtx")
    (cache / "tensorrt-rtx").touch()
    assert "set MVMR_CACHE" in refusal(rtx_provider.kernels_of, file, plugin.gpus[0])


# What is missing


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


def test_a_provider_that_is_not_installed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, rtx_provider.PACKAGE)
    reason = refusal(Session, file, provider="tensorrt-rtx")
    assert reason == (
        "the provider tensorrt-rtx is not installed here: pip install 'mvmr[rtx]' (Linux on x86-64), or use cpu"
    )


def test_a_machine_without_a_driver_by_the_real_plug_in(file: Path) -> None:
    tensorrt_rtx.require_wheels()
    if ctypes.util.find_library("cuda"):
        pytest.skip("this machine has an NVIDIA driver")
    assert NEEDS_DRIVER in refusal(Session, file, provider="tensorrt-rtx")
    assert NEEDS_DRIVER in refusal(Session, file, provider="tensorrt-rtx")  # each time
    result = CliRunner().invoke(main, ["serve", str(file.parent), "--provider", "tensorrt-rtx"])
    assert result.exit_code == 1
    assert NEEDS_DRIVER in result.stderr
    assert result.stderr.startswith("error: ")


def test_a_driver_without_a_gpu_that_it_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: Path) -> None:
    Plugin(monkeypatch, tmp_path / "site", gpu=None)
    reason = refusal(Session, file, provider="tensorrt-rtx")
    assert "TensorRT for RTX 1.7.1 finds no GPU here" in reason
    assert "compute capability 8.0" in reason


def test_a_plug_in_that_does_not_fit_this_onnxruntime(plugin: Plugin, file: Path) -> None:
    plugin.refusal = STATE.Fail("[NvTensorRTRTX EP] Host ORT is too old.\nMinimum supported API version is 99")
    reason = refusal(Session, file, provider="tensorrt-rtx")
    assert f"onnxruntime {onnxruntime.__version__} cannot load TensorRT for RTX 1.7.1" in reason
    assert "Host ORT is too old. Minimum supported API version is 99" in reason
    assert "pip install --upgrade onnxruntime onnxruntime-ep-nv-tensorrt-rtx-cu13" in reason


def test_a_library_that_the_program_around_us_registered_is_taken(plugin: Plugin, file: Path) -> None:
    plugin.register(rtx_provider.PROVIDER, "theirs.so")
    Session(file, provider="tensorrt-rtx")
    assert [call for call in plugin.calls if call[0] == "register"] == [
        ("register", rtx_provider.PROVIDER, "theirs.so")
    ]


@pytest.mark.parametrize(
    ("libraries", "bindings", "message"),
    [
        (None, None, "is not installed here: pip install 'mvmr[rtx]'"),
        ("1.7.1", None, "1.7.1 is here without its Python bindings: pip install 'tensorrt-rtx-cu13-bindings==1.7.1.*'"),
        (
            None,
            "1.7.1.116",
            "1.7.1.116 are here without onnxruntime's plug-in, which brings its libraries: pip install onnx",
        ),
        ("1.7.1", "1.6.0.9", "1.7.1 is here with the bindings of 1.6.0.9, which don't fit it: pip install 'tens"),
    ],
)
def test_libraries_and_bindings_that_are_not_a_pair(
    libraries: str | None, bindings: str | None, message: str, plugin: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    if libraries is None:
        without(monkeypatch, rtx_provider.PACKAGE)
    monkeypatch.setattr(rtx_build, "bindings_version", lambda: bindings)
    assert rtx_build.is_installed() == bool(libraries or bindings)
    assert message in refusal(rtx_build.package)


def test_bindings_that_do_not_load_say_why(plugin: Plugin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / f"{rtx_build.BINDINGS}.py").write_text("raise ImportError('libtensorrt_rtx.so.1: cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    forget(monkeypatch, rtx_build.BINDINGS)
    monkeypatch.setattr(rtx_build, "bindings_version", lambda: "1.7.1.116")
    assert "cannot be loaded (libtensorrt_rtx.so.1: cannot open): pip install --force" in refusal(rtx_build.package)


def test_the_extra_brings_a_pair() -> None:
    tensorrt_rtx.require_wheels()
    assert rtx_build.package().__version__ == rtx_build.bindings_version()


# On a GPU


@pytest.mark.gpu
def test_gpu_a_session_on_tensorrt_for_rtx_gives_what_the_cpu_gives(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    try:
        rtx_provider.device()
    except MvmrError as error:
        pytest.skip(str(error))
    file = tmp_path / "m.onnx"
    file.write_bytes(to_onnx(small_student(), precision="fp16", metadata={"heads": "{}"}))
    pixels = np.random.default_rng(0).integers(0, 256, (130, 32, 32, 3), dtype=np.uint8)
    wanted = Session(file)(pixels)["embedding"]
    began = time.perf_counter()
    session = Session(file, provider="tensorrt-rtx")
    for count in (1, 64, 130):
        assert cosines(session(pixels[:count])["embedding"], wanted[:count]).min() > 0.9995
    record_property("seconds_of_the_first_start", time.perf_counter() - began)
    del session  # kernels are written when it ends
    assert any(file.parent.glob("rtx*/*"))
    began = time.perf_counter()
    Session(file, provider="tensorrt-rtx")(pixels)
    record_property("seconds_of_the_second_start", time.perf_counter() - began)
