"""A Triton model repository is valid by Triton's own schema, and a new version is there whole or not at all.

Run as a script it exports again and again, killed before its first, second, ... file operation: see the last test.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc import model_config_pb2

from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.export import triton
from mvmr.export.onnx.session import Session

SIDE, DIM = 4, 6
SPACE = "5" * 32
HEADS = {"flowers": ["daisy", "rose"], "x": ["ä", 'b"', "c"]}
PREPROCESSING = Preprocess.for_size(SIDE)


def student(offset: float = 0.0) -> bytes:
    """An ONNX file with the contract's inputs and outputs: every value is the mean of the image plus `offset`."""
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        helper.make_node("Unsqueeze", ["means", "last"], ["column"]),
        helper.make_node("Add", ["column", "offset"], ["embedding"]),
    ]
    constants = [helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3])]
    constants += [helper.make_tensor("last", TensorProto.INT64, [1], [1])]
    constants += [helper.make_tensor("offset", TensorProto.FLOAT, [DIM], [offset] * DIM)]
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", DIM])]
    for name, classes in HEADS.items():
        constants += [
            helper.make_tensor(f"w_{name}", TensorProto.FLOAT, [DIM, len(classes)], [1.0] * DIM * len(classes))
        ]
        nodes += [helper.make_node("MatMul", ["embedding", f"w_{name}"], [f"logits_{name}"])]
        outputs += [helper.make_tensor_value_info(f"logits_{name}", TensorProto.FLOAT, ["batch", len(classes)])]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])
    graph = helper.make_graph(nodes, "student", [image], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {"heads": json.dumps(HEADS), "preprocessing": json.dumps(PREPROCESSING.to_dict())})
    return model.SerializeToString()


def export(out: Path, model: bytes | Path, *, overwrite: bool = False, **options: Any) -> Path:
    facts: dict[str, Any] = {
        "name": "mine", "platform": "onnxruntime", "dim": DIM, "heads": HEADS, "space_id": SPACE,
        "preprocessing": PREPROCESSING, "precision": "fp32", "dense": (),
    }  # fmt: skip
    facts |= {key: options.pop(key) for key in facts.keys() & options.keys()}
    serving = triton.Serving(**({"gpu": False} | options))
    return triton.add_model(model, out, triton.ExportedStudent(**facts), serving, overwrite=overwrite)


def config(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def served_model(folder: Path) -> bytes:
    """The model that Triton would load: the version that the config names."""
    (version,) = config(folder).version_policy.specific.versions
    (file,) = (folder / str(version)).iterdir()
    return file.read_bytes()


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(MvmrError) as excinfo:
        export(*arguments, **options)
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


def test_the_config_says_what_the_model_is(tmp_path):
    folder = export(tmp_path, student(), max_batch=16, instances=2, preferred=(4, 8), queue_delay_us=100)
    assert folder == tmp_path / "mine"
    model = config(folder)
    assert (model.name, model.platform, model.max_batch_size) == ("mine", "onnxruntime_onnx", 16)
    (image,) = model.input
    assert (image.name, image.data_type, list(image.dims)) == ("image", model_config_pb2.TYPE_UINT8, [SIDE, SIDE, 3])
    outputs = {output.name: (output.data_type, list(output.dims)) for output in model.output}
    float32 = model_config_pb2.TYPE_FP32
    assert outputs == {"embedding": (float32, [DIM]), "logits_flowers": (float32, [2]), "logits_x": (float32, [3])}
    assert list(model.dynamic_batching.preferred_batch_size) == [4, 8]
    assert model.dynamic_batching.max_queue_delay_microseconds == 100
    (group,) = model.instance_group
    assert (group.count, group.kind) == (2, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    assert list(model.version_policy.specific.versions) == [1]
    parameters = {key: value.string_value for key, value in model.parameters.items()}
    assert Preprocess.from_dict(json.loads(parameters["preprocessing"])) == PREPROCESSING
    assert json.loads(parameters["heads"]) == HEADS
    assert (parameters["bundle_space_id"], parameters["precision"]) == (SPACE, "fp32")


def test_the_map_of_features_is_an_output_of_the_config(tmp_path):
    outputs = {
        output.name: list(output.dims) for output in config(export(tmp_path, student(), dense=(2, 3, DIM))).output
    }
    assert outputs == {"embedding": [DIM], "logits_flowers": [2], "logits_x": [3], "dense": [2, 3, DIM]}


def test_batching_is_on_without_being_asked_for(tmp_path):
    assert config(export(tmp_path, student())).HasField("dynamic_batching")


@pytest.mark.parametrize(("max_batch", "warmed"), [(64, [1, 64]), (1, [1])])
def test_warm_up_runs_the_smallest_and_the_largest_batch(max_batch, warmed, tmp_path):
    model = config(export(tmp_path, student(), max_batch=max_batch))
    assert [sample.batch_size for sample in model.model_warmup] == warmed
    for sample in model.model_warmup:
        zeros = sample.inputs["image"]
        assert (zeros.zero_data, list(zeros.dims), zeros.data_type) == (
            True,
            [SIDE] * 2 + [3],
            model.input[0].data_type,
        )


def test_the_model_in_the_repository_does_what_its_config_says(tmp_path):
    (tmp_path / "encoder.onnx").write_bytes(student())
    folder = export(tmp_path / "out", tmp_path / "encoder.onnx")
    model, session = config(folder), Session(folder / "1" / "model.onnx", threads=1)
    images = np.random.default_rng(0).integers(0, 256, (model.max_batch_size, SIDE, SIDE, 3), np.uint8)
    results = session(images)
    assert {name: array.shape[1:] for name, array in results.items()} == {
        output.name: tuple(output.dims) for output in model.output
    }
    np.testing.assert_allclose(results["embedding"][:, 0], images.mean(axis=(1, 2, 3)), rtol=1e-5)


def test_an_engine_is_served_on_the_gpu(tmp_path):
    folder = export(tmp_path, b"plan", platform="tensorrt", precision="fp16", gpu=True)
    assert (folder / "1" / "model.plan").read_bytes() == b"plan"
    assert config(folder).platform == "tensorrt_plan"
    assert config(folder).instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU


def test_a_second_export_is_served_and_the_first_stays(tmp_path):
    export(tmp_path, b"first")
    (tmp_path / "mine" / ".2.partial").mkdir()  # left by a death
    folder = export(tmp_path, b"second", max_batch=8)
    assert served_model(folder) == b"second"
    assert config(folder).max_batch_size == 8
    assert (folder / "1" / "model.onnx").read_bytes() == b"first"
    assert sorted(os.listdir(folder)) == ["1", "2", "config.pbtxt"]


def test_versions_are_counted_as_numbers(tmp_path):
    folder = export(tmp_path, b"first")
    (folder / "9").mkdir()
    (folder / "10").mkdir()
    (folder / "notes").mkdir()
    export(tmp_path, b"new")
    assert list(config(folder).version_policy.specific.versions) == [11]


def test_another_embedding_space_is_refused_unless_overwritten(tmp_path):
    folder = export(tmp_path, b"first")
    message = refusal(tmp_path, b"second", space_id="6" * 32)
    assert f"serves another embedding space ({SPACE}, not {'6' * 32})" in message
    assert served_model(folder) == b"first"
    export(tmp_path, b"second", space_id="6" * 32, overwrite=True)
    assert served_model(folder) == b"second"
    assert config(folder).parameters["bundle_space_id"].string_value == "6" * 32


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: 'theirs'\n", "is not one of mvmr's"),
        ("not a config", "cannot be read as a Triton config"),
        ("\udcff", "cannot"),
    ],
)
def test_a_model_of_somebody_else_stays_untouched(text, reason, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.pbtxt").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert reason in refusal(tmp_path, b"model")
    assert os.listdir(tmp_path / "mine") == ["config.pbtxt"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "../x"}, "cannot be named '../x'"),
        ({"name": ""}, "cannot be named ''"),
        ({"platform": "tensorrt"}, "runs on a GPU only"),
        ({"max_batch": 0}, "max_batch = 0"),
        ({"instances": 0}, "instances = 0"),
        ({"queue_delay_us": -1}, "queue_delay_us = -1"),
        ({"preferred": (8, 65)}, "preferred batch 65 is outside 1 to max_batch = 64"),
    ],
)
def test_what_triton_would_refuse_is_refused_here(options, text, tmp_path):
    assert text in refusal(tmp_path / "out", b"model", **options)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_its_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tritonclient.grpc.model_config_pb2", None)
    message = refusal(tmp_path, b"model")
    assert "tritonclient" in message
    assert "pip install 'mvmr[export]'" in message


