"""int8 for CPUs: static quantisation by onnxruntime, calibrated on real images; layers that hurt are kept in float."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import (
    CalibrationMethod,
    QDQQuantizer,
    QuantType,
    TensorsData,
    create_calibrator,
    quant_pre_process,
)

from mvmr.errors import MvmrError, unknown
from mvmr.export.artifacts import EMBEDDING, IMAGE
from mvmr.export.onnx.int8_search import Judge, Step, keep_worst
from mvmr.export.onnx.session import Session
from mvmr.progress import track
from mvmr.storage.atomic import is_disk_full

FEWEST = 100  # images
# What has kernels in int8. The average pool and the heads stay in float: they cost next to nothing, and 8 bits of an
# embedding that a head reads would be all that is served.
_OPERATORS = ("Conv", "Add", "Relu", "MaxPool")
_AT_ONCE = 4  # images; calibrating ResNet50 at 224 px takes 1.5 GB with 4 at once, and 2.2 GB with 8
_TO_RANK = 16  # images
_LEAST_SHARE = 0.5  # of the weights in convolutions

Images = npt.NDArray[np.uint8]


def quantise(
    fp32: bytes, calibration: Iterable[Images], *, keep_float: Collection[str] = (), progress: bool = False
) -> bytes:
    """Quantise an fp32 ONNX file of :mod:`mvmr.export.onnx.graph`; the same file and images give the same bytes.

    Weights become int8 with a scale for each output channel, activations uint8 with a scale for each tensor, from
    their smallest and largest value over all images. (Signed activations lose most of the speed on x86.) Weights use
    all 8 bits: CPUs without VNNI may saturate.

    Args:
        calibration: batches of real images, of any sizes, held in memory at once.
        keep_float: names of convolutions, as in the graph ("layer2.0.conv1"), left in float with what follows them.

    Shapes:
        calibration: uint8 [n, S, S, 3] RGB in [0, 255], prepared by the bundle's preprocessing, not normalised.

    Raises:
        MvmrError: fewer than 100 images, or of another type or size; a layer that isn't there; all layers kept in
            float; a file that is not fp32, or whose weights are mostly not in convolutions; a full disk.
    """
    graph = _CalibratedGraph.of(fp32, calibration, keep_float, progress=progress)
    return graph.quantise(graph.layers.keys() - set(keep_float))


def search(
    fp32: bytes, calibration: Iterable[Images], judge: Judge, *, progress: bool = False
) -> tuple[bytes, list[str], list[Step]]:
    """Quantise all layers and, until `judge` is content, all but the worst 1, 2, 4, 8, ...

    Layers are ranked by the noise in the embedding when they alone are quantised.

    Args:
        fp32, calibration: as for :func:`quantise`.
        judge: takes an int8 file; says ``passed``, beside any figures. A report of
            :func:`mvmr.export.verification.verify` is such an answer.

    Returns:
        The first file that passes or, if none does, the one with the least noise; the layers it keeps in float, the
        worst first; and every step: kept_float (the layers, with the noise of each alone), bytes, latency_ms (batch 1,
        this machine), noise (squared error of the embedding over its variance), passed and verdict (what `judge`
        said).

    Raises:
        MvmrError: as :func:`quantise`, before anything is computed.
    """
    graph = _CalibratedGraph.of(fp32, calibration, progress=progress)
    sample = graph.images[:: len(graph.images) // _TO_RANK][:_TO_RANK]
    return keep_worst(
        graph.quantise, list(graph.layers), judge, sample, Session(fp32)(sample)[EMBEDDING], progress=progress
    )


@dataclass(frozen=True, kw_only=True)
class _CalibratedGraph:
    """A float graph with the ranges of its activations, to be quantised in whole or in part.

    source: the file as it came; graph: the same, made ready by onnxruntime
    layers: node names by the name of their layer
    """

    source: onnx.ModelProto
    graph: onnx.ModelProto
    ranges: TensorsData
    layers: Mapping[str, Sequence[str]]
    images: Images

    @classmethod
    def of(
        cls, fp32: bytes, calibration: Iterable[Images], keep_float: Collection[str] = (), *, progress: bool
    ) -> _CalibratedGraph:
        source = onnx.ModelProto.FromString(fp32)
        side = _side(source)
        _check_share(source)
        images = _gather(calibration, side)
        with _quiet_workspace() as folder:
            (folder / "float.onnx").write_bytes(fp32)
            quant_pre_process(folder / "float.onnx", folder / "ready.onnx", skip_symbolic_shape=True)
            graph = onnx.load(folder / "ready.onnx")
            layers = _layers(graph.graph)
            _check_float_layers(keep_float, layers)
            ranges = _ranges(folder / "ready.onnx", images, progress)
        return cls(source=source, graph=graph, ranges=ranges, layers=layers, images=images)

    def quantise(self, layers: Collection[str]) -> bytes:
        """The file with these layers in int8, the others in float."""
        nodes = [node for name in self.layers if name in layers for node in self.layers[name]]
        with _quiet_workspace():
            quantiser = QDQQuantizer(
                copy.deepcopy(self.graph), True, False, QuantType.QInt8, QuantType.QUInt8, copy.deepcopy(self.ranges),
                nodes, [], list(_OPERATORS), {},
            )  # fmt: skip
            quantiser.quantize_model()
            quantiser.model.topological_sort()
        model: onnx.ModelProto = quantiser.model.model
        self._take_back_additions(model)
        _widen(model.graph, self.images.shape[2])
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString(deterministic=True)

    def _take_back_additions(self, model: onnx.ModelProto) -> None:
        """Take back what onnxruntime has added: operator sets that nothing uses, metadata of its own, shapes."""
        del model.opset_import[:], model.metadata_props[:], model.graph.value_info[:]
        model.opset_import.extend(self.source.opset_import)
        entries = {entry.key: entry.value for entry in self.source.metadata_props} | {"precision": "int8"}
        for key, value in entries.items():
            model.metadata_props.add(key=key, value=value)


class _Reader:
    """Images in small batches, as onnxruntime's calibrators take them."""

    def __init__(self, images: Images, advance: Callable[[int, str], None]) -> None:
        self._images, self._advance, self._done = images, advance, 0

    def get_next(self) -> dict[str, Images] | None:
        part = self._images[self._done : self._done + _AT_ONCE]
        self._advance(self._done, "")
        self._done += len(part)
        return {IMAGE: part} if len(part) else None


