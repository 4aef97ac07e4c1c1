"""Whether what a folder holds is the run that is asked for: two descriptions of runs, compared (torch-free)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvmr.errors import MvmrError

_NAMED = 4  # differences in a refusal
_LONGEST = 40

Differences = dict[str, tuple[Any, Any]]


def differences(there: Any, now: Any) -> Differences:
    """(value there, value now) by the path of every key in which two descriptions differ, None for what lacks.

    A description is JSON values, as they were written or as they are to be: a tuple is as good as a list. Mappings are
    compared key by key, anything else as a whole.
    """
    return _differences(json.loads(json.dumps(there)), json.loads(json.dumps(now)), "")


def _differences(there: Any, now: Any, at: str) -> Differences:
    if not (isinstance(there, dict) and isinstance(now, dict)):
        return {} if there == now else {at: (there, now)}
    found: Differences = {}
    for key in {**there, **now}:
        found |= _differences(there.get(key), now.get(key), f"{at}.{key}" if at else key)
    return found


def check_same(place: Path, differing: Mapping[str, tuple[Any, Any]], *, cure: str, what: str = "run") -> None:
    """Refuse to go on with what `place` holds when it differs from what was asked for.

    cure: what else to do than to give the same arguments, as "another --out".
    what: what kind of thing it holds.

    Raises: MvmrError that names the first few differences, there and now.
    """
    if not differing:
        return
    named = [f"{at} ({_show(there)} there, {_show(now)} now)" for at, (there, now) in sorted(differing.items())]
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    raise MvmrError(
        f"{place} holds another {what}, it differs in {'; '.join(named[:_NAMED])}{more}: "
        f"give the arguments it was started with, or {cure}"
    )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]}...{text[-1]}"
