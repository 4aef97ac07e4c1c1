"""Heads, metrics and files come back from a bundle as they were put into it, and what does not fit is refused."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save

from mvmr.bundles import bundle
from mvmr.errors import MvmrError
from mvmr.storage import staging
from tests.bundles.written import CLASSES, WIDTH, damaged, record, with_head


def test_head_comes_back_as_it_was_stored(made):
    weight, bias = np.random.default_rng(0).normal(size=(2, WIDTH)), np.array([0.5, -1.0])
    again = bundle.load(bundle.add_head(made, "cats-2", weight, bias, CLASSES, record(91.5)).path)
    head = again.head("cats-2")
    assert again.heads == ("cats-2",)
    assert head.classes == CLASSES
    assert head.metrics == record(91.5) | {"head": "cats-2"} == again.manifest.metrics[0]
    np.testing.assert_array_equal(head.weight, weight.astype(np.float32))
    np.testing.assert_array_equal(head.bias, bias.astype(np.float32))
    card = (again.path / "README.md").read_text()
    assert "linear, head cats-2 | top1 91.5 | `mvmr probe b`" in card
    assert "distilled from ViT-B-16" in card


def test_head_of_the_same_name_is_replaced_with_its_figures(made):
    with_head(made, 1.0)
    bundle.add_metrics(made, record(33.0, command="mvmr evaluate b", head="x"))
    bundle.add_metrics(made, record(44.0, command="mvmr evaluate b"))
    now = with_head(made, 2.0)
    assert now.head("x").weight[0, 0] == 2.0
    assert [entry["values"]["top1"] for entry in now.manifest.metrics] == [44.0, 2.0]
    assert bundle.load(made.path) == now


def test_metrics_of_the_same_command_are_replaced(made):
    bundle.add_metrics(made, record(1.0))
    now = bundle.add_metrics(made, record(2.0))
    assert [entry["values"]["top1"] for entry in now.manifest.metrics] == [2.0]


def test_metrics_may_be_numpy_numbers_and_any_bytes_in_names(made):
    values = {"top1": np.float32(0.5), "images": np.int64(3)}
    now = bundle.add_metrics(made, {"command": "c", "data": "caf\udce9/", "protocol": "knn", "values": values})
    assert bundle.load(made.path) == now
    assert now.manifest.metrics[0]["values"] == {"top1": 0.5, "images": 3}
    assert now.manifest.metrics[0]["data"] == "caf?/"


def test_a_source_that_is_not_there_changes_nothing(made, tmp_path):
    with pytest.raises(MvmrError, match=r"No such file .*none.*still whole") as caught:
        bundle.add_files(made, {"onnx/a": b"a", "onnx/b": tmp_path / "none"})
    assert "\n" not in str(caught.value)
    assert bundle.load(made.path) == made
    assert sorted(os.listdir(made.path)) == ["README.md", "bundle.json", "encoder.safetensors"]


def test_a_bundle_that_is_gone_is_one_line(made, tmp_path):
    made.path.rename(tmp_path / "elsewhere")
    with pytest.raises(MvmrError, match="cannot change bundle"):
        with_head(made)


def test_unknown_head_names_the_nearest(made):
    with pytest.raises(MvmrError, match="unknown head 'flower'; did you mean 'flowers'"):
        with_head(made, name="flowers").head("flower")


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "-x", "x" * 65, "a b", "x\n", "é"])
def test_head_names_cannot_leave_the_folder(name, made):
    with pytest.raises(MvmrError, match="is not allowed"):
        with_head(made, name=name)
    assert bundle.load(made.path) == made


@pytest.mark.parametrize(
    ("weight", "bias", "classes", "text"),
    [
        (np.zeros((2, WIDTH + 1)), np.zeros(2), CLASSES, f"takes {WIDTH + 1} features but .* {WIDTH} wide"),
        (np.zeros((3, WIDTH)), np.zeros(3), CLASSES, "do not fit one another"),
        (np.zeros((2, WIDTH)), np.zeros(3), CLASSES, "do not fit one another"),
        (np.zeros(WIDTH), np.zeros(2), CLASSES, "do not fit one another"),
        (np.zeros((0, WIDTH)), np.zeros(0), (), "do not fit one another"),
        (np.full((2, WIDTH), np.nan), np.zeros(2), CLASSES, "not finite"),
        (np.zeros((2, WIDTH)), np.zeros(2), ("a", "a"), "names a class twice"),
        (np.zeros((2, WIDTH)), np.zeros(2), ("a", "caf\udce9"), "no Unicode text"),
    ],
)
def test_head_that_does_not_fit_is_refused(weight, bias, classes, text, made):
    with pytest.raises(MvmrError, match=text):
        bundle.add_head(made, "x", weight, bias, classes, record())
    assert bundle.load(made.path) == made


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"data": None}, "data = None"),
        ({"values": {"top1": float("nan")}}, "top1 = nan; give a finite number"),
        ({"values": {"top1": "high"}}, "top1 = 'high'"),
        ({"values": [1]}, "values = \\[1\\]"),
        ({"more": object()}, "cannot be written"),
    ],
)
def test_bad_record_is_refused(bad, text, made):
    with pytest.raises(MvmrError, match=text):
        bundle.add_metrics(made, record() | bad)
    assert bundle.load(made.path) == made


@pytest.mark.parametrize("content", [b"", b"hello"])
def test_head_whose_weights_are_broken_is_named(content, made):
    with_head(made)
    weights = made.path / "heads/x/head.safetensors"
    weights.write_bytes(content)
    listed = bundle.load(made.path, verify=False).manifest.files
    damaged(made.path, files=dict(listed) | {"heads/x/head.safetensors": staging.digest(weights)})
    with pytest.raises(MvmrError, match=r"head\.safetensors is not a whole safetensors file"):
        bundle.load(made.path).head("x")


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "x"}', '{"name": "x", "classes": ["a"], "metrics": {}}'])
def test_head_whose_description_is_broken_is_refused(text, made):
    with_head(made)
    (made.path / "heads/x/head.json").write_text(text)
    listed = bundle.load(made.path, verify=False).manifest.files
    damaged(made.path, files=dict(listed) | {"heads/x/head.json": staging.digest(made.path / "heads/x/head.json")})
    with pytest.raises(MvmrError, match="head"):
        bundle.load(made.path).head("x")


def with_files(made, **contents):
    """A bundle with a head whose files hold something else, listed with their hashes."""
    with_head(made)
    names = {"weights": "heads/x/head.safetensors", "description": "heads/x/head.json"}
    return bundle.add_files(made, {names[key]: content for key, content in contents.items()})


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"weight": np.ones((2, WIDTH), np.int64), "bias": np.zeros(2)}, "no floating-point 'weight' but int64"),
        ({"weight": np.ones((2, WIDTH))}, "no floating-point 'bias' but weight"),
        ({"weight": np.full((2, WIDTH), 1e300), "bias": np.zeros(2)}, "values that are not finite"),
        ({"weight": np.ones((2, WIDTH, 1)), "bias": np.zeros(2)}, "do not fit one another"),
        ({"weight": np.ones((2, WIDTH + 1)), "bias": np.zeros(2)}, f"takes {WIDTH + 1} features"),
    ],
)
def test_head_of_other_arrays_is_refused(arrays, told, made):
    with pytest.raises(MvmrError, match=told):
        with_files(made, weights=save(arrays)).head("x")


@pytest.mark.parametrize(
    "content",
    [
        (2**62).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b"{" * 100,
        (58).to_bytes(8, "little") + b'{"weight":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}' + b"\0" * 2,
        (57).to_bytes(8, "little") + b'{"weight":{"dtype":"F8_E4M3","shape":[99999999999],"data_offsets":[0,2]}}',
    ],
)
def test_head_whose_weights_have_a_header_that_lies_is_refused(content, made):
    with pytest.raises(MvmrError, match=r"heads/x/head\.safetensors is not a whole safetensors file") as caught:
        with_files(made, weights=content).head("x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": "y"}, "head x of bundle .* calls itself y"),
        ({"classes": "ab"}, "its classes are no list of names"),
        ({"classes": [["a"], "b"]}, "its classes are no list of names"),
        ({"metrics": 3}, "does not describe a head"),
        ({"metrics": [[1]]}, "does not describe a head"),
    ],
)
def test_head_whose_description_lies_is_refused(changes, told, made):
    with_head(made)
    said = json.loads((made.path / "heads/x/head.json").read_text()) | changes
    with pytest.raises(MvmrError, match=told):
        with_files(made, description=json.dumps(said).encode()).head("x")


def test_files_can_be_added_from_bytes_and_from_disk(made, tmp_path):
    (tmp_path / "model").write_bytes(b"graph")
    now = bundle.add_files(made, {"onnx/encoder.onnx": tmp_path / "model", "onnx/report.json": b"{}"})
    assert now.file("onnx/encoder.onnx").read_bytes() == b"graph"
    assert bundle.load(made.path) == now
    assert not (made.path / ".staged").exists()


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a//b", "", "./x", "bundle.json", "README.md", ".staged/x", "encoder.safetensors", "a\\b"]
)
def test_files_cannot_be_added_elsewhere(name, made):
    with pytest.raises(MvmrError, match="cannot be put into a bundle"):
        bundle.add_files(made, {name: b""})


def test_an_unlisted_file_is_refused_with_the_nearest(made):
    with pytest.raises(MvmrError, match=r"did you mean 'encoder\.safetensors'"):
        made.file("encoder.safetensor")
