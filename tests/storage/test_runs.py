"""Two descriptions of runs are compared by path, and another run is refused in one sentence."""

from pathlib import Path

import pytest

from mvmr.errors import MvmrError
from mvmr.storage.runs import check_same, differences


def test_values_that_differ_are_found_by_their_path() -> None:
    old = {"data": "photos", "train": {"lr": 1e-3, "seed": 0}, "old": True}
    new = {"data": "photos", "train": {"lr": 1e-4, "seed": 0}, "new": {"sizes": (1, 2)}}
    assert differences(old, new) == {
        "train.lr": (1e-3, 1e-4),
        "old": (True, None),
        "new": (None, {"sizes": [1, 2]}),
    }


def test_a_description_is_the_same_once_written_and_read() -> None:
    assert differences({"sizes": [1, 2], "at": {"x": [{"y": 0}]}}, {"sizes": (1, 2), "at": {"x": ({"y": 0},)}}) == {}


def test_the_same_run_is_not_refused(tmp_path: Path) -> None:
    check_same(tmp_path, {}, cure="another --out")


def test_the_refusal_is_one_sentence_that_names_the_first_few(tmp_path: Path) -> None:
    with pytest.raises(MvmrError) as caught:
        check_same(tmp_path, {"b": (1, 2), "a": ("x", None)}, cure="another --out", what="ablation")
    assert str(caught.value) == (
        f"{tmp_path} holds another ablation, it differs in a ('x' there, None now); b (1 there, 2 now): "
        "give the arguments it was started with, or another --out"
    )
    with pytest.raises(MvmrError, match=r"k3 \(0 there, 1 now\) and 6 more: give") as caught:
        check_same(tmp_path, {f"k{number}": (0, 1) for number in range(10)}, cure="another --out")
    assert "k4" not in str(caught.value)


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    with pytest.raises(MvmrError) as caught:
        check_same(tmp_path, {"images": ("0" * 64, list(range(1000)))}, cure="another --out")
    assert f"images ('{'0' * 35}...' there, [0, 1, 2, " in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
