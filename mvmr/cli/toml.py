"""Settings as TOML, as `mvmr.config` reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def spell(value: object) -> str:
    """A value as it stands in a recipe; None is "none", a table of weights stands in one line.

    Raises:
        TypeError: a value that no setting has.
    """
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{_spell_key(key)} = {spell(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(spell, value))}]"
    raise TypeError(f"no setting is a {type(value).__name__}")


def spell_recipe(settings: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """A whole recipe, its plain keys first, then a table for each section.

    Args:
        settings: as of :func:`mvmr.config.to_mapping`.
        notes: what stands as a comment behind a key such as ``train.lr``.
    """

    def line(key: str, value: object, path: str) -> str:
        return f"{key} = {spell(value)}" + (f"  # {notes[path]}" if path in notes else "")

    sections = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    lines = [line(name, value, name) for name, value in settings.items() if name not in sections]
    for section, keys in sections.items():
        lines += ["", f"[{section}]", *(line(key, value, f"{section}.{key}") for key, value in keys.items())]
    return "\n".join(lines) + "\n"


def _spell_key(key: str) -> str:
    return key if _BARE.fullmatch(key) else spell(key)
