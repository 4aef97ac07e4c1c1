"""What runs an artifact: uint8 images [N, S, S, 3] in, named float32 outputs out, whichever runtime it is (torch-free).

A runtime is opened by its name: importing this imports none of them, and some need torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from mvmr.bundles.bundle import Bundle
from mvmr.errors import MvmrError, unknown
from mvmr.export.artifacts import ARTIFACTS, Artifact, report_of, staleness


class Runner(Protocol):
    """An open artifact.

    Shapes: called with uint8 [N, size, size, 3] RGB, prepared by the bundle's preprocessing, of any N, it returns
        ``embedding`` float32 [N, dim], not normalised, ``logits_<head>`` float32 [N, C] of each head in it and, where
        it was exported with it, ``dense`` float32 [N, h, w, C].
    metadata: what it says of the student that it was made from, see `mvmr.export.artifacts.metadata`
    """

    @property
    def size(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    def __call__(self, images: npt.NDArray[np.uint8]) -> Mapping[str, npt.NDArray[np.float32]]: ...


class Opener(Protocol):
    """What the module of a runtime has to offer.

    locate: the listed file of a bundle that is the artifact for this machine; raises MvmrError saying why there is none
    open_artifact: that file, ready to run; provider, threads: for a runtime that has a choice
    check_provider: refuses one that can't be had here, by an MvmrError with the cure
    """

    def locate(self, artifact: Artifact, bundle: Bundle) -> str: ...
    def open_artifact(
        self, artifact: Artifact, bundle: Bundle, *, provider: str | None, threads: int | None
    ) -> Runner: ...
    def check_provider(self, provider: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What runs artifacts.

    opener: a module that keeps the contract of `Opener`; platform, model: what Triton calls it, and its files
    no_cpu: why it does not run without a GPU, "" where it does
    """

    opener: str
    platform: str
    model: str
    no_cpu: str = ""


RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": Runtime(opener="mvmr.export.onnx.session", platform="onnxruntime_onnx", model="model.onnx"),
    "tensorrt": Runtime(
        opener="mvmr.export.tensorrt.opener",
        platform="tensorrt_plan",
        model="model.plan",
        no_cpu="a TensorRT engine runs on a GPU only",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Provider:
    """What a runtime can be told to compute on, as `--provider` calls it.

    runtime: whose it is
    preferred: keys of artifacts; the first of them that a bundle has is served where no precision is asked for
    at_once: images to a batch that make the most of it
    label: what the app calls it as an engine of its own, beside the provider of its --device; "": it is none
    """

    runtime: str
    preferred: tuple[str, ...]
    at_once: int
    label: str = ""


# On a processor larger batches bring nothing (docs/export.md).
PROVIDERS: dict[str, Provider] = {
    "cpu": Provider(runtime="onnxruntime", preferred=("int8", "onnx"), at_once=4),
    "cuda": Provider(runtime="onnxruntime", preferred=("fp16", "onnx"), at_once=32),
    "tensorrt": Provider(runtime="onnxruntime", preferred=("fp16", "onnx"), at_once=32),
    "tensorrt-rtx": Provider(runtime="onnxruntime", preferred=("fp16", "onnx"), at_once=32, label="TensorRT for RTX"),
}


def check_provider(provider: str) -> None:
    """Refuse, in one line with the cure, a provider that is unknown or that this machine does not have."""
    if provider not in PROVIDERS:
        raise unknown("provider", provider, PROVIDERS)
    _opener(PROVIDERS[provider].runtime).check_provider(provider)


def run_by(provider: str) -> dict[str, Artifact]:
    """The artifacts that a provider runs, by precision."""
    runtime = PROVIDERS[provider].runtime
    return {row.precision: row for row in ARTIFACTS.values() if row.runtime == runtime}


def provider_on(artifact: Artifact, device: str) -> str | None:
    """The provider of an artifact's runtime for a device, "cpu" or "cuda"; None where the runtime has no choice."""
    return device if PROVIDERS[device].runtime == artifact.runtime else None


def locate(artifact: Artifact, bundle: Bundle) -> str:
    """Name the bundle's file that is the artifact for this machine; raises MvmrError saying why there is none."""
    return _opener(artifact.runtime).locate(artifact, bundle)


def open_artifact(
    artifact: Artifact, bundle: Bundle, *, provider: str | None = None, threads: int | None = None
) -> Runner:
    """Open an artifact of a bundle, after checking its hash and that it belongs to the bundle's student.

    Args:
        provider: of the artifact's runtime; None takes the runtime's first.
        threads: of one batch on a processor; None takes all cores of this process.

    Raises: MvmrError for an artifact that is not there for this machine, damaged, stale or of another shape, or a
        provider that can't be had.
    """
    opener, file = _opener(artifact.runtime), locate(artifact, bundle)
    bundle.verify(*(name for name in (file, report_of(file)) if name in bundle.manifest.files))
    runner = opener.open_artifact(artifact, bundle, provider=provider, threads=threads)
    difference, manifest = staleness(runner.metadata, bundle), bundle.manifest
    if difference:
        raise MvmrError(f"{bundle.path / file}: {difference}; run {export_command(artifact, bundle)}")
    if (runner.size, runner.dim) != (manifest.preprocessing.crop, manifest.embedding_dim):
        raise MvmrError(
            f"{bundle.path / file} makes {runner.dim} numbers of images of {runner.size} pixels, the bundle says "
            f"{manifest.embedding_dim} of {manifest.preprocessing.crop}; run {export_command(artifact, bundle)}"
        )
    return runner


def export_command(artifact: Artifact, bundle: Bundle) -> str:
    """What makes an artifact, for a message."""
    return f"`mvmr export {bundle.path} --{artifact.key}`"


def _opener(runtime: str) -> Opener:
    return cast(Opener, import_module(RUNTIMES[runtime].opener))
