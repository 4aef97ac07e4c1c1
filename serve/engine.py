"""One artifact of a bundle in its runtime: chosen, checked, and ready to embed (torch-free)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mvmr import strict_json
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.head import Head
from mvmr.bundles.preprocess import Preprocess
from mvmr.data.image_bytes import LIMITS, Limits, Prepared, prepare
from mvmr.errors import MvmrError, unknown
from mvmr.export.artifacts import ARTIFACTS, DENSE, EMBEDDING, Artifact, Precision, decode_canary, report_of
from mvmr.export.runtimes import PROVIDERS, Runner, check_provider, export_command, locate, open_artifact, run_by
from mvmr.serve.vectors import normalized_space, unit

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Images = Sequence[Image.Image | str | Path | bytes] | Pixels

# Largest relative error of the canary's embedding: another processor may round otherwise, a broken engine does worse.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 3e-2, "int8": 0.1}


@dataclass(frozen=True, eq=False)
class Engine:
    """A student's exported file in memory; make one with `load`.

    name: of the bundle
    space_id: of raw vectors, 32 hex digits: vectors are comparable exactly when theirs are equal; see `space_of`
    preprocess: how an image becomes what the engine takes; dim, size: width D of the embedding, side S of the images
    artifact, file: what runs, and its place in the bundle; provider: what it runs on
    heads: the bundle's linear heads, by name
    reference: float32 [D], the canary's embedding on the machine of the export, None in reports of before
    """

    path: Path
    name: str
    space_id: str
    preprocess: Preprocess
    dim: int
    artifact: Artifact
    file: str
    provider: str
    heads: Mapping[str, Head]
    runner: Runner
    reference: Floats | None

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str],
        *,
        precision: str | None = None,
        provider: str = "cpu",
        threads: int | None = None,
    ) -> Engine:
        """Load the exported file of a bundle, after checking its hash and that it belongs to the bundle's student.

        Args:
            precision: ``fp32``, ``fp16`` or ``int8``; None takes int8 on a processor and fp16 on a GPU where the bundle
                has them, else fp32.
            provider: a key of `mvmr.export.runtimes.PROVIDERS`, such as ``cpu`` or ``cuda``; never another one instead.
            threads: of one batch; None takes all cores of this process.

        Raises: MvmrError for a bundle that is not there or damaged (naming the file), nothing exported, or a provider
            that can't be had.
        """
        check_provider(provider)
        opened = bundles.load(bundle, verify=False)
        artifact = _choose(opened, precision, provider)
        runner = open_artifact(artifact, opened, provider=provider, threads=threads)
        file = locate(artifact, opened)
        return cls(
            path=opened.path,
            name=opened.path.resolve().name,
            space_id=opened.space_id,
            preprocess=opened.manifest.preprocessing,
            dim=opened.manifest.embedding_dim,
            artifact=artifact,
            file=file,
            provider=provider,
            heads=read_heads(opened),
            runner=runner,
            reference=_reference(opened, file),
        )

    @property
    def size(self) -> int:
        """Side S of the images in pixels."""
        return self.preprocess.crop

    @property
    def at_once(self) -> int:
        """Images to a batch that make the most of this provider."""
        return PROVIDERS[self.provider].at_once

    @property
    def precision(self) -> Precision:
        """What is computed in."""
        return self.artifact.precision

    def space_of(self, *, normalize: bool) -> str:
        """The space of the vectors that `embed` gives, 32 hex digits: that of normalised ones is another."""
        return normalized_space(self.space_id) if normalize else self.space_id

    def __call__(self, pixels: Pixels) -> Floats:
        """Embed prepared images.

        Shapes: uint8 [N, S, S, 3] RGB -> float32 [N, D], not normalised; row i belongs to image i alone.
        """
        return self.runner(pixels)[EMBEDDING]

    def dense(self, pixels: Pixels) -> Floats:
        """Map prepared images: their features before they are pooled.

        Shapes: uint8 [N, S, S, 3] RGB -> float32 [N, h, w, C], not normalised.
        Raises: MvmrError for a file that was exported without.
        """
        outputs = self.runner(pixels)
        if DENSE not in outputs:
            cure = f"export it by `mvmr export {self.path} --onnx --dense` and load it with precision='fp32'"
            raise MvmrError(f"{self.path / self.file} gives no dense output; {cure}")
        return outputs[DENSE]

    def embed(self, images: Images, limits: Limits = LIMITS, *, dense: bool = False, normalize: bool = False) -> Floats:
        """Embed images of any size: PIL images, paths, the bytes of files, or an array; each resized and cropped.

        Shapes: N images, or uint8 [N, H, W, 3] RGB in [0, 255] -> float32 [N, D].
        limits: of pixels and formats, for paths and bytes.
        normalize: divide each by its length, which is 1 then, or 0 where all of it is 0; those are vectors of another
            space, ``space_of(normalize=True)``.
        dense: give the features of each patch instead, float32 [N, h, w, C]; see `mvmr.models.student.Student.embed`.

        Raises: MvmrError for an image that cannot be read (naming it), an array of another type or shape, or, with
            `dense`, `normalize` or a file that was exported without.
        """
        if dense and normalize:
            raise MvmrError("normalize is for embeddings, not for the features of patches; leave out one of the two")
        if isinstance(images, str | Path | bytes | Image.Image):
            raise MvmrError("embed takes several images; put the one into a list")
        if isinstance(images, np.ndarray) and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3):
            shape = f"{images.dtype} {list(images.shape)}"
            raise MvmrError(f"embed takes arrays of uint8 [N, H, W, 3], this one is {shape}")
        run: Callable[[Pixels], Floats] = self.dense if dense else self
        none = np.empty((0, self.size, self.size, 3), np.uint8)
        rows = [self.dense(none) if dense else np.empty((0, self.dim), np.float32)]
        for start in range(0, len(images), self.at_once):
            part = images[start : start + self.at_once]
            rows.append(run(np.stack([self._prepare(image, start + i, limits) for i, image in enumerate(part)])))
        return unit(np.concatenate(rows)) if normalize else np.concatenate(rows)

    def classify(self, embeddings: Floats, head: str) -> Floats:
        """Probabilities of a head's classes.

        Shapes: float32 [N, D], not normalised -> float32 [N, C], rows sum to 1.
        Raises: MvmrError for an unknown head, with the nearest.
        """
        if head not in self.heads:
            raise unknown("head", head, self.heads)
        return self.heads[head].probabilities(embeddings)

    def with_heads_of_now(self) -> Engine:
        """This engine with the heads that its bundle has by now.

        Raises: MvmrError for a head that is damaged, or a bundle of another embedding space in this one's place.
        """
        current = bundles.load(self.path, verify=False)
        if current.space_id != self.space_id:
            raise MvmrError(
                f"{self.path} is now a bundle of another embedding space ({current.space_id[:12]}) than the one in "
                f"service ({self.space_id[:12]}); restart to serve it"
            )
        heads = read_heads(current)
        if strange := [name for name, head in heads.items() if head.weight.shape[1] != self.dim]:
            raise MvmrError(f"head {strange[0]} of {self.path} does not take the {self.dim} features served; restart")
        return replace(self, heads=heads)

    def canary_error(self, embedding: Floats) -> float:
        """Relative error of the canary's embedding, float32 [D], against that of the export; 0 where it kept none.

        Above `TOLERANCE` of the precision, or not finite, this engine does not do what was verified.
        """
        reference = embedding if self.reference is None else self.reference
        return float(np.linalg.norm(embedding - reference) / max(float(np.linalg.norm(reference)), 1e-12))

    def _prepare(self, image: object, index: int, limits: Limits) -> Pixels:
        if isinstance(image, np.ndarray):
            return self.preprocess.image(Image.fromarray(image))
        if isinstance(image, Image.Image):
            return self.preprocess.image(image)
        if isinstance(image, bytes):
            name, data = f"image number {index}", image
        elif isinstance(image, str | Path):
            name = f"image {image}"
            try:
                data = Path(image).read_bytes()
            except OSError as error:
                raise MvmrError(f"cannot read {name}: {error.strerror}; mend it or leave it out") from error
        else:
            kind = type(image).__name__
            raise MvmrError(f"embed takes PIL images, paths, bytes or a uint8 array, image number {index} is a {kind}")
        outcome = prepare(data, self.preprocess, limits)
        if not isinstance(outcome, Prepared):
            raise MvmrError(f"cannot read {name}: {outcome.reason}; mend it or leave it out")
        return outcome.pixels


def read_heads(bundle: Bundle) -> dict[str, Head]:
    """The linear heads of a bundle by name; raises MvmrError naming one that is damaged."""
    return {name: bundle.head(name) for name in bundle.heads}


def _choose(bundle: Bundle, precision: str | None, provider: str) -> Artifact:
    candidates = [ARTIFACTS[key] for key in PROVIDERS[provider].preferred]
    if precision is not None:
        artifacts = run_by(provider)
        if precision not in artifacts:
            raise unknown("precision", precision, artifacts)
        candidates = [artifacts[precision]]
    for row in candidates:
        if row.files(bundle.manifest.files):
            return row
    missing = f"no {precision} file" if precision else "nothing exported"
    raise MvmrError(f"bundle {bundle.path} has {missing}; make it by {export_command(candidates[0], bundle)}")


def _reference(bundle: Bundle, artifact_file: str) -> Floats | None:
    if report_of(artifact_file) not in bundle.manifest.files:
        return None
    file = bundle.file(report_of(artifact_file))
    report = strict_json.read_object(file, "the report of an export")
    if "canary" not in report:
        return None
    try:
        reference = decode_canary(report["canary"])
        if reference.shape != (bundle.manifest.embedding_dim,):
            raise ValueError(f"its canary has {reference.size} values")
        return reference
    except (ValueError, TypeError) as error:
        raise MvmrError(f"{file} is not the report of an export ({error}); export again") from error
