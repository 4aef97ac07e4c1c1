"""The student at work: images in, features out, by the preprocessing its bundle says."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from mvmr.bundles import weights
from mvmr.bundles.bundle import Bundle, encoder_file, write
from mvmr.bundles.preprocess import Preprocess
from mvmr.bundles.tensors import Normalise, channels_first
from mvmr.errors import MvmrError, one_line
from mvmr.models.backbone import Backbone
from mvmr.models.folding import fold_batch_norm, plain_copy
from mvmr.models.table import backbone_of

Images = Sequence[Image.Image | str | Path] | npt.NDArray[np.uint8]


class Student:
    """An encoder with its preprocessing, frozen; also a `mvmr.representations.Representation`.

    identity: the bundle's embedding-space id; name: a short name for caches and tables
    backbone: what the encoder is, of a bundle's student
    """

    def __init__(
        self, encoder: nn.Module, preprocess: Preprocess, *, dim: int, name: str, identity: str,
        backbone: Backbone | None = None,
    ) -> None:  # fmt: skip
        self.encoder, self.backbone = encoder.eval(), backbone
        self.preprocess, self.dim, self.name, self.identity = preprocess, dim, name, identity
        self._normalise = Normalise(preprocess)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.encoder.parameters()).device

    @property
    def parameters(self) -> int:
        """How many numbers the encoder has learned."""
        return sum(values.numel() for values in self.encoder.parameters())

    def copy_for_export(self, *, dense: bool = False) -> nn.Module:
        """A copy of the encoder as it is exported: float32, on the CPU, batch norms folded.

        dense: see `mvmr.models.backbone.Backbone.copy_for_export`
        """
        if self.backbone is None and not dense:
            return fold_batch_norm(plain_copy(self.encoder))
        return self._known_backbone().copy_for_export(self.encoder, dense=dense)

    def prepare(self, image: Image.Image) -> Tensor:
        """Resize and crop one image of any mode: uint8 [3, S, S], not normalised."""
        return channels_first(self.preprocess.image(image))

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> Tensor:
        """Embed prepared images.

        Shapes: uint8 [B, 3, S, S], not normalised, on the student's device -> float32 [B, D] on that device.
        """
        self.encoder.eval()  # somebody may have trained it in between
        features: Tensor = self.encoder(self._normalise.to(batch.device)(batch))
        return features.float()

    @torch.no_grad()
    def dense(self, batch: Tensor) -> Tensor:
        """Map prepared images: their features before they are pooled.

        Shapes: uint8 [B, 3, S, S], not normalised, on the student's device -> float32 [B, h, w, C] on that device.
        Raises: MvmrError for a network that has no such map.
        """
        self.encoder.eval()  # as above
        _, maps = self._known_backbone().dense(self.encoder)(self._normalise.to(batch.device)(batch))
        return cast(Tensor, maps.float())

    def embed(self, images: Images, *, batch_size: int = 64, dense: bool = False) -> Tensor:
        """Embed decoded images or image files; each is resized and cropped as in training.

        images: PIL images of any size and mode, paths, or uint8 [N, H, W, 3] RGB in [0, 255].
        dense: features of each patch of the resized and cropped image, row by row from the top left, before pooling.
            For ResNets and whatever else pools by a plain average, their mean over h and w is the embedding, and C is
            D. Where a network has more layers after pooling (MobileNetV3's last convolution, ConvNeXt's norm), it is
            not: the map is what the network itself has before it pools, its width C may be another than D, and heads
            do not take it. Transformers give the tokens of the patches, with the norm they leave the last block by.
        Shapes: returns float32 [N, D] on the CPU, not normalised; with `dense` [N, h, w, C]. Row i belongs to image i
            alone.

        Raises: MvmrError for a file that cannot be read (naming it), an array of another type or shape, or, with
            `dense`, a network that has no map.
        """
        if isinstance(images, str | Path | Image.Image):
            raise MvmrError("embed takes several images; put the one into a list")
        if isinstance(images, np.ndarray) and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3):
            seen = f"{images.dtype} {list(images.shape)}"
            raise MvmrError(f"embed takes arrays of uint8 [N, H, W, 3], this one is {seen}")
        run: Callable[[Tensor], Tensor] = self.dense if dense else self
        rows = []
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            batch = torch.stack([self._read(image, start + i) for i, image in enumerate(part)])
            rows.append(run(batch.to(self.device)).cpu())
        if not rows:  # the shape of none is that of a black image's
            side = self.preprocess.crop
            rows.append(run(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.device)).cpu()[:0])
        return torch.cat(rows)

    def _known_backbone(self) -> Backbone:
        if self.backbone is None:
            raise MvmrError(f"where {self.name} pools its features is not known here; load it from a bundle")
        return self.backbone

    def _read(self, image: object, index: int) -> Tensor:
        if not isinstance(image, Image.Image | np.ndarray | str | Path):
            kind = type(image).__name__
            raise MvmrError(f"embed takes PIL images, paths or a uint8 array, image number {index} is a {kind}")
        try:
            if isinstance(image, Image.Image):
                return self.prepare(image)
            if isinstance(image, np.ndarray):
                return self.prepare(Image.fromarray(image))
            with Image.open(image) as file:  # prepared while open: some formats read their EXIF block late
                return self.prepare(file)
        except Exception as error:  # Pillow's decoders raise a dozen kinds for strangers' bytes
            name = image if isinstance(image, str | Path) else f"number {index} ({type(image).__name__})"
            reason = one_line(getattr(error, "strerror", None) or error)
            raise MvmrError(f"cannot read image {name}: {reason}; mend it or leave it out") from error


def load_student(bundle: Bundle, *, device: str = "cpu") -> Student:
    """Build the student of `bundle`; `Bundle.student` calls this.

    Raises: MvmrError when the weights are damaged or of another architecture, or there is no such device.
    """
    manifest, file = bundle.manifest, encoder_file(bundle)
    try:
        backbone = backbone_of(manifest)
    except MvmrError as error:
        raise MvmrError(f"bundle {bundle.path}: {error}; it was not written by this mvmr: take a whole copy") from error
    encoder = backbone.build()
    weights.fit(encoder, weights.read(file), origin=f"bundle {bundle.path}, encoder.safetensors,")
    try:
        encoder = encoder.to(device).requires_grad_(False)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise MvmrError(
            f"cannot use device {device!r} ({one_line(error)}); try device='cpu', or see `mvmr doctor`"
        ) from error
    return Student(
        encoder,
        manifest.preprocessing,
        dim=manifest.embedding_dim,
        name=f"student-{manifest.backbone}",
        identity=bundle.space_id,
        backbone=backbone,
    )


def save_student(
    folder: Path,
    encoder: nn.Module,
    backbone: Backbone,
    *,
    preprocess: Preprocess,
    training: Mapping[str, Any],
    projector: nn.Module | None = None,
) -> Bundle:
    """Write a trained encoder, and its projector when it is kept, as the bundle in the working folder of its run.

    training: how it was made; see `mvmr.bundles.manifest.Manifest`.

    Raises: MvmrError when the weights are not those of such an encoder or not finite (nothing is written), the record
        is not JSON, or the disk is full.
    """
    state = encoder.state_dict()
    with torch.device("meta"):
        weights.check_fit(backbone.build(), state, origin=f"encoder weights for {backbone.name}")
    return write(
        folder,
        backbone=backbone.name,
        options=backbone.options,
        embedding_dim=backbone.width,
        preprocessing=preprocess,
        training=training,
        encoder_state=state,
        projector_state=projector.state_dict() if projector is not None else None,
    )
