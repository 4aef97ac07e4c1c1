"""docs/settings.md has every key that a recipe may say, as the source has it, and what it means."""

import dataclasses
import re
from pathlib import Path
from types import ModuleType

import pytest

from mvmr.methods.method import MethodConfig
from mvmr.methods.regulariser import RegulariserConfig
from mvmr.methods.table import CONFIGS
from mvmr.models.backbone import StudentConfig
from mvmr.training.recipe import AugmentationConfig, FinetuneRecipe, Recipe, ViewsConfig
from mvmr.training.trainer import TrainConfig
from tests.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "docs" / "settings.py"
CLASSES = [
    Recipe, StudentConfig, ViewsConfig, *CONFIGS.values(), RegulariserConfig, TrainConfig, FinetuneRecipe,
    AugmentationConfig,
]  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(SCRIPT)


def test_the_page_is_as_the_source_is(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.page(), "stale: run python docs/settings.py"


@pytest.mark.parametrize("config", CLASSES)
def test_every_key_has_a_meaning_and_every_number_a_range(script: ModuleType, config: type) -> None:
    for key in script.keys_of(config):
        assert key.meaning, f"{config.__name__}.{key.name}: write a comment behind it, and run python docs/settings.py"
        assert key.unit or "number" not in key.kind, f"{config.__name__}.{key.name}: [unit, range] at the comment's end"


def test_every_key_stands_in_its_section() -> None:
    sections: dict[str, str] = {}
    for part in re.split(r"^##+ ", SCRIPT.with_suffix(".md").read_text(encoding="utf-8"), flags=re.M)[1:]:
        heading, _, text = part.partition("\n")
        for name in re.findall(r"`([^`]+)`", heading) or [heading]:
            sections.setdefault(name, text)
    of = {"[student]": StudentConfig, "[views]": ViewsConfig, "[objective]": RegulariserConfig, "[train]": TrainConfig}
    for name, config in {**of, **CONFIGS}.items():
        keys = {field.name for field in dataclasses.fields(config)}
        keys -= {"name"} if issubclass(config, MethodConfig) else set()
        assert set(re.findall(r"^\| `(\w+)` \|", sections[name], re.M)) == keys, name
    assert set(re.findall(r"^\| `(\w+)` \|", sections["To fine-tune"], re.M)) == {
        "name", "head", "balanced", "recalibrate",
    }  # fmt: skip


def test_a_meaning_stands_behind_a_field_or_above_it(script: ModuleType) -> None:
    meanings = script.comments(CONFIGS["twist"])
    assert meanings["diversity"] == "beta: weight of the entropy of their mean [0 or more]"
    assert meanings["confident"].startswith("that has a label then")
    assert script.explain(CONFIGS["twist"], "crops") == ("views of the usual size", "2 or more")
