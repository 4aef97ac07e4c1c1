"""A tiny CLIP, trained here in a minute or two: the quickstart's teacher where real CLIP weights cannot be fetched.

Its classes, tokenizer and file format are open_clip's own, so it is loaded by the code that loads a real CLIP.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, set_model_preprocess_cfg
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import Normalize

from mvmr.data.image_set import ImageSet
from mvmr.errors import MvmrError
from mvmr.progress import track
from mvmr.storage.atomic import atomic, sync, write_json
from mvmr.training.precision import native_precision

TEMPLATES = (
    "a photo of {}.",
    "a close-up photo of {}.",
    "a small crop of a photo of {}.",
    "a picture showing {}.",
    "part of a photograph of {}.",
    "{}.",
)
"""Captions of an image whose class is {}; the same ones make a good zero-shot classifier."""

CONTEXT_LENGTH = 16
VOCABULARY = 49408  # of the byte-pair tokenizer that open_clip ships
MAX_LOGIT_SCALE = 100.0


@dataclass(frozen=True, kw_only=True)
class TinyClip:
    """Size and training of a tiny CLIP; the defaults were chosen for `sample:patches` (docs/method.md).

    layers: four numbers build open_clip's ModifiedResNet with so many blocks a stage, one number its
        VisionTransformer with so many blocks; `patch_size` and `head_width` speak of the latter (and of attention)
    crop: smallest area of a training crop, as a share of the image; aspect: its largest aspect ratio
    jitter: brightness, contrast and saturation vary by up to this share
    """

    image_size: int = 32
    layers: tuple[int, ...] = (1, 1, 1, 1)
    width: int = 32
    patch_size: int = 8
    head_width: int = 64
    embed_dim: int = 128
    text_width: int = 64
    text_layers: int = 1
    steps: int = 60
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 10
    crop: float = 0.5
    aspect: float = 4 / 3
    jitter: float = 0.2

    def __post_init__(self) -> None:
        if len(self.layers) not in (1, 4):
            raise MvmrError(f"layers = {self.layers} of a tiny CLIP must be one number (ViT) or four (ResNet)")
        if self.steps < 1 or self.batch_size < 2:
            raise MvmrError(f"a tiny CLIP needs steps >= 1 and batch_size >= 2, got {self.steps} and {self.batch_size}")

    def model_config(self) -> dict[str, object]:
        """Return the architecture in the words of open_clip's model_cfg."""
        vision: dict[str, object] = {"image_size": self.image_size, "width": self.width, "head_width": self.head_width}
        if len(self.layers) == 4:
            vision |= {"layers": list(self.layers)}
        else:
            vision |= {"layers": self.layers[0], "patch_size": self.patch_size}
        text = {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": VOCABULARY,
            "width": self.text_width,
            "heads": max(1, self.text_width // 32),
            "layers": self.text_layers,
        }
        return {"embed_dim": self.embed_dim, "vision_cfg": vision, "text_cfg": text}


def train_tiny_clip(
    images: ImageSet, out: Path, *, config: TinyClip | None = None, seed: int = 0, progress: bool = False
) -> Path:
    """Train a tiny CLIP on images captioned with their class names; write it in open_clip's hub format.

    The loss is the cross-entropy of each image against one caption of every class, so images of one class
    in a batch never count as each other's negatives. All images are held in memory: for small sets.
    Leaves the global random state as it was. When `out` already holds the same model (same settings, seed
    and data), nothing is trained.

    Writes: out/open_clip_config.json, out/open_clip_model.safetensors, out/tiny_clip.json (how it was made).
    Returns: out, for `Teacher.load(out)`.
    Raises: MvmrError when the images have no class names, or `out` holds something else.
    """
    config = config or TinyClip()
    if images.classes is None or images.labels is None:
        raise MvmrError(f"{images.name} has no class names, of which captions are made; use sample:patches")
    if len(images) < 2:
        raise MvmrError(f"{images.name} holds {len(images)} image(s); a tiny CLIP needs 2 or more")
    record = {"settings": asdict(config), "seed": seed, "data": images.name, "fingerprint": images.fingerprint}
    if _already_there(out, record):
        return out
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(config)
        with track("teacher (tiny CLIP)", 0, config.steps, per_step=config.batch_size, shown=progress) as advance:
            _fit(model, images, config, seed, advance)
    _save(model.eval(), config, record, out)
    return out


def _build(config: TinyClip) -> CLIP:
    model = CLIP(**config.model_config())
    preprocess = PreprocessCfg(size=config.image_size)
    set_model_preprocess_cfg(model, asdict(preprocess))
    if len(config.layers) == 4:
        model.visual.to(memory_format=torch.channels_last)  # convolutions are about twice as fast so on CPUs
    return model


def _fit(model: CLIP, images: ImageSet, config: TinyClip, seed: int, advance: Callable[[int, str], None]) -> None:
    preprocess = PreprocessCfg(**model.visual.preprocess_cfg)
    normalise = Normalize(mean=preprocess.mean, std=preprocess.std)
    pixels, captions = _pixels(images, preprocess), _captions(images.classes or ())
    labels = torch.from_numpy(images.labels)
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, config))
    classes = torch.arange(captions.shape[1])
    model.train()
    batches = _batches(len(images), min(config.batch_size, len(images)), config.steps, generator)
    for done, rows in enumerate(batches, start=1):
        views = normalise(augment(pixels[rows], config, generator))
        templates = torch.randint(len(TEMPLATES), classes.shape, generator=generator)
        loss = _loss(model, views, captions[templates, classes], labels[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))
        advance(done, f"loss {loss.item():.2f}")


