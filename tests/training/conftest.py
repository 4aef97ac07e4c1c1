"""What tests of whole runs share: images, and a run of two epochs that nothing disturbed."""

import pytest
import torch

from mvmr.bundles.bundle import Bundle
from mvmr.data import ImageSet, open_images
from mvmr.training.pretraining import fit
from tests.training.tiny import IMAGES, recipe


@pytest.fixture(scope="session")
def images() -> ImageSet:
    """As few images as make two steps of an epoch."""
    return open_images("sample:digits", "unlabelled").subset(range(IMAGES))


@pytest.fixture(scope="session")
def reference(images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of that run; not to be changed."""
    torch.set_num_threads(1)
    return fit(images, tmp_path_factory.mktemp("runs") / "undisturbed", recipe(), device="cpu")
