"""A model repository for NVIDIA Triton: config.pbtxt and numbered versions of an exported student.

The config names the one version to serve, so replacing it (one rename, the last step) is the change from one version to
the next: a death before it leaves Triton what it had. Going back is editing that number, for old versions stay. Triton
itself has not run what this writes; the config is made from its own protobuf schema, and the tests read it back so.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.export.artifacts import DENSE, EMBEDDING, IMAGE, LOGITS, Precision
from mvmr.export.runtimes import RUNTIMES
from mvmr.storage.atomic import atomic, sync, write_text
from mvmr.storage.lock import hold
from mvmr.storage.staging import sweep

CONFIG = "config.pbtxt"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_UNFINISHED = ".partial"


@dataclass(frozen=True, kw_only=True)
class ExportedStudent:
    """An exported student, as its model in the repository describes it.

    name: of the model; platform: the runtime that it is for
    dim, heads: width of the embedding, and class names by head, as in the exported file
    dense: h, w and width of the map of features, () where the file doesn't give it
    """

    name: str
    platform: str
    dim: int
    heads: Mapping[str, Sequence[str]]
    space_id: str
    preprocessing: Preprocess
    precision: Precision
    dense: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How Triton runs a model.

    max_batch: an engine's profile must reach from 1 to this
    instances: copies of the model that run side by side, on the GPU or on the CPU (`gpu`)
    preferred: batch sizes worth waiting for, and queue_delay_us: how long a request may wait for them
    """

    gpu: bool
    max_batch: int = 64
    instances: int = 1
    preferred: Sequence[int] = ()
    queue_delay_us: int = 0


def add_model(
    model: Path | bytes, out: Path, student: ExportedStudent, serving: Serving, *, overwrite: bool = False
) -> Path:
    """Put an exported student into the repository `out`, as the next version of its model; return <out>/<name>.

    Args:
        model: an exported file, of which an engine takes the GPU and the version that its name says.
        overwrite: replace a model of another embedding space.

    Raises: MvmrError for a bad name or number, a model there that is of another embedding space or not ours, missing
        packages, or a disk that is full; the versions that are there stay whole.
    """
    _check(student, serving)
    config = _schema().ModelConfig(
        name=student.name,
        platform=RUNTIMES[student.platform].platform,
        **_tensors(student),
        **_serving(student.preprocessing.crop, serving),
        parameters=_parameters(student),
    )
    folder = out / student.name
    if not overwrite:
        _check_space(folder / CONFIG, student.space_id)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with hold(folder):
            _add_version(folder, model, RUNTIMES[student.platform].model, config)
    except OSError as error:
        raise MvmrError(f"cannot write the Triton model {folder}: {error.strerror}; what was there stays") from error
    return folder


def _check(student: ExportedStudent, serving: Serving) -> None:
    if not _NAME.fullmatch(student.name):
        raise MvmrError(f"a Triton model cannot be named {student.name!r}; use letters, digits, '.', '_' and '-'")
    if (reason := RUNTIMES[student.platform].no_cpu) and not serving.gpu:
        raise MvmrError(f"{reason}; use the fp32 or int8 ONNX for Triton on a CPU")
    most = serving.max_batch
    if most < 1 or serving.instances < 1 or serving.queue_delay_us < 0:
        values = f"max_batch = {most}, instances = {serving.instances}, queue_delay_us = {serving.queue_delay_us}"
        raise MvmrError(f"Triton needs at least 1 image a batch, 1 instance and a delay of 0, not {values}")
    if outside := [batch for batch in serving.preferred if not 1 <= batch <= most]:
        raise MvmrError(f"the preferred batch {outside[0]} is outside 1 to max_batch = {most}; change one of them")


def _add_version(folder: Path, model: Path | bytes, file: str, config: Any) -> None:
    sweep(folder)
    for stray in folder.glob(f".*{_UNFINISHED}"):
        shutil.rmtree(stray)
    version = max((int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()), default=0) + 1
    # Triton passes over folders whose names are no numbers.
    unfinished = folder / f".{version}{_UNFINISHED}"
    try:
        with atomic(unfinished / file) as temporary:
            if isinstance(model, bytes):
                temporary.write_bytes(model)
            else:
                shutil.copyfile(model, temporary)
        os.rename(unfinished, folder / str(version))
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync(folder)
    config.version_policy.specific.versions.append(version)
    write_text(folder / CONFIG, _text_format().MessageToString(config))


def _tensors(student: ExportedStudent) -> dict[str, Any]:
    size = student.preprocessing.crop
    shapes = {EMBEDDING: [student.dim]}
    shapes |= {f"{LOGITS}{head}": [len(classes)] for head, classes in student.heads.items()}
    shapes |= {DENSE: [*student.dense]} if student.dense else {}
    return {
        "input": [{"name": IMAGE, "data_type": "TYPE_UINT8", "dims": [size, size, 3]}],
        "output": [{"name": name, "data_type": "TYPE_FP32", "dims": dims} for name, dims in shapes.items()],
    }


def _serving(size: int, serving: Serving) -> dict[str, Any]:
    zeros = {"data_type": "TYPE_UINT8", "dims": [size, size, 3], "zero_data": True}
    return {
        "max_batch_size": serving.max_batch,
        "dynamic_batching": {
            "preferred_batch_size": serving.preferred,
            "max_queue_delay_microseconds": serving.queue_delay_us,
        },
        "instance_group": [{"count": serving.instances, "kind": "KIND_GPU" if serving.gpu else "KIND_CPU"}],
        "model_warmup": [
            {"name": f"batch of {batch}", "batch_size": batch, "inputs": {IMAGE: zeros}}
            for batch in sorted({1, serving.max_batch})
        ],
    }


def _parameters(student: ExportedStudent) -> dict[str, dict[str, str]]:
    heads = {head: list(classes) for head, classes in student.heads.items()}
    values = {
        "bundle_space_id": student.space_id,
        "preprocessing": json.dumps(student.preprocessing.to_dict()),
        "heads": json.dumps(heads, ensure_ascii=False),
        "precision": student.precision,
    }
    return {key: {"string_value": value} for key, value in values.items()}


def _check_space(config: Path, space_id: str) -> None:
    if not config.exists():
        return
    cure = "give another folder, or move this one away"
    try:
        model = _text_format().Parse(config.read_text(encoding="utf-8"), _schema().ModelConfig())
    except Exception as error:  # protobuf's ParseError, of whichever protobuf is installed, or a file that is no text
        raise MvmrError(f"{config} cannot be read as a Triton config ({type(error).__name__}); {cure}") from error
    current_space = model.parameters["bundle_space_id"].string_value  # a map: "" where there is none
    if current_space != space_id:
        problem = (
            f"serves another embedding space ({current_space}, not {space_id})"
            if current_space
            else "is not one of mvmr's"
        )
        raise MvmrError(f"the Triton model {config.parent} {problem}, and its clients would not notice; {cure}")


def _schema() -> Any:
    return _package("tritonclient.grpc.model_config_pb2")


def _text_format() -> Any:
    return _package("google.protobuf.text_format")


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        cure = "pip install 'mvmr[export]'"
        raise MvmrError(f"a Triton config needs the package {error.name!r}, not installed here: {cure}") from error
