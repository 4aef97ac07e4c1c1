"""Bundles whose weights nobody looks into, written without torch."""

import json
from pathlib import Path

import numpy as np

from mvmr.bundles import bundle, manifest
from mvmr.bundles.manifest import Manifest
from mvmr.bundles.preprocess import Preprocess
from mvmr.storage import staging

WIDTH, CLASSES = 8, ("coins", "moon")


def record(value: float = 50.0, command: str = "mvmr probe b", **more: object) -> dict[str, object]:
    return {"command": command, "data": "sample:digits", "protocol": "linear", "values": {"top1": value}, **more}


def write_stub(folder: Path, *, content: bytes = b"weights", created: str = "2026-01-01T00:00:00+00:00") -> Path:
    """A bundle whose weights nobody looks into: reading must not need torch."""
    folder.mkdir(parents=True)
    (folder / "encoder.safetensors").write_bytes(content)
    (folder / "README.md").write_text("card")
    content_of_manifest = Manifest(
        schema=manifest.SCHEMA,
        mvmr_version="0.1.0",
        created=created,
        backbone="resnet18",
        options={"small_kernel": True},
        embedding_dim=WIDTH,
        preprocessing=Preprocess.for_size(32),
        training={"method": "distillation", "teachers": {"clip": {"name": "ViT-B-16", "identity": "ab"}}, "seed": 0},
        metrics=(),
        files={name: staging.digest(folder / name) or "" for name in ("encoder.safetensors", "README.md")},
    )
    (folder / "bundle.json").write_text(json.dumps(content_of_manifest.to_json()))
    return folder


def with_head(target: bundle.Bundle, value: float = 1.0, name: str = "x") -> bundle.Bundle:
    return bundle.add_head(target, name, np.full((2, WIDTH), value), np.zeros(2), CLASSES, record(value))


def damage(folder: Path, **changes: object) -> Path:
    content = json.loads((folder / "bundle.json").read_text()) | changes
    (folder / "bundle.json").write_text(json.dumps({key: value for key, value in content.items() if value != "GONE"}))
    return folder
