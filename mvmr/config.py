"""Strict configuration: TOML tables into frozen dataclasses, every mistake named at once.

Supported field types: bool, int, float, str, `X | None`, `Literal[...]`, `tuple[X, ...]`, `tuple[X, Y]`,
`dict[str, X]`, nested dataclasses, and one of several dataclasses: a field whose metadata hold a table of them under
`ONE_OF`, chosen by the key ``name`` in the TOML table. TOML has no null, so the word "none" stands for None where a
field allows it.
"""

import dataclasses
import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mvmr.errors import MvmrError, nearest, shorten
from mvmr.strict_json import check_depth

T = TypeVar("T")

ONE_OF = "one of"
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
_BAD = object()  # what a reader returns after it has noted an error, since None is a value
_MOST_BYTES = 2**16  # of a recipe
_LONGEST_LINE = 2**12  # in characters: the time that Python's reader takes grows with the square of a key's dots
_MOST_MISTAKES = 20  # named in one line
_LARGEST = 2**63  # TOML's own bound of whole numbers, which Python's reader doesn't keep


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a TOML file.

    Raises: MvmrError when the file is missing, unreadable, larger than 64 KiB, not UTF-8, not TOML (with line and
        column) or nested too deeply.
    """
    source = Path(path)
    try:
        if (size := source.stat().st_size) > _MOST_BYTES:
            raise MvmrError(f"{source} is no recipe: it has {size:,} bytes, more than {_MOST_BYTES:,}")
        return _toml(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise MvmrError(f"cannot read {source}: {error.strerror}; give the path of a TOML file") from error
    except UnicodeDecodeError as error:
        raise MvmrError(f"{source} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except ValueError as error:
        raise MvmrError(f"{source} is not valid TOML: {shorten(error)}") from error


def assign(mapping: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Return a copy of `mapping` with assignments such as `train.lr=1e-3` merged in, later ones winning.

    A value is read as TOML (`true`, `0.1`, `[256, 256]`); what is no TOML value is taken as a string, so
    words need no quotes. Whether key and type are right is for `parse` to say.

    Raises: MvmrError for an assignment without `=` or a path that leads through a plain value.
    """
    settings: dict[str, Any] = deepcopy(dict(mapping))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        steps = [step.strip() for step in key.split(".")]
        if not equals or not all(steps):
            raise MvmrError(f"cannot read assignment {shorten(assignment)!r}; write KEY=VALUE, such as train.lr=1e-3")
        table = settings
        for depth, step in enumerate(steps[:-1], start=1):
            table = table.setdefault(step, {})
            if not isinstance(table, dict):
                raise MvmrError(f"cannot set {key.strip()!r}: {'.'.join(steps[:depth])} is a value, not a table")
        table[steps[-1]] = _toml_value(text.strip())
    return settings


def parse(cls: type[T], mapping: Mapping[str, Any], *, where: str) -> T:
    """Build the dataclass `cls` from nested tables; `where` names their source in the error.

    Whole numbers are accepted for float fields, lists for tuples. A dataclass may check itself in
    `__post_init__` by raising MvmrError; its text is reported with the others.

    Raises: MvmrError that names every unknown key (with the nearest valid one), missing key and wrong value.
    """
    errors: list[str] = []
    value = _read_dataclass(cls, mapping, "", errors)
    if errors:
        more = f"; and {len(errors) - _MOST_MISTAKES} more" if len(errors) > _MOST_MISTAKES else ""
        raise MvmrError(f"{where}: " + "; ".join(errors[:_MOST_MISTAKES]) + more)
    assert isinstance(value, cls)
    return value


def to_mapping(config: object) -> dict[str, Any]:
    """Return a dataclass as nested dicts, lists and plain values: fit for JSON, and for `parse` again."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"not a dataclass instance: {config!r}")
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text; raises ValueError for what is no TOML, nested too deeply or has too long a line."""
    if (longest := max(map(len, text.split("\n")))) > _LONGEST_LINE:
        raise ValueError(f"a line of {longest:,} characters")
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    check_depth(tables)
    return tables


def _toml_value(text: str) -> object:
    try:
        document = _toml(f"value = {text}")
    except ValueError:
        return text
    value = document["value"]
    # Dates are TOML values, too, but no field is one; a second key means that `text` held a line break.
    return value if len(document) == 1 and isinstance(value, bool | int | float | str | list | dict) else text


