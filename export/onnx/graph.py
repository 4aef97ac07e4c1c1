"""The student as one ONNX graph: pixels in, features and logits out, normalisation inside."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.export import Dim

from mvmr.bundles.head import Head
from mvmr.export.artifacts import DENSE, EMBEDDING, IMAGE, LOGITS, Precision, check_opset
from mvmr.models.student import Student

LARGEST_BATCH = 1024
_ENCODER = "encoder."


class ServedEncoder(nn.Module):
    """What is exported: cast, transpose, normalise, encode, and the linear heads on the features.

    Batch norm is folded into the convolutions in float32. With `half` the folded encoder computes in half precision;
    normalisation, heads and outputs stay float32. (Halving first and folding then doubles the error.)
    dense: also give the map of features before pooling
    """

    def __init__(
        self, student: Student, heads: Sequence[Head] = (), *, half: bool = False, dense: bool = False
    ) -> None:
        super().__init__()
        self.encoder = student.copy_for_export(dense=dense)
        self.dense = dense
        self.dtype = torch.float16 if half else torch.float32
        self.encoder.to(self.dtype)
        preprocess = student.preprocess
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (preprocess.mean, preprocess.std))
        # one multiplication and one addition for each value, where (x / 255 - mean) / std takes three operations
        self.scale = nn.Buffer((1 / (255 * std)).float().view(3, 1, 1))
        self.shift = nn.Buffer((-mean / std).float().view(3, 1, 1))
        self.heads = nn.ModuleList(_linear(head) for head in heads)

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 [N, S, S, 3] -> float32 [N, 3, S, S]; cast before all else, as TensorRT demands of uint8 inputs."""
        return image.to(torch.float32).permute(0, 3, 1, 2) * self.scale + self.shift

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """uint8 [N, S, S, 3] RGB -> features float32 [N, D] as they are, then logits float32 [N, C] of each head.

        With `dense` the last is the map, float32 [N, h, w, C]: whoever takes outputs by position finds them as before.
        """
        encoded = self.encoder(self.normalise(image).to(self.dtype))
        features, *maps = (part.float() for part in (encoded if self.dense else (encoded,)))
        return (features, *(head(features) for head in self.heads), *maps)


def to_onnx(
    student: Student,
    heads: Sequence[Head] = (),
    *,
    precision: Precision = "fp32",
    opset: int = 20,
    metadata: Mapping[str, str],
    dense: bool = False,
) -> bytes:
    """Export a student, with linear heads on its features, as one ONNX file; the same student gives the same bytes.

    Every convolution's node is called after its layer in torch ("layer2.0.conv1").

    Args:
        precision: ``fp32`` or ``fp16``; int8 is made from an fp32 file by :mod:`mvmr.export.onnx.int8`.
        metadata: text by name, put into the file (see :func:`mvmr.export.artifacts.metadata`).
        dense: also give the map of features before pooling.

    Shapes:
        The graph takes ``image`` uint8 [N, S, S, 3] RGB in [0, 255] of any N, and gives ``embedding`` float32 [N, D],
        not normalised, ``logits_<head>`` float32 [N, C] and, with `dense`, ``dense`` float32 [N, h, w, C].

    Raises:
        MvmrError: an opset that can't be written as asked, or, with `dense`, a network that has no map.
    """
    check_opset(opset)
    if precision == "int8":
        raise ValueError("int8 is made from an fp32 file: see mvmr.export.onnx.int8")
    encoder = ServedEncoder(student, heads, half=precision == "fp16", dense=dense).eval()
    names = [EMBEDDING, *(f"{LOGITS}{head.name}" for head in heads), *([DENSE] if dense else [])]
    model = _trace(encoder, student.preprocess.crop, names, opset)
    _name_layers(model.graph, prefix=2 * _ENCODER if dense else _ENCODER)
    _forget_this_machine(model)
    check_graph(model, opset)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _trace(encoder: ServedEncoder, size: int, outputs: list[str], opset: int) -> onnx.ModelProto:
    """What torch's exporter makes of it, in silence."""
    log = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(log), redirect_stderr(log), torch.no_grad():
        warnings.simplefilter("ignore")  # a deprecation inside torch is not the user's; what counts is checked after
        program = torch.onnx.export(
            encoder,
            (torch.zeros(2, size, size, 3, dtype=torch.uint8),),
            dynamo=True,
            external_data=False,
            opset_version=opset,
            input_names=[IMAGE],
            output_names=outputs,
            dynamic_shapes={"image": {0: Dim("batch", min=1, max=LARGEST_BATCH)}},
            verbose=False,
        )
    if program is None:
        raise ValueError(f"torch exported nothing: {log.getvalue()}")
    model: onnx.ModelProto = program.model_proto
    return model


def check_graph(model: onnx.ModelProto, opset: int) -> None:
    """Check what torch's exporter has made against what was asked of it.

    Raises: ValueError: another opset, a batch norm left, a batch that is not free; and what onnx's checker finds.
    """
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets != {"": opset}:
        raise ValueError(f"the exporter wrote opset {opsets} where {opset} was asked for")
    if any(node.op_type == "BatchNormalization" for node in model.graph.node):
        raise ValueError("the exported graph still holds batch norm")
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise ValueError(f"{value.name} of the exported graph has a fixed batch size")
    onnx.checker.check_model(model, full_check=True)


def emulate_half(model: bytes) -> bytes:
    """A float32 graph that gives what the fp16 graph `model` gives on hardware with half precision.

    onnxruntime's CPU provider computes fp16 graphs in float32 from node to node, so that nothing overflows and no
    activation is rounded there. Here every result is rounded to half, by name as in `model`.
    """
    proto = onnx.ModelProto.FromString(model)
    graph, inferred = proto.graph, onnx.shape_inference.infer_shapes(proto).graph
    half = {value.name for value in inferred.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT16}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    nodes = []
    for node in graph.node:
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name not in half:
                continue
            if node.op_type == "Cast":
                node.attribute[0].i = TensorProto.FLOAT
            node.output[index] = f"{name}.exact"
            nodes.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copies)
    content: bytes = proto.SerializeToString()
    return content


def convolutions(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The convolutions of a graph by the name of their layer in torch, in graph order."""
    return {node.name: node for node in model.graph.node if node.op_type == "Conv"}


def _linear(head: Head) -> nn.Module:
    layer = nn.Linear(head.weight.shape[1], head.weight.shape[0])
    layer.weight, layer.bias = (nn.Parameter(torch.tensor(values)) for values in (head.weight, head.bias))
    return layer.requires_grad_(False)


def _name_layers(graph: onnx.GraphProto, *, prefix: str) -> None:
    for node in graph.node:
        if node.op_type == "Conv":  # its weight keeps torch's name
            node.name = node.input[1].removeprefix(prefix).removesuffix(".weight")


def _forget_this_machine(model: onnx.ModelProto) -> None:
    """Take out stack traces and the like: they hold paths of this machine, and differ from run to run."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
