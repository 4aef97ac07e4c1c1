"""Heads, metrics and files come back from a bundle as they were put into it, and what does not fit is refused."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save

from mvmr.bundles import bundle
from mvmr.errors import MvmrError
from mvmr.storage import staging
from tests.bundles.written import CLASSES, WIDTH, damage, record, with_head


def test_head_comes_back_as_it_was_stored(sample):
    weight, bias = np.random.default_rng(0).normal(size=(2, WIDTH)), np.array([0.5, -1.0])
    again = bundle.load(bundle.add_head(sample, "cats-2", weight, bias, CLASSES, record(91.5)).path)
    head = again.head("cats-2")
    assert again.heads == ("cats-2",)
    assert head.classes == CLASSES
    assert head.metrics == record(91.5) | {"head": "cats-2"} == again.manifest.metrics[0]
    np.testing.assert_array_equal(head.weight, weight.astype(np.float32))
    np.testing.assert_array_equal(head.bias, bias.astype(np.float32))
    card = (again.path / "README.md").read_text()
    assert "linear, head cats-2 | top1 91.5 | `mvmr probe b`" in card
    assert "distilled from ViT-B-16" in card


def test_head_of_the_same_name_is_replaced_with_its_figures(sample):
    with_head(sample, 1.0)
    bundle.add_metrics(sample, record(33.0, command="mvmr evaluate b", head="x"))
    bundle.add_metrics(sample, record(44.0, command="mvmr evaluate b"))
    now = with_head(sample, 2.0)
    assert now.head("x").weight[0, 0] == 2.0
    assert [entry["values"]["top1"] for entry in now.manifest.metrics] == [44.0, 2.0]
    assert bundle.load(sample.path) == now


def test_metrics_of_the_same_command_are_replaced(sample):
    bundle.add_metrics(sample, record(1.0))
    now = bundle.add_metrics(sample, record(2.0))
    assert [entry["values"]["top1"] for entry in now.manifest.metrics] == [2.0]


def test_metrics_may_be_numpy_numbers_and_any_bytes_in_names(sample):
    values = {"top1": np.float32(0.5), "images": np.int64(3)}
    now = bundle.add_metrics(sample, {"command": "c", "data": "caf\udce9/", "protocol": "knn", "values": values})
    assert bundle.load(sample.path) == now
    assert now.manifest.metrics[0]["values"] == {"top1": 0.5, "images": 3}
    assert now.manifest.metrics[0]["data"] == "caf?/"


def test_a_source_that_is_not_there_changes_nothing(sample, tmp_path):
    with pytest.raises(MvmrError, match=r"No such file .*none.*still whole") as caught:
        bundle.add_files(sample, {"onnx/a": b"a", "onnx/b": tmp_path / "none"})
    assert "\n" not in str(caught.value)
    assert bundle.load(sample.path) == sample
    assert sorted(os.listdir(sample.path)) == ["README.md", "bundle.json", "encoder.safetensors"]


def test_a_bundle_that_is_gone_is_one_line(sample, tmp_path):
    sample.path.rename(tmp_path / "elsewhere")
    with pytest.raises(MvmrError, match="cannot change bundle"):
        with_head(sample)


def test_unknown_head_names_the_nearest(sample):
    with pytest.raises(MvmrError, match="unknown head 'flower'; did you mean 'flowers'"):
        with_head(sample, name="flowers").head("flower")


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "-x", "x" * 65, "a b", "x\n", "é"])
def test_head_names_cannot_leave_the_folder(name, sample):
    with pytest.raises(MvmrError, match="is not allowed"):
        with_head(sample, name=name)
    assert bundle.load(sample.path) == sample


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
def test_head_that_does_not_fit_is_refused(weight, bias, classes, text, sample):
    with pytest.raises(MvmrError, match=text):
        bundle.add_head(sample, "x", weight, bias, classes, record())
    assert bundle.load(sample.path) == sample


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
def test_bad_record_is_refused(bad, text, sample):
    with pytest.raises(MvmrError, match=text):
        bundle.add_metrics(sample, record() | bad)
    assert bundle.load(sample.path) == sample


@pytest.mark.parametrize("content", [b"", b"hello"])
def test_head_whose_weights_are_broken_is_named(content, sample):
    with_head(sample)
    weights = sample.path / "heads/x/head.safetensors"
    weights.write_bytes(content)
    listed = bundle.load(sample.path, verify=False).manifest.files
    damage(sample.path, files=dict(listed) | {"heads/x/head.safetensors": staging.digest(weights)})
    with pytest.raises(MvmrError, match=r"head\.safetensors is not a whole safetensors file"):
        bundle.load(sample.path).head("x")


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "x"}', '{"name": "x", "classes": ["a"], "metrics": {}}'])
def test_head_whose_description_is_broken_is_refused(text, sample):
    with_head(sample)
    (sample.path / "heads/x/head.json").write_text(text)
    listed = bundle.load(sample.path, verify=False).manifest.files
    damage(sample.path, files=dict(listed) | {"heads/x/head.json": staging.digest(sample.path / "heads/x/head.json")})
    with pytest.raises(MvmrError, match="head"):
        bundle.load(sample.path).head("x")


def with_files(sample, **contents):
    """A bundle with a head whose files hold something else, listed with their hashes."""
    with_head(sample)
    names = {"weights": "heads/x/head.safetensors", "description": "heads/x/head.json"}
    return bundle.add_files(sample, {names[key]: content for key, content in contents.items()})


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"weight": np.ones((2, WIDTH), np.int64), "bias": np.zeros(2)}, "no floating-point 'weight' but int64"),
        ({"weight": np.ones((2, WIDTH))}, "no floating-point 'bias' but weight"),
        ({"weight": np.full((2, WIDTH), 1e300), "bias": np.zeros(2)}, "values that are not finite"),
        ({"weight": np.ones((2, WIDTH, 1)), "bias": np.zeros(2)}, "do not fit one another"),
        ({"weight": np.ones((2, WIDTH + 1)), "bias": np.zeros(2)}, f"takes {WIDTH + 1} features"),
    ],
)
def test_head_of_other_arrays_is_refused(arrays, message, sample):
    with pytest.raises(MvmrError, match=message):
        with_files(sample, weights=save(arrays)).head("x")


@pytest.mark.parametrize(
    "content",
    [
        (2**62).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b"{" * 100,
        (58).to_bytes(8, "little") + b'{"weight":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}' + b"\0" * 2,
        (57).to_bytes(8, "little") + b'{"weight":{"dtype":"F8_E4M3","shape":[99999999999],"data_offsets":[0,2]}}',
    ],
)
def test_head_whose_weights_have_a_header_that_lies_is_refused(content, sample):
    with pytest.raises(MvmrError, match=r"heads/x/head\.safetensors is not a whole safetensors file") as caught:
        with_files(sample, weights=content).head("x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "y"}, "head x of bundle .* calls itself y"),
        ({"classes": "ab"}, "its classes are no list of names"),
        ({"classes": [["a"], "b"]}, "its classes are no list of names"),
        ({"metrics": 3}, "does not describe a head"),
        ({"metrics": [[1]]}, "does not describe a head"),
    ],
)
def test_head_whose_description_lies_is_refused(changes, message, sample):
    with_head(sample)
    description = json.loads((sample.path / "heads/x/head.json").read_text()) | changes
    with pytest.raises(MvmrError, match=message):
        with_files(sample, description=json.dumps(description).encode()).head("x")


def test_files_can_be_added_from_bytes_and_from_disk(sample, tmp_path):
    (tmp_path / "model").write_bytes(b"graph")
    now = bundle.add_files(sample, {"onnx/encoder.onnx": tmp_path / "model", "onnx/report.json": b"{}"})
    assert now.file("onnx/encoder.onnx").read_bytes() == b"graph"
    assert bundle.load(sample.path) == now
    assert not (sample.path / ".staged").exists()


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a//b", "", "./x", "bundle.json", "README.md", ".staged/x", "encoder.safetensors", "a\\b"]
)
def test_files_cannot_be_added_elsewhere(name, sample):
    with pytest.raises(MvmrError, match="cannot be put into a bundle"):
        bundle.add_files(sample, {name: b""})


def test_an_unlisted_file_is_refused_with_the_nearest(sample):
    with pytest.raises(MvmrError, match=r"did you mean 'encoder\.safetensors'"):
        sample.file("encoder.safetensor")
