"""What can be said of a command's arguments before torch is imported, which takes seconds: a typo is answered at once.

Each is checked again where it is used, by the same code; so that a caller of the library hears the same.
"""

from __future__ import annotations

from mvmr.cli.threads import note_threads
from mvmr.errors import MvmrError


def check(*, bundle: str | None = "", data: str | None = None, recipe: str | None = None, of: str = "") -> None:
    """Refuse what isn't there; then say, if need be, that fewer threads than cores are used.

    Args:
        bundle: of whose manifest the shape is looked at, not the hashes; None means the newest below runs/.
        data: as `mvmr.data.grammar` has it; the files themselves are not looked at.
        recipe, of: a recipe of the command ``of``.

    Raises: MvmrError, as the library does.
    """
    # imported one by one, for numpy and Pillow take longer than `--help`
    if bundle != "":
        from mvmr.bundles import bundle as bundles

        bundles.load(bundle or bundles.newest(), verify=False)
    if data is not None:
        from mvmr.data import grammar

        description = grammar.parse(data)
        if description.kind.refusal:
            raise MvmrError(f"data {data!r} {description.kind.refusal}")
    if recipe is not None:
        from mvmr.cli.shelves import shelf_of
        from mvmr.training.shelf import read_tables

        read_tables(recipe, shelf_of(of))
    note_threads()
