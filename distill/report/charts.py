"""Charts of a report as inline SVG: text stays text, and every colour is a variable of the page's style sheet."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Name of the CSS variable -> colour on a light and on a dark ground; told apart by the colour-blind (Okabe and Ito
# 2008, Tol 2021). The charts are drawn in the light colours, which become variables when the SVG is put inline.
COLOURS = {
    "ink": ("#1c2530", "#e6eaee"),
    "muted": ("#5b6672", "#a3adb8"),
    "grid": ("#dbe1e7", "#36404b"),
    "student": ("#0072b2", "#5ab4ec"),
    "teacher": ("#c8500a", "#f2955a"),
    "untrained": ("#767c84", "#9aa2ab"),
    "shared": ("#0b8a68", "#35c79c"),
    "wine": ("#882255", "#d97fae"),
    "olive": ("#7d7a1c", "#cdc960"),
    "indigo": ("#332288", "#a79bf5"),
}
_LIGHT = {name: light for name, (light, _) in COLOURS.items()}
_SERIES = ("student", "teacher", "shared", "wine", "olive", "indigo")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_WIDTH = 5.0  # inches of 72 units; the page scales the whole chart, text included, to its column
_DOT_ROW = 0.19
_LABEL_LENGTH = 26
_NOT_TERMS = frozenset({"step", "epoch", "lr", "loss", "images_per_s", "seconds"})
_NOT_TERM_GROUPS = ("rank_", "std_", "biased.", "unbiased.")
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mvmr",
    "text.parse_math": False,  # a class may be called "$x$"
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.edgecolor": _LIGHT["muted"],
    "axes.labelcolor": _LIGHT["ink"],
    "legend.labelcolor": _LIGHT["ink"],
    "xtick.color": _LIGHT["muted"],
    "ytick.color": _LIGHT["muted"],
    "xtick.labelcolor": _LIGHT["ink"],
    "ytick.labelcolor": _LIGHT["ink"],
    "grid.color": _LIGHT["grid"],
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
}


def stages_chart(dependence: Mapping[str, Any], columns: Sequence[str], *, name: str, label: str) -> Markup:
    """Draw the student's dependence on other representations, stage by stage, as inline SVG.

    One column is drawn in full: dCor and CKA, the band of its permutation null, and the untrained encoder as lines.
    Of several, only dCor is drawn.

    Args:
        dependence: the part of that name of ``report.json``.
        columns: names of the representations.
        name: prefix of the ids inside the SVG, unique on the page.
        label: what the chart shows, for those who can't see it.
    """
    cells = {(cell["row"], cell["column"]): cell for cell in dependence["cells"]}
    stages = [row for row in dependence["rows"] if row.startswith("student.")]

    def draw(axes: Axes) -> None:
        for number, column in enumerate(columns):
            own_stages = [stage for stage in stages if (stage, column) in cells]
            own_cells = [cells[stage, column] for stage in own_stages]
            positions = [stages.index(stage) for stage in own_stages]
            mark, colour = _MARKERS[number % len(_MARKERS)], _LIGHT[_SERIES[number % len(_SERIES)]]
            title = "student, dCor" if len(columns) == 1 else column
            axes.plot(positions, [cell["dcor"] for cell in own_cells], marker=mark, color=colour, label=_short(title))
            if len(columns) == 1:
                cka = [cell["cka"] for cell in own_cells]
                axes.plot(positions, cka, marker="s", color=_LIGHT["indigo"], linestyle="--", label="student, CKA")
                _references(axes, own_cells, positions, cells.get(("untrained", column)))
        axes.set_xticks(range(len(stages)), [_short(stage.removeprefix("student.")) for stage in stages])
        axes.set_xlabel("stage of the student, input to output")
        axes.set_ylabel("dCor" if len(columns) > 1 else "dCor, CKA")
        axes.set_ylim(bottom=min(-0.05, axes.get_ylim()[0]), top=1.02)
        _legend(axes)

    return _chart(draw, name=name, label=label, height=3.3)


def _references(
    axes: Axes, cells: Sequence[Mapping[str, Any]], positions: Sequence[int], untrained: Mapping[str, Any] | None
) -> None:
    low, high = [cell["null_low"] for cell in cells], [cell["null_high"] for cell in cells]
    axes.fill_between(
        positions, low, high, color=_LIGHT["untrained"], alpha=0.35, linewidth=0, label="null of dCor, 95 %"
    )
    for value, line, title in (("dcor", "-.", "dCor"), ("cka", ":", "CKA")):
        if untrained is not None:
            axes.axhline(
                untrained[value], color=_LIGHT["untrained"], linestyle=line, label=f"untrained encoder, {title}"
            )


def dots_chart(
    rows: Sequence[Mapping[str, Any]], value: str, *, lines: Mapping[str, float], unit: str, name: str, label: str
) -> Markup:
    """Draw one dot with its interval to a class, in the given order from the top, as inline SVG.

    Args:
        rows: each with ``name``, ``low``, ``high`` and the key ``value``.
        lines: label -> place of a vertical line to compare with.
        unit: label of the axis.
        name, label: as :func:`stages_chart`.
    """

    def draw(axes: Axes) -> None:
        for number, row in enumerate(rows):
            axes.plot([row["low"], row["high"]], [number, number], color=_LIGHT["student"], alpha=0.55)
        positions = range(len(rows))
        axes.plot([row[value] for row in rows], positions, "o", color=_LIGHT["student"], label="class, 95 % interval")
        for (title, position), style in zip(lines.items(), ("-", "-.", ":"), strict=False):
            axes.axvline(position, color=_LIGHT["muted"], linestyle=style, linewidth=1.1, label=title)
        axes.set_yticks(positions, [_short(row["name"]) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(unit)
        axes.grid(axis="y", visible=False)
        _legend(axes)

    return _chart(draw, name=name, label=label, height=1.3 + _DOT_ROW * len(rows))


def spectrum_chart(spectrum: Mapping[str, Any], *, name: str, label: str) -> Markup:
    """Draw the singular values of each encoder's centred embeddings on a log scale, as inline SVG."""
    styles = {"student": "-", "teacher": "--", "untrained": "-."}

    def draw(axes: Axes) -> None:
        for who, style in styles.items():
            if spectrum.get(who) is not None:
                values = [value for value in spectrum[who]["values"] if value > 0]
                numbers = range(1, len(values) + 1)
                axes.plot(numbers, values, color=_LIGHT[who], linestyle=style, label=who)
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-4), top=1.3)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("number of the singular value")
        axes.set_ylabel("singular value / the largest")
        _legend(axes)

    return _chart(draw, name=name, label=label, height=3.1)


