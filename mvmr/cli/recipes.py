"""`mvmr recipe`: which recipes there are, what one of them says in full, and in what two of them differ.

Names are looked up without torch, so that a misspelt one is told at once; the settings themselves need it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import click

from mvmr.cli.shelves import SHELVES, shelf_of
from mvmr.cli.toml import spell, spell_recipe
from mvmr.errors import MvmrError, one_line, unknown

_OF_FINETUNING = {"head", "recalibrate"}  # keys that only its recipes have
_OF: Callable[..., Any] = click.option(
    "--of",
    type=click.Choice(list(SHELVES)),
    help=f"Command whose recipes are meant; left out, the first of {', '.join(SHELVES)} that has the name.",
)
_Settings = Mapping[str, Any]


class _Named(NamedTuple):
    """A recipe that there is: by the command it is of, and its name or file."""

    command: str
    name: str

    def __str__(self) -> str:
        return f"{self.command}:{self.name}"


@click.group()
def recipe() -> None:
    """Show which recipes there are, what one says in full, and in what two differ."""


@recipe.command("list")
@_OF
def list_recipes(of: str | None) -> None:
    """List the recipes that ship: command, name, and what each is."""
    from mvmr.training.shelf import first_line, names_on

    rows = [
        (command, name, first_line(name, shelf_of(command)))
        for command in ([of] if of else SHELVES)
        for name in names_on(shelf_of(command))
    ]
    _show(rows)


@recipe.command()
@click.argument("name", metavar="[COMMAND:]NAME|FILE.toml")
@_OF
@click.option(
    "--set", "assign", multiple=True, metavar="KEY=VALUE", help="Change a key; it then says what it was without."
)
def show(name: str, of: str | None, assign: tuple[str, ...]) -> None:
    """Print a recipe in full, as TOML that --recipe takes.

    Keys that it leaves to a default stand there, too; the first line says of which command it is.
    """
    named = _look_up(name, of)
    settings = _resolve(named, assign)
    changes = f", with {' '.join(assign)}" if assign else ""
    click.echo(f"# {_printable(f'recipe {named.name} of mvmr {named.command}{changes}')}")
    click.echo(spell_recipe(settings, _notes(named, settings) if assign else {}), nl=False)


@recipe.command()
@click.argument("a", metavar="[COMMAND:]A")
@click.argument("b", metavar="[COMMAND:]B")
@_OF
def diff(a: str, b: str, of: str | None) -> None:
    """Print the keys in which A and B differ, and both values.

    Each is a name or a TOML file; a command before it counts more than --of. What they are called is no difference.
    """
    first, second = _look_up(a, of), _look_up(b, of)
    left, right = (_flatten(_resolve(named)) for named in (first, second))
    rows = [
        (key, *(spell(side[key]) if key in side else "-" for side in (left, right)))
        for key in _by_section(left, right)
        if key != "name" and (key not in left or key not in right or left[key] != right[key])
    ]
    _show([("", _printable(str(first)), _printable(str(second))), *(rows or [("no key differs", "", "")])])


def _look_up(text: str, of: str | None) -> _Named:
    """The recipe that ``[COMMAND:]NAME`` or ``[COMMAND:]FILE.toml`` means.

    Raises:
        MvmrError: no such recipe or file.
    """
    from mvmr.training.shelf import is_file, names_on, read_tables

    prefix, _, rest = text.partition(":")
    if prefix in SHELVES:
        text, of = rest, prefix
    if of:
        read_tables(text, shelf_of(of))  # refuses what is not there
        return _Named(of, text)
    if is_file(text):
        tables = read_tables(text, shelf_of("distill"))
        return _Named("finetune" if _OF_FINETUNING & tables.keys() else "distill", text)
    for command in SHELVES:
        if text in names_on(shelf_of(command)):
            return _Named(command, text)
    raise unknown("recipe", text, dict.fromkeys(name for command in SHELVES for name in names_on(shelf_of(command))))


def _resolve(named: _Named, assignments: tuple[str, ...] = ()) -> _Settings:
    """All settings of a recipe, changed by ``assignments``; errors as of `mvmr.training.recipe.read_recipe`."""
    from mvmr.config import to_mapping
    from mvmr.training.recipe import FinetuneRecipe, Recipe, read_recipe

    shelf = shelf_of(named.command)
    if named.command == "finetune":
        return to_mapping(read_recipe(FinetuneRecipe, named.name, shelf, assignments))
    return to_mapping(read_recipe(Recipe, named.name, shelf, assignments))


def _notes(named: _Named, settings: _Settings) -> dict[str, str]:
    """What each changed key is without the assignments."""
    try:
        before = _flatten(_resolve(named))
    except MvmrError:  # a file that is whole only with the assignments
        return {}
    return {
        key: f"{spell(before[key])} without --set" if key in before else "not there without --set"
        for key, value in _flatten(settings).items()
        if key not in before or before[key] != value
    }


def _flatten(settings: _Settings) -> dict[str, Any]:
    """Settings by keys such as ``train.lr``; a table of weights stays whole."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def _by_section(left: _Settings, right: _Settings) -> list[str]:
    """The keys of both, those of a section together."""
    keys = list(dict.fromkeys((*left, *right)))
    sections = [key.partition(".")[0] for key in keys]
    return sorted(keys, key=lambda key: sections.index(key.partition(".")[0]))


def _show(rows: Sequence[Sequence[str]]) -> None:
    """Rows of three cells, the first two as wide as their widest."""
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    for a, b, c in rows:
        click.echo(f"{a:<{first}}  {b:<{second}}  {c}".rstrip())


def _printable(text: str) -> str:
    """A user's words, such that they stay in one comment or cell."""
    return text if text.isprintable() else repr(one_line(text))
