"""The page of `mvmr report`: whole, self-contained, escaped, and readable where parts are missing."""

import base64
import copy
import io
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvmr.distillation.report.page import write_page

ROWS = ["student.stem", "student.layer1", "student.layer2", "student.layer3", "student.layer4", "untrained", "teacher"]
COLUMNS = ["teacher", "pixels", "scattering", "hog", "local_std"]
VILE = "<script>alert(1)</script>"
VOID = {"meta", "img", "br", "path", "rect", "use"}
MINUS = "\N{MINUS SIGN}"

Report = dict[str, Any]


def synthetic(classes: Sequence[str], images: int, *, seed: int = 0) -> Report:
    """A report with plausible figures for a ResNet18 and a small CLIP."""
    rng = np.random.default_rng(seed)
    return {
        "schema": 1,
        "mvmr_version": "0.1.0",
        "command": "mvmr report runs/R&D/student --data sample:patches --out report",
        "bundle": {
            "path": "runs/R&D/student", "space_id": "5d0c88a1f3e2b764", "backbone": "resnet18",
            "embedding_dim": 512, "method": "distillation", "recipe": "quickstart", "trained_on": "sample:patches",
            "steps": 840,
        },
        "teacher": {"name": "ViT-B-16", "weights": "openai", "identity": "c30e07468368b3122723b2c7d75", "dim": 192},
        "data": {
            "name": "sample:patches", "split": "test", "images": images, "available": images,
            "classes": list(classes), "seed": 0,
        },
        "dependence": {"permutations": 200, "rows": ROWS, "columns": COLUMNS, "cells": _cells(rng)},
        "neighbours": _neighbours(rng, classes, images),
        "probe": _probe(rng, classes, images),
        "spectrum": {
            who: {"effective_rank": rank, "dim": dim, "values": np.exp(-np.arange(dim) / rank).tolist()}
            for who, rank, dim in (("student", 31.4, 512), ("teacher", 28.2, 192), ("untrained", 12.6, 512))
        },
        "training": [_record(step) for step in range(10, 850, 10)],
        "not_measured": [
            {"what": "spread over trainings", "why": "one bundle is one seed; train again with another --seed"},
            {"what": "speed of the exported model", "why": "that is mvmr bench export"},
        ],
    }  # fmt: skip


def _cells(rng: np.random.Generator) -> list[Report]:
    cells = []
    for i, row in enumerate(ROWS):
        for j, column in enumerate(COLUMNS):
            level = (0.36 + 0.1 * i if i < 5 else 0.41) if column == "teacher" else 0.62 - 0.06 * i - 0.04 * j
            value = 1.0 if row == column else level + rng.normal(0, 0.01)
            cells.append({
                "row": row, "column": column, "dcor": value, "null_mean": -0.0004, "null_low": -0.018,
                "null_high": 0.021, "p": 1 / 201 if value > 0.1 else 0.3, "cka": min(1.0, value + 0.05),
            })  # fmt: skip
    return cells


