"""What a teacher is: the contract that every kind keeps."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import parse_qsl

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mvmr.errors import MvmrError, summarise, unknown

OBJECT = "object"  # the kind of a teacher that a program made
_LIBRARIES = ("torch", "torchvision", "timm", "open_clip", "transformers")
_SAME = 1e-2  # of what makes two images differ
_ROUNDING = 1e-5  # of float32 on the CPU, over the largest value


class Teacher(Protocol):
    """A frozen network with its own preprocessing: one more representation of the original view.

    name: what it is, for people; weights: the tag or file its weights came from, for people
    identity: hex sha256 of all that its embeddings depend on but the image
    dim: length of an embedding; parameters: how many it has, None where nobody knows
    """

    name: str
    weights: str
    identity: str
    dim: int

    @property
    def parameters(self) -> int | None: ...

    def prepare(self, image: Image.Image) -> Tensor:
        """An RGB image of any size -> what the teacher takes, [C, H, W]; carries no weights to worker processes."""
        ...

    def __call__(self, batch: Tensor) -> Tensor:
        """Prepared images [B, C, H, W], on any device -> raw embeddings, not normalised, float32 [B, dim]."""
        ...


class TeacherGone(MvmrError):
    """A teacher that may well be right, but whose file, weights or module can't be had here."""


class NoTextTower(MvmrError):
    """A teacher of images alone, where text was to be embedded."""


class TextTeacher(Teacher, Protocol):
    """A teacher that also embeds text."""

    def zero_shot_classifier(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """A unit column for each class, float32 [dim, C]; `templates`: captions with {} in the place of its name."""
        ...


def read_settings(kind: str, what: str, keys: Sequence[str]) -> tuple[str, dict[str, str]]:
    """What stands before the question mark of "FILE?KEY=VALUE&...", and the settings behind it.

    Raises: MvmrError for a key that is none of `keys`.
    """
    file, _, query = what.partition("?")
    settings = dict(parse_qsl(query.replace("+", "%2B"), keep_blank_values=True))  # a plus is a plus here
    for key in settings:
        if key not in keys:
            raise unknown(f"setting of teacher {kind}:{file}", key, keys)
    return file, settings


def identity_of(network: nn.Module, prepare: Callable[[Image.Image], Tensor], description: Mapping[str, Any]) -> str:
    """The identity of a network: of its weights, what it is described as, and what it makes of two images' pixels."""
    own = sources_of(network)
    described = {**description, "classes": own} if own else description
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for key, tensor in sorted({**dict(network.named_buffers()), **network.state_dict()}.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for image in canaries():
        digest.update(prepare(image).detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def sources_of(network: nn.Module) -> list[str]:
    """What the classes of a network look like, but for those of libraries: what it computes by its weights."""
    sources = set()
    for kind in {type(part) for part in network.modules()}:
        if kind.__module__.partition(".")[0] not in _LIBRARIES:
            with contextlib.suppress(OSError, TypeError):  # typed into a console, or compiled
                sources.add(inspect.getsource(kind))
    return sorted(sources)


def canaries() -> list[Image.Image]:
    """Two images of different shape, the same on every machine."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)) for shape in ((64, 96, 3), (300, 200, 3))]


def measure_width(
    network: Callable[[Tensor], Tensor], prepare: Callable[[Image.Image], Tensor], name: str, *, rounding: float = 2e-3
) -> int:
    """The width of a network's embeddings, after a look at what it makes of two images, together and alone.

    rounding: how far two results of one computation may be apart, over the largest value

    Raises: MvmrError where they are no rows of one width, [B, D], in floating point and finite, or that of an image
        hangs on the others of its batch.
    """
    images = canaries()
    try:
        prepared = [prepare(image) for image in images]
    except Exception as error:  # a user's own code
        raise MvmrError(f"teacher {name}: its preprocessing failed ({summarise(error)})") from error
    if not all(isinstance(tensor, Tensor) and tensor.ndim == 3 for tensor in prepared):
        first = prepared[0]
        description = list(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise MvmrError(f"teacher {name}: its preprocessing gives {description}, not a tensor [C, H, W]")
    if prepared[0].shape != prepared[1].shape:
        shapes = " and ".join(str(list(tensor.shape)) for tensor in prepared)
        raise MvmrError(f"teacher {name}: its preprocessing gives {shapes} for two images; all must have one shape")
    try:
        with torch.no_grad():
            both, alone = network(torch.stack(prepared)), network(prepared[0][None])
    except Exception as error:  # as above
        raise MvmrError(f"teacher {name} failed on two images ({summarise(error)})") from error
    for rows, count in ((both, 2), (alone, 1)):
        if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != count or not rows.is_floating_point():
            kind = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise MvmrError(f"teacher {name} gives {kind} for a batch of {count}, not rows of floats [{count}, D]")
    if both.shape[1] != alone.shape[1]:
        widths = f"{both.shape[1]} numbers in one batch and {alone.shape[1]} in another"
        raise MvmrError(f"teacher {name} gives rows of {widths}")
    if not both.isfinite().all():
        raise MvmrError(f"teacher {name} gives values that are not finite")
    apart, size = (both[0] - both[1]).abs().amax(), both.abs().amax()
    if (both[0] - alone[0]).abs().amax() > _SAME * apart + rounding * size:
        raise MvmrError(
            f"teacher {name} gives an image another row when it stands beside another: is a batch norm in training "
            "mode, or a dropout on?"
        )
    return int(both.shape[1])


class NetworkTeacher:
    """A teacher made of a torch module and its preprocessing; see `Teacher`.

    Its identity is a hash of the weights, of what the network's own classes look like, and of what the preprocessing
    makes of two images. It is put into evaluation mode and onto the device.

    Not an `nn.Module`, on purpose: kept as an attribute of one, it stays out of that module's parameters, checkpoints
    and `train()`.

    network: prepared images [B, C, H, W] -> rows of floats [B, D]
    prepare: an RGB image of any size -> [C, H, W], of one shape for all images
    name: for people; weights: where they come from, for people
    kind, what: how a bundle's reader has it again (`mvmr.distillation.teachers.spec`); an object can't be had again
    description: what else its embeddings depend on

    Raises: MvmrError, as `measure_width`.
    """

    def __init__(
        self, network: nn.Module, prepare: Callable[[Image.Image], Tensor], *, name: str, weights: str = "its own",
        kind: str = OBJECT, what: str = "", description: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        self.name, self.weights, self.prepare = name, weights, prepare
        self.origin = {"kind": kind, "what": what}  # recorded in the bundle
        self._network = network.cpu().float().eval().requires_grad_(False)
        self.dim = measure_width(self._network, prepare, name, rounding=_ROUNDING)
        self.identity = identity_of(self._network, prepare, description or {})
        self._device = torch.device(device)
        self._network.to(self._device)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._network.parameters())

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> Tensor:
        rows: Tensor = self._network(batch.to(self._device, torch.float32))
        return rows.float()
