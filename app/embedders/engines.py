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
    BATCH,
    SERVICE,
    TORCH,
    Encoder,
    Provenance,
    device_type,
    embed_in_torch,
    identity_of,
    key_of,
    once,
)
from mvmr.app.embedders.service import ServedModel, classify_by_service
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import ENCODER, Bundle
from mvmr.errors import MvmrError, unknown
from mvmr.export.artifacts import ARTIFACTS, EMBEDDING, Artifact
from mvmr.export.runtimes import PROVIDERS, check_provider, export_command, locate, open_artifact, provider_on
from mvmr.serve.client import Client
from mvmr.serve.engine import Floats, read_heads


@dataclass(frozen=True)
class Choice:
    """An engine; why: None when it can be had, else a sentence that says what to do; nbytes: of its file."""

    key: str
    label: str
    why: str | None
    nbytes: int | None


@dataclass(frozen=True)
class _Way:
    """A way to run the student: an artifact, and the provider of its runtime, None where that has no choice.

    own_provider: whether the provider is what makes this an engine of its own, beside the one of the app's device
    """

    key: str
    label: str
    artifact: Artifact
    provider: str | None
    own_provider: bool = False


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
            with Client(service, api_key=api_key, retries=1) as client:  # one that isn't there is not waited for
                model = ServedModel.ask(client, service)
            self._client = Client(service, api_key=api_key)
            self.space_id, self.name, self.default, self.dim = model.space_id, model.name, SERVICE, model.dim
            self.heads, self.background = model.heads, model.preprocess.background
            self._add(SERVICE, model.label, None, None, partial(model.encoder, self._client))
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
        choice = next((choice for choice in self.choices if choice.key == key), None)
        if choice is None:
            raise unknown("engine", key, [choice.key for choice in self.choices])
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
            return classify_by_service(self._client, images, head, self.heads[head])
        return self._heads[head].probabilities(embeddings)

    def close(self) -> None:
        """Close the connections to a service."""
        if self._client is not None:
            self._client.close()

    def _offer(self, bundle: Bundle, device: str) -> None:
        self._add(TORCH, "torch float32", None, _size(bundle, ENCODER), partial(_open_student, bundle, device))
        provider = "cuda" if device_type(device) == "cuda" else "cpu"
        for row in ARTIFACTS.values():
            self._offer_artifact(bundle, _Way(key_of(row), row.label, row, provider_on(row, provider)))
        for name, option in PROVIDERS.items():
            if option.label:
                row = ARTIFACTS[option.preferred[0]]
                way = _Way(f"{name}-{row.precision}", f"{option.label} {row.precision}", row, name, own_provider=True)
                self._offer_artifact(bundle, way)

    def _offer_artifact(self, bundle: Bundle, way: _Way) -> None:
        row = way.artifact
        file, why = None, None
        try:
            if not row.files(bundle.manifest.files):
                where = f" on {row.machine}" if row.machine else ""
                what = f"it runs the {row.precision} file" if way.own_provider else "the bundle has no such file"
                raise MvmrError(f"{what}; run {export_command(row, bundle)}{where}, then start again")
            file = locate(row, bundle)
            if way.own_provider and way.provider is not None:
                check_provider(way.provider)
        except MvmrError as error:
            why = str(error)
        self._add(way.key, way.label, why, _size(bundle, file), partial(_open_exported, bundle, way))

    def _add(self, key: str, label: str, why: str | None, nbytes: int | None, make: Callable[[], Encoder]) -> None:
        self.choices += (Choice(key, label, why, nbytes),)
        self._locks[key], self._makers[key] = threading.Lock(), make


def _open_student(bundle: Bundle, device: str) -> Encoder:
    student = once(lambda: bundle.student(device))  # embeddings that were computed before need no weights
    return Encoder(
        key=TORCH,
        label="torch float32",
        identity=identity_of(bundle.space_id, TORCH, device_type(device)),
        dim=bundle.manifest.embedding_dim,
        nbytes=_size(bundle, ENCODER),
        prepare=lambda image: student().prepare(image),
        forward=lambda prepared: embed_in_torch(student(), student().dim, device, prepared),
    )


def _open_exported(bundle: Bundle, way: _Way) -> Encoder:
    row, current = way.artifact, bundles.load(bundle.path, verify=False)
    if current.space_id != bundle.space_id:
        raise MvmrError(f"bundle {bundle.path} has changed since it was opened; start again")
    runner, file = open_artifact(row, current, provider=way.provider), locate(row, current)
    step, digest = PROVIDERS[way.provider].at_once if way.provider else BATCH, current.manifest.files[file]

    def forward(prepared: Sequence[Any]) -> Floats:
        rows = [np.empty((0, runner.dim), np.float32)]
        for start in range(0, len(prepared), step):
            rows.append(runner(np.stack(prepared[start : start + step]))[EMBEDDING])
        return np.concatenate(rows)

    return Encoder(
        key=way.key,
        label=way.label,
        identity=identity_of(bundle.space_id, way.key, way.provider or "", digest),
        dim=runner.dim,
        nbytes=_size(current, file),
        prepare=current.manifest.preprocessing.image,
        forward=forward,
        # What `mvmr embed` runs; a provider that is an engine of its own computes the same file otherwise.
        provenance=Provenance(bundle.space_id, row.precision, digest)
        if way.provider and not way.own_provider
        else None,
    )


def _size(bundle: Bundle, name: str | None) -> int | None:
    if name is None or name not in bundle.manifest.files:
        return None
    try:
        return bundle.file(name).stat().st_size
    except OSError:
        return None
