"""A bundle in a few lines, for people: what it is, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from mvmr.bundles.preprocess import describe_background

if TYPE_CHECKING:
    from mvmr.bundles.bundle import Bundle


def describe(bundle: Bundle) -> dict[str, str]:
    """What `mvmr info` says, by the words before its lines."""
    manifest = bundle.manifest
    training, image = manifest.training, manifest.preprocessing
    return {
        "bundle": str(bundle.path),
        "encoder": manifest.backbone + (", small kernel" if manifest.options.get("small_kernel") else ""),
        "features": str(manifest.embedding_dim),
        "images": f"{image.crop} px, resized to {image.resize} px first ({image.interpolation}), transparent ones "
        f"{describe_background(image.background)}",
        "trained": f"{_look_up(training, 'method')}, recipe {_look_up(training, 'recipe', 'name')}, "
        f"{_look_up(training, 'steps')} steps",
        "teacher": _teachers(training) or "none",
        "data": f"{_look_up(training, 'data', 'name')}, {_look_up(training, 'data', 'images')} images",
        "space": bundle.space_id,
        "heads": ", ".join(bundle.heads) or "none; make one with `mvmr probe`",
        "files": str(len(manifest.files)),
    }


def measurements(bundle: Bundle) -> list[str]:
    """A line for each that was made; a head's figures are those of the protocol, and stand there once."""
    return list(dict.fromkeys(map(_measured, bundle.manifest.metrics)))


def as_html(bundle: Bundle) -> str:
    """The same as a table, for notebooks."""
    rows = [*describe(bundle).items(), *(("measured", line) for line in measurements(bundle))]
    return table(rows)


def table(rows: list[tuple[str, str]]) -> str:
    """Rows of a name and a text as an HTML table; strangers' names are escaped."""
    cells = (
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(text)}</td></tr>"
        for name, text in rows
    )
    return f"<table>{''.join(cells)}</table>"


def _teachers(training: Mapping[str, Any]) -> str:
    teachers = training.get("teachers")
    entries = teachers.items() if isinstance(teachers, Mapping) else ()
    return "; ".join(
        (f"{name}: " if len(entries) > 1 else "") + f"{_look_up(entry, 'name')}, weights {_look_up(entry, 'weights')}"
        for name, entry in entries
    )


def _measured(record: Mapping[str, Any]) -> str:
    values = ", ".join(f"{name} {value:.4g}" for name, value in record["values"].items())
    return f"{record['protocol']} on {record['data']}: {values}"


def _look_up(record: object, *keys: str) -> str:
    """A value out of nested tables that a stranger may have written."""
    for key in keys:
        if not isinstance(record, Mapping) or key not in record:
            return "not recorded"
        record = record[key]
    return str(record)
