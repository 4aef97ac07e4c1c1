"""An exported file runs on the provider asked for, or says in one line why not; without torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.export.onnx.session import Session

SIZE = 6
CLASSES = ("cat", "dög")
WEIGHT = np.array([[1, -1], [0.5, 2], [-2, 0.25]], np.float32)
METADATA = {
    "preprocessing": json.dumps(Preprocess.for_size(SIZE).to_dict()),
    "heads": json.dumps({"pets": CLASSES}),
    "bundle_space_id": "ab" * 16,
}
FLOAT, BYTES = TensorProto.FLOAT, TensorProto.UINT8


def a_model(
    *,
    image: tuple[str, int, list[Any]] = ("image", BYTES, ["batch", SIZE, SIZE, 3]),
    embedding: str = "embedding",
    metadata: dict[str, str] = METADATA,
    opset: int = 20,
) -> bytes:
    """The mean colour of an image, and a linear head on it: all that the contract asks for."""
    name, kind, shape = image
    nodes = [
        helper.make_node("Cast", [name], ["pixels"], to=FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], [embedding], keepdims=0),
        helper.make_node("MatMul", [embedding, "weight"], ["logits_pets"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape)],
        [
            helper.make_tensor_value_info(embedding, FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("logits_pets", FLOAT, ["batch", 2]),
        ],
        [numpy_helper.from_array(np.array([1, 2]), "axes"), numpy_helper.from_array(WEIGHT, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    helper.set_model_props(model, metadata)
    return model.SerializeToString()


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def refusal(model: Path | bytes, **options: Any) -> str:
    with pytest.raises(MvmrError) as excinfo:
        Session(model, **options)
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


@pytest.mark.parametrize("count", [0, 1, 3, 64])
def test_a_batch_of_any_size_gives_every_output_by_name(count: int) -> None:
    outputs = Session(a_model(), threads=1)(images(count))
    colour = images(count).astype(np.float32).mean((1, 2)) if count else np.empty((0, 3), np.float32)
    assert list(outputs) == ["embedding", "logits_pets"]
    np.testing.assert_allclose(outputs["embedding"], colour, rtol=1e-5)
    np.testing.assert_allclose(outputs["logits_pets"], colour @ WEIGHT, rtol=1e-4, atol=1e-3)
    assert {rows.dtype for rows in outputs.values()} == {np.dtype(np.float32)}


def test_it_says_what_the_file_is(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(a_model())
    session = Session(tmp_path / "m.onnx")
    assert (session.size, session.dim, session.heads) == (SIZE, 3, {"pets": CLASSES})
    assert session.preprocess == Preprocess.for_size(SIZE)
    assert session.metadata == METADATA


@pytest.mark.parametrize(
    "wrong", [images(2).astype(np.float32), images(2)[0], images(2)[:, :, 1:], images(2).transpose(0, 3, 1, 2)]
)
def test_other_arrays_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(MvmrError, match=r"takes uint8 \[N, 6, 6, 3\], this array is (uint8|float32) \["):
        Session(a_model())(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": ("image", BYTES, ["batch", 3, SIZE, SIZE])}, "instead of image uint8 [N, S, S, 3]"),
        ({"image": ("image", FLOAT, ["batch", SIZE, SIZE, 3])}, "takes image tensor(float)"),
        ({"image": ("pixels_in", BYTES, ["batch", SIZE, SIZE, 3])}, "takes pixels_in"),
        ({"embedding": "features"}, "gives features tensor(float)"),
        ({"metadata": {}}, "has no metadata 'heads'"),
        ({"metadata": METADATA | {"heads": "{"}}, "has no metadata 'heads'"),
        ({"metadata": METADATA | {"heads": '{"pets": ["a", "b", "c"]}'}}, "its metadata say {'logits_pets': 3}"),
        ({"metadata": METADATA | {"heads": "{}"}}, "gives {'logits_pets': 2} where its metadata say {}"),
    ],
)
def test_a_file_of_another_contract_is_refused(changes: dict[str, Any], message: str) -> None:
    reason = refusal(a_model(**changes))
    assert message in reason
    assert "export" in reason


def test_a_dense_output_without_places_is_refused() -> None:
    model = onnx.ModelProto.FromString(a_model())
    model.graph.node.append(helper.make_node("Neg", ["embedding"], ["dense"]))
    model.graph.output.append(helper.make_tensor_value_info("dense", FLOAT, ["batch", 3]))
    reason = refusal(model.SerializeToString())
    assert "dense tensor(float) ['batch', 3] instead of embedding float32 [N, D]" in reason


def test_preprocessing_that_the_file_does_not_say_is_one_line() -> None:
    session = Session(a_model(metadata={"heads": METADATA["heads"]}))
    with pytest.raises(MvmrError, match="has no metadata 'preprocessing'"):
        _ = session.preprocess


def test_what_cannot_be_loaded_is_one_line_and_nothing_else_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.onnx").write_bytes(a_model()[:-40])
    assert f"cannot load {tmp_path / 'cut.onnx'} on cpu" in refusal(tmp_path / "cut.onnx")
    assert "export it again" in refusal(b"not a model")
    assert f"{tmp_path / 'none.onnx'} is not there" in refusal(tmp_path / "none.onnx")
    unknown = refusal(a_model(opset=99))
    assert f"onnxruntime {onnxruntime.__version__} doesn't know the opset" in unknown
    assert "--opset 20" in unknown
    assert capfd.readouterr() == ("", "")


def with_weights_elsewhere(folder: Path) -> Path:
    """A model whose weights lie in a file beside it."""
    folder.mkdir()
    model = onnx.load_from_string(a_model())
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "weight")
    onnx.external_data_helper.set_external_data(weight, "side.bin")
    (folder / "side.bin").write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


def test_weights_in_another_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = with_weights_elsewhere(tmp_path / "m")
    onnxruntime.InferenceSession(str(file))  # which sees nothing wrong with it
    assert f"{file} refers to weights in another file, which no bundle vouches for" in refusal(file)
    monkeypatch.chdir(file.parent)  # where onnxruntime looks for the weights of a model given as bytes
    assert "the exported model refers to weights in another file" in refusal(file.read_bytes())


def test_no_way_of_writing_the_other_files_name_gets_through(tmp_path: Path) -> None:
    content = with_weights_elsewhere(tmp_path / "m").read_bytes()
    # To protobuf a padded length is the same number.
    entry = onnx.StringStringEntryProto(key="location", value="side.bin").SerializeToString()
    assert entry in content
    for padding in (b"\x88\x00", b"\x88\x80\x80\x00"):
        padded = entry.replace(b"\n\x08location", b"\n" + padding + b"location")
        assert onnx.StringStringEntryProto.FromString(padded).key == "location"
        assert "refers to weights in another file" in refusal(padded)


def test_an_engine_that_a_provider_compiled_is_refused() -> None:
    node = helper.make_node("EPContext", ["image"], ["embedding"], domain="com.microsoft", ep_cache_context="x.engine")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("image", BYTES, ["batch", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("embedding", FLOAT, ["batch", 3])],
    )
    assert "refers to a compiled engine in another file" in refusal(helper.make_model(graph).SerializeToString())


def test_words_that_only_look_like_a_reference_are_no_hindrance() -> None:
    classes = ("location", "EPContext")
    metadata = METADATA | {"heads": json.dumps({"pets": classes}), "note": "location, EPContext"}
    assert Session(a_model(metadata=metadata)).heads == {"pets": classes}


@pytest.mark.parametrize("heads", ['{"pets": 2}', '{"pets": [1, 2]}', '{"pets": "ab"}', "[]", "[" * 100_000, "3"])
def test_heads_that_are_no_names_are_refused(heads: str) -> None:
    assert "metadata" in refusal(a_model(metadata=METADATA | {"heads": heads}))


def test_an_unknown_provider_names_the_nearest() -> None:
    assert "did you mean 'cuda'" in refusal(a_model(), provider="cudda")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_this_onnxruntime_lacks(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    message = refusal(a_model(), provider=provider)
    assert f"has no {provider}: pip install onnxruntime-gpu" in message


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_silent_fall_back_to_the_cpu_is_an_error(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxruntime-gpu behaves where a library of the provider is missing: a session, on the CPU."""
    real: Callable[..., Any] = onnxruntime.InferenceSession
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda model, settings, **_: real(model, settings, providers=names[-1:])
    )
    assert f"fell back to CPUExecutionProvider from {provider}: pip install" in refusal(a_model(), provider=provider)


