"""A bundle is whole or not there, says what is wrong with it, and is read without torch."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from mvmr.bundles import bundle, manifest
from mvmr.bundles.manifest import Manifest
from mvmr.bundles.model_card import model_card
from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.storage import staging

WIDTH, CLASSES = 8, ("coins", "moon")
KILLS = Path(__file__).with_name("kills.py")


def record(value: float = 50.0, command: str = "mvmr probe b", **more: object) -> dict[str, object]:
    return {"command": command, "data": "sample:digits", "protocol": "linear", "values": {"top1": value}, **more}


def finished(folder: Path, *, content: bytes = b"weights", created: str = "2026-01-01T00:00:00+00:00") -> Path:
    """A bundle whose weights nobody looks into: reading must not need torch."""
    folder.mkdir(parents=True)
    (folder / "encoder.safetensors").write_bytes(content)
    (folder / "README.md").write_text("card")
    said = Manifest(
        schema=manifest.SCHEMA,
        mvmr_version="0.1.0",
        created=created,
        backbone="resnet18",
        options={"small_kernel": True},
        embedding_dim=WIDTH,
        preprocessing=Preprocess.for_size(32),
        training={"method": "distillation", "teachers": {"clip": {"name": "ViT-B-16", "identity": "ab"}}, "seed": 0},
        metrics=(),
        files={name: staging.digest(folder / name) or "" for name in ("encoder.safetensors", "README.md")},
    )
    (folder / "bundle.json").write_text(json.dumps(said.to_json()))
    return folder


@pytest.fixture
def made(tmp_path: Path) -> bundle.Bundle:
    return bundle.load(finished(tmp_path / "b"))


def with_head(target: bundle.Bundle, value: float = 1.0, name: str = "x") -> bundle.Bundle:
    return bundle.add_head(target, name, np.full((2, WIDTH), value), np.zeros(2), CLASSES, record(value))


def damaged(folder: Path, **changes: object) -> Path:
    content = json.loads((folder / "bundle.json").read_text()) | changes
    (folder / "bundle.json").write_text(json.dumps({key: value for key, value in content.items() if value != "GONE"}))
    return folder


def refusal(path: Path) -> str:
    with pytest.raises(MvmrError) as caught:
        bundle.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_manifest_survives_a_round_trip(made):
    again = bundle.load(made.path)
    assert again == made
    assert again.manifest.preprocessing == Preprocess.for_size(32)
    assert again.heads == ()


def test_reading_extending_and_describing_need_no_torch(made):
    code = f"""
