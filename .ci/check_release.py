"""Whether tag, version and changelog are of one release: `python .ci/check_release.py v0.1.0`, before it is built."""

import re
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]


def version(source: str) -> str:
    """The version in the text of mvmr/__init__.py, which needs no import, nor then any package."""
    (text,) = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    return str(text)


def newest(changelog: str) -> tuple[str, str]:
    """The version of the changelog's first heading, and its date, which is `unreleased` until there is one."""
    heading = re.search(r"^## (.*)$", changelog, re.MULTILINE)
    parts = re.fullmatch(r"(\S+) \((unreleased|\d{4}-\d{2}-\d{2})\)", heading[1]) if heading else None
    if parts is None:
        raise ValueError("the first heading of CHANGELOG.md must read `## VERSION (YYYY-MM-DD)` or `(unreleased)`")
    if parts[2] != "unreleased":
        date.fromisoformat(parts[2])
    return parts[1], parts[2]


def check(tag: str, source: str, changelog: str) -> None:
    """Raise ValueError with what is in the way of a release under this tag."""
    here, (there, when) = version(source), newest(changelog)
    if tag != f"v{here}":
        raise ValueError(f"the tag is {tag}, mvmr/__init__.py says {here}: the tag must be v{here}")
    if there != here:
        raise ValueError(f"mvmr/__init__.py says {here}, the first heading of CHANGELOG.md {there}")
    if when == "unreleased":
        raise ValueError(f"CHANGELOG.md says that {here} is unreleased: put the date there")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/check_release.py TAG")
    try:
        check(
            sys.argv[1], *((ROOT / name).read_text(encoding="utf-8") for name in ("mvmr/__init__.py", "CHANGELOG.md"))
        )
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
