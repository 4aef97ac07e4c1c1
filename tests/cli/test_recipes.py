"""`mvmr recipe`, and the defaults of recipes in `--help`."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest

from mvmr.cli.commands import ablate, compare, finetune, pretrain
from mvmr.cli.options import SHORTHANDS
from mvmr.cli.shelves import SHELVES, shelf_of
from mvmr.cli.toml import spell, spell_recipe
from mvmr.config import parse, to_mapping
from mvmr.distillation.cli import distill
from mvmr.training.recipe import FinetuneRecipe, Recipe, read_recipe
from mvmr.training.shelf import names_on
from mvmr.training.shorthands import KEYS, Shorthands
from tests.cli.commands import mvmr, refusal

SHIPPED = [(command, name) for command in SHELVES for name in names_on(shelf_of(command))]


def read(command: str, recipe: str | Path, *assignments: str) -> Any:
    kind = FinetuneRecipe if command == "finetune" else Recipe
    return read_recipe(kind, recipe, shelf_of(command), assignments)


def shown(*argv: str | Path) -> str:
    result = mvmr("recipe", *argv)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def differences(*argv: str | Path) -> dict[str, list[str]]:
    """Key -> both values, of `mvmr recipe diff`; what was compared stands under ""."""
    first, *lines = shown("diff", *argv).splitlines()
    edge = len(first) - len(first.lstrip())
    cells = {line[:edge].strip(): line[edge:] for line in lines}
    left = first.split()[0]
    second = first.index(first.split()[1]) - edge
    return {"": [left, first.split()[1]]} | {
        key: [rest[:second].strip(), rest[second:].strip()] for key, rest in cells.items()
    }


def test_every_recipe_is_listed_with_what_it_is() -> None:
    lines = [line.split(maxsplit=2) for line in shown("list").splitlines()]
    assert [(command, name) for command, name, _ in lines] == SHIPPED
    for command, name, text in lines:
        assert len(text) > 20, f"{command}:{name}"
    assert {line.split()[0] for line in shown("list", "--of", "finetune").splitlines()} == {"finetune"}


@pytest.mark.parametrize(("command", "name"), SHIPPED)
def test_what_is_shown_is_a_recipe_that_comes_to_the_same(command: str, name: str, tmp_path: Path) -> None:
    text = shown("show", name, "--of", command)
    assert text == shown("show", f"{command}:{name}")
    assert text.startswith(f"# recipe {name} of mvmr {command}\n")
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    assert read(command, file) == read(command, name)
    assert shown("show", file, "--of", command).partition("\n")[2] == text.partition("\n")[2]


@dataclass(frozen=True, kw_only=True)
class Section:
    none: float | None = None
    words: tuple[str, ...] = ()
    numbers: tuple[float, ...] = (1e-06, 1e22, -0.1)
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Whole:
    name: str = "x"
    yes: bool = True
    section: Section = field(default_factory=Section)


def test_toml_keeps_whatever_a_setting_may_be() -> None:
    words = ('a "quoted" \\ word', "ä 😀", "tab\tbreak\nbell\x07 delete\x7f", "")
    whole = Whole(name="# no comment", section=Section(words=words, weights={"a b": 1, "c.d": 2.5, "": 3, "x-1": 0.1}))
    text = spell_recipe(to_mapping(whole), {"section.none": "1.0 without --set"})
    assert 'none = "none"  # 1.0 without --set\n' in text
    assert parse(Whole, tomllib.loads(text), where="test") == whole


def test_an_assignment_shows_what_it_changes() -> None:
    text = shown("show", "pretrain:default", "--set", "train.epochs=5", "--set", "method.name=simclr")
    assert text.startswith("# recipe default of mvmr pretrain, with train.epochs=5 method.name=simclr\n")
    assert "\nepochs = 5  # 200 without --set\n" in text
    assert '\nname = "simclr"  # "mvmr" without --set\n' in text
    assert "\ntemperature = 0.5  # not there without --set\n" in text
    assert text.count("  # ") == 4  # the projector, too


def test_a_name_without_its_command_is_the_first_that_has_it() -> None:
    assert shown("show", "paper").startswith("# recipe paper of mvmr distill\n")
    assert shown("show", "stl10-ssl").startswith("# recipe stl10-ssl of mvmr pretrain\n")
    assert shown("show", "few-label-paper").startswith("# recipe few-label-paper of mvmr finetune\n")


def test_only_keys_that_differ_are_printed() -> None:
    assert differences("default", "paper", "--of", "pretrain") == {
        "": ["pretrain:default", "pretrain:paper"],
        "train.epochs": ["200", "1000"],
        "train.optimizer": ['"adamw"', '"adam"'],
        "train.lr": ["0.0003", "0.0001"],
    }
    other = differences("paper", "pretrain:paper", "--of", "distill")  # what stands before a name counts more
    assert other[""] == ["distill:paper", "pretrain:paper"]
    assert other["method.representations"][0] == "{ teacher = 1.0 }"
    missing = differences("finetune:default", "distill:default")
    assert missing["head"] == ['"probe"', "-"]
    assert missing["student.backbone"] == ["-", '"resnet50"']
    assert "name" not in missing
    assert shown("diff", "default", "distill:default").splitlines()[1:] == ["no key differs"]


def test_a_file_is_compared_as_what_its_keys_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("pretrain", "finetune"):
        Path(f"{command}.toml").write_text(shown("show", f"{command}:default", "--set", "train.lr=0.5"))
    tuned = differences("finetune.toml", "finetune:default")
    assert tuned == {"": ["finetune:finetune.toml", "finetune:default"], "train.lr": ["0.5", "0.0001"]}
    assert differences("pretrain.toml", "pretrain:default")["train.lr"] == ["0.5", "0.0003"]
    assert shown("show", "pretrain:pretrain.toml").startswith("# recipe pretrain.toml of mvmr pretrain\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["show", "papr"], "unknown recipe 'papr'; did you mean 'paper'?"),
        (["show", "few-label-paper", "--of", "distill"], "unknown recipe 'few-label-paper'"),
        (["show", "pretrain:papr"], "unknown recipe 'papr'; did you mean 'paper'?"),
        (["show", "gone.toml"], "recipe file gone.toml does not exist"),
        (["show", "broken.toml"], "broken.toml is not valid TOML"),
        (["show", "wrong.toml"], "wrong.toml: unknown key 'train.lrr', did you mean 'lr'?"),
        (["show", "default", "--set", "train.epochs=-1"], "[train] epochs = -1: must be 0 or more"),
        (["show", "default", "--set", "epochs"], "cannot read assignment 'epochs'; write KEY=VALUE"),
        (["diff", "default", "papr"], "unknown recipe 'papr'"),
        (["diff", "default", "gone.toml"], "recipe file gone.toml does not exist"),
    ],
)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.toml").write_text("[train")
    Path("wrong.toml").write_text("[train]\nlrr = 1")
    assert message in refusal(mvmr("recipe", *argv))


def test_strangers_words_stay_in_the_comment(tmp_path: Path) -> None:
    file = tmp_path / "a\nname = 3.toml"
    file.write_text("")
    assert tomllib.loads(shown("show", file))["name"] == "a\nname = 3"


@pytest.mark.parametrize(
    ("command", "of", "recipe"),
    [
        (distill, "distill", "default"),
        (pretrain, "pretrain", "default"),
        (finetune, "finetune", "default"),
        (compare, "pretrain", "default"),
        (ablate, "pretrain", "paper"),
    ],
)
def test_help_says_the_defaults_of_the_recipe(command: click.Command, of: str, recipe: str) -> None:
    context = click.Context(command, info_name=command.name)
    resolved = to_mapping(read(of, recipe))
    flags = [
        option
        for option in command.params
        if isinstance(option, click.Option) and option.opts[0].removeprefix("--") in SHORTHANDS
    ]
    assert len(flags) >= 7
    for option in flags:
        shorthand = SHORTHANDS[option.opts[0].removeprefix("--")]
        name = KEYS[option.opts[0].removeprefix("--").replace("-", "_")]
        section, _, key = name.partition(".")
        value = resolved[section][key]
        words = shorthand.unset if value is None else value if isinstance(value, str) else spell(value)
        assert option.get_help_extra(context).get("default") == f"{words}, by recipe {recipe}", name
        assert (value is None) <= (" " in shorthand.unset), f"{name}: none is no word for a reader"


def test_every_argument_of_the_library_has_its_flag() -> None:
    assert [flag.replace("-", "_") for flag in SHORTHANDS] == list(KEYS)
    assert Shorthands.__annotations__.keys() == KEYS.keys()


def test_help_says_what_a_value_is_and_its_default() -> None:
    text = " ".join(mvmr("distill", "--help").stdout.split())
    assert "--epochs INTEGER Passes over the images; 0:" in text
    assert "to compare with. [default: 100, by recipe default]" in text
    assert "--lr FLOAT Peak learning rate. [default: 0.001, by recipe default]" in text
    assert "--size INTEGER Side of the images the student sees, in pixels. [default: the data's own," in text
    assert "--small-kernel A stem" in text
