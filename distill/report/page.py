"""The page of a report: its figures, charts and images as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from mvmr.distillation.report.charts import COLOURS, dots_chart, spectrum_chart, stages_chart, training_charts
from mvmr.storage.atomic import write_text

_THUMBNAIL = 96  # pixels
_MATRIX_CLASSES = 50  # a larger confusion matrix is read as a list
_NUMBERED_CLASSES = 20  # a larger one has no room for its counts, they stand in tooltips
_CONFUSIONS = 30
_CHART_CLASSES = 40
_NAMED = 3
_WHO = {"teacher": "teacher", "untrained": "untrained encoder"}
_UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

Report = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A headline figure: what it is, how sure, beside what, and in plain words."""

    title: str
    value: str
    unit: str = ""
    interval: str = ""
    beside: str = ""
    reading: str
    level: float | None = None  # 0..1, for the bar
    marks: Mapping[str, float] = field(default_factory=dict)  # name -> 0..1, on the bar


def write_page(report: Report, thumbnail: Callable[[int], Image.Image], path: Path) -> None:
    """Write the HTML page of a report: one file, nothing loaded from elsewhere, no script.

    Args:
        report: the content of ``report.json``, schema 1; parts that are null are said in words.
        thumbnail: number of an image in the evaluated set -> that image, of any size; asked once an image.
        path: the file to write; the same report and images give the same bytes.
    """
    report = _clean(report)
    classes = (report["neighbours"] or {}).get("classes")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "number": _number, "signed": _with_sign, "small": _small}
    source = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    text = environment.from_string(source).render(
        report=report,
        colours=COLOURS,
        tiles=_tiles(report),
        summary=_summary(report),
        cells={(cell["row"], cell["column"]): cell for cell in report["dependence"]["cells"]},
        charts=_charts(report),
        chart_classes=_CHART_CLASSES,
        class_rows=[] if classes is None else classes,
        matrices=_matrices(report),
        numbered=len(report["data"]["classes"] or ()) <= _NUMBERED_CLASSES,
        confusions=_confusions(report),
        image=cache(lambda number: _data_uri(thumbnail(number))),
        reasons=lambda *words: [
            entry for entry in report["not_measured"] if any(word in entry["what"].casefold() for word in words)
        ],
    )
    write_text(path, text)


