"""Every row of every grid is a recipe that is what its label says, whatever the recipe it is applied to."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mvmr.comparison.grids import GRIDS, POLICIES, REPRESENTATIONS, check_free, rows_of
from mvmr.errors import MvmrError
from mvmr.representations import AUGMENTED_PIXELS, HAND_CRAFTED
from mvmr.training.recipe import Recipe, load_recipe
from mvmr.training.views import POLICIES as VIEW_POLICIES
from mvmr.training.views import STEPS, make_policy

SIZES = {"losses": 7, "representations": 31, "augmentations": 6, "projector": 19}


def recipes(grid: str, base: str | Path = "paper") -> dict[str, Recipe]:
    return {row.label: load_recipe(base, "mvmr", row.assignments) for row in GRIDS[grid]}


@pytest.fixture
def crowded_recipe(tmp_path: Path) -> Path:
    """A recipe with every term that the paper does not have."""
    path = tmp_path / "crowded.toml"
    path.write_text(
        "[method]\n"
        "invariance = 3.0\nvariance = 3.0\ndependence = 3.0\ndecorrelation = 2.0\nestimator = 'unbiased'\n"
        "representations = { hog = 3.0, teacher = 1.0 }\n"
    )
    return path


def test_the_grids_have_the_papers_numbers_of_rows() -> None:
    assert {grid: len(rows) for grid, rows in GRIDS.items()} == SIZES
    assert set(REPRESENTATIONS) == {AUGMENTED_PIXELS, *HAND_CRAFTED}
    assert tuple(VIEW_POLICIES) == POLICIES


@pytest.mark.parametrize("grid", GRIDS)
def test_rows_differ_in_label_recipe_and_name_of_folder(grid: str) -> None:
    made = recipes(grid)
    assert len(made) == SIZES[grid]
    assert len({repr(recipe) for recipe in made.values()}) == SIZES[grid]
    assert len({re.sub(r"[^a-z0-9]+", "-", label.lower()) for label in made}) == SIZES[grid]


@pytest.mark.parametrize("crowd", [False, True])
def test_losses_are_those_of_the_label(crowd: bool, crowded_recipe: Path) -> None:
    for label, recipe in recipes("losses", crowded_recipe if crowd else "paper").items():
        terms, method = label.split(" + "), recipe.method
        assert (method.invariance, method.variance) == (("L1" in terms),) * 2
        assert method.dependence == ("L2" in terms)
        assert method.representations == (dict.fromkeys(REPRESENTATIONS, 1.0) if "L3" in terms else {})
        assert method.targets == (REPRESENTATIONS if "L3" in terms else ())
        assert method.decorrelation == 0
        assert method.estimator == ("unbiased" if crowd else "biased")  # what the grid does not vary stays


@pytest.mark.parametrize("crowd", [False, True])
def test_representations_are_those_of_the_label(crowd: bool, crowded_recipe: Path) -> None:
    for label, recipe in recipes("representations", crowded_recipe if crowd else "paper").items():
        method = recipe.method
        assert method.representations == dict.fromkeys(label.split(" + "), 1.0)
        assert method.targets == tuple(label.split(" + "))
        assert (method.invariance, method.variance, method.dependence) == (1, 1, 1)
    assert recipes("representations")[" + ".join(REPRESENTATIONS)].method == load_recipe("paper", "mvmr").method


def test_augmentations_add_a_step_at_a_time() -> None:
    steps = [make_policy(recipe.views.policy, 32).steps for recipe in recipes("augmentations").values()]
    assert steps == [STEPS[:count] for count in range(len(STEPS) + 1)]


def test_projectors_have_the_widths_of_the_label() -> None:
    made = {label: recipe.method.projector for label, recipe in recipes("projector").items()}
    assert made.pop("none") == ()
    assert {label: tuple(int(width) for width in label.split("-")) for label in made} == made
    assert {(len(sizes), sizes[0]) for sizes in made.values()} == {
        (depth, width) for depth in (1, 2, 3) for width in (512, 1024, 2048, 4096, 8192, 16384)
    }


@pytest.mark.parametrize(
    ("grid", "only", "labels"),
    [
        ("losses", "L1", ["L1"]),  # a label as it stands is a glob
        ("losses", "L1*", ["L1", "L1 + L2", "L1 + L3", "L1 + L2 + L3"]),
        ("losses", "2 +", ["L2 + L3", "L1 + L2 + L3"]),
        ("augmentations", "crop", ["crop"]),
        ("projector", "16384", ["16384"]),
        ("augmentations", "jitter", ["crop+flip+jitter", "crop+flip+jitter+grey"]),
    ],
)
def test_rows_are_chosen_by_glob_or_else_by_a_part(grid: str, only: str, labels: list[str]) -> None:
    assert [row.label for row in rows_of(grid, only)] == labels


def test_unknown_grids_and_rows_are_named() -> None:
    with pytest.raises(MvmrError, match=r"unknown grid 'loses'; did you mean 'losses'\?"):
        rows_of("loses")
    with pytest.raises(MvmrError, match=r"no row of grid losses matches 'L4'; its rows: L1, L2, L3, L1 \+ L2, .*L3$"):
        rows_of("losses", "L4")


@pytest.mark.parametrize(
    ("grid", "assignment"),
    [
        ("losses", "method.representations.hog=1"),
        ("losses", "method.decorrelation=1"),
        ("losses", "method={}"),
        ("augmentations", "views.policy = crop"),
        ("projector", "method.projector=[8]"),
        ("projector", "train.seed=3"),
    ],
)
def test_what_the_rows_decide_cannot_be_set(grid: str, assignment: str) -> None:
    with pytest.raises(MvmrError, match=f"cannot set .*: the rows of grid {grid}"):
        check_free(GRIDS[grid], ["train.lr=1", assignment], f"grid {grid}")
    check_free(GRIDS[grid], ["train.lr=1", "method.gamma=1", "views.size=32"], "it")


def test_grids_are_read_without_torch() -> None:
    script = "import sys, mvmr.comparison.grids; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