def test_a_place_that_cannot_hold_a_repository(tmp_path):
    (tmp_path / "mine").write_text("a file")
    assert "cannot write the Triton model" in refusal(tmp_path, b"model")
    assert (tmp_path / "mine").read_text() == "a file"


def test_a_model_file_that_is_gone(tmp_path):
    export(tmp_path, b"first")
    assert "No such file" in refusal(tmp_path, tmp_path / "none.onnx")
    assert sorted(os.listdir(tmp_path / "mine")) == ["1", "config.pbtxt"]


@pytest.mark.parametrize("step", range(2))
def test_a_full_disk_leaves_the_old_version(step, tmp_path, monkeypatch):
    folder = export(tmp_path, b"first")
    calls, replace = [], os.replace

    def fail(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == step + 1:
            raise OSError(28, "No space left on device", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    assert "disk full" in refusal(tmp_path, b"second")
    assert served_model(folder) == b"first"
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


@pytest.mark.slow
def test_killed_at_any_step_the_old_or_the_new_version_is_served(tmp_path):
    """This file as a script ends a child process (as kill -9 would) before each of its file operations in turn."""
    answer = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], check=True, capture_output=True, text=True, timeout=120
    )
    outcomes = json.loads(answer.stdout)
    after_kill = [outcome["after_kill"] for outcome in outcomes]
    assert len(outcomes) > 5
    assert set(after_kill) == {"old", "new"}
    assert after_kill == sorted(after_kill, reverse=True), "once new, it must stay new"
    assert {outcome["after_retry"] for outcome in outcomes} == {"new"}
    assert not any(outcome["left_over"] for outcome in outcomes)


_WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


def die_before(count: int) -> None:
    seen = 0

    def hook(event: str, _: object) -> None:
        nonlocal seen
        if event in _WATCHED:
            seen += 1
            if seen > count:
                os._exit(9)

    sys.addaudithook(hook)


def kill_again_and_again(root: Path) -> None:
    os.fsync = lambda descriptor: None  # a death of the process alone loses nothing that was written
    template = root / "template"
    served_model(export(template, b"old"))
    outcomes, alive = [], False
    while not alive:
        work = root / str(len(outcomes))
        shutil.copytree(template, work)
        child = os.fork()
        if child == 0:
            die_before(len(outcomes))
            export(work, b"new")
            os._exit(0)
        alive = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        after_kill = served_model(work / "mine").decode()
        export(work, b"new")
        left_over = [name for name in os.listdir(work / "mine") if name.startswith(".")]
        after_retry = served_model(work / "mine").decode()
        outcomes.append({"after_kill": after_kill, "after_retry": after_retry, "left_over": left_over})
    print(json.dumps(outcomes))  # noqa: T201


if __name__ == "__main__":
    kill_again_and_again(Path(sys.argv[1]))