def training_charts(records: Sequence[Mapping[str, Any]]) -> dict[str, Markup]:
    """Draw the records of a training as inline SVGs: ``loss``, ``dcor`` and ``rank``, those that the records have.

    Every recipe has its own terms: what is no setting, no pace and no diagnosis is one.
    """
    keys = list(dict.fromkeys(key for record in records for key in record))
    terms = [key for key in keys if key not in _NOT_TERMS and not key.startswith(_NOT_TERM_GROUPS)]
    unbiased = [key for key in keys if key.startswith("unbiased.")]
    same = all(record.get("rank_h") == record.get("rank_z") for record in records)  # no projector: z is h
    panels = {
        "loss": (["loss", *terms], "loss and its terms"),
        "dcor": (unbiased, "unbiased dCor in the batch"),
        "rank": (["rank_h"] if same else ["rank_h", "rank_z"], "effective rank in the batch"),
    }
    charts = {}
    for name, (series, unit) in panels.items():
        curves = {
            key: [(record["step"], record[key]) for record in records if {"step", key} <= record.keys()]
            for key in series
        }
        if any(curves.values()):
            charts[name] = _curves_chart(curves, unit=unit, name=name, log=name == "loss")
    return charts


def _curves_chart(curves: Mapping[str, Sequence[tuple[float, float]]], *, unit: str, name: str, log: bool) -> Markup:
    """Curves of (step, value) by label; a null is drawn thin and grey, and a log scale takes positive values."""
    positive = all(value > 0 for pairs in curves.values() for _, value in pairs)

    def draw(axes: Axes) -> None:
        for number, (title, pairs) in enumerate(curves.items()):
            steps, values = [step for step, _ in pairs], [value for _, value in pairs]
            colour, style, width = _LIGHT[_SERIES[number % len(_SERIES)]], ("-", "--", "-.")[number % 3], 1.7
            if title.endswith(".null"):
                colour, style, width = _LIGHT["untrained"], ":", 1.1
            axes.plot(steps, values, linewidth=width, color=colour, linestyle=style, label=_short(title))
        if log and positive:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        else:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.set_xlabel("training step")
        axes.set_ylabel(unit)
        _legend(axes)

    return _chart(draw, name=name, label=f"{unit.capitalize()}, by training step", height=3.1)


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handlelength=2.4)


def _chart(draw: Callable[[Axes], None], *, name: str, label: str, height: float) -> Markup:
    buffer = io.StringIO()
    style: dict[Any, Any] = {key: value for key, value in mpl.rcParamsDefault.items() if key != "backend"}
    with mpl.rc_context(style | _STYLE), warnings.catch_warnings():
        # Text is set by the reader's browser, with the reader's fonts; only its size is estimated here.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure.subplots())
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), name, label)


def _inline(svg: str, name: str, label: str) -> Markup:
    """Make a file's SVG part of a page: no namespaces, no style sheet of its own, ids and colours of this page."""
    root = ElementTree.fromstring(svg.encode())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        plain = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({key: _attribute(key, value, name) for key, value in plain.items()})
        for child in list(element):
            if child.tag.rpartition("}")[2] in {"metadata", "style"}:
                element.remove(child)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-", 1)
    if key in {"style", "fill", "stroke"}:
        for variable, light in _LIGHT.items():
            value = value.replace(light, f"var(--{variable})")
        value = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value)
    return value.replace("url(#", f"url(#{name}-")


def _short(text: str) -> str:
    return text if len(text) <= _LABEL_LENGTH else text[: _LABEL_LENGTH - 1] + "…"
