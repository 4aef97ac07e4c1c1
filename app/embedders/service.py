"""A model that a service serves, in the student's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from mvmr.app.embedders.embedder import SERVICE, Encoder, Provenance, identity_of
from mvmr.bundles.preprocess import Preprocess, to_rgb
from mvmr.errors import MvmrError, summarise
from mvmr.serve.client import Client
from mvmr.serve.engine import Floats


@dataclass(frozen=True)
class ServedModel:
    """What a service says about its model."""

    url: str
    name: str
    space_id: str
    dim: int
    precision: str
    engine: str
    preprocess: Preprocess
    heads: Mapping[str, tuple[str, ...]]

    @classmethod
    def ask(cls, client: Client, url: str) -> ServedModel:
        address = str(httpx2.URL(url).copy_with(userinfo=b"")).rstrip("/")
        models = client.models()
        try:
            return cls(
                url=address,
                name=str(models[0]["id"]),
                space_id=str(models[0]["space_id"]),
                dim=int(models[0]["dim"]),
                precision=str(models[0]["precision"]),
                engine=str(models[0]["engine"]),
                preprocess=Preprocess.from_dict(models[0]["preprocessing"]),
                heads={str(name): tuple(map(str, classes)) for name, classes in models[0]["heads"].items()},
            )
        except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise MvmrError(
                f"{address} doesn't answer as an mvmr service does ({summarise(error)}); check the URL"
            ) from error

    @property
    def label(self) -> str:
        return f"service at {self.url} ({self.precision})"

    def encoder(self, client: Client) -> Encoder:
        def forward(prepared: Sequence[Any]) -> Floats:
            if not prepared:
                return np.empty((0, self.dim), np.float32)
            answer = client.embed(prepared)
            if answer.space_id != self.space_id:
                raise MvmrError(f"{self.url} serves another model than when the app was started; start the app again")
            return answer.vectors

        return Encoder(
            key=SERVICE,
            label=self.label,
            identity=identity_of(self.space_id, SERVICE, self.url, self.precision, self.engine),
            dim=self.dim,
            nbytes=None,
            prepare=partial(_shrink, self.preprocess),
            forward=forward,
            provenance=Provenance(self.space_id, self.precision, ""),
        )


def _shrink(preprocess: Preprocess, image: Image.Image) -> Image.Image:
    """The image as the service's own preprocessing would resize it: less to send, and the same pixels in the end."""
    picture = to_rgb(image, preprocess.background)
    width, height = picture.size
    short = min(width, height)
    if short <= preprocess.resize:
        return picture
    size = (preprocess.resize * width // short, preprocess.resize * height // short)
    return picture.resize(size, Image.Resampling[preprocess.interpolation.upper()])


def classify_by_service(client: Client, images: Sequence[Image.Image], head: str, classes: Sequence[str]) -> Floats:
    answer = client.classify(images, head=head, top_k=min(len(classes), 1000))
    columns = {name: column for column, name in enumerate(classes)}
    probabilities = np.zeros((len(answer.rows), len(classes)), np.float32)
    try:
        for row, labels in enumerate(answer.rows):
            for guess in labels:
                probabilities[row, columns[guess.label]] = guess.probability
    except KeyError as error:
        raise MvmrError(f"the service's head {head} has other classes than before; start the app again") from error
    return probabilities
