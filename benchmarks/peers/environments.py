"""A virtual environment for each peer: its pinned version, with the libraries that this environment has.

Servers get mvmr beside them, whose files they serve. Distillers don't: LightlyTrain is under the AGPL, so it is kept in
a process and an environment of its own, and neither side imports the other.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

# The newest that install here: BentoML 1.4.40 asks for a certifi that was not to be had.
PINNED = {"litserve": "0.2.19", "bentoml": "1.4.39"}
# What mvmr.serve's engine and decoding import; of the versions of this environment, so that all compute alike.
_SAME = ("numpy", "onnxruntime", "pillow", "rich", "safetensors")
# What trains beside ours; with each what its results depend on.
DISTILLERS = {
    "lightly-train": {"lightly-train": "0.18.0", "pytorch-lightning": "2.6.6", "albumentations": "2.0.8"},
    "sentence-transformers": {
        "sentence-transformers": "6.0.0",
        "transformers": "5.24.0",
        "accelerate": "1.15.0",
        "datasets": "5.2.0",
    },
}
_TRAINS = ("numpy", "pillow", "torch", "torchvision")
HERE = Path(__file__).parent
_SOURCE = HERE.parents[1]
_PARTS = ("pyproject.toml", "README.md", "LICENSE", "mvmr", "distill", "export", "serve", "app")


def prepare(folder: Path, peers: list[str]) -> dict[str, Path]:
    """The Python of each peer's environment below `folder`: made where there is none, mvmr always as it is now."""
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _wheel(Path(scratch))
        pythons = {peer: _environment(folder / peer, versions(peer)) for peer in peers}
        for python in pythons.values():
            _install(python, "--no-deps", *_again(), str(wheel))
        return pythons


def prepare_distiller(folder: Path, peer: str) -> Path:
    """The Python of a distiller's environment below `folder`, made where there is none."""
    same = {name: metadata.version(name).partition("+")[0] for name in _TRAINS}
    return _environment(folder / peer, DISTILLERS[peer] | same)


def versions(peer: str) -> dict[str, str]:
    """What is installed for a peer, by name."""
    return {peer: PINNED[peer], **{name: metadata.version(name) for name in _SAME}}


def quiet(folder: Path) -> dict[str, str]:
    """Variables of a peer's processes: nothing is reported home, nothing written outside `folder`."""
    return {
        **os.environ,
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(folder / "bentoml-home"),
        "DO_NOT_TRACK": "1",
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "LIGHTLY_TRAIN_CACHE_DIR": str(folder / "lightly-train"),
        "LIGHTLY_TRAIN_EVENTS_DISABLED": "1",
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "PYTHONWARNINGS": "ignore",
    }


def _environment(place: Path, packages: dict[str, str]) -> Path:
    """The Python of an environment with these versions, made again where others were wanted before."""
    python, stamp = place / "bin" / "python", place / "requirements.txt"
    wanted = "\n".join(f"{name}=={version}" for name, version in packages.items()) + "\n"
    if not (python.exists() and stamp.exists() and stamp.read_text() == wanted):
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        if _has_uv():
            _run("uv", "venv", "--quiet", "--python", sys.executable, str(place))
        else:
            _run("venv", str(place))
        _install(python, *wanted.split())
        stamp.write_text(wanted)
    return python


def _wheel(scratch: Path) -> Path:
    """mvmr's wheel, built from a copy: building leaves folders behind."""
    source, out = scratch / "source", scratch / "wheel"
    source.mkdir()
    for part in _PARTS:
        if (_SOURCE / part).is_dir():
            shutil.copytree(_SOURCE / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(_SOURCE / part, source)
    if _has_uv():
        _run(
            "uv", "build", "--quiet", "--wheel", "--no-build-isolation", "--python", sys.executable,
            "--out-dir", str(out), str(source),
        )  # fmt: skip
    else:
        _run("pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source))
    return next(out.glob("*.whl"))


def _install(python: Path, *what: str) -> None:
    if _has_uv():
        _run("uv", "pip", "install", "--quiet", "--python", str(python), *what)
    else:
        _run("pip", "install", "--quiet", *what, python=str(python))


def _again() -> tuple[str, ...]:
    return ("--reinstall",) if _has_uv() else ("--force-reinstall",)


def _has_uv() -> bool:
    return importlib.util.find_spec("uv") is not None


def _run(module: str, *arguments: str, python: str = sys.executable) -> None:
    done = subprocess.run([python, "-m", module, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} {arguments[0]} failed: {done.stderr.strip()[-2000:]}")