def _read(kind: Any, value: object, path: str, errors: list[str]) -> object:
    """Return `value` as type `kind`, or note an error and return _BAD."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _read_optional(arguments, value, path, errors)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, path, errors)
    if origin is Literal:
        return _read_choice(arguments, value, path, errors)
    if origin is tuple:
        return _read_tuple(arguments, value, path, errors)
    if origin is dict:
        return _read_dict(arguments[1], value, path, errors)
    if kind not in _NAMES:
        raise TypeError(f"{path}: configuration fields of type {kind} are not supported")
    if type(value) is int and not -_LARGEST <= value < _LARGEST:
        return _refuse("should fit into 64 bits", f"{value:#x}"[:20], path, errors)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        return _refuse(f"should be {_NAMES[kind]}", value, path, errors)
    if isinstance(value, float) and not math.isfinite(value):
        return _refuse("should be finite", value, path, errors)
    return value


def _read_dataclass(cls: Any, value: object, path: str, errors: list[str]) -> object:
    if not isinstance(value, Mapping):
        return _refuse("should be a table", value, path, errors)
    before = len(errors)
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in value:
        if key not in fields:
            suggestion = nearest(str(key), fields)
            hint = f"did you mean {suggestion!r}?" if suggestion else f"known: {', '.join(fields)}"
            errors.append(f"unknown key {_join(path, key)!r}, {hint}")
    arguments = {}
    for name, field in fields.items():
        if name in value and ONE_OF in field.metadata:
            arguments[name] = _read_one_of(field.metadata[ONE_OF], value[name], _join(path, name), errors)
        elif name in value:
            arguments[name] = _read(hints[name], value[name], _join(path, name), errors)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            errors.append(f"key {_join(path, name)!r} is missing")
    if len(errors) > before:
        return _BAD
    try:
        return cls(**arguments)
    except MvmrError as error:
        errors.append(f"{path}: {error}" if path else str(error))
        return _BAD


def _read_one_of(classes: Mapping[str, Any], value: object, path: str, errors: list[str]) -> object:
    """A table whose ``name`` says which dataclass it is; the first of them where it says none."""
    name = value.get("name", next(iter(classes))) if isinstance(value, Mapping) else next(iter(classes))
    if _read_choice(tuple(classes), name, _join(path, "name"), errors) is _BAD:
        return _BAD
    return _read_dataclass(classes[name], value, path, errors)


def _read_optional(kinds: tuple[Any, ...], value: object, path: str, errors: list[str]) -> object:
    inner = [kind for kind in kinds if kind is not NoneType]
    if len(inner) != 1 or len(inner) == len(kinds):
        raise TypeError(f"{path}: the only supported union is X | None")
    if value is None or value == "none":
        return None
    return _read(inner[0], value, path, errors)


def _read_choice(choices: tuple[Any, ...], value: object, path: str, errors: list[str]) -> object:
    # `1 == True`, so the type must agree as well.
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    suggestion = nearest(value, map(str, choices)) if isinstance(value, str) else None
    hint = f"; did you mean {suggestion!r}?" if suggestion else ""
    return _refuse(f"should be one of {', '.join(map(str, choices))}{hint}", value, path, errors)


def _read_tuple(kinds: tuple[Any, ...], value: object, path: str, errors: list[str]) -> object:
    if not isinstance(value, list | tuple):
        return _refuse("should be a list", value, path, errors)
    any_length = len(kinds) == 2 and kinds[1] is Ellipsis
    if not any_length and len(value) != len(kinds):
        return _refuse(f"should have {len(kinds)} values, not {len(value)}", value, path, errors)
    types = kinds[:1] * len(value) if any_length else kinds
    items = [_read(kind, item, f"{path}[{i}]", errors) for i, (kind, item) in enumerate(zip(types, value, strict=True))]
    return _BAD if _BAD in items else tuple(items)


def _read_dict(kind: Any, value: object, path: str, errors: list[str]) -> object:
    if not isinstance(value, Mapping):
        return _refuse("should be a table", value, path, errors)
    items = {key: _read(kind, item, _join(path, key), errors) for key, item in value.items()}
    return _BAD if _BAD in items.values() else items


def _refuse(expected: str, value: object, path: str, errors: list[str]) -> object:
    try:
        text = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    except ValueError:  # a whole number of thousands of digits
        text = "..."
    errors.append(f"{path or 'the document'} = {text} {expected}")
    return _BAD


def _join(path: str, key: object) -> str:
    step = shorten(key)
    step = step if step.isprintable() else repr(step)
    return f"{path}.{step}" if path else step
