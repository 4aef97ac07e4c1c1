"""The student under every engine that can be had."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from mvmr.app.embedders.embedder import (
    SERVICE,
    TENSORRT,
    TENSORRT_RTX,
    TORCH,
    Encoder,
    Written,
    device_type,
    identity_of,
    in_torch,
    once,
)
from mvmr.app.embedders.service import Served, classified
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import ENCODER, Bundle
from mvmr.errors import MvmrError, unknown
from mvmr.export.artifacts import EMBEDDING, Precision, artifact
from mvmr.export.tensorrt import engine as tensorrt
from mvmr.export.tensorrt import rtx_provider
from mvmr.serve.client import Client
from mvmr.serve.engine import Engine, Floats, read_heads

_EXPORTS: dict[Precision, str] = {"fp32": "onnx", "fp16": "fp16", "int8": "int8"}  # -> option of `mvmr export`


@dataclass(frozen=True)
class Choice:
    """An engine; why: None when it can be had, else a sentence that says what to do; nbytes: of its file."""

    key: str
    label: str
    why: str | None
    nbytes: int | None


class Engines:
    """What can take the student's place: every engine of a bundle, or the one of a service.

    Cheap to make: an engine is loaded at its first use. Threads may share it.

    space_id: of the embeddings; name: of the bundle or of the served model; dim: width of an embedding
    background: what the student is shown behind transparent images
    choices: all engines, also those that can't be had here, with the reason; default: key of the first to show
    heads: classes of the linear heads, by name
    """

    def __init__(
        self, bundle: Bundle | None, *, device: str = "cpu", service: str | None = None, api_key: str | None = None
    ) -> None:
        """Look at what a bundle has, or ask the service at a URL, which then stands in the place of any bundle.

        Raises: MvmrError for a head that is damaged, or a service that is out of reach.
        """
        self._locks: dict[str, threading.Lock] = {}
        self._loaded: dict[str, Encoder] = {}
        self._makers: dict[str, Callable[[], Encoder]] = {}
        self._client: Client | None = None
        self.heads: Mapping[str, tuple[str, ...]]
        self.choices: tuple[Choice, ...] = ()
        if service is not None:
            with Client(service, api_key=api_key, retries=1) as asking:  # one that isn't there is not waited for
                says = Served.ask(asking, service)
            self._client = Client(service, api_key=api_key)
            self.space_id, self.name, self.default, self.dim = says.space_id, says.name, SERVICE, says.dim
            self.heads, self.background = says.heads, says.preprocess.background
            self._add(SERVICE, says.label, None, None, partial(says.encoder, self._client))
        elif bundle is not None:
            self.space_id, self.name, self.default = bundle.space_id, bundle.path.resolve().name, TORCH
            self.dim, self.background = bundle.manifest.embedding_dim, bundle.manifest.preprocessing.background
            self._heads = read_heads(bundle)
            self.heads = {name: head.classes for name, head in self._heads.items()}
            self._offer(bundle, device)
        else:
            raise ValueError("engines are those of a bundle or of a service: give one")

    def get(self, key: str) -> Encoder:
        """The student under an engine; raises MvmrError with the reason where it can't be had."""
        choice = next((each for each in self.choices if each.key == key), None)
        if choice is None:
            raise unknown("engine", key, [each.key for each in self.choices])
        if choice.why is not None:
            raise MvmrError(f"{choice.label} can't be had: {choice.why}")
        with self._locks[key]:
            if key not in self._loaded:
                self._loaded[key] = self._makers[key]()
            return self._loaded[key]

    def classify(self, embeddings: Floats, head: str, images: Sequence[Image.Image] = ()) -> Floats:
        """Probabilities of a head's classes, which `heads` names.

        images: those that the embeddings are of; a service, whose head stays there, classifies them.

        Shapes: embeddings float32 [N, D] of any engine, N images -> float32 [N, C], rows sum to 1.
        Raises: MvmrError for an unknown head, with the nearest; or a service out of reach.
        """
        if head not in self.heads:
            raise unknown("head", head, self.heads)
        if self._client is not None:
            if len(images) != len(embeddings):
                raise ValueError(f"a service classifies images: {len(images)} came with {len(embeddings)} embeddings")
            return classified(self._client, images, head, self.heads[head])
        return self._heads[head].probabilities(embeddings)

    def close(self) -> None:
        """Close the connections to a service."""
        if self._client is not None:
            self._client.close()

    def _offer(self, bundle: Bundle, device: str) -> None:
        files = bundle.manifest.files
        self._add(TORCH, "torch float32", None, _size(bundle, ENCODER), partial(_student, bundle, device))
        provider = "cuda" if device_type(device) == "cuda" else "cpu"
        for precision, option in _EXPORTS.items():
            place, why = artifact(precision), None
            if place not in files:
                why = f"the bundle has no such file; run `mvmr export {bundle.path} --{option}`, then start again"
            key, label = f"onnx-{precision}", f"ONNX {precision}"
            self._add(
                key, label, why, _size(bundle, place), partial(_exported, bundle, precision, provider, key, label)
            )
        engines = [name for name in files if name.endswith(".engine")]
        try:
            if not engines:
                raise MvmrError(
                    f"the bundle has no engine; make one by `mvmr export {bundle.path} --trt` on a machine with an "
                    "NVIDIA GPU and TensorRT, then start again"
                )
            found = tensorrt.find(bundle)
            self._add(TENSORRT, "TensorRT fp16", None, found.path.stat().st_size, partial(_tensorrt, bundle, found))
        except MvmrError as error:
            self._add(TENSORRT, "TensorRT fp16", str(error), None, partial(_tensorrt, bundle, None))
        self._offer_rtx(bundle)

    def _offer_rtx(self, bundle: Bundle) -> None:
        place, label, why = artifact("fp16"), "TensorRT for RTX fp16", None
        try:
            if place not in bundle.manifest.files:
                raise MvmrError(f"it runs the fp16 file; run `mvmr export {bundle.path} --fp16`, then start again")
            rtx_provider.device()
        except MvmrError as error:
            why = str(error)
        make = partial(_exported, bundle, "fp16", rtx_provider.NAME, TENSORRT_RTX, label)
        self._add(TENSORRT_RTX, label, why, _size(bundle, place), make)

    def _add(self, key: str, label: str, why: str | None, nbytes: int | None, make: Callable[[], Encoder]) -> None:
        self.choices += (Choice(key, label, why, nbytes),)
        self._locks[key], self._makers[key] = threading.Lock(), make


