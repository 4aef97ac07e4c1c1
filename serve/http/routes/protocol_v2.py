"""The Open Inference Protocol v2 over HTTP, JSON and binary tensors, so that Triton's clients talk to this service.

Source: github.com/kserve/open-inference-protocol, and Triton's binary tensor data extension. Images arrive prepared
(uint8 [N, S, S, 3]), as an exported file and a Triton repository take them.
"""

from __future__ import annotations

from itertools import chain
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import BaseModel, ConfigDict, Field

from mvmr import __version__
from mvmr.export.artifacts import EMBEDDING, IMAGE, LOGITS
from mvmr.export.runtimes import RUNTIMES
from mvmr.serve import wire
from mvmr.serve.engine import Engine
from mvmr.serve.http.problems import Problem
from mvmr.serve.http.request_body import RAW, parse
from mvmr.serve.vectors import unit

_VALUES = 1_000_000  # in JSON: six images of 224 pixels
_SLICE = 2**16  # values made into numbers while nothing else is done
Floats = npt.NDArray[np.float32]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)  # what is not known here is passed over, as Triton does


class TensorParameters(_Part):
    """binary_data_size: bytes of the tensor after the JSON."""

    binary_data_size: int | None = Field(default=None, ge=0)


class InputTensor(_Part):
    """A tensor, its values in `data` or, in binary, after the JSON."""

    name: str
    shape: Annotated[list[int], Field(min_length=1, max_length=8, fail_fast=True)]
    datatype: str
    parameters: TensorParameters = TensorParameters()
    data: list[Any] | None = None


class OutputParameters(_Part):
    """binary_data: whether the values are wanted after the JSON."""

    binary_data: bool | None = None


class WantedOutput(_Part):
    """An output by name."""

    name: str
    parameters: OutputParameters = OutputParameters()


class InferParameters(_Part):
    """binary_data_output: whether all values are wanted after the JSON; normalize: embeddings of length 1."""

    binary_data_output: bool = False
    normalize: bool = False


class InferRequest(_Part):
    """The request of `/v2/models/{model}/infer`."""

    id: str | None = None
    parameters: InferParameters = InferParameters()
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1, fail_fast=True)]
    outputs: Annotated[list[WantedOutput], Field(max_length=64, fail_fast=True)] | None = None


def server() -> dict[str, Any]:
    """The document of `/v2`."""
    return {"name": "mvmr", "version": __version__, "extensions": ["binary_tensor_data"]}


def model(engine: Engine) -> dict[str, Any]:
    """The document of `/v2/models/{model}`."""
    heads = [(f"{LOGITS}{name}", len(head.classes)) for name, head in engine.heads.items()]
    outputs = [(EMBEDDING, engine.dim), *heads]
    return {
        "name": engine.name,
        "versions": ["1"],
        "platform": RUNTIMES[engine.artifact.runtime].platform,
        "inputs": [{"name": IMAGE, "datatype": "UINT8", "shape": [-1, engine.size, engine.size, 3]}],
        "outputs": [{"name": name, "datatype": "FP32", "shape": [-1, width]} for name, width in outputs],
    }


