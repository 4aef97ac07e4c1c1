"""Whether what a folder holds is the run that is asked for: two descriptions of runs, compared (torch-free)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvmr.errors import MvmrError

_NAMED = 4  # differences in a refusal
_LONGEST = 40

Differences = dict[str, tuple[Any, Any]]


def differences(old: Any, new: Any) -> Differences:
    """(old value, new value) by the path of every key in which two descriptions differ, None for what lacks.

    A description is JSON values, as they were written or as they are to be: a tuple is as good as a list. Mappings are
    compared key by key, anything else as a whole.
    """
    return _differences(json.loads(json.dumps(old)), json.loads(json.dumps(new)), "")


def _differences(old: Any, new: Any, at: str) -> Differences:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {at: (old, new)}
    result: Differences = {}
    for key in {**old, **new}:
        result |= _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    return result


def check_same(folder: Path, changes: Mapping[str, tuple[Any, Any]], *, cure: str, what: str = "run") -> None:
    """Refuse to go on with what `folder` holds when it differs from what is asked for now.

    cure: what else to do than to give the same arguments, as "another --out".
    what: what kind of thing it holds.

    Raises: MvmrError that names the first few differences, there and now.
    """
    if not changes:
        return
    parts = [f"{at} ({_show(old)} there, {_show(new)} now)" for at, (old, new) in sorted(changes.items())]
    more = f" and {len(parts) - _NAMED} more" if len(parts) > _NAMED else ""
    raise MvmrError(
        f"{folder} holds another {what}, it differs in {'; '.join(parts[:_NAMED])}{more}: "
        f"give the arguments it was started with, or {cure}"
    )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]}...{text[-1]}"
