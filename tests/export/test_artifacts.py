"""Every row of the table of artifacts is built, opened by its runtime and held to torch; a new row needs no more."""

import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mvmr.app.embedders.engines import Engines
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.errors import MvmrError
from mvmr.export import runtimes
from mvmr.export.artifacts import ARTIFACTS, EMBEDDING, Artifact, choose_artifacts, report_of
from mvmr.export.attempt import builder_of
from mvmr.export.bench import bench
from mvmr.export.cli import export as command
from mvmr.export.export import export
from mvmr.export.onnx import session
from mvmr.export.runtimes import PROVIDERS, RUNTIMES, Provider, Runtime, open_artifact
from mvmr.export.verification import Gates, Reference, verify
from mvmr.serve import Engine
from tests.export import other_runtime
from tests.export.students import a_bundle, patches
from tests.making import SMALL

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

ROWS = pytest.mark.parametrize("row", ARTIFACTS.values(), ids=ARTIFACTS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small student, to be exported by each test to what it needs."""
    torch.set_num_threads(1)
    return bundles.load(a_bundle(tmp_path_factory.mktemp("runs") / "student", backbone="resnet18_050"))


# The table


def test_keys_labels_and_files_are_distinct() -> None:
    for names in ({row.label for row in ARTIFACTS.values()}, {row.file for row in ARTIFACTS.values()}):
        assert len(names) == len(ARTIFACTS)
    assert [row.key for row in ARTIFACTS.values()] == list(ARTIFACTS)
    assert len({(row.runtime, row.precision) for row in ARTIFACTS.values()}) == len(ARTIFACTS)
    files = {row.key: row.file.replace("*", "sm90.trt11.4.0") for row in ARTIFACTS.values()}
    listed = [*files.values(), *map(report_of, files.values()), "trt/timing.cache"]
    for row in ARTIFACTS.values():
        assert row.files(listed) == [files[row.key]]


@ROWS
def test_a_row_has_a_builder_an_opener_an_option_and_what_it_needs(row: Artifact) -> None:
    builder, opener = builder_of(row), import_module(RUNTIMES[row.runtime].opener)
    assert all(callable(part) for part in (builder.check, builder.build, builder.summarise))
    assert all(callable(part) for part in (opener.locate, opener.open_artifact, opener.check_provider))
    assert isinstance(Gates.of(row.gate), Gates)
    keys = list(ARTIFACTS)
    assert all(keys.index(need) < keys.index(row.key) for need in row.needs)
    assert f"--{row.key} " in CliRunner().invoke(command, ["--help"]).output


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_provider_runs_what_it_prefers(name: str) -> None:
    provider = PROVIDERS[name]
    assert {ARTIFACTS[key].runtime for key in provider.preferred} == {provider.runtime}
    assert {ARTIFACTS[key] for key in provider.preferred} <= set(runtimes.run_by(name).values())


def test_every_provider_of_onnxruntime_can_be_asked_for() -> None:
    assert set(session.PROVIDERS) == {name for name, provider in PROVIDERS.items() if provider.runtime == "onnxruntime"}


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(MvmrError, match="unknown format 'onxx'; did you mean 'onnx'"):
        choose_artifacts(["onxx"])
    with pytest.raises(MvmrError, match="unknown provider 'cuda0'; did you mean 'cuda'"):
        runtimes.check_provider("cuda0")


def test_what_is_needed_comes_first_and_once() -> None:
    assert [row.key for row in choose_artifacts(["trt"])] == ["fp16", "trt"]
    assert [row.key for row in choose_artifacts(["trt", "fp16", "onnx"])] == ["onnx", "fp16", "trt"]


def test_reading_the_tables_imports_no_runtime() -> None:
    code = (
        "import sys; import mvmr.export.runtimes; print({'torch', 'onnx', 'onnxruntime', 'tensorrt'} & {*sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


# Each row, on this machine


@pytest.mark.slow
@ROWS
def test_what_this_machine_can_make_gives_torchs_features(row: Artifact, bundle: Bundle) -> None:
    try:
        report = export(bundle.path, formats=[row.key], images=32)[row.key]
    except MvmrError as error:
        if not row.machine:
            raise
        pytest.skip(str(error))
    if not row.files([report["artifact"]]):
        pytest.skip(f"{report['artifact']} stands in for it: {report.get('not_run')}")
    now = bundles.load(bundle.path)
    assert (report["format"], report["precision"], report["passed"]) == (row.key, row.precision, True)
    assert row.files(now.manifest.files) == [report["artifact"]] == [runtimes.locate(row, now)]
    runner, student = open_artifact(row, now, threads=1), now.student()
    assert (runner.size, runner.dim) == (32, bundle.manifest.embedding_dim)
    images = patches(48)
    for count in (0, 1, 5):
        rows = runner(images[:count])[EMBEDDING]
        assert (rows.shape, rows.dtype) == ((count, runner.dim), np.float32)
    assert verify(runner, Reference.of(student, images), gates=Gates.of(row.gate))["failures"] == []
    ours, torchs = runner(images)[EMBEDDING], student.embed(images).numpy()
    ours, torchs = (features - torchs.mean(0) for features in (ours, torchs))
    cosines = (ours * torchs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(torchs, axis=1)
    assert cosines.mean() > {"fp32": 0.9999, "fp16": 0.999, "int8": 0.95}[row.gate]


@ROWS
def test_what_is_not_there_is_one_line(row: Artifact, tmp_path: Path) -> None:
    empty = bundles.load(a_bundle(tmp_path / "empty"))
    for call in (runtimes.locate, open_artifact):
        with pytest.raises(MvmrError) as excinfo:
            call(row, empty)
        assert "mvmr export" in str(excinfo.value)
        assert "\n" not in str(excinfo.value)


# A row that is new


@pytest.mark.slow
def test_a_runtime_of_its_own_is_exported_served_shown_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = a_bundle(tmp_path / "student")
    module, provider = other_runtime.__name__, other_runtime.PROVIDER
    row = replace(
        ARTIFACTS["onnx"], key="other", label="Other fp32", runtime="other", file="other/encoder.bin", builder=module
    )
    monkeypatch.setitem(ARTIFACTS, row.key, row)
    monkeypatch.setitem(RUNTIMES, "other", Runtime(opener=module, platform="other", model="model.bin"))
    monkeypatch.setitem(PROVIDERS, provider, Provider(runtime="other", preferred=("other",), at_once=2))
    assert export(path, formats=["other", "onnx"], images=16)["other"]["passed"]
    images, wanted = patches(3), bundles.load(path).student().embed(patches(3)).numpy()
    engine = Engine.load(path, provider=provider)
    assert (engine.artifact, engine.precision, engine.at_once) == (row, "fp32", 2)
    np.testing.assert_allclose(engine(images), wanted, atol=1e-4)
    (choice,) = (option for option in Engines(bundles.load(path)).choices if option.key == "other-fp32")
    assert (choice.label, choice.why, choice.nbytes) == ("Other fp32", None, (path / row.file).stat().st_size)
    assert Engines(bundles.load(path)).get("other-fp32").dim == SMALL.width
    measurements = bench(path, batches=(1,), rounds=1, compiled=False)["rows"]
    assert [measurement["engine"] for measurement in measurements] == ["torch eager", "onnx fp32", "other fp32"]