import sys
import numpy
from mvmr.bundles import bundle
found = bundle.load({str(made.path)!r})
found = bundle.add_head(found, "x", numpy.ones((2, {WIDTH})), numpy.zeros(2), {CLASSES}, {record()})
found = bundle.add_metrics(found, {record(protocol="knn")})
found = bundle.load({str(made.path)!r})
assert found.head("x").weight.shape == (2, {WIDTH})
print(found.heads, found.space_id, bundle.newest({str(made.path.parent)!r}))
assert not {{"torch", "torchvision", "open_clip", "sklearn"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_space_id_follows_weights_and_preprocessing_only(made, tmp_path):
    assert with_head(made).space_id == made.space_id == bundle.load(finished(tmp_path / "same")).space_id
    assert bundle.load(finished(tmp_path / "other", content=b"other")).space_id != made.space_id
    resized = replace(made.manifest, preprocessing=Preprocess.for_size(64))
    assert replace(made, manifest=resized).space_id != made.space_id


# What is refused


def test_no_folder(tmp_path):
    assert "there is no such folder" in refusal(tmp_path / "none")


def test_a_file(tmp_path):
    (tmp_path / "f").write_text("x")
    assert "is a file, not a bundle" in refusal(tmp_path / "f")


def test_a_folder_of_something_else(tmp_path):
    assert "holds no bundle.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["b", "b.partial"])
def test_a_run_that_has_not_finished(name, tmp_path):
    (tmp_path / "b.partial").mkdir()
    assert "has not finished" in refusal(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"schema": NaN}',
        '{"schema": 1e999}',
        "[" * 100_000,
        '{"a":' * 99 + "1" + "}" * 99,
        "\udce9",
        "9" * 5000,
    ],
)
def test_broken_json(text, made):
    (made.path / "bundle.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "bundle.json is not valid JSON" in refusal(made.path)


@pytest.mark.parametrize("text", ["[]", "{}", '"x"', "3"])
def test_json_of_something_else(text, made):
    (made.path / "bundle.json").write_text(text)
    assert "not a bundle's manifest: it has no schema version" in refusal(made.path)


def test_newer_schema_says_who_wrote_it(made):
    damaged(made.path, schema=manifest.SCHEMA + 1, mvmr_version="9.1", shape="unheard of")
    message = refusal(made.path)
    assert f"has schema {manifest.SCHEMA + 1}, this mvmr reads up to {manifest.SCHEMA}" in message
    assert "mvmr 9.1" in message


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"schema": "1"}, "schema = '1'"),
        ({"schema": True}, "schema = True"),
        ({"schema": 0}, "schema = 0"),
        ({"backbone": "GONE", "files": "GONE"}, "lacks backbone, files"),
        ({"embedding_dims": 3}, "unknown key 'embedding_dims'; did you mean 'embedding_dim'"),
        ({"embedding_dim": "512"}, "embedding_dim = '512'; it must be of type int"),
        ({"embedding_dim": 0}, "embedding_dim = 0"),
        ({"embedding_dim": 2**40}, "must lie between 1 and 1048576"),
        ({"embedding_dim": 10**100}, "is not valid JSON (the number 1000"),
        ({"preprocessing": Preprocess.for_size(8).to_dict() | {"resize": 100_000}}, "must be at most 8192 pixels"),
        ({"preprocessing": Preprocess.for_size(8).to_dict() | {"mean": [0, 0, 10**400]}}, "is not valid JSON"),
        ({"backbone": "\ud800"}, "is not valid JSON"),
        ({"x" * 5000: 1}, "unknown key 'xxxx"),
        ({"embedding_dim": True}, "embedding_dim = 'True'"),
        ({"options": 1}, "options = '1'"),
        ({"preprocessing": {}}, "preprocessing lacks resize"),
        ({"preprocessing": {**Preprocess.for_size(8).to_dict(), "std": [0, 0, 0]}}, "std > 0"),
        ({"metrics": [3]}, "each record must be an object"),
        ({"metrics": [{"command": "c"}]}, "data = None"),
        ({"files": {"../../etc/passwd": "0" * 64}}, "'../../etc/passwd', which is not a plain path"),
        ({"files": {"/etc/passwd": "0" * 64}}, "not a plain path"),
        ({"files": {"a\nb": "0" * 64}}, r"'a\nb', which is not a plain path"),
        ({"files": {"encoder.safetensors": "abc"}}, "encoder.safetensors with sha256 'abc'"),
        ({"files": {"encoder.safetensors": 5}}, "64 hex digits"),
    ],
)
def test_a_manifest_that_lies(changes, text, made):
    assert text in refusal(damaged(made.path, **changes))


def test_a_changed_file_is_named(made):
    with_head(made)
    (made.path / "heads/x/head.json").write_text("{}")
    message = refusal(made.path)
    assert "heads/x/head.json has changed" in message
    assert "encoder" not in message
    assert bundle.load(made.path, verify=False).heads == ("x",)


def test_missing_files_are_named(made):
    with_head(made)
    (made.path / "heads/x/head.safetensors").unlink()
    (made.path / "encoder.safetensors").unlink()
    message = refusal(made.path)
    assert "encoder.safetensors is missing" in message
    assert "heads/x/head.safetensors is missing" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(made):
    (made.path / "encoder.safetensors").chmod(0)
    assert "cannot read" in refusal(made.path)