def _ranges(model: Path, images: Images, progress: bool) -> TensorsData:
    calibrator = create_calibrator(
        model, list(_OPERATORS), str(model.with_name("augmented.onnx")), calibrate_method=CalibrationMethod.MinMax
    )
    with track("calibrating int8", 0, len(images), shown=progress) as advance:
        calibrator.collect_data(_Reader(images, advance))
    return calibrator.compute_data()


def _side(model: onnx.ModelProto) -> int:
    """Side of the images in pixels; raises MvmrError for a file that is not a student's in fp32."""
    weights = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    shapes = [entry.type.tensor_type.shape.dim for entry in model.graph.input if entry.name == IMAGE]
    if not shapes or not any(node.op_type == "Conv" and node.input[1] in weights for node in model.graph.node):
        raise MvmrError("int8 is made from the fp32 ONNX of a student, this file is none; make one by `mvmr export`")
    return int(shapes[0][1].dim_value)


def _check_share(model: onnx.ModelProto) -> None:
    """Refuse a network whose weights mostly stay in float whatever is done: a transformer's."""
    graph = model.graph
    in_convolutions = {node.input[1] for node in graph.node if node.op_type == "Conv"}
    sizes = {
        tensor.name: int(np.prod(tensor.dims)) for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT
    }
    share = sum(size for name, size in sizes.items() if name in in_convolutions) / max(1, sum(sizes.values()))
    if share < _LEAST_SHARE:
        raise MvmrError(
            f"int8 quantises convolutions, which hold {100 * share:.0f} % of this student's weights: it would cost "
            "accuracy and save next to nothing; export it as fp32, or as fp16 for a GPU"
        )


def _gather(calibration: Iterable[Images], side: int) -> Images:
    images = [np.empty((0, side, side, 3), np.uint8)]
    for part in calibration:
        if part.dtype != np.uint8 or part.shape[1:] != (side, side, 3):
            mismatch = f"uint8 [n, {side}, {side}, 3], these are {part.dtype} {list(part.shape)}"
            raise MvmrError(f"int8 calibrates on images of {mismatch}; prepare them by the bundle's preprocessing")
        images.append(part)
    if (count := sum(map(len, images))) < FEWEST:
        raise MvmrError(f"int8 takes at least {FEWEST} real images to calibrate, got {count}; give more: --calibration")
    return np.concatenate(images)


def _layers(graph: onnx.GraphProto) -> dict[str, list[str]]:
    """Each convolution by name, with what follows it up to the next: a sum belongs to the last one it adds."""
    weights = {tensor.name for tensor in graph.initializer}
    layers: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for node in graph.node:
        owners = {owner[name] for name in node.input if name in owner}
        if node.op_type == "Conv" and node.input[1] in weights:
            layers[node.name] = []
            owner[node.output[0]] = node.name
        elif node.op_type in _OPERATORS and owners:
            owner[node.output[0]] = max(owners, key=list(layers).index)
        else:
            continue
        layers[owner[node.output[0]]].append(node.name)
    return layers


def _check_float_layers(keep_float: Collection[str], layers: Collection[str]) -> None:
    for name in keep_float:
        if name not in layers:
            raise unknown("layer", name, layers)
    if len(set(keep_float)) == len(layers):  # the quantiser would take no nodes for all of them
        raise MvmrError(f"with all {len(layers)} layers kept in float nothing is left for int8; keep fewer")


def _widen(graph: onnx.GraphProto, side: int) -> None:
    """Write the normalisation's constants, three numbers, once for every pixel of a row.

    onnxruntime runs an int8 graph with the channels last, where it would broadcast three numbers at a time: that
    takes 1.2 of the 24 ms of ResNet50 at 224 px, and 0.1 so.
    """
    for tensor in graph.initializer:
        if list(tensor.dims) == [3, 1, 1]:
            row = np.repeat(numpy_helper.to_array(tensor), side, axis=2)
            tensor.CopyFrom(numpy_helper.from_array(row, tensor.name))


@contextmanager
def _quiet_workspace() -> Iterator[Path]:
    """A folder for onnxruntime's intermediate files, gone afterwards; its remarks reach only loggers set up before.

    It logs by `logging.info` and the like, which install a handler to standard error where there is none.
    """
    silent = logging.NullHandler()
    logging.root.addHandler(silent)
    try:
        with tempfile.TemporaryDirectory(prefix="mvmr-int8-") as folder:
            yield Path(folder)
    except Exception as error:
        if is_disk_full(error):
            full = tempfile.gettempdir()
            raise MvmrError(f"disk full while quantising in {full}; free some space, or set TMPDIR") from error
        raise
    finally:
        logging.root.removeHandler(silent)