def test_onnxruntimes_tensorrt_keeps_the_engines_of_each_file_apart(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names them after the graph: a student trained again would be given the old one's."""
    real, names, folders = onnxruntime.InferenceSession, ["TensorrtExecutionProvider", "CUDAExecutionProvider"], []

    def record(model: bytes, settings: Any, *, providers: Any, **_: Any) -> Any:
        assert [name for name, _ in providers] == names
        folders.append(providers[0][1]["trt_engine_cache_path"])
        session = real(model, settings, providers=["CPUExecutionProvider"])
        session.get_providers = lambda: names
        return session

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    for model in (a_model(), a_model(), a_model(metadata={**METADATA, "bundle_hash": "1"})):
        Session(model, provider="tensorrt")
    assert folders[0] == folders[1] != folders[2]
    assert {Path(folder).parent for folder in folders} == {cache / "tensorrt"}


def test_threads_are_as_asked_and_never_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    real, threads = onnxruntime.InferenceSession, []

    def record(model: bytes, settings: Any, **options: Any) -> Any:
        threads.append(
            (settings.intra_op_num_threads, settings.get_session_config_entry("session.intra_op.allow_spinning"))
        )
        return real(model, settings, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    monkeypatch.setattr("mvmr.export.onnx.session.usable_cores", lambda: 3)
    Session(a_model())
    Session(a_model(), threads=1)
    assert threads == [(3, "0"), (1, "0")]


def test_a_service_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(a_model())
    code = f"""
import sys
from pathlib import Path
import numpy
from mvmr.export.onnx.session import Session
session = Session(Path({str(tmp_path / "m.onnx")!r}))
assert session(numpy.zeros((2, {SIZE}, {SIZE}, 3), numpy.uint8))["embedding"].shape == (2, 3)
assert not {{"torch", "torchvision", "onnx", "scipy", "sklearn"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives() -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider: pip install onnxruntime-gpu")
    ours, theirs = (Session(a_model(), provider=provider)(images(5)) for provider in ("cuda", "cpu"))
    np.testing.assert_allclose(ours["embedding"], theirs["embedding"], rtol=1e-5)
