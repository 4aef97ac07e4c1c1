"""One file, one embedding: torch, `mvmr evaluate`, the engine, every door of the service, clients, the batch job."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import numpy.typing as npt
import pytest
import skimage.data
from PIL import Image

from mvmr.bundles import bundle as bundles
from mvmr.bundles.preprocess import Preprocess
from mvmr.data import decoding, open_images
from mvmr.data.image_bytes import Limits, Prepared, prepare
from mvmr.export.artifacts import EMBEDDING, report_of
from mvmr.serve import Engine
from mvmr.serve.batch.job import embed
from tests.serve.serving import FLOAT32, PREPROCESS, Running, encoded, read_json, rows, running

pytestmark = pytest.mark.slow

Floats = npt.NDArray[np.float32]
PRECISIONS = ("fp32", "int8")
EVERY_FORMAT = Limits(formats=decoding.formats())
FORMATS = [flag for name in decoding.formats() for flag in ("--format", name)]
ROTATIONS = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip
NAMES = (  # those that come with the package
    "astronaut", "coffee", "chelsea", "rocket", "retina", "immunohistochemistry", "hubble_deep_field", "brick", "grass",
    "gravel", "coins", "page", "text", "clock", "moon", "camera",
)  # fmt: skip


def photograph(number: int) -> Image.Image:
    """Another part of another of scikit-image's photographs for every number, 300 x 200 pixels, RGB."""
    picture = Image.fromarray(getattr(skimage.data, NAMES[number % len(NAMES)])()).convert("RGB")
    random = np.random.default_rng(number)
    side = int(random.integers(min(picture.size) // 2, min(picture.size)))
    left, top = (int(random.integers(length - side + 1)) for length in picture.size)
    return picture.resize((300, 200), box=(left, top, left + side, top + side))


def golden_files() -> dict[str, bytes]:
    """Files of every kind that a service meets, by name."""
    contents: dict[str, bytes] = {}

    def add(name: str, kind: str, image: Image.Image | None = None, **options: Any) -> None:
        picture = photograph(len(contents)) if image is None else image
        contents[name] = encoded(picture, kind, **options)

    def another() -> Image.Image:
        return photograph(len(contents))

    for orientation, rotation in ROTATIONS.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = another() if rotation is None else another().transpose(rotation)
        add(f"exif-{orientation}.jpg", "JPEG", stored, exif=exif, quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    add("exif.png", "PNG", exif=exif)
    add("exif.webp", "WEBP", exif=exif)
    add("exif.tif", "TIFF", exif=exif)
    add("cmyk.jpg", "JPEG", another().convert("CMYK"))
    add("cmyk.tif", "TIFF", another().convert("CMYK"))
    add("progressive.jpg", "JPEG", progressive=True, quality=60)
    add("subsampled.jpg", "JPEG", subsampling=2, quality=30)
    add("grey.jpg", "JPEG", another().convert("L"))
    add("grey.png", "PNG", another().convert("L"))
    add("black-and-white.png", "PNG", another().convert("1"))
    sixteen = (np.asarray(another().convert("L"), np.uint16) * 257) ^ 7
    add("sixteen.png", "PNG", Image.fromarray(sixteen))
    add("sixteen.tif", "TIFF", Image.fromarray(np.roll(sixteen, 70, axis=1)))
    add("thirty-two.tif", "TIFF", Image.fromarray(np.roll(sixteen, 40, axis=0).astype(np.int32) * 3))
    add("float.tif", "TIFF", Image.fromarray(np.asarray(another().convert("L"), np.float32) / 255))
    add("float-large.tif", "TIFF", Image.fromarray(np.asarray(another().convert("L"), np.float32) * 12))
    add("palette.png", "PNG", another().quantize(32))
    add("palette-transparent.png", "PNG", another().quantize(32), transparency=5)
    alpha = another().convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    add("alpha.png", "PNG", alpha)
    add("alpha-grey.png", "PNG", another().convert("LA"))
    add("transparent-colour.png", "PNG", transparency=(0, 0, 0))
    add("lossy.webp", "WEBP", quality=70)
    add("lossless.webp", "WEBP", alpha.rotate(180), lossless=True)
    add("animation.webp", "WEBP", save_all=True, append_images=[photograph(90)], duration=100)
    add("animation.gif", "GIF", save_all=True, append_images=[photograph(91), photograph(92)], duration=100)
    add("still.gif", "GIF", another().quantize(64))
    add("lzw.tif", "TIFF", compression="tiff_lzw")
    add("pages.tif", "TIFF", save_all=True, append_images=[photograph(93)])
    add("lab.tif", "TIFF", another().convert("LAB"))
    add("plain.bmp", "BMP")
    add("modern.avif", "AVIF")
    add("modern.jp2", "JPEG2000")
    add("two-pictures.jpg", "MPO", save_all=True, append_images=[photograph(94)])
    add("icon.ico", "ICO", another().convert("RGBA").resize((64, 64)))
    add("huge.jpg", "JPEG", another().resize((6000, 4000)), quality=50)
    add("upright.png", "PNG", another().resize((90, 800)))
    add("wide.png", "PNG", another().resize((800, 90)))
    add("exact.png", "PNG", another().resize((PREPROCESS.crop, PREPROCESS.crop)))
    add("resized.png", "PNG", another().resize((PREPROCESS.resize, PREPROCESS.resize)))
    add("odd.png", "PNG", another().resize((47, 41)))
    add("one-pixel.png", "PNG", Image.new("RGB", (1, 1), (200, 30, 90)))
    add("one-pixel.gif", "GIF", Image.new("RGB", (1, 1), (10, 130, 90)))
    add("line.png", "PNG", another().resize((1, 500)))
    add("row.jpg", "JPEG", another().resize((500, 1)))
    return contents


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return dict(sorted(golden_files().items()))


@pytest.fixture(scope="module")
def folder(files: Mapping[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("golden")
    for name, content in files.items():
        (out / name).write_bytes(content)
    return out


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet18 in float32 and in 8 bits, each of which has passed its gates on photographs."""
    import torch

    from mvmr.export.export import export
    from mvmr.models.torchvision_resnet import Resnet

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    encoder = Resnet(name="resnet18").build()
    generator = torch.Generator().manual_seed(0)
    for part in encoder.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight, generator=generator)
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.2, 0.5, generator=generator)  # else each block is the identity
            part.momentum = None
    seen = open_images("sample:patches", "train")
    pixels = PREPROCESS.batch(seen.load(index) for index in range(0, len(seen), 40))
    with torch.no_grad():
        encoder.train()(torch.from_numpy(PREPROCESS.normalise(pixels)))
    out = tmp_path_factory.mktemp("bundle") / "student"
    out.mkdir()
    bundles.write(
        out, backbone="resnet18", options={"small_kernel": False}, embedding_dim=512, preprocessing=PREPROCESS,
        training={"data": {"name": "sample:patches", "split": "unlabelled"}}, encoder_state=encoder.state_dict(),
    )  # fmt: skip
    export(out, formats=["onnx", "int8"], images=64)
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module", params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(path: Path, precision: str) -> Engine:
    return Engine.load(path, precision=precision, threads=1)


@pytest.fixture(scope="module")
def service(path: Path, precision: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(path, tmp_path_factory.mktemp("service"), "--precision", precision, *FORMATS) as service:
        yield service
        assert "Traceback" not in service.log_text


@pytest.fixture(scope="module")
def embeddings(engine: Engine, files: Mapping[str, bytes]) -> Floats:
    """What the engine makes of the files, one by one: what all others are compared with."""
    return np.concatenate([engine.embed([content], EVERY_FORMAT) for content in files.values()])


@pytest.fixture
def client(service: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=service.url, verify=False, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def pixels(files: Mapping[str, bytes]) -> npt.NDArray[np.uint8]:
    """What the service hands to its engine for each file, uint8 [N, 32, 32, 3]."""
    outcomes = [prepare(content, PREPROCESS, EVERY_FORMAT) for content in files.values()]
    assert [outcome for outcome in outcomes if not isinstance(outcome, Prepared)] == []
    return np.stack([outcome.pixels for outcome in outcomes if isinstance(outcome, Prepared)])


def same(actual: Any, wanted: Floats, engine: Engine) -> None:
    """Equal within what the report says an embedding may change by with the batch it is in."""
    report = json.loads((engine.path / report_of(engine.file)).read_text())
    actual = np.asarray(actual, np.float32)
    assert actual.shape == wanted.shape
    assert np.abs(actual - wanted).max() <= report["gates"]["batch_difference"] * np.abs(wanted).max()


# One preprocessing


def test_training_evaluation_and_service_see_the_same_pixels(
    path: Path, files: Mapping[str, bytes], folder: Path, pixels: npt.NDArray[np.uint8]
) -> None:
    """Not nearly the same: the same."""
    student, evaluated = bundles.load(path).student(), open_images(str(folder), "unlabelled")
    assert list(evaluated.keys) == list(files)
    for number, (name, content) in enumerate(files.items()):
        by_torch = student.prepare(Image.open(io.BytesIO(content))).numpy().transpose(1, 2, 0)
        by_evaluation = student.prepare(evaluated.load(number)).numpy().transpose(1, 2, 0)
        np.testing.assert_array_equal(pixels[number], by_torch, name)
        np.testing.assert_array_equal(pixels[number], by_evaluation, name)


def test_pictures_that_are_stored_turned_are_seen_upright(
    pixels: npt.NDArray[np.uint8], files: Mapping[str, bytes]
) -> None:
    """Against the photographs themselves: that all agree could also mean that all are wrong."""
    for orientation in ROTATIONS:
        upright = PREPROCESS.image(photograph(orientation - 1)).astype(int)
        seen = pixels[list(files).index(f"exif-{orientation}.jpg")]
        assert np.abs(seen - upright).mean() < 3, orientation
        assert np.abs(np.rot90(seen, 2) - upright).mean() > 6, orientation


def test_the_preprocessing_is_the_bundles_own(path: Path, engine: Engine) -> None:
    assert engine.preprocess == bundles.load(path).manifest.preprocessing == PREPROCESS
    assert json.loads(engine.runner.metadata["preprocessing"]) == PREPROCESS.to_dict()
    usual = Preprocess.for_size(PREPROCESS.crop)  # what a part would do that has a preprocessing of its own
    assert np.abs(usual.image(photograph(0)).astype(int) - PREPROCESS.image(photograph(0))).max() > 20


# The engine and torch


def test_the_engine_does_as_torch_does_on_each_kind_of_file(
    path: Path, engine: Engine, folder: Path, embeddings: Floats, pixels: npt.NDArray[np.uint8]
) -> None:
    """By the export's own measure, with the gates that the file's report was judged by."""
    from mvmr.export.verification import Gates, Reference, verify

    report = json.loads((path / report_of(engine.file)).read_text())
    assert report["passed"]
    student = bundles.load(path).student()
    reference = Reference.of(student, pixels)
    by_torch = student.embed(sorted(folder.iterdir())).numpy()
    np.testing.assert_allclose(reference.outputs[EMBEDDING], by_torch, rtol=1e-4, atol=1e-4)
    verdict = verify(lambda images: {EMBEDDING: engine(images)}, reference, gates=Gates(**report["gates"]))
    assert verdict["failures"] == []
    same(engine(pixels), embeddings, engine)


def test_so_does_what_evaluate_computes(path: Path, folder: Path, files: Mapping[str, bytes]) -> None:
    from mvmr.representations.cache import represent

    student = bundles.load(path).student()
    evaluated = represent(open_images(str(folder), "unlabelled"), student)
    np.testing.assert_allclose(evaluated, student.embed([folder / name for name in files]), rtol=1e-4, atol=1e-4)


def test_a_picture_in_memory_is_embedded_as_its_file_is(engine: Engine, folder: Path, embeddings: Floats) -> None:
    opened = [Image.open(file) for file in sorted(folder.iterdir())]
    same(engine.embed(opened), embeddings, engine)
    for picture in opened:
        picture.close()
    same(engine.embed(sorted(folder.iterdir()), EVERY_FORMAT), embeddings, engine)


# The doors of the service


def test_raw_bytes(client: httpx2.Client, engine: Engine, files: Mapping[str, bytes], embeddings: Floats) -> None:
    answers = [client.post("/v1/embed", content=content, headers={"accept": FLOAT32}) for content in files.values()]
    same(np.concatenate([rows(answer) for answer in answers]), embeddings, engine)


def test_many_files_at_a_time(
    client: httpx2.Client, engine: Engine, files: Mapping[str, bytes], embeddings: Floats
) -> None:
    parts = [("file", (name, content)) for name, content in files.items()]
    same(rows(client.post("/v1/embed", files=parts, headers={"accept": FLOAT32})), embeddings, engine)


def test_base64(client: httpx2.Client, engine: Engine, files: Mapping[str, bytes], embeddings: Floats) -> None:
    answer = client.post(
        "/v1/embed", json={"input": [base64.b64encode(content).decode() for content in files.values()]}
    )
    results = read_json(answer)["results"]
    same([result["embedding"] for result in results], embeddings, engine)
    sizes = {name: (result["width"], result["height"]) for name, result in zip(files, results, strict=True)}
    assert (sizes["huge.jpg"], sizes["one-pixel.png"], sizes["line.png"]) == ((6000, 4000), (1, 1), (1, 500))


def test_openais_own_client(service: Running, engine: Engine, files: Mapping[str, bytes], embeddings: Floats) -> None:
    import openai

    texts = [f"data:image/png;base64,{base64.b64encode(content).decode()}" for content in files.values()]
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
        answer = client.embeddings.create(model="student", input=texts)
        same([row.embedding for row in answer.data], embeddings, engine)
        answer = client.embeddings.create(model="student", input=texts[:3], encoding_format="float")
        same([row.embedding for row in answer.data], embeddings[:3], engine)
        assert [model.id for model in client.models.list()] == ["student"]


def test_tritons_own_client(
    service: Running, engine: Engine, pixels: npt.NDArray[np.uint8], embeddings: Floats
) -> None:
    from tritonclient import http as triton

    client = triton.InferenceServerClient(service.url.removeprefix("http://"))
    try:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("student")
        assert client.get_model_metadata("student")["outputs"][0]["shape"] == [-1, 512]
        for binary in (True, False):
            tensor = triton.InferInput("image", list(pixels.shape), "UINT8")
            tensor.set_data_from_numpy(pixels, binary_data=binary)
            wanted = triton.InferRequestedOutput("embedding", binary_data=binary)
            same(client.infer("student", [tensor], outputs=[wanted]).as_numpy("embedding"), embeddings, engine)
    finally:
        client.close()


def test_the_batch_job(path: Path, engine: Engine, folder: Path, embeddings: Floats, tmp_path: Path) -> None:
    out = tmp_path / "golden.npy"
    summary = embed(path, folder, out=out, precision=engine.precision, limits=EVERY_FORMAT)
    assert (summary.rows, summary.errors) == (len(embeddings), 0)
    names = [Path(line).name for line in (tmp_path / "golden.paths.txt").read_text().splitlines()]
    assert names == sorted(file.name for file in folder.iterdir())
    same(np.load(out), embeddings, engine)
