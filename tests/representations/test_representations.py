"""Hand-crafted representations against scikit-image, scipy and kymatio, on real photographs."""

import numpy as np
import pytest
import torch
from kymatio.torch import Scattering2D
from scipy.ndimage import generic_filter
from skimage import data
from skimage.feature import hog
from torch import Tensor

from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.representations import HAND_CRAFTED, hand_crafted
from mvmr.representations.hog import Hog
from mvmr.representations.local_std import local_std
from mvmr.representations.scattering import Scattering


def photographs(height: int = 96, width: int = 128) -> Tensor:
    """[3, 3, H, W] float32 in [0, 1]."""
    crops = [image[40 : 40 + height, 60 : 60 + width] for image in (data.astronaut(), data.coffee(), data.chelsea())]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("block", [1, 2, 3])
def test_hog_agrees_with_scikit_image(block: int) -> None:
    images = photographs()
    ours = Hog(block=block)(images)
    for image, row in zip(images, ours, strict=True):
        expected = hog(
            image.permute(1, 2, 0).double().numpy(),
            orientations=24,
            pixels_per_cell=(8, 8),
            cells_per_block=(block, block),
            block_norm="L2-Hys",
            channel_axis=-1,
        )
        np.testing.assert_allclose(row.numpy(), expected, atol=1e-6)


def test_hog_of_a_flat_image_is_zero_and_of_an_image_of_one_cell_is_finite() -> None:
    assert Hog()(torch.full((2, 3, 32, 32), 0.5)).abs().max() == 0
    assert torch.isfinite(Hog()(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))).all()


def test_local_std_agrees_with_scipy() -> None:
    images = photographs(40, 50)
    images[0, :, :20] = 0.3  # a flat region, which E[x^2] - E[x]^2 loses to rounding
    ours = local_std(images).view_as(images)
    for image, row in zip(images.double().numpy(), ours, strict=True):
        for channel, got in zip(image, row, strict=True):
            expected = generic_filter(channel, np.std, size=3, mode="nearest")
            np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)


def test_scattering_is_kymatios() -> None:
    images = photographs(32, 32)
    expected = Scattering2D(J=2, L=8, shape=(32, 32))(images.contiguous()).flatten(1)
    assert torch.equal(Scattering(32)(images), expected)
    assert expected.shape == (3, 3 * 81 * 8 * 8)


@pytest.mark.parametrize("name", HAND_CRAFTED)
def test_a_batch_is_its_images_one_by_one(name: str) -> None:
    representation = hand_crafted(name, Preprocess.for_size(32))
    batch = (photographs(32, 32) * 255).round().to(torch.uint8)
    together = representation(batch)
    one_by_one = torch.cat([representation(image[None]) for image in batch])
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-6)
    assert together.dtype == torch.float32
    assert (together[0] - together[1]).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", HAND_CRAFTED)
def test_identity_names_the_function_its_parameters_and_the_preprocessing(name: str) -> None:
    small, large = (hand_crafted(name, Preprocess.for_size(size)) for size in (32, 64))
    assert small.identity == hand_crafted(name, Preprocess.for_size(32)).identity
    assert small.identity != large.identity
    assert len({hand_crafted(name, Preprocess.for_size(32)).identity for name in HAND_CRAFTED}) == len(HAND_CRAFTED)


def test_unknown_names_the_nearest() -> None:
    with pytest.raises(MvmrError, match="did you mean 'scattering'"):
        hand_crafted("scatering", Preprocess.for_size(32))