def test_a_damaged_encoder_is_never_used(made):
    (made.path / "encoder.safetensors").write_bytes(b"weightz")
    with pytest.raises(MvmrError, match=r"encoder\.safetensors has changed"):
        bundle.load(made.path, verify=False).student()


def test_a_bundle_without_weights_says_so(made):
    damaged(made.path, files={})
    with pytest.raises(MvmrError, match=r"lists no encoder\.safetensors"):
        _ = bundle.load(made.path).space_id


def test_the_card_may_be_edited_and_then_stays(made):
    (made.path / "README.md").write_text("mine")
    with_head(bundle.load(made.path))
    assert (made.path / "README.md").read_text() == "mine"
    (made.path / "README.md").unlink()
    with_head(bundle.load(made.path), 2.0)
    assert not (made.path / "README.md").exists()


def test_a_card_survives_whatever_names_hold(made):
    training = {"teachers": {"t": {"name": "a|b\nc"}}, "note": "x | y\n# z", "init": None}
    card = model_card(replace(made.manifest, training=training), name='q"\udce9', space_id="0" * 32)
    assert "distilled from a\\|b c, without labels" in card
    assert "| note | x \\| y # z |" in card
    assert "licence" in card
    assert 'mvmr.load("q?")' in card


# Finding the newest


def test_newest_is_by_creation_whatever_was_touched_since(tmp_path):
    old = bundle.load(finished(tmp_path / "runs/z/old", created="2026-01-01T00:00:00+00:00"))
    new = finished(tmp_path / "runs/a", created="2026-02-01T00:00:00+00:00")
    finished(tmp_path / "runs/next.partial", created="2026-03-01T00:00:00+00:00")
    finished(tmp_path / "runs/.a.replaced", created="2026-03-01T00:00:00+00:00")
    (finished(tmp_path / "runs/broken") / "bundle.json").write_text("{")
    with_head(old)
    assert bundle.newest(tmp_path / "runs") == new


@pytest.mark.parametrize("root", [".", "none"])
def test_newest_of_none_says_how_to_make_one(root, tmp_path):
    with pytest.raises(MvmrError, match="mvmr distill"):
        bundle.newest(tmp_path / root)


# Heads and metrics


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


@pytest.mark.parametrize("place", ["encoder.safetensors", "bundle.json"])
def test_a_pipe_in_a_bundle_is_not_waited_for(place, made):
    (made.path / place).unlink()
    os.mkfifo(made.path / place)
    refusal(made.path)


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


# Writers and readers beside one another


def test_writers_beside_one_another_lose_nothing(made):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: with_head(made, i, name=f"h{i}"), range(8)))
    now = bundle.load(made.path)
    assert now.heads == tuple(f"h{i}" for i in range(8))
    assert [now.head(f"h{i}").weight[0, 0] for i in range(8)] == list(range(8))


def test_a_reader_beside_a_writer_sees_whole_bundles(made):
    stop, failures = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                bundle.load(made.path)
            except MvmrError as error:
                failures.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    for value in range(20):
        with_head(made, float(value))
    stop.set()
    reader.join()
    assert not failures


# Publishing


def test_publish_moves_the_folder_into_place(tmp_path):
    partial = finished(tmp_path / "b.partial")
    bundle.publish(partial, tmp_path / "b")
    assert bundle.load(tmp_path / "b").path == tmp_path / "b"
    assert os.listdir(tmp_path) == ["b"]


def test_publish_replaces_an_older_bundle(tmp_path):
    old = bundle.load(finished(tmp_path / "b", content=b"old"))
    with_head(old)
    bundle.publish(finished(tmp_path / "b.partial", content=b"new"), tmp_path / "b")
    assert bundle.load(tmp_path / "b").file("encoder.safetensors").read_bytes() == b"new"
    assert bundle.load(tmp_path / "b").heads == ()
    assert os.listdir(tmp_path) == ["b"]


