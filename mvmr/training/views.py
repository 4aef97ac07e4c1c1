"""Views of an image: the original, and augmented copies of it, seeded for each image on its own."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from mvmr.bundles.preprocess import Preprocess, to_rgb
from mvmr.bundles.tensors import channels_first
from mvmr.data.image_set import ImageSet
from mvmr.errors import MvmrError, unknown
from mvmr.methods.method import ViewSpec

Pixels = npt.NDArray[np.uint8]

# the order in which they are applied, whatever the order they are named in
STEPS = ("crop", "flip", "jitter", "grey", "blur")
# the paper's policy, and the way there step by step
POLICIES: dict[str, tuple[str, ...]] = {
    "none": (),
    "crop": ("crop",),
    "crop+flip": ("crop", "flip"),
    "crop+flip+jitter": ("crop", "flip", "jitter"),
    "crop+flip+jitter+grey": ("crop", "flip", "jitter", "grey"),
    "paper": STEPS,
}

CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
FLIP = 0.5
JITTER = 0.8
JITTER_STRENGTH = 0.8  # of brightness, contrast and saturation: factors in [0.2, 1.8]
JITTER_HUE = 0.2  # in turns of the colour wheel
GREY = 0.2
SIGMA = (0.1, 2.0)  # of the blur, in pixels
_CROP_TRIES = 10


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The augmentation made of `steps`; without "crop" it starts from the preprocessing's resize and centre crop.

    crop: random area (`area`, 8 to 100 % of the image's) and ratio (3:4 to 4:3), resized to S, bilinear, antialiased
    flip: left-right, p = 0.5
    jitter: brightness, contrast, saturation (0.8) and hue (0.2) in random order, p = 0.8
    grey: p = 0.2
    blur: always; Gaussian, odd kernel of about S / 10, sigma 0.1 to 2.0 pixels

    Source: the parameters of MV-MR; crop and jitter draw as torchvision's RandomResizedCrop and ColorJitter do.
    """

    steps: tuple[str, ...]
    preprocess: Preprocess
    size: int
    area: tuple[float, float] = CROP_AREA

    def __call__(self, image: Image.Image, random: np.random.Generator) -> torch.Tensor:
        """Return one augmented view; `random` is the only source of chance.

        Shapes: PIL image -> uint8 [3, S, S], sRGB in [0, 255], not normalised, S = size.
        """
        size = self.size
        if "crop" in self.steps:
            picture = to_rgb(image, self.preprocess.background)
            box = crop_box(picture.width, picture.height, random, self.area)
            picture = picture.crop(box).resize((size, size), Image.Resampling.BILINEAR)
        else:
            picture = Image.fromarray(self.preprocess.image(image))
        if "flip" in self.steps and random.random() < FLIP:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if "jitter" in self.steps and random.random() < JITTER:
            picture = _jitter(picture, random)
        if "grey" in self.steps and random.random() < GREY:
            picture = picture.convert("L").convert("RGB")
        pixels = np.array(picture)
        if "blur" in self.steps:
            pixels = gaussian_blur(pixels, blur_kernel(size), random.uniform(*SIGMA))
        return channels_first(pixels)


def make_policy(name: str, size: int, preprocess: Preprocess | None = None) -> Policy:
    """Return the policy called `name`: one of POLICIES, or STEPS joined by "+", such as "crop+blur".

    size: side S of the views in pixels
    preprocess: used where the policy does not crop; `Preprocess.for_size(size)` when None

    Raises: MvmrError for an unknown policy or step, a step named twice, or a preprocessing of another size.
    """
    preprocess = preprocess or Preprocess.for_size(size)
    if preprocess.crop != size:
        raise MvmrError(f"policy {name!r}: views of {size} px, but the preprocessing crops to {preprocess.crop} px")
    if name in POLICIES:
        return Policy(steps=POLICIES[name], preprocess=preprocess, size=size)
    names = name.split("+")
    for step in names:
        if step not in STEPS:
            raise unknown("view policy or step", step, [*POLICIES, *(s for s in STEPS if s not in POLICIES)])
    if len(set(names)) < len(names):
        raise MvmrError(f"policy {name!r} names a step twice; name each of {', '.join(STEPS)} at most once")
    return Policy(steps=tuple(step for step in STEPS if step in names), preprocess=preprocess, size=size)


