"""Views: the paper's policy, seeded for each item on its own, and never a label."""

import math
import pickle
import random as python_random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Sampler
from torchvision.transforms import v2

from mvmr.bundles.preprocess import Preprocess
from mvmr.data import ImageSet, open_images
from mvmr.data.image_set import Labels
from mvmr.errors import MvmrError
from mvmr.methods.method import AUGMENTED, ORIGINAL, ViewSpec
from mvmr.methods.mvmr import SECOND
from mvmr.training.views import (
    CROP_AREA,
    POLICIES,
    STEPS,
    Views,
    blur_kernel,
    crop_box,
    gaussian_blur,
    item_random,
    make_policy,
)

SMALL = Preprocess.for_size(32)
TWO, THREE = (ORIGINAL, AUGMENTED), (ORIGINAL, AUGMENTED, SECOND)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return open_images("sample:patches", "unlabelled").subset(range(0, 1360, 40))


def numpy_random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


class Pairs(Sampler[tuple[int, int]]):
    """(epoch, index), as the training loop asks for them."""

    def __init__(self, epoch: int, indices: list[int]) -> None:
        self.epoch, self.indices = epoch, indices

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def no_labels() -> Labels:
    raise AssertionError("training read a label")


class Unlabellable(ImageSet):
    """An image set whose labels nobody may touch."""

    @property
    def labels(self) -> Labels | None:
        raise AssertionError("training read a label")


def test_an_item_is_images_and_a_number_only(images: ImageSet) -> None:
    item = Views(images, SMALL, TWO, "paper", seed=0)[3, 5]
    assert set(item) == {"index", "original", "augmented"}
    assert item["index"].dtype == torch.int64
    assert int(item["index"]) == 5
    for name in ("original", "augmented"):
        assert item[name].dtype == torch.uint8
        assert item[name].shape == (3, 32, 32)
        assert item[name].is_contiguous()
    expected = torch.from_numpy(SMALL.image(images.load(5))).permute(2, 0, 1)
    assert torch.equal(item["original"], expected)


def test_training_data_never_read_a_label() -> None:
    labelled = open_images("sample:patches", "train")
    fields = {name: getattr(labelled, name) for name in labelled.__dataclass_fields__}
    images = Unlabellable(**fields | {"read_labels": no_labels})
    loader = DataLoader(Views(images, SMALL, THREE, "paper", seed=0), sampler=Pairs(0, list(range(24))), batch_size=8)
    assert [set(batch) for batch in loader] == [{"index", "original", "augmented", "second"}] * 3


@pytest.mark.parametrize(
    ("workers", "context"), [(1, "fork"), (2, "fork"), pytest.param(1, "spawn", marks=pytest.mark.slow)]
)
def test_items_do_not_depend_on_the_workers(images: ImageSet, workers: int, context: str) -> None:
    views = Views(images, SMALL, THREE, "paper", seed=4)
    order = [7, 3, 30, 1, 12, 5]
    alone = [views[2, index] for index in order]
    loader = DataLoader(
        views, sampler=Pairs(2, order), batch_size=2, num_workers=workers, multiprocessing_context=context
    )
    batches = list(loader)
    for key in alone[0]:
        assert torch.equal(torch.cat([batch[key] for batch in batches]), torch.stack([item[key] for item in alone]))


def test_items_depend_on_seed_epoch_and_index_alone(images: ImageSet) -> None:
    views = Views(images, SMALL, THREE, "paper", seed=0)
    first = views[0, 1]
    views[5, 7]
    assert same(views[0, 1], first)
    assert same(Views(images, SMALL, THREE, "paper", seed=0)[0, 1], first)
    without = Views(images, SMALL, TWO, "paper", seed=0)[0, 1]
    assert torch.equal(without["augmented"], first["augmented"])
    items = [views[1, 1], Views(images, SMALL, TWO, "paper", seed=1)[0, 1]]
    assert not any(torch.equal(item["augmented"], first["augmented"]) for item in items)
    assert all(torch.equal(item["original"], first["original"]) for item in items)
    assert not torch.equal(first["second"], first["augmented"])


def test_a_view_has_the_size_and_the_area_that_a_method_asks_for(images: ImageSet) -> None:
    specs = (ViewSpec("most", area=(0.9, 1.0)), ViewSpec("part", scale=0.5, area=(0.05, 0.1)))
    item = Views(images, SMALL, specs, "crop", seed=0)[0, 5]
    assert (item["most"].shape, item["part"].shape) == ((3, 32, 32), (3, 16, 16))
    random = numpy_random()
    for area in ((0.9, 1.0), (0.05, 0.1)):
        boxes = np.array([crop_box(100, 100, random, area) for _ in range(200)])
        shares = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 100**2
        assert shares.min() > 0.9 * area[0]
        assert shares.max() < 1.1 * area[1]
    with pytest.raises(MvmrError, match="view 'part' is a crop, and policy 'flip' doesn't crop: give one that does"):
        Views(images, SMALL, specs[1:], "flip", seed=0)


