"""What the tests of the service share: a tiny exported bundle with heads, photographs, and real `mvmr serve`s."""

from __future__ import annotations

import io
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import numpy.typing as npt
import onnx
import psutil  # type: ignore[import-untyped]
import skimage.data
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from mvmr import __version__
from mvmr.bundles import bundle as bundles
from mvmr.bundles.manifest import SCHEMA, Manifest
from mvmr.bundles.preprocess import Preprocess
from mvmr.export.artifacts import ARTIFACTS, canary, encode_canary, metadata, report_of
from mvmr.storage import staging
from mvmr.storage.atomic import write_json

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# Nothing at its usual value: a part with a preprocessing of its own would show.
PREPROCESS = Preprocess(resize=40, crop=32, interpolation="bicubic", mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
DIM = 48
HEADS = {"animals": ("cat", "dog", "eel"), "colours": ("red", "green")}
FLOAT32, FLOAT16 = "application/x-mvmr-float32", "application/x-mvmr-float16"
# A comment in pieces of a byte: Pillow's time grows with the square of its length, to hours for this one.
SLOW = b"GIF89a\x01\x00\x01\x00\x00\x00\x00!\xfe" + b"\x01a" * 4_000_000 + b"\x00;"
_SECONDS = 60.0


def bundle(folder: Path, name: str = "student") -> Path:
    """A bundle with `HEADS` whose exported file takes milliseconds to make, to load and to run; see `embed_by_hand`."""
    path = folder / name
    (path / "onnx").mkdir(parents=True)
    (path / bundles.ENCODER).write_bytes(b"weights")
    manifest = Manifest(
        schema=SCHEMA,
        mvmr_version=__version__,
        created="2026-01-01T00:00:00+00:00",
        backbone="resnet18",
        options={"small_kernel": True},
        embedding_dim=DIM,
        preprocessing=PREPROCESS,
        training={},
        metrics=(),
        files={bundles.ENCODER: staging.digest(path / bundles.ENCODER) or ""},
    )
    write_json(path / "bundle.json", manifest.to_json())
    for head, classes in HEADS.items():
        add_head(path, head, classes)
    export(path)
    return path


def export(path: Path, *, scale: float = 1.0) -> None:
    """Put the exported file of such a bundle into it; with another `scale` it does not do what its report says."""
    opened = bundles.load(path, verify=False)
    mean, deviation = (np.array(values, np.float32)[:, None, None] for values in (PREPROCESS.mean, PREPROCESS.std))
    size = PREPROCESS.crop
    steps = [
        onnx.helper.make_node("Cast", ["image"], ["float"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        onnx.helper.make_node("Mul", ["planes", "factor"], ["scaled"]),
        onnx.helper.make_node("Add", ["scaled", "term"], ["normal"]),
        onnx.helper.make_node("AveragePool", ["normal"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        onnx.helper.make_node("Flatten", ["pooled"], ["embedding"]),
    ]
    constants = {"factor": scale / (255 * deviation), "term": -mean / deviation}
    graph = onnx.helper.make_graph(
        steps,
        "pooled",
        [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, ["N", size, size, 3])],
        [onnx.helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["N", DIM])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.helper.set_model_props(model, metadata(opened, [], "fp32"))
    report = json.dumps({"canary": encode_canary(embed_by_hand(canary(size))[0])}).encode()
    file = ARTIFACTS["onnx"].file
    bundles.add_files(opened, {file: model.SerializeToString(), report_of(file): report})


def embed_by_hand(pixels: Pixels) -> Floats:
    """What that bundle makes of prepared images, in numpy: uint8 [N, 32, 32, 3] -> float32 [N, 48]."""
    normal = PREPROCESS.normalise(pixels)
    return normal.reshape(len(pixels), 3, 4, 8, 4, 8).mean((3, 5)).reshape(len(pixels), DIM)


def copy_bundle(path: Path, folder: Path) -> Path:
    """A copy of a bundle, for a test that changes it."""
    shutil.copytree(path, folder / path.name)
    return folder / path.name


def damage(path: Path, name: str, content: bytes | None, *, listed: bool = False) -> None:
    """Change a file of a bundle; `listed`: so that its hash is right."""
    if listed:
        bundles.add_files(bundles.load(path, verify=False), {name: content or b""})
    elif content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content)


def add_head(path: Path, name: str, classes: tuple[str, ...], *, dim: int = DIM, seed: int = 0) -> None:
    """Put a head of random weights into a bundle."""
    random = np.random.default_rng(seed)
    record = {"command": "c", "data": name, "protocol": "linear", "values": {"top1": 1.0}}
    weight, bias = random.normal(size=(len(classes), dim)), random.normal(size=len(classes))
    bundles.add_head(bundles.load(path, verify=False), name, weight, bias, classes, record)


@cache
def photograph(name: str = "astronaut") -> Image.Image:
    """One of scikit-image's photographs, RGB, 240 pixels wide; not to be changed."""
    picture = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    return picture.resize((240, 240 * picture.height // picture.width))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of a file that holds `image`."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


@cache
def jpeg(name: str = "astronaut") -> bytes:
    """A photograph as a JPEG file."""
    return encoded(photograph(name), "JPEG", quality=90)


def rows(answer: httpx2.Response) -> Floats:
    """The embeddings of an answer of /v1/embed in binary, float32 [N, D]."""
    assert answer.status_code == 200, answer.text
    count, dim = map(int, answer.headers["x-shape"].split(","))
    kind = "<f2" if answer.headers["content-type"] == FLOAT16 else "<f4"
    return np.frombuffer(answer.content, kind).reshape(count, dim).astype(np.float32)


def problem(answer: httpx2.Response) -> str:
    """Which of the problems an answer is, after checking that it is a whole problem document."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    document = answer.json()
    assert document["status"] == answer.status_code
    assert document["title"]
    assert document["detail"]
    assert "\n" not in document["detail"]
    kind: str = document["type"]
    assert kind.startswith("urn:mvmr:problem:")
    return kind.rpartition(":")[2]


def embed(client: httpx2.Client) -> Floats:
    """The embedding of a photograph, float32 [1, D], by a service."""
    return rows(client.post("/v1/embed", content=jpeg(), headers={"accept": FLOAT32}))


def reasons(answer: httpx2.Response) -> set[str]:
    """Why none of the images of a request has an embedding."""
    assert problem(answer) == "bad-image"
    return {failure["error"]["code"] for failure in answer.json()["errors"]}


@dataclass
class Running:
    """A service in a process of its own; url: where it listens; log: the file that holds what it says."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    clients: list[httpx2.Client] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def log_text(self) -> str:
        """All of its log so far."""
        return self.log.read_text()

    def memory(self) -> int:
        """Bytes of its resident set."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(_SECONDS)

    def wait_for(self, words: str) -> None:
        """Return when the log holds `words`."""
        wait_until(lambda: words in self.log_text, f"{words!r} in the log", self)


def wait_until(holds: Any, what: str, running: Running | None = None, seconds: float = _SECONDS) -> None:
    """Ask `holds` again and again until it says yes; fails when the service has ended before, or time is up."""
    end = time.monotonic() + seconds
    while not holds():
        log = running.log_text if running else ""
        assert running is None or running.process.poll() is None, f"ended while waiting for {what}:\n{log}"
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}:\n{log}"
        time.sleep(0.02)


def command(path: Path | str, *options: str) -> list[str]:
    """The command that serves a bundle at a free port."""
    return [sys.executable, "-m", "mvmr", "serve", str(path), "--port", "0", *options]


@contextmanager
def running(
    path: Path | str,
    folder: Path,
    *options: str,
    env: Mapping[str, str | None] | None = None,
    wrapped: str | None = None,
    drain: float = 0.0,
) -> Iterator[Running]:
    """Start `mvmr serve`, wait until it is ready, and end it with the block.

    Args:
        folder: for its log; it is started there.
        env: variables on top of those here, None takes one away.
        wrapped: Python source that runs before, in the same process, to spy on the service or to break it.
        drain: seconds between SIGTERM and the closing of the door.
    """
    argv = command(path, "--drain", str(drain), *options)
    if wrapped is not None:
        script = folder / "wrapped.py"
        script.write_text(f"{wrapped}\nfrom mvmr.cli.main import main\nmain(prog_name='mvmr')\n")
        argv[1:3] = [str(script)]
    log = folder / "log"
    surroundings = {name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None}
    with log.open("wb") as out, subprocess.Popen(argv, stdout=out, stderr=out, env=surroundings, cwd=folder) as process:
        service = Running(process, "", log)
        try:
            service.wait_for(" at http")
            line = next(line for line in service.log_text.splitlines() if " at http" in line)
            service.url = line.rpartition(" at ")[2]
            service.wait_for("startup complete")
            yield service
        finally:
            if process.poll() is None:
                process.kill()


def refusal(path: Path | str, *options: str) -> str:
    """Start a service that must not start; the one line that it says."""
    done = subprocess.run(command(path, *options), capture_output=True, text=True, timeout=_SECONDS)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def read_metric(text: str, name: str) -> dict[str, float]:
    """The values of one of Prometheus' metrics in `text`, by its labels as they are written there."""
    values = {}
    for line in text.splitlines():
        labels, _, value = line.rpartition(" ")
        if labels == name or labels.startswith(f"{name}{{"):
            values[labels.removeprefix(name).strip("{}")] = float(value)
    return values


def read_json(answer: httpx2.Response) -> dict[str, Any]:
    """The JSON of an answer with status 200."""
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = json.loads(answer.content)
    return document


def certificate(folder: Path, name: str = "localhost") -> tuple[Path, Path]:
    """A certificate that nobody has signed but itself, for `name` and 127.0.0.1, and its key: PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    names = x509.SubjectAlternativeName([x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, pem, plain))
    return folder / "cert.pem", folder / "key.pem"
