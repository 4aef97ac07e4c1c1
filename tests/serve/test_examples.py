"""docs/serving.md tells the truth: its tables are those of the code, and each of its examples runs as it stands."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import skimage.data
import yaml
from click.testing import CliRunner
from fastapi import APIRouter
from fastapi.routing import APIRoute
from PIL import Image
from prometheus_client import Counter
from prometheus_client.metrics import MetricWrapperBase

from mvmr.cli.main import main
from mvmr.data import decoding, image_bytes
from mvmr.data.image_bytes import Limits
from mvmr.serve import cli, engine
from mvmr.serve.decoding import pool as decode_pool
from mvmr.serve.http import fetch, request_body, run
from mvmr.serve.http.metrics import Metrics
from mvmr.serve.http.problems import PROBLEMS
from mvmr.serve.http.routes import embeddings, inference, status
from mvmr.serve.http.settings import ConnectionLimits, Settings
from tests.serve import serving

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
IMAGES = ("photos/cat.jpg", "photos/dog.jpg")
SIZE, DIM, CLASSES = 32, 128, ("cat", "dog", "eel")


def rows(heading: str) -> list[list[str]]:
    """The cells of the tables below a heading, without their heads."""
    _, _, below = f"\n{PAGE}".partition(f"\n{heading}\n")
    assert below, f"no heading {heading!r}"
    section = re.split(r"^#", below, maxsplit=1, flags=re.M)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for number, row in enumerate(cells) if set("".join(row)) != {"-"} and (number or any(row))]


# Tables


def test_all_endpoints_are_listed() -> None:
    listed = re.findall(r"`(GET|POST) ([^`?]+)[^`]*`", "".join(row[0] for row in rows(PAGE.splitlines()[0])))
    routers: tuple[APIRouter, ...] = (status.probes, status.router, embeddings.router, inference.router)
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    expected = [(method, route.path) for route in routes for method in route.methods]
    assert sorted(listed) == sorted([*expected, ("GET", "/openapi.json")])


def test_all_problems_are_listed() -> None:
    assert rows("## Problems")[1:] == [[f"`{name}`", str(code), title] for name, (code, title) in PROBLEMS.items()]


def test_all_reasons_why_an_image_has_no_embedding_are_listed() -> None:
    sources = "".join(Path(module.__file__).read_text() for module in (image_bytes, decode_pool, request_body, fetch))
    codes = re.findall(r'Rejected\(\s*"([a-z0-9-]+)"', sources)
    assert sorted(row[0].strip("`") for row in rows("## What becomes of each image")[1:]) == sorted(set(codes))


def test_all_settings_are_listed_with_their_variables_and_defaults() -> None:
    expected = []
    for parameter in cli.serve.params:
        assert isinstance(parameter, click.Option | click.Argument)
        assert parameter.name
        flag = parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name.strip("[]")
        default = (
            "" if parameter.multiple or not isinstance(parameter.default, str | int | float) else str(parameter.default)
        )
        expected.append([f"`{flag}`", f"`MVMR_{parameter.name.upper()}`", default])
    assert [row[:3] for row in rows("## Settings")[1:]] == expected


def test_each_variable_sets_what_its_flag_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through the whole command line, to the function that serves."""
    keys = tmp_path / "keys"
    keys.write_text("0123456789abcdef\n")
    variables = {
        "BUNDLE": "b", "HOST": "0.0.0.0", "PORT": "9", "NAME": "n", "PRECISION": "fp32", "PROVIDER": "cuda",
        "WORKERS": "2", "THREADS": "3", "DECODERS": "4", "MAX_BATCH": "5", "QUEUE": "100", "MAX_ITEMS": "6",
        "MAX_BODY_MB": "1.5", "MAX_JSON_MB": "0.5",
        "MAX_MEGAPIXELS": "2", "DECODE_SECONDS": "3", "DECODE_MEMORY_MB": "4", "FORMATS": "ppm ICO",
        "MAX_CONNECTIONS": "11", "MAX_CONNECTIONS_PER_ADDRESS": "12", "MAX_HEAD_KB": "13", "MAX_HEADERS": "14",
        "MAX_PIPELINED": "15", "MAX_UNSENT_MB": "16", "HEAD_SECONDS": "17", "BODY_SECONDS": "18",
        "ANSWER_SECONDS": "19", "IDLE_SECONDS": "20", "PROXIES": "10.0.0.1 ::1", "PROBE_PORT": "21",
        "API_KEYS": str(keys), "CORS": "https://a https://b", "URL_HOSTS": "c d", "INDEX": "i",
        "TLS_CERT": "t", "TLS_KEY": "k", "DRAIN": "7", "GRACE": "8",
    }  # fmt: skip
    expected = Settings(
        host="0.0.0.0", port=9, workers=2, decoders=4, max_batch=5, queue=100, max_items=6, max_body=3 * 2**19,
        limits=Limits(pixels=2e6, seconds=3, memory=4 * 2**20, formats=(*decoding.COMMON, "PPM", "ICO")),
        connections=ConnectionLimits(
            total=11, of_one=12, head=13 * 2**10, headers=14, pipelined=15, unsent=16 * 2**20, head_seconds=17,
            body_seconds=18, answer_seconds=19, idle_seconds=20, proxies=("10.0.0.1", "::1"),
        ),
        max_json=2**19, probe_port=21,
        api_keys=("0123456789abcdef",), cors=("https://a", "https://b"), url_hosts=("c", "d"),
        tls_cert="t", tls_key="k", drain=7, grace=8,
    )  # fmt: skip
    assert [f"`MVMR_{name}`" for name in variables] == [row[1] for row in rows("## Settings")[1:]]
    called: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(run, "serve", lambda bundle, **options: called.append((bundle, options)))
    environment = {f"MVMR_{name}": value for name, value in variables.items()}
    for arguments in ([], ["other", "--port", "10"]):
        result = CliRunner().invoke(main, ["serve", *arguments], env=environment)
        assert result.exit_code == 0, result.output
    (bundle, options), (typed, others) = called
    assert options.pop("settings") == expected
    assert (bundle, typed, others["settings"].port) == ("b", "other", 10)  # what is typed wins
    assert options == {"name": "n", "precision": "fp32", "provider": "cuda", "threads": 3, "index": "i"}