def make_policies(specs: Sequence[ViewSpec], name: str, preprocess: Preprocess) -> dict[str, Policy]:
    """The policy of each view that a method asks for, by the view's name; `name`: of the policy of those without one.

    Raises: MvmrError as `make_policy`; and for a view of another size or area whose policy doesn't crop.
    """
    policies = {}
    for spec in specs:
        policy = make_policy(spec.policy or name, preprocess.crop, preprocess)
        if (spec.scale != 1 or spec.area) and "crop" not in policy.steps:
            raise MvmrError(
                f"view {spec.name!r} is a crop, and policy {spec.policy or name!r} doesn't crop: give one that does"
            )
        size = view_side(spec, preprocess.crop)
        policies[spec.name] = replace(policy, size=size, area=spec.area or CROP_AREA)
    return policies


def view_side(spec: ViewSpec, size: int) -> int:
    """Side of a view in pixels, where that of the others is `size`."""
    return max(1, round(spec.scale * size))


def view_sides(specs: Sequence[ViewSpec], size: int) -> set[int]:
    """Sides of all views in pixels."""
    return {view_side(spec, size) for spec in specs}


class Views(Dataset[dict[str, torch.Tensor]]):
    """The training data: for (epoch, index) the views of image `index` that a method asks for, never a label.

    What an item holds depends on (seed, epoch, index) and nothing else: not on the number of workers, the order of
    reading or the global random state, which is neither read nor changed. May be pickled to worker processes.

    images: where the images come from
    preprocess: what a view is made by where it is not cropped at random
    policy: name for `make_policy`, of views that name none
    """

    def __init__(
        self, images: ImageSet, preprocess: Preprocess, specs: Sequence[ViewSpec], policy: str, *, seed: int
    ) -> None:
        self.images = images
        self.seed = seed
        self.policies = make_policies(specs, policy, preprocess)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return the views of image `index` in `epoch`; `item` is (epoch, index).

        Shapes: "index" int64 []; each view by its name uint8 [3, S, S], sRGB in [0, 255], not normalised; S is
        preprocess.crop times the view's scale.
        """
        epoch, index = item
        image, views, branch = self.images.load(index), {"index": torch.tensor(index)}, 0
        for name, policy in self.policies.items():
            views[name] = policy(image, item_random(self.seed, epoch, index, branch))
            branch += bool(policy.steps)  # what is not augmented takes no part of the chance
        return views


def item_random(seed: int, epoch: int, index: int, branch: int) -> np.random.Generator:
    """Return the random generator of one view; any two that differ in an argument are independent."""
    text = f"{seed}/{epoch}/{index}/{branch}".encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


def crop_box(
    width: int, height: int, random: np.random.Generator, share: tuple[float, float] = CROP_AREA
) -> tuple[int, int, int, int]:
    """Draw a crop (left, top, right, bottom): uniform area, log-uniform ratio, uniform place.

    share: of the image's area, from and to

    An image so long that no drawn shape fits gets its largest centre crop within the ratios.
    """
    area = width * height
    for _ in range(_CROP_TRIES):
        part = area * random.uniform(*share)
        ratio = math.exp(random.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(part * ratio)), round(math.sqrt(part / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(random.integers(0, width - w, endpoint=True))
            top = int(random.integers(0, height - h, endpoint=True))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * CROP_RATIO[1])))
    h = min(height, max(1, round(width / CROP_RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def blur_kernel(size: int) -> int:
    """Return the odd kernel side nearest to a tenth of `size`, at least 3."""
    return max(3, 2 * round((size / 10 - 1) / 2) + 1)


def gaussian_blur(pixels: Pixels, kernel: int, sigma: float) -> Pixels:
    """Blur with a Gaussian cut to `kernel` pixels, the image mirrored at its edges.

    By scipy: at 224 px some thirty times as fast as torchvision's on one core, and within one grey level of it.

    Shapes: uint8 [H, W, 3] -> uint8 [H, W, 3]; kernel odd.
    """
    from scipy.ndimage import gaussian_filter  # here: most policies have no blur, and do without scipy

    reach = kernel // 2
    blurred = gaussian_filter(pixels.astype(np.float32), (sigma, sigma, 0), mode="mirror", radius=(reach, reach, 0))
    return np.rint(blurred).astype(np.uint8)


def _jitter(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    order = random.permutation(4)
    brightness, contrast, saturation = random.uniform(1 - JITTER_STRENGTH, 1 + JITTER_STRENGTH, 3).tolist()
    hue = random.uniform(-JITTER_HUE, JITTER_HUE)
    for step in order:
        if step == 0:
            picture = functional.adjust_brightness(picture, brightness)
        elif step == 1:
            picture = functional.adjust_contrast(picture, contrast)
        elif step == 2:
            picture = functional.adjust_saturation(picture, saturation)
        else:
            picture = functional.adjust_hue(picture, hue)
    return picture