def _student(bundle: Bundle, device: str) -> Encoder:
    student = once(lambda: bundle.student(device))  # embeddings that were computed before need no weights
    return Encoder(
        key=TORCH,
        label="torch float32",
        identity=identity_of(bundle.space_id, TORCH, device_type(device)),
        dim=bundle.manifest.embedding_dim,
        nbytes=_size(bundle, ENCODER),
        prepare=lambda image: student().prepare(image),
        forward=lambda prepared: in_torch(student(), student().dim, device, prepared),
    )


def _exported(bundle: Bundle, precision: Precision, provider: str, key: str, label: str) -> Encoder:
    engine = Engine.load(bundle.path, precision=precision, provider=provider)
    now, place = bundles.load(bundle.path, verify=False), artifact(precision)
    if engine.space_id != bundle.space_id:
        raise MvmrError(f"bundle {bundle.path} has changed since it was opened; start again")

    def forward(prepared: Sequence[Any]) -> Floats:
        rows = [np.empty((0, engine.dim), np.float32)]
        for start in range(0, len(prepared), engine.at_once):
            rows.append(engine(np.stack(prepared[start : start + engine.at_once])))
        return np.concatenate(rows)

    digest = now.manifest.files[place]
    return Encoder(
        key=key,
        label=label,
        identity=identity_of(bundle.space_id, key, provider, digest),
        dim=engine.dim,
        nbytes=_size(now, place),
        prepare=engine.preprocess.image,
        forward=forward,
        # TensorRT for RTX computes the same file in half precision, which a job on the processor does not
        written=Written(bundle.space_id, precision, digest) if provider != rtx_provider.NAME else None,
    )


def _tensorrt(bundle: Bundle, found: tensorrt.Stored | None) -> Encoder:
    stored = found or tensorrt.find(bundle)
    engine = tensorrt.Engine.load(stored.path, stored.sidecar, onnx_sha256=stored.onnx_sha256)
    (low, high), one_at_a_time = engine.batches, threading.Lock()

    def forward(prepared: Sequence[Any]) -> Floats:
        rows = [np.empty((0, engine.dim), np.float32)]
        for start in range(0, len(prepared), high):
            part = np.stack(prepared[start : start + high])
            padded = np.concatenate([part, np.repeat(part[:1], max(0, low - len(part)), axis=0)])
            with one_at_a_time:
                rows.append(engine(padded)[EMBEDDING][: len(part)])
        return np.concatenate(rows)

    return Encoder(
        key=TENSORRT,
        label="TensorRT fp16",
        identity=identity_of(bundle.space_id, TENSORRT, str(stored.sidecar.get("engine_sha256"))),
        dim=engine.dim,
        nbytes=stored.path.stat().st_size,
        prepare=bundle.manifest.preprocessing.image,
        forward=forward,
    )


def _size(bundle: Bundle, name: str) -> int | None:
    if name not in bundle.manifest.files:
        return None
    try:
        return bundle.file(name).stat().st_size
    except OSError:
        return None