def _loss(model: CLIP, views: Tensor, captions: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of normalised images [B, 3, S, S] against a caption of each class [C, 16]; labels int64 [B]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=native_precision(None, "cpu") == "bf16-mixed"):
        image = model.encode_image(views.contiguous(memory_format=torch.channels_last))
        text = model.encode_text(captions)
    cosine = F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T
    return F.cross_entropy(model.logit_scale.exp() * cosine, labels)


def augment(images: Tensor, config: TinyClip, generator: torch.Generator) -> Tensor:
    """Return an independent crop, flip and light colour jitter of each image, made as one tensor operation.

    Shapes: images [B, 3, S, S] float32 in [0, 1] -> the same.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(len(images), *shape, generator=generator) * (high - low) + low

    area = uniform(config.crop, 1.0)
    aspect = torch.exp(uniform(-math.log(config.aspect), math.log(config.aspect)))
    width = (area * aspect).sqrt().clamp(max=1.0)
    height = (area / aspect).sqrt().clamp(max=1.0)
    mirrored = torch.where(uniform(0.0, 1.0) < 0.5, -1.0, 1.0)
    maps = torch.zeros(len(images), 2, 3)  # output to input coordinates, both in [-1, 1]
    maps[:, 0, 0] = width * mirrored
    maps[:, 0, 2] = uniform(-1.0, 1.0) * (1 - width)
    maps[:, 1, 1] = height
    maps[:, 1, 2] = uniform(-1.0, 1.0) * (1 - height)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    low, high = 1 - config.jitter, 1 + config.jitter
    views = views * uniform(low, high, 1, 1, 1)  # brightness
    views = torch.lerp(views.mean((1, 2, 3), keepdim=True), views, uniform(low, high, 1, 1, 1))  # contrast
    views = torch.lerp(views.mean(1, keepdim=True), views, uniform(low, high, 1, 1, 1))  # saturation
    return views.clamp(0, 1)


def _pixels(images: ImageSet, preprocess: PreprocessCfg) -> Tensor:
    """The images as the evaluation transform makes them, [N, 3, S, S] in [0, 1]: all of its steps but the last."""
    steps = image_transform_v2(preprocess, is_train=False).transforms[:-1]

    def prepare(index: int) -> Tensor:
        value: Any = images.load(index)
        for step in steps:
            value = step(value)
        return cast(Tensor, value)

    return torch.stack([prepare(index) for index in range(len(images))])


def _captions(classes: tuple[str, ...]) -> Tensor:
    """Tokens of every caption: int64 [templates, classes, 16]."""
    tokenizer = SimpleTokenizer(context_length=CONTEXT_LENGTH)
    return torch.stack([tokenizer([template.format(name) for name in classes]) for template in TEMPLATES])


def _optimizer(model: CLIP, config: TinyClip) -> torch.optim.Optimizer:
    """AdamW; weight decay for matrices and kernels only, and not for embeddings (most tokens never occur)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (plain if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)


def _warmup_cosine(step: int, config: TinyClip) -> float:
    if step < config.warmup:
        return (step + 1) / config.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))


def _batches(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers of each step's batch, in a new order every epoch; an epoch's short last batch is left out."""
    done = 0
    while True:
        for rows in torch.randperm(count, generator=generator).split(size):
            if len(rows) < size:
                break
            if done == steps:
                return
            yield rows
            done += 1


def _already_there(out: Path, record: dict[str, object]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        if json.loads((out / "tiny_clip.json").read_text(encoding="utf-8")) == json.loads(json.dumps(record)):
            return True
    except (OSError, ValueError):
        pass
    raise MvmrError(f"{out} holds something else than this tiny CLIP; remove it or choose another folder")


def _save(model: CLIP, config: TinyClip, record: dict[str, object], out: Path) -> None:
    """Write a folder beside `out` and rename it, so that `out` is whole or not there."""
    preprocess = {key: model.visual.preprocess_cfg[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    hub = {"model_cfg": config.model_config(), "preprocess_cfg": preprocess}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", ignore_cleanup_errors=True) as name:
        folder = Path(name) / out.name
        folder.mkdir()
        write_json(folder / "open_clip_config.json", hub)
        write_json(folder / "tiny_clip.json", record)
        with atomic(folder / "open_clip_model.safetensors") as weights:
            save_file({key: value.contiguous() for key, value in model.state_dict().items()}, weights)
        os.replace(folder, out)
    sync(out.parent)