def test_every_item_draws_its_own_chance() -> None:
    draws = {item_random(s, e, i, b).random() for s in range(5) for e in range(5) for i in range(20) for b in range(2)}
    assert len(draws) == 1000
    # 1/12 would not be 11/2, nor 112 anything else
    assert item_random(1, 12, 3, 0).random() != item_random(11, 2, 3, 0).random()
    uniform = np.sort([item_random(0, epoch, index, 0).random() for epoch in range(20) for index in range(100)])
    assert np.abs(uniform - np.linspace(0, 1, 2000)).max() < 1.6 / math.sqrt(2000)  # Kolmogorov-Smirnov


def test_the_global_random_states_are_left_alone(images: ImageSet) -> None:
    views = Views(images, SMALL, THREE, "paper", seed=0)
    before = torch.get_rng_state(), str(np.random.get_state()), python_random.getstate()  # noqa: NPY002
    first = views[0, 0]
    torch.manual_seed(123)
    assert same(views[0, 0], first)
    torch.set_rng_state(before[0])
    views[1, 0]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]  # noqa: NPY002
    assert python_random.getstate() == before[2]


def test_views_survive_pickling(images: ImageSet) -> None:
    views = Views(images, SMALL, TWO, "crop+blur", seed=3)
    again: Views = pickle.loads(pickle.dumps(views))
    assert len(again) == len(images)
    assert same(again[1, 2], views[1, 2])


@pytest.mark.parametrize("policy", [*POLICIES, *STEPS, "blur+flip", "grey+jitter"])
@pytest.mark.parametrize("size", [(64, 64), (40, 97), (9, 5), (1, 1), (200, 3)])
def test_every_policy_makes_views_of_every_image(policy: str, size: tuple[int, int]) -> None:
    image = open_images("sample:digits").load(0).resize(size)
    view = make_policy(policy, 24)(image, numpy_random())
    assert view.shape == (3, 24, 24)
    assert view.dtype == torch.uint8


def test_the_paper_policy_is_all_steps() -> None:
    assert make_policy("paper", 32).steps == STEPS
    assert POLICIES["crop+flip"] == ("crop", "flip")
    assert make_policy("blur+crop", 32).steps == ("crop", "blur")
    assert make_policy("paper", 64).preprocess == Preprocess.for_size(64)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("papr", "did you mean 'paper'"),
        ("crop+flipp", "did you mean 'flip'"),
        ("crop+crop", "twice"),
        ("", "unknown view policy or step ''"),
        ("crop+", "unknown view policy or step ''"),
    ],
)
def test_unknown_policies_are_refused(policy: str, words: str) -> None:
    with pytest.raises(MvmrError) as raised:
        make_policy(policy, 32)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_sizes_must_agree() -> None:
    with pytest.raises(MvmrError, match="views of 64 px, but the preprocessing crops to 32 px"):
        make_policy("paper", 64, SMALL)


def test_no_step_is_the_original(images: ImageSet) -> None:
    preprocess = Preprocess(resize=40, crop=32, interpolation="bicubic")
    for policy in ("none",):
        item = Views(images, preprocess, TWO, policy, seed=0)[0, 9]
        assert torch.equal(item["original"], item["augmented"])


def share(policy: str, image: Image.Image, changed: object, tries: int = 600) -> float:
    """The share of views for which `changed` holds; the seed is fixed, so the figure is, too."""
    made, random = make_policy(policy, image.width), numpy_random(1)
    assert callable(changed)
    return sum(bool(changed(made(image, random))) for _ in range(tries)) / tries


@pytest.mark.slow
def test_steps_happen_as_often_as_they_should(images: ImageSet) -> None:
    image = images.load(20).resize((16, 16))
    original = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert (original[0] != original[1]).any()

    def is_grey(view: torch.Tensor) -> bool:
        return bool((view[0] == view[1]).all() and (view[1] == view[2]).all())

    assert share("grey", image, is_grey) == pytest.approx(0.2, abs=0.05)
    assert share("flip", image, lambda v: torch.equal(v, original.flip(-1))) == pytest.approx(0.5, abs=0.06)
    assert share("jitter", image, lambda v: not torch.equal(v, original)) == pytest.approx(0.8, abs=0.05)
    assert share("blur", image, lambda v: not torch.equal(v, original)) > 0.85  # the least sigmas change nothing
    assert share("crop", image, lambda v: not torch.equal(v, original)) > 0.95


def test_grey_is_the_luminance(images: ImageSet) -> None:
    image = images.load(20)
    views = [make_policy("grey", 64)(image, numpy_random(seed)) for seed in range(40)]
    expected = torch.from_numpy(np.array(image.convert("L").convert("RGB"))).permute(2, 0, 1)
    assert any(torch.equal(view, expected) for view in views)


