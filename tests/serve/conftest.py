"""What tests of the service and of the batch job share: bundles, photos, an engine, a client of a service in here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from mvmr.bundles import bundle as bundles
from mvmr.serve import Engine
from tests.serve import serving
from tests.serve.batch.jobs import BAD, CLASSES, COUNT, DIM, picture, run
from tests.serve.inprocess import serve


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose exported file is tiny; a test that changes it takes a copy."""
    return serving.bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def engine(path: Path) -> Engine:
    return Engine.load(path, threads=1)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with serve(engine) as client:
        yield client


# Of the batch job


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow ResNet18 at 16 px with a head, exported to fp32."""
    import torch  # here, as most tests of the service need none

    from mvmr.export.export import export
    from tests.making import write_bundle

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "mine"
    opened = write_bundle(out)
    weight = np.random.default_rng(0).normal(size=(len(CLASSES), DIM))
    record = {"command": "c", "data": "d", "protocol": "linear", "values": {"top1": 1.0}}
    bundles.add_head(opened, "photos", weight, np.zeros(len(CLASSES)), CLASSES, record)
    export(out, formats=["onnx"], data="sample:digits", images=20)
    return out


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, of which some can't be read."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(COUNT):
        picture(number).save(folder / f"{number:02}.png")
    for name, content in BAD.items():
        (folder / name).unlink()
        if content is None:
            (folder / name).symlink_to("nowhere.png")
        else:
            (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def finished_run(bundle: Path, photos: Path, tmp_path: Path) -> Path:
    """What the batch job has made of the photos."""
    run(bundle, photos, tmp_path / "finished_run")
    return tmp_path / "finished_run"