def test_all_metrics_are_listed_with_their_labels() -> None:
    expected = []
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            labels = f": {', '.join(metric._labelnames)}" if metric._labelnames else ""
            name = f"{family.name}_total" if isinstance(metric, Counter) else family.name
            expected.append([f"`{name}`", f"{family.type}{labels}"])
    assert sorted(row[:2] for row in rows("## Metrics")) == sorted(expected)


def test_how_far_the_canary_may_be_off_is_said() -> None:
    match = re.search(r"within (.+) % of its length for fp32, (.+) % for fp16, (.+) % for int8", " ".join(PAGE.split()))
    assert match
    assert [float(percent) / 100 for percent in match.groups()] == pytest.approx(
        [engine.TOLERANCE[precision] for precision in ("fp32", "fp16", "int8")]
    )


# Examples


@dataclass(frozen=True)
class Example:
    """A fenced block of the page; start: of the service that it needs, in the page's words."""

    language: str
    text: str
    line: int
    start: str


def blocks() -> Iterator[tuple[str, str, int]]:
    """Each fenced block: what its fence says, its text, and the line where that begins."""
    begins: tuple[str, int] | None = None
    lines = PAGE.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if line.startswith("```"):
            if begins is not None:
                yield begins[0], "".join(lines[begins[1] : number]), begins[1] + 1
            begins = (line[3:].strip(), number + 1) if begins is None else None


def examples() -> Iterator[Example]:
    """What is tagged `run`, each with what was tagged `start` last."""
    start = ""
    for tag, text, line in blocks():
        if tag == "bash start":
            start = text
        elif tag in ("bash run", "python run"):
            yield Example(tag.split()[0], text, line, start)


