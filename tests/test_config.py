import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from mvmr.config import assign, parse, read_toml, to_mapping
from mvmr.errors import MvmrError


@dataclass(frozen=True, kw_only=True)
class Train:
    epochs: int = 10
    lr: float = 1e-3
    clip_grad: float | None = None
    optimizer: Literal["adam", "adamw"] = "adamw"

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise MvmrError(f"epochs = {self.epochs} should be at least 1")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    projector: tuple[int, ...] = (64, 64)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    steps: tuple[str, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    resume: bool = False
    train: Train = field(default_factory=Train)


def message(mapping: dict[str, object]) -> str:
    with pytest.raises(MvmrError) as caught:
        parse(Recipe, mapping, where="recipe test")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_parse_fills_defaults_and_converts() -> None:
    recipe = parse(
        Recipe,
        {"name": "a", "projector": [8, 8], "mean": [0, 1, 0.5], "weights": {"hog": 1}, "train": {"lr": 1}},
        where="test",
    )
    assert recipe == Recipe(name="a", projector=(8, 8), mean=(0.0, 1.0, 0.5), weights={"hog": 1.0}, train=Train(lr=1.0))
    assert isinstance(recipe.train.lr, float)
    assert isinstance(recipe.mean[0], float)
    assert isinstance(recipe.weights["hog"], float)


def test_all_mistakes_stand_in_one_line() -> None:
    text = message(
        {
            "nam": "a",
            "projector": [8, "wide"],
            "mean": [1, 2],
            "resume": 1,
            "weights": {"hog": "much"},
            "train": {"epocks": 3, "lr": True, "optimizer": "adam2", "clip_grad": []},
        }
    )
    assert text.startswith("recipe test: ")
    for part in (
        "unknown key 'nam', did you mean 'name'?",
        "key 'name' is missing",
        "projector[1] = 'wide' should be a whole number",
        "mean = [1, 2] should have 3 values, not 2",
        "resume = 1 should be true or false",
        "weights.hog = 'much' should be a number",
        "unknown key 'train.epocks', did you mean 'epochs'?",
        "train.lr = True should be a number",
        "train.optimizer = 'adam2' should be one of adam, adamw; did you mean 'adam'?",
        "train.clip_grad = [] should be a number",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("train", "part"),
    [
        ({"epochs": True}, "train.epochs = True should be a whole number"),
        ({"epochs": 2.0}, "train.epochs = 2.0 should be a whole number"),
        ({"epochs": 0}, "train: epochs = 0 should be at least 1"),
        ({"lr": float("nan")}, "train.lr = nan should be finite"),
        ({"lr": None}, "train.lr = None should be a number"),
        ({"zzz": 1}, "unknown key 'train.zzz', known: epochs, lr, clip_grad, optimizer"),
        (3, "train = 3 should be a table"),
        ("x" * 100, "..."),
    ],
)
def test_wrong_values_are_refused(train: object, part: str) -> None:
    assert part in message({"name": "a", "train": train})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = " + "[" * 3000, "not valid TOML: nested too deeply"),
        ("x = " + "[" * 200 + "]" * 200, "not valid TOML: nested more than 64 deep"),
        ("a." * 200 + "a = 1", "not valid TOML: nested more than 64 deep"),
        ("a." * 20_000 + "a = 1", "not valid TOML: a line of 40,005 characters"),
        ("x = 1 # " + "a" * 70_000, "is no recipe: it has 70,008 bytes, more than 65,536"),
        ("x = " + "9" * 5000, "not valid TOML: a line of"),
    ],
)
def test_toml_that_python_chokes_on_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(MvmrError) as caught:
        parse(Train, read_toml(tmp_path / "r.toml"), where="r.toml")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text", ["epochs = 99999999999999999999", "lr = 0x" + "f" * 4000, "epochs = -99999999999999999999"]
)
def test_whole_numbers_beyond_64_bits_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(MvmrError, match="should fit into 64 bits"):
        parse(Train, read_toml(tmp_path / "r.toml"), where="r.toml")


def test_absurd_keys_are_named_in_part(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        "a" * 4000 + ' = 1\n"b\\u001b[31m\\nc" = 2\n' + "".join(f"x{i} = 1\n" for i in range(500))
    )
    with pytest.raises(MvmrError) as caught:
        parse(Train, read_toml(tmp_path / "r.toml"), where="r.toml")
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(f"r.toml: unknown key '{'a' * 77}...', known: epochs")
    assert message.endswith("; and 482 more")
    assert len(message) < 3000


def test_none_by_word_and_by_value() -> None:
    for value in ("none", None):
        assert parse(Train, {"clip_grad": value}, where="test").clip_grad is None
    assert parse(Train, {"clip_grad": 2}, where="test").clip_grad == 2.0


def test_to_mapping_round_trips_through_json() -> None:
    recipe = Recipe(name="ä", projector=(), weights={"hog": 0.5}, train=Train(clip_grad=1.0, optimizer="adam"))
    assert parse(Recipe, json.loads(json.dumps(to_mapping(recipe))), where="test") == recipe


def test_assign_reads_toml_values_and_bare_words() -> None:
    start = {"name": "a", "train": {"lr": 1.0}}
    merged = assign(
        start,
        [
            "train.lr=1e-3",
            "train.optimizer=adam",
            "projector=[8, 4]",
            'name="quoted = yes"',
            "resume = true",
            "weights.hog=2",
            "train.lr=3e-4",
        ],
    )
    assert merged == {
        "name": "quoted = yes",
        "train": {"lr": 3e-4, "optimizer": "adam"},
        "projector": [8, 4],
        "resume": True,
        "weights": {"hog": 2},
    }
    assert start == {"name": "a", "train": {"lr": 1.0}}


@pytest.mark.parametrize("value", ["2024-01-01", "1\nother = 2", "a b", "a=b", ""])
def test_assign_takes_the_rest_as_a_string(value: str) -> None:
    assert assign({}, [f"name={value}"]) == {"name": value}


@pytest.mark.parametrize("assignment", ["lr", "=1", "train..lr=1", "name.x=1", "train.lr.x.y=1"])
def test_assign_refuses_what_has_no_place(assignment: str) -> None:
    with pytest.raises(MvmrError, match=r"assignment|cannot set"):
        assign({"name": "a", "train": {"lr": 1.0}}, [assignment])


def test_read_toml_names_file_and_place(tmp_path: Path) -> None:
    good = tmp_path / "good.toml"
    good.write_text('name = "ä"\n[train]\nlr = 1e-4\n', encoding="utf-8")
    assert read_toml(good) == {"name": "ä", "train": {"lr": 1e-4}}
    for name, content, part in (
        ("broken.toml", b"a = \n", "line 1"),
        ("latin.toml", 'a = "ä"'.encode("latin-1"), "UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MvmrError, match=rf"{name}.*{part}"):
            read_toml(tmp_path / name)
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(MvmrError, match="cannot read"):
            read_toml(path)
