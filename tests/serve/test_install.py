"""`pip install mvmr`, bare: a clean environment with the wheel of this checkout embeds and serves, without torch."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mvmr
from mvmr.bundles.preprocess import Preprocess
from mvmr.export.export import export
from tests.making import SMALL, write_bundle

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ROOT = Path(__file__).parents[2]
# The training stack, and what only tests or export need: distributions as pip names them.
NOT_IN_PRODUCTION = {
    "kymatio", "lightning-fabric", "matplotlib", "onnx", "onnxscript", "open-clip-torch", "pytest", "scikit-image",
    "scikit-learn", "scipy", "sympy", "timm", "torch", "torchvision", "triton", "tritonclient",
}  # fmt: skip
LINES = 60  # of the service's log, before it must have said where it listens


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the commands of an environment that holds the wheel, built outside the checkout, and what it brings."""
    folder = tmp_path_factory.mktemp("clean")
    source, environment = folder / "source", folder / "environment"
    for name in ("mvmr", "distill", "export", "serve", "app"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(environment)], check=True)
    commands = environment / "bin"
    pinned = ["--constraint", str(ROOT / "constraints.txt"), "--compile-bytecode"]
    subprocess.run(
        [*uv, "pip", "install", "--quiet", "--python", str(commands / "python"), *pinned, str(wheel)], check=True
    )
    return commands


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "mine"
    write_bundle(out, preprocess=Preprocess.for_size(32))
    export(out, formats=["onnx"], data="sample:digits", images=20)
    return out


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def expected(bundle: Path, photo: Path) -> np.ndarray:
    return mvmr.load(bundle).student().embed([photo])[0].numpy()


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command outside the checkout, whose folders would be importable, and return what it printed."""
    done = subprocess.run([*map(str, command)], cwd=cwd, env=bare(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def bare() -> dict[str, str]:
    """This environment, without what would lend the other one packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def test_nothing_of_the_training_stack_is_installed(clean: Path, tmp_path: Path) -> None:
    program = "import importlib.metadata as m, json; print(json.dumps([d.name for d in m.distributions()]))"
    packages = {
        name.lower().replace("_", "-") for name in json.loads(run(clean / "python", "-c", program, cwd=tmp_path))
    }
    assert {"mvmr", "onnxruntime", "fastapi", "pillow", "prometheus-client"} <= packages
    assert not packages & NOT_IN_PRODUCTION
    assert not {name for name in packages if name.startswith("nvidia-")}
    program = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, sys.argv[1:])))"
    run(clean / "python", "-c", program, "torch", "torchvision", "scipy", "sklearn", "open_clip", "onnx", cwd=tmp_path)


def test_the_commands_that_need_no_training_work(clean: Path, bundle: Path, tmp_path: Path) -> None:
    assert "serve" in run(clean / "mvmr", "--help", cwd=tmp_path)
    assert run(clean / "mvmr", "--version", cwd=tmp_path) == f"mvmr {mvmr.__version__}\n"
    report = json.loads(run(clean / "mvmr", "doctor", "--json", cwd=tmp_path))
    assert report["commands"]["serve"] is None
    assert report["commands"]["distill"].endswith("pip install 'mvmr[train]'")
    assert "CPUExecutionProvider" in report["onnxruntime"]
    assert report["problems"] == []
    assert SMALL.name in run(clean / "mvmr", "info", bundle, cwd=tmp_path)


def test_what_needs_torch_says_so_in_one_line(clean: Path, bundle: Path, tmp_path: Path) -> None:
    command = [clean / "mvmr", "probe", bundle, "--data", "sample:digits", "--head", "digits"]
    done = subprocess.run(command, cwd=tmp_path, env=bare(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "pip install 'mvmr[train]'" in done.stderr


def test_the_engine_gives_the_embedding_of_torch(
    clean: Path, bundle: Path, photo: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    program = (
        "import json, sys; from mvmr.serve import Engine\n"
        "engine = Engine.load(sys.argv[1])\n"
        "(row,) = engine.embed([sys.argv[2]])\n"
        "assert 'torch' not in sys.modules\n"
        "print(json.dumps(row.tolist()))"
    )
    row = json.loads(run(clean / "python", "-c", program, bundle, photo, cwd=tmp_path))
    np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_service_gives_the_embedding_of_torch(
    clean: Path, bundle: Path, photo: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    with service(clean / "mvmr", bundle, cwd=tmp_path) as at:
        posted = urllib.request.Request(f"{at}/v1/embed", photo.read_bytes(), {"content-type": "image/png"})
        with urllib.request.urlopen(posted, timeout=30) as answer:
            (result,) = json.load(answer)["results"]
        with urllib.request.urlopen(f"{at}/metrics", timeout=30) as answer:
            text = answer.read().decode()
    np.testing.assert_allclose(result["embedding"], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert 'mvmr_images_total{outcome="embedded"} 1.0' in text
    assert "mvmr_ready 1.0" in text


@contextmanager
def service(command: Path, bundle: Path, *, cwd: Path) -> Iterator[str]:
    """Its address, once it is ready; told to stop when the block ends, which it must do with exit code 0."""
    environment = bare() | {"MVMR_BUNDLE": str(bundle), "MVMR_PORT": "0", "MVMR_DRAIN": "0"}
    process = subprocess.Popen([command, "serve"], cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if (url := re.search(r"http://127\.0\.0\.1:\d+", line)) or len(lines) == LINES:
                break
        assert url, "".join(lines)
        wait_until_ready(url[0])
        yield url[0]
        process.send_signal(signal.SIGTERM)
        _, tail = process.communicate(timeout=30)
        assert process.returncode == 0, tail
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def wait_until_ready(at: str) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{at}/readyz", timeout=30):
                return
        except OSError:  # nobody listens yet, or 503
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
