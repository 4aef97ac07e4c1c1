"""Shipped recipes are readable, and docs/recipes.md says what they say."""

import re
from pathlib import Path

import pytest

from mvmr.methods.distillers.table import DISTILLERS
from mvmr.methods.table import METHODS
from mvmr.training.recipe import load_recipe, recipe_names
from mvmr.training.views import make_policy

DOC = Path(__file__).parents[2] / "docs" / "recipes.md"
SHIPPED = [(package, name) for package in ("mvmr", "mvmr.distillation") for name in recipe_names(package)]
FIVE = {"augmented_pixels", "pixels", "scattering", "hog", "local_std"}


def cells_of(name: str) -> list[str]:
    """The cells of a recipe's row in docs/recipes.md."""
    (row,) = re.findall(rf"^\| `{name}` \|(.*)\|$", DOC.read_text(), re.M)
    return [cell.strip() for cell in row.split("|")]


@pytest.mark.parametrize(("package", "name"), SHIPPED)
def test_every_shipped_recipe_can_be_read(package: str, name: str) -> None:
    recipe = load_recipe(name, package)
    assert recipe.name == name
    make_policy(recipe.views.policy, recipe.views.size or 224)
    assert ("teacher" in recipe.method.targets) == (package == "mvmr.distillation")


@pytest.mark.parametrize(("package", "name"), [pair for pair in SHIPPED if re.search("-(ssl|distill)$", pair[1])])
def test_the_page_says_what_a_recipe_of_the_paper_says(package: str, name: str) -> None:
    recipe = load_recipe(name, package)
    size, stem, epochs, batch, accumulation, warmup = cells_of(name)
    assert size == f"{recipe.views.size} px"
    assert (stem == "yes") == recipe.student.small_kernel
    train = recipe.train
    assert (int(epochs), int(batch)) == (train.epochs, train.batch_size)
    assert (int(accumulation), int(warmup)) == (train.accumulate, train.warmup_steps)
    assert (train.optimizer, train.lr, train.weight_decay) == ("adam", 1e-4, 1e-6)
    assert recipe.method.projector == (8192, 8192, 8192)
    assert (recipe.student.backbone, recipe.views.policy) == ("resnet50", "paper")


PUBLISHED = [name for package, name in SHIPPED if name.startswith("imagenet/")]


def test_every_method_without_a_teacher_but_one_has_its_published_run() -> None:
    others = {"mvmr", "deepercluster", "combination", *DISTILLERS}
    assert {name.removeprefix("imagenet/") for name in PUBLISHED} == METHODS.keys() - others


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_page_says_what_a_published_run_is(name: str) -> None:
    recipe = load_recipe(name, "mvmr")
    train = recipe.train
    _, *cells, _ = cells_of(name)
    assert [train.optimizer if cell.isalpha() else float(cell) for cell in cells] == [
        train.epochs, train.batch_size, train.optimizer, train.lr, train.weight_decay, train.warmup_steps,
    ]  # fmt: skip
    assert cells[2] == train.optimizer
    assert recipe.method.name == name.removeprefix("imagenet/")
    assert (recipe.student.backbone, recipe.views.size, recipe.views.policy) == ("resnet50", 224, "paper")
    recipe.method.settle(1_281_167).check(train.batch_size, 1_281_167)
    train.steps(1_281_167, 8, recipe.smallest_batch)


@pytest.mark.parametrize(("package", "name"), [pair for pair in SHIPPED if re.search("-(ssl|distill)|paper", pair[1])])
def test_the_paper_s_recipes_have_the_paper_s_objective(package: str, name: str) -> None:
    recipe = load_recipe(name, package)
    assert recipe.method == load_recipe("paper", package).method
    assert set(recipe.method.targets) == (FIVE if package == "mvmr" else {"teacher"})
    assert set(recipe.method.representations.values()) == {1.0}
    assert (recipe.method.estimator, recipe.method.space) == ("biased", "projection")


def test_every_recipe_of_the_paper_has_its_command_on_the_page() -> None:
    text = DOC.read_text()
    for package, name in SHIPPED:
        if re.search("-(ssl|distill)$", name):
            command = "pretrain" if package == "mvmr" else "distill"
            assert re.search(rf"mvmr {command} --recipe {name}|the same with `{name}`", text), name
