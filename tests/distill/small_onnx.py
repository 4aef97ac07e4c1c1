"""Small ONNX files for tests: the mean colour of an image, mapped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE, DIM = 8, 5


def small_onnx(
    file: Path,
    *,
    kind: int = TensorProto.UINT8,
    shape: Sequence[Any] = ("N", SIZE, SIZE, 3),
    outputs: Sequence[str] = ("embedding",),
    operator: tuple[str, str] = ("", "Relu"),
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a model: mean colour of the image, matrix, then an operator, the same to every output."""
    axes = [2, 3] if shape[1] == 3 else [1, 2]
    weight = np.random.default_rng(0).normal(size=(3, DIM)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["colour"], keepdims=0),
        helper.make_node("MatMul", ["colour", "weight"], ["mapped"]),
        *(helper.make_node(operator[1], ["mapped"], [name], domain=operator[0]) for name in outputs),
    ]
    constants = [
        numpy_helper.from_array(np.array(axes, np.int64), "axes"), numpy_helper.from_array(weight, "weight")
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "colours", [helper.make_tensor_value_info("image", kind, list(shape))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [shape[0], DIM]) for name in outputs], constants,
    )  # fmt: skip
    domains = {"": 18} | ({operator[0]: 1} if operator[0] else {})
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid(*domain) for domain in domains.items()], ir_version=10
    )
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, file)
    return file
