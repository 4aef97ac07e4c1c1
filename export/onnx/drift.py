"""Where an exported file departs from torch: the layer whose error grows most over the one before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import TensorProto
from torch import nn

from mvmr.export.artifacts import EMBEDDING, IMAGE
from mvmr.export.onnx.graph import convolutions, emulate_half
from mvmr.models.student import Student

INPUT = "the normalised input"
_FEW = 8  # images: the layers of ResNet50 at 224 px take 45 MB an image
_ROUNDING = 1e-3  # a relative error of half precision; jumps below it say nothing
_QUANTISING = 2e-2  # the same of 8 bits

Floats = npt.NDArray[np.float32]


def first_drift(model: bytes, student: Student, images: npt.NDArray[np.uint8]) -> dict[str, Any]:
    """Find the layer at which an ONNX file of `student` departs most from it.

    Compared are the normalised input, every convolution and the embedding, on a few images, with torch's encoder
    in float32, in the order of execution. An fp16 file is run with every result rounded, as on a GPU.

    Returns:
        JSON values: layer (its name in torch), error and before (relative RMS errors of it and of the one before it;
        None: not finite) and layers, the error of each.
    """
    few = images[:_FEW]
    expected, actual = _torch_layers(student, few), _onnx_layers(model, few)
    errors = {name: _relative_rms(actual[name], expected[name]) for name in expected if name in actual}
    tolerance = _QUANTISING if b"QuantizeLinear" in model else _ROUNDING
    jumps, before = {}, 0.0
    for name, error in errors.items():
        # after the first layer that overflows, nothing can be told
        jumps[name] = (error + tolerance) / (before + tolerance) if np.isfinite(before) else 0.0
        before = error
    layer = max(jumps, key=jumps.__getitem__)
    names = list(errors)
    finite = {name: float(error) if np.isfinite(error) else None for name, error in errors.items()}
    position = names.index(layer)
    return {
        "layer": layer,
        "error": finite[layer],
        "before": finite[names[position - 1]] if position else 0.0,
        "layers": finite,
    }


def _torch_layers(student: Student, images: npt.NDArray[np.uint8]) -> dict[str, Floats]:
    outputs: dict[str, Floats] = {INPUT: student.preprocess.normalise(images)}
    encoder = student.copy_for_export()

    def keep(name: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        # copied at once: the ReLU behind it works in place
        return lambda module, args, output: outputs.__setitem__(name, output.numpy().copy())

    for name, part in encoder.named_modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(keep(name))
    with torch.no_grad():
        embedding = encoder(torch.from_numpy(outputs[INPUT])).numpy()
    return {**outputs, EMBEDDING: embedding}


def _onnx_layers(model: bytes, images: npt.NDArray[np.uint8]) -> dict[str, Floats]:
    proto = onnx.ModelProto.FromString(model)
    layers = convolutions(proto)
    names = {INPUT: next(iter(layers.values())).input[0]} | {name: node.output[0] for name, node in layers.items()}
    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in proto.graph.initializer)
    proto = onnx.ModelProto.FromString(emulate_half(model)) if half else proto
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names.values())
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), settings, providers=["CPUExecutionProvider"], enable_fallback=0
    )
    wanted = {**names, EMBEDDING: EMBEDDING}
    outputs = session.run(list(wanted.values()), {IMAGE: images})
    return {name: cast(Floats, output) for name, output in zip(wanted, outputs, strict=True)}


def _relative_rms(actual: Floats, expected: Floats) -> float:
    difference = actual.astype(np.float64) - expected
    if not np.isfinite(difference).all():
        return float("inf")
    scale = float(np.sqrt(np.square(expected, dtype=np.float64).mean()))
    return float(np.sqrt(np.square(difference).mean())) / max(scale, np.finfo(np.float64).tiny)
