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
from importlib import import_module
from pathlib import Path
from typing import Any

from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.export.artifacts import EMBEDDING, IMAGE, LOGITS, Precision
from mvmr.export.runtimes import RUNTIMES
from mvmr.storage.atomic import atomic, sync, write_text
from mvmr.storage.lock import hold
from mvmr.storage.staging import sweep

CONFIG = "config.pbtxt"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_UNFINISHED = ".partial"


def repository(
    model: Path | bytes,
    out: Path,
    *,
    name: str,
    platform: str,
    size: int,
    dim: int,
    heads: Mapping[str, Sequence[str]],
    space_id: str,
    preprocessing: Preprocess,
    precision: Precision,
    gpu: bool,
    max_batch: int = 64,
    instances: int = 1,
    preferred: Sequence[int] = (),
    queue_delay_us: int = 0,
    overwrite: bool = False,
) -> Path:
    """Put an exported student into the repository `out`, as the next version of model `name`; return <out>/<name>.

    Args:
        model: an exported file, of which an engine takes the GPU and the version that its name says; platform: the
            runtime that it is for.
        size, dim, heads: image side in pixels, width of the embedding, class names by head, as in the model.
        max_batch: an engine's profile must reach from 1 to this.
        instances: copies of the model that run side by side, on the GPU or on the CPU (`gpu`).
        preferred: batch sizes worth waiting for, and queue_delay_us: how long a request may wait for them.
        overwrite: replace a model of another embedding space.

    Raises: MvmrError for a bad name or number, a model there that is of another embedding space or not ours, missing
        packages, or a disk that is full; the versions that are there stay whole.
    """
    _check(name, platform, gpu)
    config = _schema().ModelConfig(
        name=name,
        platform=RUNTIMES[platform].platform,
        **_tensors(size, dim, heads),
        **_serving(size, gpu, max_batch, instances, preferred, queue_delay_us),
        parameters=_parameters(space_id, preprocessing, heads, precision),
    )
    folder = out / name
    if not overwrite:
        _check_space(folder / CONFIG, space_id)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with hold(folder):
            _add_version(folder, model, RUNTIMES[platform].model, config)
    except OSError as error:
        raise MvmrError(f"cannot write the Triton model {folder}: {error.strerror}; what was there stays") from error
    return folder


def _check(name: str, platform: str, gpu: bool) -> None:
    if not _NAME.fullmatch(name):
        raise MvmrError(f"a Triton model cannot be named {name!r}; use letters, digits, '.', '_' and '-'")
    if RUNTIMES[platform].no_cpu and not gpu:
        raise MvmrError(f"{RUNTIMES[platform].no_cpu}; use the fp32 or int8 ONNX for Triton on a CPU")


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


def _tensors(size: int, dim: int, heads: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    widths = {EMBEDDING: dim} | {f"{LOGITS}{head}": len(classes) for head, classes in heads.items()}
    return {
        "input": [{"name": IMAGE, "data_type": "TYPE_UINT8", "dims": [size, size, 3]}],
        "output": [{"name": name, "data_type": "TYPE_FP32", "dims": [width]} for name, width in widths.items()],
    }


def _serving(
    size: int, gpu: bool, max_batch: int, instances: int, preferred: Sequence[int], queue_delay_us: int
) -> dict[str, Any]:
    if max_batch < 1 or instances < 1 or queue_delay_us < 0:
        values = f"max_batch = {max_batch}, instances = {instances}, queue_delay_us = {queue_delay_us}"
        raise MvmrError(f"Triton needs at least 1 image a batch, 1 instance and a delay of 0, not {values}")
    if outside := [batch for batch in preferred if not 1 <= batch <= max_batch]:
        raise MvmrError(f"the preferred batch {outside[0]} is outside 1 to max_batch = {max_batch}; change one of them")
    zeros = {"data_type": "TYPE_UINT8", "dims": [size, size, 3], "zero_data": True}
    return {
        "max_batch_size": max_batch,
        "dynamic_batching": {"preferred_batch_size": preferred, "max_queue_delay_microseconds": queue_delay_us},
        "instance_group": [{"count": instances, "kind": "KIND_GPU" if gpu else "KIND_CPU"}],
        "model_warmup": [
            {"name": f"batch of {batch}", "batch_size": batch, "inputs": {IMAGE: zeros}}
            for batch in sorted({1, max_batch})
        ],
    }


def _parameters(
    space_id: str, preprocessing: Preprocess, heads: Mapping[str, Sequence[str]], precision: str
) -> dict[str, dict[str, str]]:
    values = {
        "bundle_space_id": space_id,
        "preprocessing": json.dumps(preprocessing.to_dict()),
        "heads": json.dumps({head: list(classes) for head, classes in heads.items()}, ensure_ascii=False),
        "precision": precision,
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
