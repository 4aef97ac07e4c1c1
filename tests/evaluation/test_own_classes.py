"""Classes that a method has found are told from the bundle alone, as its projector tells them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import normalized_mutual_info_score

from mvmr.bundles.bundle import Bundle
from mvmr.data import open_images
from mvmr.errors import MvmrError
from mvmr.evaluation.evaluate import evaluate
from mvmr.evaluation.own_classes import own_classes
from mvmr.representations.cache import represent
from mvmr.training.pretraining import pretrain
from tests.evaluation.test_evaluate import a_bundle, write_photos

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

TINY = (
    "student.backbone=resnet18_025", "views.size=16", "views.policy=crop+flip", "train.epochs=1", "train.batch_size=12",
    "train.workers=0", "train.precision=32-true",
)  # fmt: skip
SETTINGS = {
    "twist": ("method.classes=4", "method.hidden=[16]", "method.local=0"),
    "deepcluster": ("method.clusters=4", "method.projector=[16,8]", "method.local=0"),
    "selflabel": ("method.classes=4", "method.heads=2"),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_photos(tmp_path_factory.mktemp("data") / "photos", {"red": 12, "blue": 12}))


def train(name: str, photos: str, out: Path) -> Bundle:
    return pretrain(photos, out, assign=[*TINY, f"method.name={name}", *SETTINGS[name]], device="cpu")


def by_hand(name: str, h: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    """Logits from the weights in the file."""

    def norm(rows: np.ndarray, at: str) -> np.ndarray:
        return (rows - w[f"{at}.running_mean"]) / np.sqrt(w[f"{at}.running_var"] + 1e-5)

    if name == "selflabel":
        return h @ w["weight"].T + w["bias"]
    hidden = np.maximum(norm(h @ w["0.weight"].T, "1") * w["1.weight"] + w["1.bias"], 0)
    z = hidden @ w["3.weight"].T
    if name == "twist":
        return norm(z, "4")
    means = w["4.weight"] / np.linalg.norm(w["4.weight"], axis=1, keepdims=True)
    return z @ means.T  # of one length or another: the nearest is the same


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_they_are_what_the_projector_tells(photos: str, tmp_path: Path, name: str) -> None:
    bundle = train(name, photos, tmp_path / "out")
    images = open_images(photos, "test")
    h = np.asarray(represent(images, bundle.student()))
    expected = by_hand(name, h, load_file(bundle.path / "projector.safetensors")).argmax(1)
    classify = own_classes(bundle)
    assert classify is not None
    np.testing.assert_array_equal(classify(h), expected)
    figures = evaluate(bundle.path, photos, protocols=["clustering"])["clustering"]
    assert figures["own_classes"] == len(set(expected))
    assert figures["own_nmi"] == pytest.approx(100 * normalized_mutual_info_score(images.labels, expected))


@pytest.mark.slow
def test_a_projector_of_another_method_is_one_line(photos: str, tmp_path: Path) -> None:
    bundle = train("selflabel", photos, tmp_path / "out")
    file = bundle.path / "bundle.json"
    content = json.loads(file.read_text())
    content["training"]["recipe"]["method"]["classes"] = 5
    file.write_text(json.dumps(content))
    with pytest.raises(MvmrError, match=r"projector\.safetensors, .*\[4, 128\] instead of \[5, 128\]"):
        evaluate(bundle.path, photos, protocols=["clustering"])


def test_other_bundles_have_none(tmp_path: Path) -> None:
    assert own_classes(a_bundle(tmp_path / "out")) is None
