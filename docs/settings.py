"""Make docs/settings.md again: `python docs/settings.py`. Every key of a recipe, from the dataclasses.

What a key means is the comment behind its field, or above it, its unit and range in brackets at the end of that.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from mvmr.cli.toml import spell
from mvmr.config import ONE_OF, to_mapping
from mvmr.methods.distillers.distiller import DistillerConfig
from mvmr.training.recipe import FinetuneRecipe, Recipe

PAGE = Path(__file__).with_suffix(".md")
WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}
HEAD = """# Settings: every key of a recipe

Made by `python docs/settings.py` from the source; not to be edited.

What a recipe, a TOML file, may say, and `--set SECTION.KEY=VALUE` may change. The default holds where a recipe leaves
a key out; `mvmr recipe show NAME` prints what a recipe comes to ([recipes.md](recipes.md)). Text stands in quotes in a
file; where a key may be none, that is the word `"none"`.
"""
METHODS = """
What each does: [methods.md](methods.md), [method.md](method.md) for `mvmr`, [distillers.md](distillers.md) for those
that learn from a teacher. `{name}` chooses; left out, it is `mvmr`. Of a recipe's `[method]` nothing is kept where
`--method` names another.
"""
FINETUNING = """
Of `mvmr finetune` ([evaluation.md](evaluation.md)). `[train]` is as above.
"""


class Key(NamedTuple):
    """A row: the key, in words what it may be, its default as TOML, unit and range, what it means."""

    name: str
    kind: str
    default: str
    unit: str
    meaning: str


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page."""
    (method,) = (field for field in dataclasses.fields(Recipe) if ONE_OF in field.metadata)
    parts = [HEAD, "## At the top\n", table(keys_of(Recipe))]
    for name, section in sections(Recipe):
        parts.append(f"## `[{name}]`\n")
        parts += methods(method.metadata[ONE_OF]) if name == method.name else [table(keys_of(section))]
    parts += ["## To fine-tune\n", FINETUNING.lstrip("\n"), table(keys_of(FinetuneRecipe))]
    for name, section in sections(FinetuneRecipe):
        if section not in dict(sections(Recipe)).values():
            parts += [f"### `[{name}]`\n", table(keys_of(section))]
    return "\n".join(parts)


def methods(configs: dict[str, type]) -> Iterator[str]:
    """A table for each method; one for those that have the same keys, types and defaults."""
    yield METHODS.lstrip("\n").format(name="name")
    tables: dict[tuple[Key, ...], list[str]] = {}
    for name, config in configs.items():
        rows = tuple(key for key in keys_of(config) if key.name != "name")
        tables.setdefault(rows, []).append(name)
    for rows, names in tables.items():
        distils = all(issubclass(configs[name], DistillerConfig) for name in names)
        yield f"### {', '.join(f'`{name}`' for name in names)}{' (from a teacher)' if distils else ''}\n"
        yield table(rows)


def sections(recipe: type) -> Iterator[tuple[str, Any]]:
    """The tables of a recipe: name and dataclass."""
    hints = get_type_hints(recipe)
    for field in dataclasses.fields(recipe):
        if dataclasses.is_dataclass(hints[field.name]):
            yield field.name, hints[field.name]


def keys_of(config: type) -> tuple[Key, ...]:
    """The plain keys of a dataclass."""
    hints = get_type_hints(config)
    keys = []
    for field in dataclasses.fields(config):
        if field.init and not dataclasses.is_dataclass(hints[field.name]):
            meaning, unit = explain(config, field.name)
            default = spell(to_mapping(config())[field.name])
            keys.append(Key(field.name, describe(hints[field.name]), default, unit, meaning))
    return tuple(keys)


def describe(kind: Any) -> str:
    """What a value may be, in words.

    Raises: TypeError for a type that `mvmr.config` doesn't read either.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in WORDS:
        return WORDS[kind]
    if origin in (Union, UnionType):
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        if get_origin(inner) is Literal:  # where None may be, the word "none" is read as that
            inner = Literal[tuple(choice for choice in get_args(inner) if choice != "none")]
        return f"{describe(inner)}, or none"
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {PLURALS[arguments[0]]}"
    if origin is tuple:
        return f"list of {len(arguments)} {PLURALS[arguments[0]]}"
    if origin is dict:
        return f"table of {PLURALS[arguments[1]]}"
    raise TypeError(f"no words for {kind}")


def explain(config: type, name: str) -> tuple[str, str]:
    """Meaning of a key, and its unit and range; of the first class that says it, empty where none does."""
    for parent in config.__mro__:
        if comment := comments(parent).get(name) if dataclasses.is_dataclass(parent) else None:
            match = re.fullmatch(r"(.*?)(?: \[([^\]]*)\])?", comment)
            assert match is not None  # a comment is one line
            return match[1], match[2] or ""
    return "", ""


@cache
def comments(config: type) -> dict[str, str]:
    """The comment behind each field of a class itself, or in the lines above it."""
    source = inspect.getsource(config)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = source.splitlines()
    behind = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    above = {number: text for number, text in behind.items() if lines[number - 1].lstrip().startswith("#")}
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in above:
                first -= 1
            words = [above[number] for number in range(first, node.lineno)]
            texts[node.target.id] = behind.get(node.end_lineno or node.lineno) or " ".join(words)
    return texts


def table(keys: tuple[Key, ...]) -> str:
    """The rows in Markdown."""
    rows = ["| key | type | default | unit, range | meaning |", "|---|---|---|---|---|"]
    for key in keys:
        cells = [f"`{key.name}`", key.kind, f"`{key.default}`", key.unit, key.meaning]
        rows.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