def _clean(value: Any) -> Any:
    """Replace what HTML and SVG can't hold: a file's name may be any bytes."""
    if isinstance(value, str):
        return _UNWRITABLE.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, Mapping):
        return {_clean(key): _clean(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    return value


def _tiles(report: Report) -> list[Tile]:
    tiles = []
    if report["neighbours"] is not None:
        tiles.append(_overlap_tile(report))
    tiles += _dependence_tiles(report)
    tiles += _probe_tiles(report)
    spectrum = report["spectrum"]
    references = [who for who in ("teacher", "untrained") if spectrum.get(who) is not None]
    tiles.append(
        Tile(
            title="Effective rank",
            value=_number(spectrum["student"]["effective_rank"], 1),
            unit=f"of {spectrum['student']['dim']}",
            beside=", ".join(
                f"{_WHO[who]} {_number(spectrum[who]['effective_rank'], 1)} of {spectrum[who]['dim']}"
                for who in references
            ),
            reading="How many directions the embeddings really use; far fewer than the teacher's would be a collapse."
            if "teacher" in references
            else "How many directions the embeddings really use; near 1 would be a collapse.",
        )
    )
    return tiles


def _overlap_tile(report: Report) -> Tile:
    neighbours = report["neighbours"]
    overlap, untrained, k = neighbours["overlap"], neighbours["untrained"], neighbours["k"]
    chance = 100 * neighbours["chance"]
    return Tile(
        title=f"Neighbour overlap@{k}",
        value=_percent(overlap["mean"]),
        unit="%",
        interval=f"95 % interval [{_percent(overlap['low'])}, {_percent(overlap['high'])}]",
        beside=f"untrained encoder {_percent(untrained['mean'])} %, chance {_percent(chance)} %",
        reading=f"Of the teacher's {k} nearest neighbours of an image, the student finds "
        f"{_number(overlap['mean'] / 100 * k, 1)} on average.",
        level=overlap["mean"] / 100,
        marks={"untrained encoder": untrained["mean"] / 100, "chance": neighbours["chance"]},
    )


def _dependence_tiles(report: Report) -> list[Tile]:
    """Dependence on the teacher; without one, on each hand-crafted representation."""
    against_teacher = report["teacher"] is not None
    tiles = []
    for column in ["teacher"] if against_teacher else report["dependence"]["columns"]:
        cell, untrained = _last_stage(report, column), _cell(report, "untrained", column)
        if cell is None:
            continue
        tiles.append(
            Tile(
                title=f"dCor with {'the teacher' if against_teacher else column}",
                value=_number(cell["dcor"]),
                interval=f"null {_number(cell['null_mean'], 3)} "
                f"[{_number(cell['null_low'], 3)}, {_number(cell['null_high'], 3)}], p {_small(cell['p'])}",
                beside=f"untrained encoder {_number(untrained['dcor'])}" if untrained else "",
                reading="0 when the two say nothing of each other, 1 when all distances between images agree.",
                level=max(0.0, cell["dcor"]),
                marks={"untrained encoder": max(0.0, untrained["dcor"])} if untrained else {},
            )
        )
        if against_teacher:
            tiles.append(
                Tile(
                    title="Linear CKA with the teacher",
                    value=_number(cell["cka"]),
                    beside=f"untrained encoder {_number(untrained['cka'])}" if untrained else "",
                    reading="Agreement of the directions that carry most variance; high by itself when images are few.",
                    level=max(0.0, cell["cka"]),
                    marks={"untrained encoder": max(0.0, untrained["cka"])} if untrained else {},
                )
            )
    return tiles


def _probe_tiles(report: Report) -> list[Tile]:
    probe = report["probe"]
    if probe is None:
        return []
    student, teacher = probe["student"]["top1"], (probe["teacher"] or {}).get("top1")
    tested = sum(row["images"] for row in probe["classes"])
    below = "" if teacher is None else f" {_with_sign(student - teacher)} points to the teacher's."
    tiles = [
        Tile(
            title="Linear probe, top-1",
            value=_percent(student),
            unit="%",
            beside="" if teacher is None else f"teacher {_percent(teacher)} %",
            reading=f"A linear classifier on frozen embeddings, {tested} test images.{below}",
            level=student / 100,
            marks={} if teacher is None else {"teacher": teacher / 100},
        )
    ]
    if probe["agreement"] is not None:
        tiles.append(
            Tile(
                title="Agreement of the probes",
                value=_percent(probe["agreement"]),
                unit="%",
                reading="Test images on which student and teacher say the same class, right or wrong.",
                level=probe["agreement"] / 100,
            )
        )
    return tiles


def _summary(report: Report) -> list[tuple[str, str]]:
    """The three questions of the reader, each with its answer in words."""
    successes, losses = [], []
    neighbours, probe = report["neighbours"], report["probe"]
    if neighbours is not None:
        successes.append(
            f"{_percent(neighbours['overlap']['mean'])} % of the teacher's {neighbours['k']} nearest neighbours "
            f"(untrained encoder {_percent(neighbours['untrained']['mean'])} %)"
        )
        if neighbours["classes"]:
            worst = neighbours["classes"][:_NAMED]
            named = ", ".join(f"{row['name']} ({_percent(row['mean'])} %)" for row in worst)
            losses.append(f"Neighbours are kept least for {named}.")
    if probe is not None and probe["teacher"] is not None:
        student, teacher = probe["student"]["top1"], probe["teacher"]["top1"]
        successes.append(f"a linear probe of {_percent(student)} % beside the teacher's {_percent(teacher)} %")
        losses.insert(0, _describe_losses(probe["classes"]))
    data = report["data"]
    answers = [
        ("Kept", "; ".join(successes) + "." if successes else ""),
        ("Lost", " ".join(losses)),
        (
            "Before you ship",
            f"These figures hold for {data['images']} images of {data['name']} ({data['split']}). Measure on images of "
            "the kind you serve, and read below what was not measured.",
        ),
    ]
    return [(term, answer) for term, answer in answers if answer]


def _describe_losses(classes: Sequence[Mapping[str, Any]]) -> str:
    losers = [row for row in classes if row["high"] is not None and row["high"] < 0]
    winners = sum(row["low"] is not None and row["low"] > 0 for row in classes)
    by_chance = f"chance alone would give about {_number(0.025 * len(classes), 1)} each"
    if not losers:
        return f"No class of {len(classes)} has its whole 95 % interval below the teacher's accuracy."
    named = ", ".join(f"{row['name']} ({_with_sign(row['difference'])} points)" for row in losers[:_NAMED])
    more = f" and {len(losers) - _NAMED} more" if len(losers) > _NAMED else ""
    return (
        f"{len(losers)} of {len(classes)} classes have their whole 95 % interval below the teacher's accuracy, "
        f"and {winners} above it ({by_chance}). Below: {named}{more}."
    )


def _charts(report: Report) -> dict[str, Markup]:
    dependence, neighbours, probe = report["dependence"], report["neighbours"], report["probe"]
    crafted = [column for column in dependence["columns"] if column != "teacher"]
    charts = {
        "crafted": stages_chart(
            dependence, crafted, name="crafted", label="dCor with hand-crafted representations, by stage of the student"
        ),
        "spectrum": spectrum_chart(report["spectrum"], name="spectrum", label="Singular values of the embeddings"),
    }
    if "teacher" in dependence["columns"]:
        charts["stages"] = stages_chart(
            dependence, ["teacher"], name="stages", label="dCor and CKA with the teacher, by stage of the student"
        )
    if neighbours is not None and neighbours["classes"]:
        charts["overlap"] = dots_chart(
            neighbours["classes"][:_CHART_CLASSES], "mean",
            lines={"all images": neighbours["overlap"]["mean"], "untrained encoder": neighbours["untrained"]["mean"]},
            unit="teacher's neighbours that the student finds, %", name="overlap", label="Neighbour overlap by class",
        )  # fmt: skip
    if probe is not None and probe["teacher"] is not None:
        charts["difference"] = dots_chart(
            probe["classes"][:_CHART_CLASSES], "difference", lines={"as the teacher": 0.0},
            unit="student minus teacher, points of accuracy", name="difference",
            label="Difference of probe accuracy by class",
        )  # fmt: skip
    return charts | training_charts(report["training"] or [])


def _matrices(report: Report) -> dict[str, list[list[tuple[int, float]]]]:
    """Side -> rows of (count, share of the row), for as many classes as can be shown."""
    if report["probe"] is None or len(report["data"]["classes"]) > _MATRIX_CLASSES:
        return {}
    return {
        side: [[(count, count / max(1, sum(row))) for count in row] for row in rows]
        for side, rows in report["probe"]["confusion"].items()
        if rows is not None
    }


def _confusions(report: Report) -> list[tuple[str, str, int, int | None]]:
    """True class, class said, the student's count and the teacher's; the student's largest, of very many classes."""
    probe, names = report["probe"], report["data"]["classes"]
    if probe is None or len(names) <= _MATRIX_CLASSES:
        return []
    student, teacher = probe["confusion"]["student"], probe["confusion"]["teacher"]
    wrong = [
        (-count, true, predicted)
        for true, row in enumerate(student)
        for predicted, count in enumerate(row)
        if count and true != predicted
    ]
    return [
        (names[true], names[predicted], -count, None if teacher is None else teacher[true][predicted])
        for count, true, predicted in sorted(wrong)[:_CONFUSIONS]
    ]


def _last_stage(report: Report, column: str) -> Mapping[str, Any] | None:
    stages = [row for row in report["dependence"]["rows"] if row.startswith("student.")]
    return _cell(report, stages[-1], column)


def _cell(report: Report, row: str, column: str) -> Mapping[str, Any] | None:
    cells = report["dependence"]["cells"]
    return next((cell for cell in cells if cell["row"] == row and cell["column"] == column), None)


def _data_uri(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    files = {"jpeg": io.BytesIO(), "png": io.BytesIO()}
    small.save(files["jpeg"], "JPEG", quality=85, optimize=True)
    small.save(files["png"], "PNG", optimize=True)
    kind, content = min(files.items(), key=lambda item: len(item[1].getvalue()))
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _number(value: float, digits: int = 2) -> str:
    text = f"{round(value, digits) + 0.0:.{digits}f}"  # adding 0.0 turns -0.0 into 0.0
    return text.replace("-", "\N{MINUS SIGN}")


def _percent(value: float) -> str:
    return _number(value, 1)


def _with_sign(value: float) -> str:
    text = _percent(value)
    return text if text.startswith("\N{MINUS SIGN}") or text == "0.0" else f"+{text}"


def _small(value: float) -> str:
    return f"{value:.{max(2, 1 - math.floor(math.log10(value)))}f}".rstrip("0") if 0 < value < 1 else f"{value:g}"