@pytest.mark.slow
def test_crops_are_drawn_as_torchvision_draws_them() -> None:
    random, count = numpy_random(3), 3000
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reference = v2.RandomResizedCrop(64, scale=CROP_AREA)
        blank = [torch.zeros(3, 75, 100)]
        drawn = [reference.make_params(blank) for _ in range(count)]
    theirs = np.array([[d["left"], d["top"], d["left"] + d["width"], d["top"] + d["height"]] for d in drawn])
    ours = np.array([crop_box(100, 75, random) for _ in range(count)])
    assert (ours >= 0).all()
    assert (ours[:, 2] <= 100).all()
    assert (ours[:, 3] <= 75).all()
    for boxes in (ours, theirs):
        widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        assert (widths * heights / 7500).min() > 0.07
        assert (widths / heights).max() < 1.45
    for function in (
        lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) / 7500,
        lambda b: np.log((b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1])),
        lambda b: (b[:, 2] + b[:, 0]) / 200,
        lambda b: (b[:, 3] + b[:, 1]) / 150,
    ):
        first, second = np.sort(function(ours)), np.sort(function(theirs))
        assert np.abs(first - second).mean() < 0.02


@pytest.mark.parametrize(
    ("width", "height", "box"), [(1000, 10, (493, 0, 506, 10)), (10, 1000, (0, 493, 10, 506)), (1, 1, (0, 0, 1, 1))]
)
def test_an_image_too_long_for_any_crop_gives_its_centre(width: int, height: int, box: tuple[int, ...]) -> None:
    assert crop_box(width, height, numpy_random()) == box


def test_jitter_spans_its_range() -> None:
    """On a grey image only brightness is left of the jitter: factors from 0.2 to 1.8, no wider."""
    image = Image.new("RGB", (4, 4), (100, 100, 100))
    policy, random = make_policy("jitter", 4), numpy_random(5)
    levels = np.array([int(policy(image, random)[0, 0, 0]) for _ in range(600)])
    assert 19 <= levels.min() < 26
    assert 174 < levels.max() <= 181
    assert abs(levels.mean() - 100) < 6


def test_jitter_turns_the_hue_by_a_fifth_at_most() -> None:
    image = Image.new("RGB", (4, 4), (200, 40, 40))
    policy, random = make_policy("jitter", 4), numpy_random(5)
    views = [Image.fromarray(policy(image, random).permute(1, 2, 0).numpy()) for _ in range(300)]
    hues = np.array([pixel[0] for view in views if (pixel := view.convert("HSV").getpixel((0, 0)))[1] > 60])  # type: ignore[index]
    turned = (hues.astype(float) / 256 + 0.5) % 1 - 0.5
    assert turned.min() == pytest.approx(-0.2, abs=0.04)
    assert turned.max() == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 50), (224, 224)])
@pytest.mark.parametrize("sigma", [0.1, 0.6, 2.0])
def test_the_blur_is_torchvisions(images: ImageSet, height: int, width: int, sigma: float) -> None:
    pixels = np.array(images.load(3).resize((width, height)))
    kernel = blur_kernel(min(height, width))
    reference = v2.functional.gaussian_blur(torch.from_numpy(pixels).permute(2, 0, 1), [kernel, kernel], [sigma, sigma])
    ours = gaussian_blur(pixels, kernel, sigma).astype(int)
    difference = np.abs(ours - reference.permute(1, 2, 0).numpy().astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize(("size", "kernel"), [(8, 3), (28, 3), (32, 3), (64, 7), (96, 9), (224, 23)])
def test_the_blur_kernel_is_an_odd_tenth_of_the_side(size: int, kernel: int) -> None:
    assert blur_kernel(size) == kernel
    assert kernel % 2 == 1


def test_a_black_border_does_not_creep_in() -> None:
    white = np.full((20, 30, 3), 255, np.uint8)
    assert (gaussian_blur(white, 7, 2.0) == 255).all()


def test_views_of_other_modes_are_made(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("photos")
    Image.new("CMYK", (50, 40)).save(folder / "a.jpg")
    Image.fromarray(np.full((40, 50), 65535, np.uint16)).save(folder / "b.png")
    views = Views(open_images(folder, "unlabelled"), SMALL, TWO, "none", seed=0)
    assert int(views[0, 1]["original"].min()) == 255


def test_sources_may_be_replaced_by_ones_that_count(images: ImageSet) -> None:
    """A view loads its image once, however many augmentations it makes."""

    class Counting:
        keys = images.source.keys
        loads = 0

        def load(self, index: int) -> Image.Image:
            self.loads += 1
            return images.source.load(index)

    source = Counting()
    Views(replace(images, source=source), SMALL, THREE, "paper", seed=0)[0, 0]
    assert source.loads == 1
