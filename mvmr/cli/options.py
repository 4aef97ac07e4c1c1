"""Options that several subcommands share."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

import click
from click.types import OptionHelpExtra

from mvmr.cli.shelves import SHELVES, shelf_of
from mvmr.cli.threads import THREADS
from mvmr.training.shorthands import KEYS, assignments

Command = Callable[..., None]
Decorator = Callable[[Command], Command]


class Shorthand(NamedTuple):
    """A flag that changes one key of the recipe; everything else is reached by --set.

    metavar: what a value is, None for a switch
    unset: the value where a recipe leaves the key out; its own default, or in words what none stands for
    """

    text: str
    metavar: str | None
    unset: str


# By flag; which key each changes is in `mvmr.training.shorthands.KEYS`.
SHORTHANDS = {
    "student": Shorthand(
        "resnet18 (_050, _025: narrower), resnet50, or timm: and one of its models.",
        "NAME",
        "resnet50",
    ),
    "method": Shorthand(
        "How it learns: mvmr, simclr, moco, byol, simsiam, barlow, vicreg, swav, dino, isd, twist, "
        "deepcluster, deepercluster, selflabel, lejepa; from a teacher by regression, cosine, dcor, cka, rkd, seed, "
        "relational, gram, procrustes, cospress, or their combination.",
        "NAME",
        "mvmr",
    ),
    "small-kernel": Shorthand("A stem for small images: 3 x 3, stride 1, no pooling.", None, "false"),
    "size": Shorthand("Side of the images the student sees, in pixels.", "INTEGER", "the data's own"),
    "epochs": Shorthand(
        "Passes over the images; 0: an encoder that has learned nothing, to compare with.",
        "INTEGER",
        "100",
    ),
    "batch-size": Shorthand("Images to a batch, over all devices; the objective compares them.", "INTEGER", "256"),
    "accumulate": Shorthand("Batches to an optimiser step.", "INTEGER", "1"),
    "lr": Shorthand("Peak learning rate.", "FLOAT", "0.001"),
    "clip-grad": Shorthand("Largest norm of the gradient.", "FLOAT", "no limit"),
    "precision": Shorthand(
        "32-true, bf16-mixed or 16-mixed.",
        "NAME",
        "bf16-mixed where the device has it",
    ),
    "workers": Shorthand("Processes that load images.", "INTEGER", "one to a usable core"),
    "seed": Shorthand("Same seed, machine and --threads: same weights.", "INTEGER", "0"),
}
OF_PRETRAINING = ("student", "method", "small-kernel", "size")

OUT = click.option("--out", metavar="FOLDER", help="Folder of the bundle; made from the data's name when left out.")
RECIPE = click.option(
    "--recipe", default="default", show_default=True, help="Name of a recipe (mvmr recipe list), or a TOML file."
)
INIT = click.option(
    "--init",
    metavar="B|FILE|torchvision:TAG",
    help="What the encoder starts from: a bundle, a state-dict file, or weights that torchvision has downloaded, such "
    "as torchvision:IMAGENET1K_V2.",
)
RESUME = click.option("--resume", is_flag=True, help="Go on with the run of --out, if it is not finished.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace what --out holds.")
DEVICE = click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto.")
DEVICES = click.option("--devices", default=1, show_default=True, help="Number of devices.")
MAX_UNREADABLE = click.option(
    "--max-unreadable", default=0.01, show_default=True, help="Share of unreadable images that stops it."
)
LABELLED = click.option(
    "--data",
    required=True,
    help="Labelled data: a folder with a folder to a class, a table (labels.csv), or a name such as stl10:ROOT.",
)
BALANCED = click.option("--balanced", is_flag=True, help="Weigh each class alike, however many images it has.")
CONFUSION = click.option(
    "--confusion", metavar="FILE.csv", help="Write which class of the test split is taken for which."
)


def options(*decorators: Decorator) -> Decorator:
    """Several options as one decorator, in the order in which `--help` shows them."""

    def decorate(command: Command) -> Command:
        for option in reversed(decorators):
            command = option(command)
        return command

    return decorate


class _ShorthandOption(click.Option):
    """A flag of ``SHORTHANDS``; `--help` shows what the command's default recipe says, and only then reads it."""

    def get_help_extra(self, ctx: click.Context) -> OptionHelpExtra:
        extra = super().get_help_extra(ctx)
        (recipe,) = (str(option.default) for option in ctx.command.params if option.name == "recipe")
        command = str(ctx.command.name)
        shelf = shelf_of(command if command in SHELVES else "pretrain")  # compare and ablate take its recipes
        extra["default"] = f"{_default(str(self.name), recipe, shelf)}, by recipe {recipe}"
        return extra


def _default(name: str, recipe: str, shelf: Traversable) -> str:
    """What a recipe that ships says of an argument's key, from its file alone: its dataclasses need torch."""
    from mvmr.training.shelf import read_tables

    section, _, key = KEYS[name].partition(".")
    value = read_tables(recipe, shelf).get(section, {}).get(key, "none")
    if value == "none":
        return SHORTHANDS[name.replace("_", "-")].unset
    return str(value).lower() if isinstance(value, bool) else str(value)


def recipe_options(*, without: tuple[str, ...] = ()) -> Decorator:
    """`--set` and a flag for each of SHORTHANDS but those in ``without``; all arrive together, as ``assign``."""
    flags = {flag: entry for flag, entry in SHORTHANDS.items() if flag not in without}

    def decorate(command: Command) -> Command:
        def run(assign: tuple[str, ...], **arguments: Any) -> None:
            values = {name: arguments.pop(name) for name in (flag.replace("-", "_") for flag in flags)}
            chosen = {name: value for name, value in values.items() if value}
            command(assign=(*assignments(chosen), *assign), **arguments)

        run.__doc__, run.__name__ = command.__doc__, command.__name__
        if hasattr(command, "__click_params__"):  # of the options below this one
            run.__click_params__ = command.__click_params__  # type: ignore[attr-defined]
        change = click.option(
            "--set", "assign", multiple=True, metavar="KEY=VALUE", help="Change a key of the recipe: train.lr=3e-4."
        )
        # None, not False: with False click takes a missing value as no option at all, and no value may be negative
        shorthands = [
            click.option(f"--{flag}", cls=_ShorthandOption, is_flag=metavar is None or None, metavar=metavar, help=text)
            for flag, (text, metavar, _) in flags.items()
        ]
        return options(change, *shorthands)(run)

    return decorate


TRAINING = options(OUT, RECIPE, recipe_options(), INIT, RESUME, OVERWRITE, DEVICE, DEVICES, THREADS, MAX_UNREADABLE)