def _neighbours(rng: np.random.Generator, classes: Sequence[str], images: int) -> Report:
    means = np.sort(rng.uniform(38, 78, len(classes)))
    rows = [
        {"name": name, "images": 40, "mean": mean, "low": mean - 6.2, "high": mean + 6.1}
        for name, mean in zip(classes, means.tolist(), strict=True)
    ]
    worst = []
    for number in range(12):
        image, *neighbours = rng.choice(images, size=18, replace=False).tolist()
        shared = neighbours[: number % 3]
        teacher, student = (
            shared + neighbours[2 : 12 - len(shared)],
            neighbours[10 : 17 - len(shared)] + neighbours[7:10] + shared,
        )
        worst.append({
            "image": image, "class": rows[min(number // 2, len(rows) - 1)]["name"],
            "overlap": 10.0 * len(set(teacher) & set(student)), "teacher": teacher, "student": student,
        })  # fmt: skip
    return {
        "k": 10, "chance": 10 / (images - 1), "overlap": {"mean": 61.23, "low": 59.12, "high": 63.34},
        "untrained": {"mean": 21.04, "low": 19.45, "high": 22.56}, "classes": rows, "worst": worst,
    }  # fmt: skip


def _probe(rng: np.random.Generator, classes: Sequence[str], images: int) -> Report:
    differences = np.sort(rng.normal(-1.2, 5, len(classes)))
    rows = [
        {
            "name": name, "images": 40, "student": 80.6 + difference, "teacher": 80.6, "difference": difference,
            "low": difference - 5.1, "high": difference + 5.2,
        }
        for name, difference in zip(classes, differences.tolist(), strict=True)
    ]  # fmt: skip
    count = len(classes)
    confusion = {
        side: (rng.poisson(8 / count, (count, count)) + np.eye(count, dtype=int) * right).tolist()
        for side, right in (("student", 31), ("teacher", 32))
    }
    return {
        "student": {"top1": 79.41, "C": 0.1}, "teacher": {"top1": 80.59, "C": 1.0}, "agreement": 84.26,
        "confusion": confusion, "classes": rows,
    }  # fmt: skip


def _record(step: int) -> Report:
    left = float(np.exp(-step / 200))
    return {
        "step": step, "epoch": step / 21, "lr": 1e-3, "loss": 0.08 + left, "dcor.teacher": 0.03 + 0.4 * left,
        "regression.teacher": 0.05 + 0.6 * left, "images_per_s": 300.0, "seconds": step / 5,
        "rank_h": 29 + 10 * left, "rank_z": 29 + 10 * left, "std_h": 0.6, "std_z": 0.6,
        "biased.teacher": 0.99, "biased.teacher.null": 0.5, "unbiased.teacher": 0.97 - 0.4 * left,
        "unbiased.teacher.null": 0.01,
    }  # fmt: skip


def without_teacher(report: Report) -> None:
    """Take out of `report` all that a bundle without a teacher lacks."""
    report["teacher"] = report["neighbours"] = None
    dependence = report["dependence"]
    dependence["rows"], dependence["columns"] = ROWS[:-1], COLUMNS[1:]
    dependence["cells"] = [cell for cell in dependence["cells"] if "teacher" not in (cell["row"], cell["column"])]
    if report["probe"] is not None:
        report["probe"] |= {"teacher": None, "agreement": None}
        report["probe"]["confusion"]["teacher"] = None
        for row in report["probe"]["classes"]:
            row |= dict.fromkeys(("teacher", "difference", "low", "high"))
    del report["spectrum"]["teacher"]
    report["not_measured"].append({"what": "all that takes a teacher", "why": "the bundle names none"})


def without_labels(report: Report) -> None:
    """Take out of `report` all that takes labels."""
    report["data"]["classes"] = report["probe"] = None
    if report["neighbours"] is not None:
        report["neighbours"]["classes"] = None
        for entry in report["neighbours"]["worst"]:
            entry["class"] = None
    report["not_measured"].append({"what": "the probe, and figures by label", "why": "the data has none"})


class Page(HTMLParser):
    """Tags with their attributes, the text, and whether every tag is closed in its order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.parts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def picture(number: int) -> Image.Image:
    """Noise, which JPEG holds in less, or one colour, which PNG does."""
    if number % 2:
        noise = np.random.default_rng(number).integers(0, 256, (100, 120, 3), dtype=np.uint8)
        return Image.fromarray(noise)
    return Image.new("RGB", (120, 100), (number % 256, number // 256, 90))


@pytest.fixture
def page(tmp_path: Path, no_fsync: None) -> Callable[[Report], Page]:
    def write(report: Report) -> Page:
        write_page(report, picture, tmp_path / "index.html")
        return Page((tmp_path / "index.html").read_text(encoding="utf-8"))

    return write


CLASSES = ["air & sea", "brick", VILE, "$\\frac$ & $x$", "猫", "bell\x07"] + [f"class {i}" for i in range(11)]


@pytest.fixture(scope="module")
def report() -> Report:
    return synthetic(CLASSES, 680)


@pytest.fixture(scope="module")
def full(report: Report, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    file = tmp_path_factory.mktemp("page") / "index.html"
    write_page(report, picture, file)
    html = file.read_text(encoding="utf-8")
    return html, Page(html)


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(full: tuple[str, Page]) -> None:
    html, page = full
    addresses = [
        value for _, attributes in page.tags for key, value in attributes.items()
        if key in {"src", "href", "xlink:href", "srcset", "action", "data"}
    ]  # fmt: skip
    assert len(addresses) > 100
    assert {address.partition(":")[0] if ":" in address else address[0] for address in addresses} == {"data", "#"}
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]


def test_names_are_text(full: tuple[str, Page]) -> None:
    html, page = full
    assert VILE not in html
    for name in (VILE, "air & sea", "runs/R&D/student", "$\\frac$ & $x$", "猫", "bell\N{REPLACEMENT CHARACTER}"):
        assert name in page.text
    assert any(VILE in image["alt"] for image in page.all("img"))
    labels = [text for svg in re.findall(r"<svg.*?</svg>", html, re.S) for text in Page(svg).parts]
    assert {"air & sea", VILE, "$\\frac$ & $x$", "猫"} <= set(labels)


def test_every_link_finds_its_place_and_ids_are_unique(full: tuple[str, Page]) -> None:
    html, page = full
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) > 100
    assert len(ids) == len(set(ids))
    links = [value[1:] for _, attributes in page.tags for key, value in attributes.items() if key.endswith("href")]
    assert set(links) | set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)


def test_images_and_charts_say_what_they_show(full: tuple[str, Page], report: Report) -> None:
    _, page = full
    images = page.all("img")
    assert len(images) == sum(
        1 + len(entry["teacher"]) + len(entry["student"]) for entry in report["neighbours"]["worst"]
    )
    assert all(image["alt"] for image in images)
    charts = page.all("svg")
    assert len(charts) == 8
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert len(page.all("figcaption")) == len(page.all("figure"))
    assert all(cell["scope"] in {"row", "col"} for cell in page.all("th"))


def test_shared_neighbours_are_marked_in_both_rows(full: tuple[str, Page], report: Report) -> None:
    _, page = full
    names = [image["alt"] for image in page.all("img") if image.get("class") == "shared"]
    expected = [
        (side, number) for entry in report["neighbours"]["worst"] for side in ("teacher", "student")
        for number in entry[side] if number in entry["teacher"] and number in entry["student"]
    ]  # fmt: skip
    assert [(alt.partition("'")[0], int(re.findall(r"image (\d+), shared", alt)[0])) for alt in names] == expected
    assert expected


def test_every_figure_is_on_the_page(full: tuple[str, Page], report: Report) -> None:
    _, page = full
    for cell in report["dependence"]["cells"]:
        if cell["row"] != cell["column"]:
            text = "null 0.000 [-0.018, 0.021] p " + ("0.005" if cell["p"] < 0.1 else "0.3")
            expected = f"{cell['dcor']:.2f} {text} · CKA {cell['cka']:.2f}".replace("-", MINUS)
            assert expected in page.text
    for row in report["neighbours"]["classes"]:
        assert f"{_printable(row['name'])} {row['mean']:.1f} [{row['low']:.1f}, {row['high']:.1f}] 40" in page.text
    for row in report["probe"]["classes"]:
        difference, low, high = (f"{row[key]:+.1f}".replace("-", MINUS) for key in ("difference", "low", "high"))
        line = f"{_printable(row['name'])} {difference} [{low}, {high}] {row['student']:.1f} {row['teacher']:.1f} 40"
        assert line in page.text
    matrices = [
        [count for row in report["probe"]["confusion"][side] for count in row] for side in ("teacher", "student")
    ]
    titles = [int(cell["title"].rpartition(" ")[2]) for cell in page.all("td") if "title" in cell]
    assert titles == [count for matrix in matrices for count in matrix if count]
    for text in ("61.2 % 95 % interval [59.1, 63.3]", "untrained encoder 21.0 %, chance 1.5 %", "84.3 %", "79.4 %",
                 "teacher 80.6 %", "31.4 of 512", "teacher 28.2 of 192, untrained encoder 12.6 of 512",
                 "840 steps", "680 of 680", report["command"], "one bundle is one seed"):  # fmt: skip
        assert text in page.text


def _printable(name: str) -> str:
    return name.replace("\x07", "\N{REPLACEMENT CHARACTER}")


def test_the_summary_names_the_classes_that_fell_beyond_their_interval(full: tuple[str, Page], report: Report) -> None:
    _, page = full
    losers = [row["name"] for row in report["probe"]["classes"] if row["high"] < 0]
    assert 0 < len(losers) < 17
    winners = sum(row["low"] > 0 for row in report["probe"]["classes"])
    below = f"{len(losers)} of 17 classes have their whole 95 % interval below the teacher's accuracy"
    assert (
        f"{below}, and {winners} above it (chance alone would give about 0.4 each). Below: {losers[0]} (" in page.text
    )
    assert [row.get("class") for row in page.all("tr")].count("fallen") == len(losers)


@pytest.mark.slow
def test_the_same_report_gives_the_same_bytes_and_each_image_is_asked_for_once(
    full: tuple[str, Page], report: Report, tmp_path: Path
) -> None:
    numbers: list[int] = []

    def thumbnail(number: int) -> Image.Image:
        numbers.append(number)
        return picture(number)

    write_page(copy.deepcopy(report), thumbnail, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == full[0]
    assert len(numbers) == len(set(numbers)) > 100


def test_thumbnails_are_small_and_in_the_smaller_format(full: tuple[str, Page]) -> None:
    for image in full[1].all("img"):
        kind, _, content = image["src"].partition(";base64,")
        decoded = Image.open(io.BytesIO(base64.b64decode(content)))
        number = int(re.findall(r"image (\d+)", image["alt"])[0])
        difference = np.abs(np.asarray(decoded, np.float64).mean((0, 1)) - np.asarray(picture(number)).mean((0, 1)))
        assert decoded.size == (96, 80)
        assert difference.max() < 3
        assert kind == ("data:image/jpeg" if number % 2 else "data:image/png")


def test_without_a_teacher_the_page_says_so(page: Callable[[Report], Page], report: Report) -> None:
    alone = copy.deepcopy(report)
    without_teacher(alone)
    document = page(alone)
    assert document.text.count("Reason: the bundle names none.") == 3
    assert "dCor with scattering" in document.text
    assert "79.4 %" in document.text
    assert "overlap@" not in document.text
    assert document.all("img") == []


def test_without_labels_and_records_the_page_says_so(page: Callable[[Report], Page], report: Report) -> None:
    bare = copy.deepcopy(report)
    without_labels(bare)
    bare["training"] = None
    bare["not_measured"].append({"what": "training curves", "why": "metrics.jsonl is not there"})
    document = page(bare)
    assert "A probe takes labels. Reason: the data has none." in document.text
    assert "no records of its training. Reason: metrics.jsonl is not there." in document.text
    assert "61.2 %" in document.text
    assert "class None" not in " ".join(image["alt"] for image in document.all("img"))
    assert len(document.all("img")) > 100


@pytest.mark.slow
def test_one_class_one_image(page: Callable[[Report], Page]) -> None:
    small = synthetic(["only"], 30)
    small["neighbours"] |= {
        "k": 1,
        "worst": [{"image": 3, "class": "only", "overlap": 0.0, "teacher": [1], "student": [2]}],
    }
    small["training"] = small["training"][:1]
    small["spectrum"]["untrained"]["values"] = [0.0] * 8  # constant embeddings
    small["probe"]["classes"][0] |= {"low": -2.5, "high": 2.5}
    document = page(small)
    assert "No class of 1 has its whole 95 % interval below" in document.text
    assert [image["alt"] for image in document.all("img")] == [
        "query, image 3, class only", "teacher's neighbour 1: image 1", "student's neighbour 1: image 2",
    ]  # fmt: skip


@pytest.mark.slow
def test_very_many_classes_are_a_chart_of_the_worst_and_a_list_of_confusions(page: Callable[[Report], Page]) -> None:
    many = synthetic([f"kind {number}." for number in range(60)], 680)
    document = page(many)
    assert "The 40 worst of 60 classes." in document.text
    assert {f"kind {number}." for number in range(60)} <= set(document.parts)
    assert "open" not in document.all("details")[0]
    confusion = many["probe"]["confusion"]["student"]
    largest = max(count for i, row in enumerate(confusion) for j, count in enumerate(row) if i != j)
    after = document.text.partition("teacher, images ")[2]
    true, predicted, count = re.findall(r"kind (\d+)\. kind (\d+)\. (\d+)", after)[0]
    assert int(count) == confusion[int(true)][int(predicted)] == largest