EXAMPLES = tuple(examples())
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "MVMR_DRAIN": "0",
}


def test_all_code_is_run_but_what_needs_a_gpu_or_containers() -> None:
    others = [text for tag, text, _ in blocks() if not tag.endswith((" run", " start"))]
    assert [text for text in others if not re.search(r"gpu|rtx|docker|^kind: Deployment$", text, re.M)] == []
    assert len(EXAMPLES) + len(others) < len(list(blocks()))  # there are starts


def test_the_kubernetes_manifest_fits_the_service() -> None:
    (text,) = (text for tag, text, _ in blocks() if tag == "yaml")
    pod = yaml.safe_load(text)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert {f"`{name}`" for name in variables} < {row[1] for row in rows("## Settings")}
    paths = {route.path for route in status.probes.routes if isinstance(route, APIRoute)}
    assert {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")} <= paths
    assert pod["terminationGracePeriodSeconds"] > float(variables["MVMR_DRAIN"]) + Settings().grace
    # else a Service of the name mvmr would set MVMR_PORT=tcp://..., which is the variable of a flag
    assert pod["enableServiceLinks"] is False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the examples run: runs/photos is a small ResNet with a head, exported by torch."""
    from mvmr.bundles.preprocess import Preprocess
    from mvmr.export.export import export
    from tests.making import write_bundle

    folder = tmp_path_factory.mktemp("examples")
    for path, name in zip(IMAGES, ("chelsea", "astronaut"), strict=True):
        (folder / path).parent.mkdir(exist_ok=True)
        Image.fromarray(getattr(skimage.data, name)()).save(folder / path, quality=90)
    out = folder / "runs" / "photos"
    write_bundle(out, preprocess=Preprocess.for_size(SIZE))
    serving.add_head(out, "animals", CLASSES, dim=DIM)
    export(out, formats=["onnx"], heads="all", data="sample:digits", images=16)
    return folder


@pytest.fixture(scope="module")
def student(folder: Path) -> np.ndarray:
    """What torch makes of the images, float32 [2, D]."""
    from mvmr.bundles import bundle as bundles

    vectors = bundles.load(folder / "runs" / "photos").student().embed([folder / image for image in IMAGES])
    return np.asarray(vectors, np.float32)


@pytest.fixture(scope="module")
def port(folder: Path, request: pytest.FixtureRequest) -> Iterator[int]:
    """Where the service listens that the page has started last, by the page's own command, but for the port."""
    script = re.sub(r"^mvmr serve (.*)$", r"exec mvmr serve \1 --port 0", request.param, flags=re.M)
    log = folder / "log"
    command = ["bash", "-euo", "pipefail", "-c", script]
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=out, cwd=folder, env=ENVIRONMENT) as process,
    ):
        started = serving.Running(process, "", log)
        try:
            started.wait_for("startup complete")
            match = re.search(r" at https?://127\.0\.0\.1:(\d+)$", started.log_text, re.M)
            assert match
            yield int(match[1])
            assert started.stop() == 0
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)


# What each example gives, by words that it alone has: called with what it printed, its folder, and what torch makes
# of the images. A Python example leaves `embeddings`, which are saved.
Check = Callable[[str, Path, np.ndarray], None]


def printed_embedding(output: str, folder: Path, student: np.ndarray) -> None:
    answer = json.loads(output)
    assert (answer["model"], answer["dim"]) == ("photos", DIM)
    (result,) = answer["results"]
    np.testing.assert_allclose(result["embedding"], student[0], atol=1e-4)
    assert f'"width": {result["width"]}, "height": {result["height"]}' in PAGE


def saved_embeddings(output: str, folder: Path, student: np.ndarray) -> None:
    embeddings = np.fromfile(folder / "embeddings.f32", "<f4").reshape(2, DIM)
    np.testing.assert_allclose(embeddings, student, atol=1e-4)


def kept_embeddings(output: str, folder: Path, student: np.ndarray) -> None:
    np.testing.assert_allclose(np.load(folder / "embeddings.npy"), student, atol=1e-4)