def test_publish_through_a_link_replaces_what_it_points_to(tmp_path):
    finished(tmp_path / "disk/b", content=b"old")
    (tmp_path / "b").symlink_to(tmp_path / "disk/b")
    bundle.publish(finished(tmp_path / "b.partial", content=b"new"), tmp_path / "b")
    assert (tmp_path / "b").is_symlink()
    assert bundle.load(tmp_path / "b").file("encoder.safetensors").read_bytes() == b"new"


def test_publish_never_replaces_what_is_not_a_bundle(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_bytes(b"x")
    with pytest.raises(MvmrError, match="stays untouched"):
        bundle.publish(finished(tmp_path / "b.partial"), tmp_path / "photos")
    assert (tmp_path / "photos/one.jpg").exists()
    assert bundle.load(tmp_path / "b.partial")


def test_publish_fills_an_empty_folder(tmp_path):
    (tmp_path / "b").mkdir()
    bundle.publish(finished(tmp_path / "b.partial"), tmp_path / "b")
    assert bundle.load(tmp_path / "b")


def test_half_written_is_never_published(tmp_path):
    partial = tmp_path / "b.partial"
    partial.mkdir()
    (partial / "encoder.safetensors").write_bytes(b"half")
    finished(tmp_path / "b", content=b"old")
    with pytest.raises(MvmrError, match="has not finished"):
        bundle.publish(partial, tmp_path / "b")
    assert bundle.load(tmp_path / "b").file("encoder.safetensors").read_bytes() == b"old"


def test_a_failed_rename_puts_the_old_bundle_back(tmp_path, monkeypatch):
    finished(tmp_path / "b", content=b"old")
    partial, rename = finished(tmp_path / "b.partial", content=b"new"), os.rename

    def refuse(source, target):
        if Path(source) == partial:
            raise OSError(18, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(MvmrError, match="cross-device"):
        bundle.publish(partial, tmp_path / "b")
    monkeypatch.undo()
    assert bundle.load(tmp_path / "b").file("encoder.safetensors").read_bytes() == b"old"
    assert bundle.load(partial)


# Death and full disks, at every step


@pytest.mark.parametrize("operation", ["add_head", "replace_head", "publish", "publish_over"])
def test_killed_at_any_step_the_bundle_is_the_old_or_the_new_one(operation, tmp_path):
    """bundle_kills.py ends a child process (as kill -9 would) before each of its file operations in turn."""
    command = [sys.executable, str(KILLS), operation, str(tmp_path)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # no threads: the script forks
    answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=environment)
    outcomes = json.loads(answer.stdout)
    seen = [outcome["after_kill"] for outcome in outcomes]
    expected = {"publish": "nothing", "publish_over": "old", "add_head": "nothing", "replace_head": "old"}[operation]
    assert len(outcomes) > 3
    assert set(seen) == {expected, "new"}, outcomes
    assert seen == sorted(seen, key=lambda state: state == "new"), "once new, it must stay new"
    assert all(outcome["after_retry"] == "new" and not outcome["left_over"] for outcome in outcomes), outcomes


@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize("step", range(12))
def test_a_full_disk_at_any_step_leaves_a_whole_bundle(step, replacing, made, monkeypatch):
    if replacing:
        with_head(made, 1.0)
    before, calls, replace_file = bundle.load(made.path), [], os.replace

    def fail(source, target):
        calls.append(target)
        if len(calls) == step + 1:
            raise OSError(28, "No space left on device", str(source))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", fail)
    try:
        with_head(made, 2.0)
        failed = False
    except MvmrError:
        failed = True
    monkeypatch.undo()
    assert failed == (step < len(calls))
    now = bundle.load(made.path)
    if now != before:
        assert now.head("x").weight[0, 0] == 2.0
    after = with_head(made, 3.0)
    assert after.head("x").weight[0, 0] == 3.0
    assert sorted(os.listdir(made.path)) == ["README.md", "bundle.json", "encoder.safetensors", "heads"]
