"""Looks at what `make dist` built as a stranger's pip will: metadata, files, and the wheel in clean environments.

python .ci/check_dist.py dist               the metadata of both, the files of both
python .ci/check_dist.py dist --install     the wheel in four new environments: bare, [train], [export], [app]

Run from the root of the checkout, by a Python that has the packages for the tests.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename

NAME = "mvmr"
# What setuptools writes into the archive of the source beside the files of the checkout.
WRITTEN = ("PKG-INFO", "setup.cfg", f"{NAME}.egg-info/")
UV = (sys.executable, "-m", "uv")

# Every module below the packages that are named: one that needs an undeclared package is noticed.
IMPORT_ALL = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""
PUBLIC = (
    IMPORT_ALL
    + """
import mvmr
for name in mvmr.__all__:
    getattr(mvmr, name)
"""
)
WITHOUT_TORCH = (
    IMPORT_ALL
    + """
import importlib.util
import mvmr
mvmr.load
assert "torch" not in sys.modules and importlib.util.find_spec("torch") is None, "torch is here"
"""
)
BARE = [f"{NAME}.{part}" for part in ("cli", "serve", "storage")]
CORE = [f"{NAME}.{part}" for part in ("bundles", "cli", "comparison", "data", "distillation", "evaluation", "methods")]
CORE += [f"{NAME}.{part}" for part in ("models", "representations", "serve", "storage", "training")]
# Extra -> what must end well in an environment that has it.
COMMANDS: dict[str, list[tuple[str, ...]]] = {
    "": [("mvmr", "--help"), ("mvmr", "doctor"), ("mvmr", "serve", "--help"), ("python", "-c", WITHOUT_TORCH, *BARE)],
    "train": [("mvmr", "distill", "--help"), ("python", "-c", PUBLIC, *CORE)],
    "export": [("mvmr", "export", "--help"), ("python", "-c", PUBLIC, f"{NAME}.export")],
    "app": [("mvmr", "app", "--help"), ("python", "-c", IMPORT_ALL, f"{NAME}.app")],
}


class Refused(Exception):
    """Something is wrong with what was built; the message is all that is printed."""


def built(folder: Path) -> tuple[Path, Path]:
    """The one wheel and the one archive of the source in a folder, which must be of the same version."""
    wheels, archives = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(archives) != 1:
        raise Refused(f"{folder} holds {len(wheels)} wheels and {len(archives)} archives, not one of each: make dist")
    (wheel,), (archive,) = wheels, archives
    of_wheel, of_archive = parse_wheel_filename(wheel.name), parse_sdist_filename(archive.name)
    if of_wheel[:2] != of_archive:
        raise Refused(f"{wheel.name} and {archive.name} are not of one version")
    return wheel, archive


def files_of_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return {name for name in opened.namelist() if not name.endswith("/")}


def files_of_archive(archive: Path) -> set[str]:
    """The files of the source, without the folder that holds them."""
    with tarfile.open(archive) as opened:
        return {member.name.partition("/")[2] for member in opened if member.isfile()}


def check_metadata(wheel: Path, archive: Path) -> Metadata:
    """As `twine check --strict` does, and that both say the same; the fields are held to their specification."""
    root = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as opened:
        member = opened.extractfile(f"{root}/PKG-INFO")
        assert member is not None
        of_archive = member.read()
    with zipfile.ZipFile(wheel) as opened:
        of_wheel = opened.read(f"{root}.dist-info/METADATA")
    if of_wheel != of_archive:
        raise Refused(f"the metadata of {wheel.name} and of {archive.name} differ")
    try:
        metadata = Metadata.from_email(of_wheel, validate=True)
    except ExceptionGroup as group:
        raise Refused("; ".join(map(str, group.exceptions))) from None
    if not metadata.description or metadata.description_content_type != "text/markdown":
        raise Refused("the description of the project is missing, or not said to be Markdown")
    return metadata


def tracked(root: Path) -> set[str] | None:
    """What git holds, or would hold if told to; None where there is no git or no repository."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    names = {name for name in done.stdout.split("\0") if name and (root / name).exists()}
    # An unpacked archive may lie in a repository of something else, which ignores it.
    return names if "pyproject.toml" in names else None


def check_files(wheel: Path, archive: Path, expected: set[str], rooms: dict[str, str]) -> None:
    """Compare with the files of the checkout; `rooms` is setuptools' `package-dir`."""
    inside = {name for name in files_of_archive(archive) if not name.startswith(WRITTEN)}
    compare(archive.name, inside, expected)
    folders = {folder: package.replace(".", "/") for package, folder in rooms.items()}
    parts = [name.partition("/") for name in expected]
    inside = {name for name in files_of_wheel(wheel) if ".dist-info/" not in name}
    compare(wheel.name, inside, {f"{folders[room]}/{rest}" for room, _, rest in parts if room in folders})