def described_embeddings(output: str, folder: Path, student: np.ndarray) -> None:
    kept_embeddings(output, folder, student)
    first, *labels = output.splitlines()
    assert re.fullmatch(rf"\(2, {DIM}\) float32 [0-9a-f]{{32}}", first)
    assert [line.split()[0] for line in labels] == best(folder, student[0])


def two_classes(output: str, folder: Path, student: np.ndarray) -> None:
    (result,) = json.loads(output)["results"]
    assert [label["label"] for label in result["labels"]] == best(folder, student[0])


def best(folder: Path, embedding: np.ndarray) -> list[str]:
    from mvmr.bundles import bundle as bundles

    head = bundles.load(folder / "runs" / "photos").head("animals")
    return [CLASSES[number] for number in np.argsort(-(head.weight @ embedding + head.bias))[:2]]


def itself_nearest(output: str, folder: Path, student: np.ndarray) -> None:
    (result,) = json.loads(output)["results"]
    assert result["hits"][0]["path"].endswith(IMAGES[0])
    assert result["hits"][0]["score"] == pytest.approx(1, abs=1e-4)


def neighbours_of(image: str) -> Check:
    """Its last two lines are neighbours, the image itself first."""

    def check(output: str, folder: Path, student: np.ndarray) -> None:
        first, second = output.splitlines()[-2:]
        assert re.match(rf"1\.0000  \S*{image}", first)
        assert image not in second

    return check


def stored_embeddings(output: str, folder: Path, student: np.ndarray) -> None:
    assert output == f"features.parquet 2 0\n2 (2, {DIM})\n"
    kept_embeddings(output, folder, student)


def named_model(output: str, folder: Path, student: np.ndarray) -> None:
    assert [model["id"] for model in json.loads(output)["data"]] == ["photos"]


def said_ready(output: str, folder: Path, student: np.ndarray) -> None:
    assert json.loads(output) == {"status": "ready"}


def said_true(output: str, folder: Path, student: np.ndarray) -> None:
    assert output == "True\n"


CHECKS: Mapping[str, Check] = {
    "data-binary @photos/cat.jpg": printed_embedding,
    "--output embeddings.f32": saved_embeddings,
    "/v1/classify": two_classes,
    "/v1/search": itself_nearest,
    "client.classify(": described_embeddings,
    "AsyncClient(": kept_embeddings,
    "OpenAI(": kept_embeddings,
    "InferInput(": kept_embeddings,
    "mvmr search": neighbours_of(IMAGES[0]),
    "open_embeddings(": stored_embeddings,
    "client.search(": neighbours_of(IMAGES[1]),
    "index.search(": neighbours_of(IMAGES[1]),
    "x-api-key: $(": named_model,
    "--cacert cert.pem": said_ready,
    "SSL_CERT_FILE": said_true,
}
KEEP = """
import runpy, sys
found = runpy.run_path(sys.argv[1])
if "embeddings" in found:
    import numpy
    numpy.save(sys.argv[2], numpy.asarray(found["embeddings"], "float32"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("port", "example"),
    [pytest.param(example.start, example, id=f"{example.language}-{example.line}") for example in EXAMPLES],
    indirect=["port"],
    scope="module",
)
def test_an_example_gives_what_it_promises(port: int, example: Example, folder: Path, student: np.ndarray) -> None:
    """In the order of the page, for some use what others have written."""
    if re.search(r"\bcurl\b", example.text) and not shutil.which("curl"):
        pytest.skip("this machine has no curl")
    (check,) = (check for words, check in CHECKS.items() if words in example.text)
    script = folder / "example"
    script.write_text(example.text.replace("localhost:8000", f"localhost:{port}"))
    command = {
        "bash": ["bash", "-euo", "pipefail", str(script)],
        "python": [sys.executable, "-c", KEEP, str(script), "embeddings.npy"],
    }[example.language]
    (folder / "embeddings.npy").unlink(missing_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stdout[:2000] + done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    check(done.stdout, folder, student)
