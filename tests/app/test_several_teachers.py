"""A student of several teachers: a page for each, all of one student and one gallery."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from mvmr.app import fragments
from mvmr.app.embedders.embedder import TEACHER
from mvmr.app.gallery import Gallery
from mvmr.app.opening import open_workbenches
from mvmr.distillation.teachers.clip import ClipTeacher
from mvmr.evaluation.neighbours import neighbour_overlap
from mvmr.representations.cache import represent
from tests.app.several import NAMES, make_student
from tests.distill.test_teacher import write_folder

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

PATHS = {"clip": "", "dino": "/teacher/dino"}
K = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(tmp_path_factory.mktemp("several"))


@pytest.fixture
def student(made: Path, tmp_path: Path) -> Path:
    """One whose teachers may be spoiled."""
    folder = tmp_path / "copy"
    shutil.copytree(made.parent, folder, ignore=shutil.ignore_patterns("*.app"))
    manifest = folder / made.name / "bundle.json"
    manifest.write_text(manifest.read_text().replace(str(made.parent), str(folder)))
    return folder / made.name


def teachers_rows(student: Path, name: str) -> np.ndarray:
    """What a teacher says of the gallery, without the app."""
    images = Gallery.open(str(student.parent / "photos")).images
    return represent(images, ClipTeacher.load(student.parent / name))


def nearest(rows: np.ndarray, row: int) -> list[int]:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return [int(other) for other in np.argsort(-unit @ unit[row], kind="stable") if other != row][:K]


def test_each_is_compared_with_one_student(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed, embeddings = Counter[str](), Gallery.embeddings

    def count(gallery: Gallery, encoder: Any, *arguments: Any, **options: Any) -> np.ndarray:
        computed[encoder.label] += 1
        return embeddings(gallery, encoder, *arguments, **options)

    monkeypatch.setattr(Gallery, "embeddings", count)
    benches = open_workbenches(made)
    assert [bench.name for bench in benches] == list(NAMES)
    for bench in benches:
        rows = teachers_rows(made, bench.name)
        comparison = bench.compare(3, "torch", K).comparison
        assert comparison.teacher is not None
        assert [neighbour.row for neighbour in comparison.teacher] == nearest(rows, 3)
        np.testing.assert_array_equal(bench.overlap("torch", K), 100 * neighbour_overlap(rows, bench.rows("torch"), K))
    first, second = benches
    assert not np.array_equal(first.overlap("torch", K), second.overlap("torch", K))
    assert second.bank("torch") is first.bank("torch")
    assert computed == {"torch float32": 1} | {f"{name} (open_clip_model.safetensors)": 1 for name in NAMES}


def test_the_line_at_the_start_and_the_header_name_them_all(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benches = open_workbenches(made, progress=True)
    told = " ".join(capsys.readouterr().err.split())
    assert "clip: clip (open_clip_model.safetensors); dino: dino (open_clip_model.safetensors)" in told
    for bench in benches:
        header = fragments.header(bench)
        links = {name: address for address, name in re.findall(r'<a href="([^"]*)"[^>]*>(\w+)</a>', header)}
        here = f"http://proxy/below{PATHS[bench.name]}/"
        assert {name: urljoin(here, address) for name, address in links.items()} == {
            name: f"http://proxy/below{path}/" for name, path in PATHS.items()
        }
        assert re.findall(r'aria-current="page">(\w+)<', header) == [bench.name]


def test_the_one_that_is_named_is_shown_alone(made: Path) -> None:
    (bench,) = open_workbenches(made, teacher="dino")
    assert np.array_equal(bench.rows(TEACHER), teachers_rows(made, "dino"))
    assert "<nav" not in fragments.header(bench)


def lose(folder: Path) -> None:
    shutil.rmtree(folder)


def spoil(folder: Path) -> None:
    shutil.rmtree(folder)
    write_folder(folder, seed=9)


@pytest.mark.parametrize(("name", "other"), [NAMES, NAMES[::-1]])
@pytest.mark.parametrize(("hurt", "told"), [(lose, "any more"), (spoil, "is not the one")])
def test_one_that_can_not_be_had_leaves_the_other_whole(
    student: Path, name: str, other: str, hurt: Callable[[Path], None], told: str
) -> None:
    hurt(student.parent / name)
    benches = {bench.name: bench for bench in open_workbenches(student)}
    assert list(benches) == list(NAMES)
    assert benches[name].teacher is None
    assert told in benches[name].no_teacher
    assert benches[name].compare(3, "torch", K).comparison.teacher is None
    assert benches[other].no_teacher == ""
    whole = benches[other].compare(3, "torch", K).comparison
    assert whole.teacher is not None
    assert [neighbour.row for neighbour in whole.teacher] == nearest(teachers_rows(student, other), 3)


@pytest.fixture(scope="module")
def client(made: Path) -> Iterator[TestClient]:
    from mvmr.app.server import create_app  # here, for Gradio takes seconds

    async def create() -> FastAPI:  # in a loop, else Gradio makes some of its own and leaves them open
        return create_app(benches)

    benches = open_workbenches(made)
    with TestClient(asyncio.run(create()), follow_redirects=False) as opened:
        yield opened


def overlaps(client: TestClient, path: str) -> dict[str, float]:
    text = client.get(f"{path}/disagreements/images.csv", params={"engine": "torch", "k": K}).text
    return {line["image"]: float(line[f"overlap@{K} (%)"]) for line in csv.DictReader(io.StringIO(text))}


@pytest.mark.slow
def test_each_page_has_its_own_map_and_tables_and_the_same_images(client: TestClient, made: Path) -> None:
    (student,) = (bench for bench in open_workbenches(made) if bench.name == "clip")
    thumbnails = set()
    for name, path in PATHS.items():
        expected = 100 * neighbour_overlap(teachers_rows(made, name), student.rows("torch"), K)
        assert list(dict(sorted(overlaps(client, path).items())).values()) == expected.tolist()
        drawn = client.get(f"{path}/map.json", params={"engine": "torch", "k": K})
        assert drawn.status_code == 200
        np.testing.assert_allclose(drawn.json()["overlap"], expected, atol=0.1)
        thumbnails.add(client.get(f"{path}/thumb/{fragments.version(student)}/3").content)
        assert client.get(f"{path}/mvmr/map.js").text.startswith("//")
        assert f"teacher: {name} (" in client.get(f"{path}/figures.csv").text
    assert len(thumbnails) == 1


@pytest.mark.slow
def test_the_queue_of_each_page_answers_a_click(client: TestClient, made: Path) -> None:
    for name, path in PATHS.items():
        config = client.get(f"{path}/config").json()
        strip = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "strip")
        (click,) = (event["id"] for event in config["dependencies"] if [strip, "select"] in event["targets"])
        event = {"data": ["torch", K], "event_data": {"row": 3}, "fn_index": click, "session_hash": "visit"}
        assert client.post(f"{path}/gradio_api/queue/join", json=event).status_code == 200
        said = client.get(f"{path}/gradio_api/queue/data", params={"session_hash": "visit"}).text
        answers = [json.loads(line.removeprefix("data: ")) for line in said.splitlines() if line.startswith("data: ")]
        (output,) = (answer["output"] for answer in answers if answer["msg"] == "process_completed")
        (side,) = re.findall(r'<section class="side teacher".*?</section>', output["data"][1], re.DOTALL)
        assert [int(row) for row in re.findall(r'data-row="(\d+)"', side)] == nearest(teachers_rows(made, name), 3)


@pytest.mark.slow
def test_an_address_without_its_slash_leads_to_the_page_and_one_of_no_teacher_nowhere(client: TestClient) -> None:
    answer = client.get("/teacher/dino")
    assert answer.status_code == 307
    assert urljoin("http://proxy/below/teacher/dino", answer.headers["location"]) == "http://proxy/below/teacher/dino/"
    assert client.get("/teacher/dino/").status_code == 200
    assert [client.get(path).status_code for path in ("/teacher/", "/teacher/clip/", "/teacher/vit/")] == [404] * 3
