"""A bundle says what is wrong with it, is read without torch, and the newest is found."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mvmr.bundles import bundle, manifest
from mvmr.bundles.model_card import model_card
from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from tests.bundles.written import CLASSES, WIDTH, damage, record, with_head, write_stub


def refusal(path: Path) -> str:
    with pytest.raises(MvmrError) as caught:
        bundle.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_manifest_survives_a_round_trip(sample):
    again = bundle.load(sample.path)
    assert again == sample
    assert again.manifest.preprocessing == Preprocess.for_size(32)
    assert again.heads == ()


def test_reading_extending_and_describing_need_no_torch(sample):
    code = f"""
import sys
import numpy
from mvmr.bundles import bundle
found = bundle.load({str(sample.path)!r})
found = bundle.add_head(found, "x", numpy.ones((2, {WIDTH})), numpy.zeros(2), {CLASSES}, {record()})
found = bundle.add_metrics(found, {record(protocol="knn")})
found = bundle.load({str(sample.path)!r})
assert found.head("x").weight.shape == (2, {WIDTH})
print(found.heads, found.space_id, bundle.newest({str(sample.path.parent)!r}))
assert not {{"torch", "torchvision", "open_clip", "sklearn"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_space_id_follows_weights_and_preprocessing_only(sample, tmp_path):
    assert with_head(sample).space_id == sample.space_id == bundle.load(write_stub(tmp_path / "same")).space_id
    assert bundle.load(write_stub(tmp_path / "other", content=b"other")).space_id != sample.space_id
    resized = replace(sample.manifest, preprocessing=Preprocess.for_size(64))
    assert replace(sample, manifest=resized).space_id != sample.space_id


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
def test_broken_json(text, sample):
    (sample.path / "bundle.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "bundle.json is not valid JSON" in refusal(sample.path)


@pytest.mark.parametrize("text", ["[]", "{}", '"x"', "3"])
def test_json_of_something_else(text, sample):
    (sample.path / "bundle.json").write_text(text)
    assert "not a bundle's manifest: it has no schema version" in refusal(sample.path)


def test_newer_schema_says_who_wrote_it(sample):
    damage(sample.path, schema=manifest.SCHEMA + 1, mvmr_version="9.1", shape="unheard of")
    message = refusal(sample.path)
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
def test_a_manifest_that_lies(changes, text, sample):
    assert text in refusal(damage(sample.path, **changes))


def test_a_changed_file_is_named(sample):
    with_head(sample)
    (sample.path / "heads/x/head.json").write_text("{}")
    message = refusal(sample.path)
    assert "heads/x/head.json has changed" in message
    assert "encoder" not in message
    assert bundle.load(sample.path, verify=False).heads == ("x",)


def test_missing_files_are_named(sample):
    with_head(sample)
    (sample.path / "heads/x/head.safetensors").unlink()
    (sample.path / "encoder.safetensors").unlink()
    message = refusal(sample.path)
    assert "encoder.safetensors is missing" in message
    assert "heads/x/head.safetensors is missing" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(sample):
    (sample.path / "encoder.safetensors").chmod(0)
    assert "cannot read" in refusal(sample.path)


def test_a_damaged_encoder_is_never_used(sample):
    (sample.path / "encoder.safetensors").write_bytes(b"weightz")
    with pytest.raises(MvmrError, match=r"encoder\.safetensors has changed"):
        bundle.load(sample.path, verify=False).student()


def test_a_bundle_without_weights_says_so(sample):
    damage(sample.path, files={})
    with pytest.raises(MvmrError, match=r"lists no encoder\.safetensors"):
        _ = bundle.load(sample.path).space_id


def test_the_card_may_be_edited_and_then_stays(sample):
    (sample.path / "README.md").write_text("mine")
    with_head(bundle.load(sample.path))
    assert (sample.path / "README.md").read_text() == "mine"
    (sample.path / "README.md").unlink()
    with_head(bundle.load(sample.path), 2.0)
    assert not (sample.path / "README.md").exists()


def test_a_card_survives_whatever_names_hold(sample):
    training = {"teachers": {"t": {"name": "a|b\nc"}}, "note": "x | y\n# z", "init": None}
    card = model_card(replace(sample.manifest, training=training), name='q"\udce9', space_id="0" * 32)
    assert "distilled from a\\|b c, without labels" in card
    assert "| note | x \\| y # z |" in card
    assert "licence" in card
    assert 'mvmr.load("q?")' in card


# Finding the newest


def test_newest_is_by_creation_whatever_was_touched_since(tmp_path):
    old = bundle.load(write_stub(tmp_path / "runs/z/old", created="2026-01-01T00:00:00+00:00"))
    new = write_stub(tmp_path / "runs/a", created="2026-02-01T00:00:00+00:00")
    write_stub(tmp_path / "runs/next.partial", created="2026-03-01T00:00:00+00:00")
    write_stub(tmp_path / "runs/.a.replaced", created="2026-03-01T00:00:00+00:00")
    (write_stub(tmp_path / "runs/broken") / "bundle.json").write_text("{")
    with_head(old)
    assert bundle.newest(tmp_path / "runs") == new


@pytest.mark.parametrize("root", [".", "none"])
def test_newest_of_none_says_how_to_make_one(root, tmp_path):
    with pytest.raises(MvmrError, match="mvmr distill"):
        bundle.newest(tmp_path / root)


# Heads and metrics


@pytest.mark.parametrize("name", ["encoder.safetensors", "bundle.json"])
def test_a_pipe_in_a_bundle_is_not_waited_for(name, sample):
    (sample.path / name).unlink()
    os.mkfifo(sample.path / name)
    refusal(sample.path)


def test_a_student_without_torch_is_one_line(sample, monkeypatch):
    monkeypatch.delitem(sys.modules, "mvmr.models.student", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MvmrError, match=r"needs the package 'torch', not installed here: pip install 'mvmr\[train\]'"):
        sample.student()


def test_a_console_shows_a_line_and_a_notebook_a_table(sample):
    extended = bundle.add_metrics(sample, record(44.0))
    assert repr(extended) == f"Bundle('{sample.path}': {sample.manifest.backbone}, {WIDTH} features)"
    html = extended._repr_html_()
    assert html.startswith("<table>")
    assert "measured" in html
    assert "top1 44" in html
    strange = replace(extended.manifest, training={"method": "<script>alert(1)</script>"})
    assert "<script>" not in replace(extended, manifest=strange)._repr_html_()