def read(body: bytes, header: str | None, engine: Engine, most: int) -> tuple[InferRequest, npt.NDArray[np.uint8]]:
    """The request and its images, uint8 [N, S, S, 3].

    header: the length of the JSON in bytes, where binary tensors follow it; most: what it may be.
    Raises: Problem for anything that is not as the protocol or the model has it.
    """
    try:
        length = len(body) if header is None else int(header)
    except ValueError:
        raise Problem("malformed", f"{wire.JSON_LENGTH} is {header!r}, not a number") from None
    if not 0 <= length <= len(body):
        raise Problem("malformed", f"{wire.JSON_LENGTH} is {length}, but the body has {len(body)} bytes")
    if length > most:
        raise Problem(
            "too-large", f"{length:,} bytes of JSON, the limit is {most:,} (--max-json-mb); send binary tensors"
        )
    request = parse(InferRequest, body[:length], _VALUES)
    tensor, size = request.inputs[0], engine.size
    if tensor.name != IMAGE or tensor.datatype != "UINT8":
        raise Problem("invalid", f"the input is {tensor.name} {tensor.datatype}; this model takes {IMAGE} UINT8")
    if len(tensor.shape) != 4 or tensor.shape[1:] != [size, size, 3] or tensor.shape[0] < 1:
        raise Problem("invalid", f"the input's shape is {tensor.shape}; this model takes [N, {size}, {size}, 3]")
    _check_outputs(request, engine)
    count = tensor.shape[0] * size * size * 3
    raw = body[length:]
    if tensor.parameters.binary_data_size is not None:
        if tensor.data is not None or tensor.parameters.binary_data_size != len(raw) or len(raw) != count:
            reason = f"binary_data_size {tensor.parameters.binary_data_size}, {len(raw)} bytes after the JSON"
            raise Problem("malformed", f"{reason}; shape {tensor.shape} takes {count}, and no data beside them")
        return request, np.frombuffer(raw, np.uint8).reshape(tensor.shape)
    return request, _from_json(tensor, count, raw)


def answer(request: InferRequest, engine: Engine, embeddings: Floats) -> tuple[bytes, dict[str, str]]:
    """The body of the answer, and its headers."""
    choices = {output.name: output.parameters.binary_data for output in request.outputs or ()}
    names = list(choices) or [output["name"] for output in model(engine)["outputs"]]
    outputs, raw = [], []
    for name in names:
        values = _output(name, engine, embeddings, request.parameters.normalize)
        output: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(values.shape)}
        choice = choices.get(name)
        if request.parameters.binary_data_output if choice is None else choice:
            content = np.ascontiguousarray(values, "<f4").tobytes()
            output["parameters"] = {"binary_data_size": len(content)}
            raw.append(content)
        else:
            output["data"] = np.ascontiguousarray(values).ravel()
        outputs.append(output)
    document: dict[str, Any] = {"model_name": engine.name, "model_version": "1", "outputs": outputs}
    if request.id is not None:
        document["id"] = request.id
    head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if not raw:
        return head, {"content-type": wire.JSON}
    return head + b"".join(raw), {"content-type": RAW, wire.JSON_LENGTH: str(len(head))}


def _check_outputs(request: InferRequest, engine: Engine) -> None:
    names = [output["name"] for output in model(engine)["outputs"]]
    for output in request.outputs or ():
        if output.name not in names:
            raise Problem("invalid", f"there is no output {output.name!r}; this model has {', '.join(names)}")


def _from_json(tensor: InputTensor, count: int, raw: bytes) -> npt.NDArray[np.uint8]:
    if raw:
        raise Problem("malformed", f"{len(raw)} bytes follow the JSON, which names no binary_data_size")
    data = tensor.data or []
    if len(data) != count:  # not flat, then: a list to each dimension, looked at before anything is made of it
        data = _flatten(data, tensor.shape)
    pixels = np.empty(count, np.uint8)
    for start in range(0, count, _SLICE):
        part = data[start : start + _SLICE]
        if set(map(type, part)) != {int} or min(part) < 0 or max(part) > 255:  # true and false are not numbers
            raise Problem("invalid", "inputs.0.data must hold whole numbers from 0 to 255")
        pixels[start : start + _SLICE] = part
    return pixels.reshape(tensor.shape)


def _flatten(data: list[Any], shape: list[int]) -> list[Any]:
    fits = len(data) == shape[0]
    for size in shape[1:]:
        if not fits or not all(isinstance(row, list) and len(row) == size for row in data):
            raise Problem(
                "invalid", f"inputs.0.data is not of shape {shape}; give a flat list, or one to each dimension"
            )
        data = list(chain.from_iterable(data))
    return data


def _output(name: str, engine: Engine, embeddings: Floats, normalize: bool) -> Floats:
    if name == EMBEDDING:
        return unit(embeddings) if normalize else embeddings
    head = engine.heads[name.removeprefix(LOGITS)]
    logits: Floats = embeddings @ head.weight.T + head.bias
    return logits
