"""The folders and the one import name: what `package-dir` costs is watched here."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import mvmr
from mvmr.cli.doctor import DISTRIBUTIONS
from mvmr.errors import EXTRAS, ON_TRAIN

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
# Top-level folder -> the package it is imported as.
ROOMS: dict[str, str] = {folder: package for package, folder in SETUPTOOLS["package-dir"].items()}


def sources() -> list[Path]:
    return [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]


def distribution(requirement: str) -> str:
    """The normalised project name of a requirement such as `open_clip_torch>=3.0`."""
    return re.split(r"[\[<>=!~ ]", requirement)[0].lower().replace("_", "-")


def test_every_package_folder_is_listed() -> None:
    packages = set()
    for path in sources():
        room, *inner = path.parent.relative_to(ROOT).parts
        packages.add(".".join([ROOMS[room], *inner]))
        assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py"
    assert packages == set(SETUPTOOLS["packages"])


def test_imports_use_the_one_import_name() -> None:
    for path in [*sources(), *(ROOT / "tests").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: relative import"
                names = [node.module or ""]
            for name in names:
                assert name.partition(".")[0] not in set(ROOMS) - {"mvmr"}, f"{path}: import {name}"


def test_public_names_resolve_and_are_typed_alike() -> None:
    tree = ast.parse((ROOT / "mvmr" / "__init__.py").read_text(encoding="utf-8"))
    (checking,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in checking.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: node.module for node in imports for alias in node.names}
    assert homes == mvmr._HOMES
    assert set(mvmr.__all__) == {"__version__", *homes}
    for name in mvmr.__all__:
        assert getattr(mvmr, name) is not None
    assert callable(mvmr.distill)
    with pytest.raises(AttributeError, match="distil"):
        _ = mvmr.distil


def test_extras_agree_with_the_project_file() -> None:
    for extra, packages in EXTRAS.items():
        declared = {distribution(text) for text in PROJECT["project"]["optional-dependencies"][extra]}
        declared -= {"mvmr"}  # an extra may contain another
        assert {distribution(DISTRIBUTIONS.get(package, package)) for package in packages} == declared
    extras = PROJECT["project"]["optional-dependencies"]
    assert {extra for extra in EXTRAS if "mvmr[train]" in extras[extra]} == set(ON_TRAIN)


def test_constraints_pin_every_dependency_by_version_alone() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    for pin in pins:
        assert re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.+!]+( ; .+)?", pin), pin
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    wanted = {distribution(text) for group in groups for text in group} - {"mvmr"}
    assert wanted <= {pin.partition("==")[0] for pin in pins}


def test_what_the_pages_say_to_install_exists() -> None:
    extras = set(PROJECT["project"]["optional-dependencies"])
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
            assert set(re.findall(r"mvmr\[(\w+)\]", paragraph)) <= extras, path.name
            if re.search(r"pip install (-U )?mvmr\b", paragraph):
                assert "once released" in " ".join(paragraph.split()), f"{path.name}: no index has it yet"


def test_the_wheel_holds_one_import_name_and_the_recipes(tmp_path: Path) -> None:
    for name in [*ROOMS, "pyproject.toml", "README.md", "LICENSE"]:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, "out"], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    assert {name.partition("/")[0] for name in inside} == {"mvmr", f"mvmr-{mvmr.__version__}.dist-info"}
    expected = {"mvmr/py.typed"}
    for room, package in ROOMS.items():
        for pattern in ("*.py", "*.toml"):
            for path in (ROOT / room).rglob(pattern):
                expected.add(f"{package.replace('.', '/')}/{path.relative_to(ROOT / room).as_posix()}")
    assert expected <= inside
