"""What `make dist` gives: an archive of all that git holds, and the wheel built from it, which runs in a bare place."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def check_dist() -> ModuleType:
    return load_script(ROOT / ".ci" / "check_dist.py")


@pytest.fixture(scope="module")
def dist(check_dist: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make dist` builds, but of a copy of the checkout, and by the setuptools that is here."""
    if (files := check_dist.tracked(ROOT)) is None:
        pytest.skip("needs git, which says what the project's files are")
    folder = tmp_path_factory.mktemp("dist")
    for name in files:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    build = [sys.executable, "-m", "uv", "build", "--quiet", "--offline", "--no-build-isolation"]
    build += ["--python", sys.executable, "--out-dir", str(folder / "dist"), str(folder / "source")]
    subprocess.run(build, check=True, capture_output=True)
    return folder / "dist"


@pytest.mark.slow
def test_archive_and_wheel_are_complete_and_the_wheel_runs_bare(
    check_dist: ModuleType, dist: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    check_dist.check(dist, install=True, full=False, extras=[""])
    printed = capsys.readouterr().out
    assert "metadata 2." in printed
    assert "in the archive" in printed
    assert "bare: installed and run" in printed


@pytest.mark.slow
def test_what_each_extra_leads_to(check_dist: ModuleType, dist: Path) -> None:
    metadata = check_dist.check_metadata(*check_dist.built(dist))
    requirements = [str(requirement) for requirement in metadata.requires_dist]
    names = {extra: {package.name for package in check_dist.required(requirements, extra)} for extra in ("", "train")}
    assert {"onnxruntime", "numpy"} <= names[""]
    assert not names[""] & {"torch", "pytest", "mvmr"}
    assert names[""] | {"torch", "timm"} <= names["train"]
    assert not names["train"] & {"pytest", "gradio", "onnx"}
    with pytest.raises(check_dist.Refused, match=r"mvmr requires numpy<1, and this environment has \d"):
        check_dist.required(["numpy<1"], "")
    with pytest.raises(check_dist.Refused, match="mvmr requires no-such-package, which this environment lacks"):
        check_dist.required(["no-such-package"], "")


@pytest.mark.slow
def test_a_file_too_few_or_too_many_is_refused(check_dist: ModuleType, dist: Path, tmp_path: Path) -> None:
    wheel, archive = check_dist.built(dist)
    expected = {name for name in check_dist.files_of_archive(archive) if not name.startswith(check_dist.WRITTEN)}
    rooms = {"mvmr": "mvmr", "mvmr.distillation": "distill", "mvmr.export": "export"}
    rooms |= {"mvmr.serve": "serve", "mvmr.app": "app"}
    check_dist.check_files(wheel, archive, expected, rooms)
    with pytest.raises(check_dist.Refused, match=r"tar\.gz lacks tests/new\.py"):
        check_dist.check_files(wheel, archive, expected | {"tests/new.py"}, rooms)
    with pytest.raises(check_dist.Refused, match=r"tar\.gz holds, unlike the checkout, Makefile"):
        check_dist.check_files(wheel, archive, expected - {"Makefile"}, rooms)
    del rooms["mvmr.serve"]
    with pytest.raises(check_dist.Refused, match=r"whl holds, unlike the checkout, mvmr/serve/"):
        check_dist.check_files(wheel, archive, expected, rooms)
    with pytest.raises(check_dist.Refused, match="holds 0 wheels and 0 archives"):
        check_dist.built(tmp_path)
    with tarfile.open(archive) as opened:
        modes = {member.name.partition("/")[2]: member.mode for member in opened}
    assert modes[".ci/run"] & 0o111, "continuous integration starts it"