def compare(where: str, inside: set[str], expected: set[str]) -> None:
    for word, names in (("lacks", expected - inside), ("holds, unlike the checkout,", inside - expected)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise Refused(f"{where} {word} {', '.join(sorted(names)[:5])}{more}: see MANIFEST.in and pyproject.toml")


def required(requirements: list[str], extra: str) -> list[Distribution]:
    """What is installed here of all that a wheel with these requirements leads to, each in a version it allows."""
    here: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(NAME, extra)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in requirements if name == NAME else here[name].requires or []:
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            wanted = canonicalize_name(requirement.name)
            if wanted != NAME:
                try:
                    here[wanted] = distribution(wanted)
                except PackageNotFoundError:
                    raise Refused(f"{name} requires {text}, which this environment lacks: make test") from None
                if not requirement.specifier.contains(here[wanted].version, prereleases=True):
                    raise Refused(f"{name} requires {text}, and this environment has {here[wanted].version}")
            todo += [(wanted, inner) for inner in ("", *requirement.extras)]
    return list(here.values())


def paths(package: Distribution) -> list[str]:
    """Its files below site-packages, by its own record; `Distribution.files` takes ten times as long."""
    rows = csv.reader((package.read_text("RECORD") or "").splitlines())
    return [row[0] for row in rows if row and not row[0].startswith(("../", "/", "__pycache__/"))]


@cache
def shared() -> frozenset[str]:
    """The names in site-packages that several packages of this environment have files under."""
    owners = Counter(top for package in distributions() for top in {path.split("/")[0] for path in paths(package)})
    return frozenset(top for top, count in owners.items() if count > 1)


def link(packages: Iterable[Distribution], site: Path) -> None:
    """Lead an environment to these packages of this one; folders that several packages share, file by file."""
    for package in packages:
        tops = {path: path.split("/")[0] for path in paths(package)}
        for name in {path if top in shared() else top for path, top in tops.items()}:
            if not os.path.lexists(site / name):  # a file may be of two packages, too
                (site / name).parent.mkdir(parents=True, exist_ok=True)
                (site / name).symlink_to(Path(str(package.locate_file(name))).resolve())


def environment(folder: Path, wheel: Path, extra: str, requirements: list[str], *, full: bool) -> Path:
    """The folder of the commands of a new environment that holds the wheel and what it requires.

    torch is gigabytes, so unless `full` the packages are links to those of this environment, to the ones that the
    wheel's own requirements lead to and no others: what these forgot is missing there as it would be elsewhere.
    """
    run([*UV, "venv", "--quiet", "--python", sys.executable, str(folder)])
    python = folder / "bin" / "python"
    install = [*UV, "pip", "install", "--quiet", "--python", str(python)]
    if full:
        run([*install, "--constraint", "constraints.txt", f"{wheel}[{extra}]" if extra else str(wheel)])
    else:
        (site,) = (folder / "lib").glob("python*/site-packages")
        link(required(requirements, extra), site)
        run([*install, "--offline", "--no-deps", str(wheel)])
    return python.parent


def try_out(commands: Path, extra: str, version: str, cwd: Path) -> None:
    """Run what must work with this extra, outside the checkout, whose folders would be importable."""
    said = run([commands / "mvmr", "--version"], cwd=cwd)
    if said.split() != [NAME, version]:
        raise Refused(f"mvmr --version says {said.strip()!r}, the wheel is {version}")
    for program, *arguments in COMMANDS[extra]:
        run([commands / program, *arguments], cwd=cwd)
    report = json.loads(run([commands / "mvmr", "doctor", "--json"], cwd=cwd))
    for command, lacks in report["commands"].items():
        if lacks and extra and lacks.endswith(f"'{NAME}[{extra}]'"):
            raise Refused(f"mvmr {command} with [{extra}] {lacks}")
    if report["problems"]:
        raise Refused(f"mvmr doctor: {'; '.join(report['problems'])}")


def run(command: list[str | Path], cwd: Path | None = None) -> str:
    lent = ("PYTHONPATH", "VIRTUAL_ENV")  # would lend the new environment packages
    variables = {name: value for name, value in os.environ.items() if name not in lent}
    variables |= {"PYTHONDONTWRITEBYTECODE": "1"}  # or links would lead it into this environment
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, cwd=cwd, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"{' '.join(arguments)}\n{done.stdout}{done.stderr}exit code {done.returncode}")
    return done.stdout


def check(folder: Path, *, install: bool, full: bool, extras: Iterable[str] = COMMANDS) -> None:
    wheel, archive = built(folder.resolve())
    metadata = check_metadata(wheel, archive)
    print(f"{wheel.name}, {archive.name}: metadata {metadata.metadata_version}")
    if (expected := tracked(Path.cwd())) is None:
        print("no git here: files not compared with the checkout's")
    else:
        project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
        check_files(wheel, archive, expected, project["tool"]["setuptools"]["package-dir"])
        print(f"files: {len(files_of_archive(archive))} in the archive, {len(files_of_wheel(wheel))} in the wheel")
    requirements = [str(requirement) for requirement in metadata.requires_dist or []]
    for extra in extras if install else ():
        with tempfile.TemporaryDirectory() as place:
            commands = environment(Path(place) / "env", wheel, extra, requirements, full=full)
            try_out(commands, extra, str(metadata.version), Path(place))
        print(f"{f'[{extra}]' if extra else 'bare'}: installed and run")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--install", action="store_true", help="try the wheel in clean environments, too")
    parser.add_argument("--full", action="store_true", help="with packages from the index: minutes, gigabytes")
    given = parser.parse_args()
    try:
        check(given.folder, install=given.install or given.full, full=given.full)
    except Refused as refused:
        sys.exit(f"error: {refused}")


if __name__ == "__main__":
    main()
