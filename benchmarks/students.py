"""Students of random weights, and the ways to run one on a device: uint8 images in host memory in, features out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.preprocess import Preprocess
from mvmr.bundles.tensors import Normalise
from mvmr.data import ImageSet
from mvmr.errors import MvmrError
from mvmr.models.torchvision_resnet import Resnet
from mvmr.training.pretraining import recalibrate

# [N, S, S, 3] uint8 -> [N, D] float32
Engine = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]


def random_bundle(folder: Path, images: ImageSet, *, backbone: str, size: int, device: str = "cpu") -> Path:
    """A bundle of random weights whose batch norms have seen ``images``."""
    torch.manual_seed(0)
    config, preprocess = Resnet(name=backbone), Preprocess.for_size(size)
    encoder = config.build().to(device)
    for part in encoder.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.2, 0.5)  # else each block is the identity
    recalibrate(encoder, images, preprocess, batch_size=16, workers=0, device=torch.device(device))
    working = folder / "student.partial"
    working.mkdir()
    bundles.write(
        working, backbone=backbone, options={"small_kernel": False}, embedding_dim=config.width,
        preprocessing=preprocess, training={"data": {"name": images.name}}, encoder_state=encoder.state_dict(),
    )  # fmt: skip
    bundles.publish(working, folder / "student")
    return folder / "student"


def half(device: str) -> torch.dtype:
    """The half precision that a device computes fast in: float16, or bfloat16 on a processor."""
    return torch.float16 if device == "cuda" else torch.bfloat16


def torch_engine(
    bundle: Bundle,
    device: str,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    compiled: bool = False,
) -> Engine:
    """The student in torch."""
    student = bundle.student(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    encoder = student.encoder.to(dtype=dtype, memory_format=layout)
    if compiled:
        encoder = torch.compile(encoder, dynamic=False)
    normalise = Normalise(bundle.manifest.preprocessing).to(device)

    @torch.inference_mode()
    def run(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        batch = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous(memory_format=layout)
        features: npt.NDArray[np.float32] = encoder(normalise(batch).to(dtype)).float().cpu().numpy()
        return features

    return run


def onnx_engines(path: Path, device: str, data: Path) -> dict[str, Engine]:
    """The student exported in float32 and half precision, on onnxruntime; ``data``: images to verify the export with.

    Raises:
        MvmrError: onnxruntime is not there or can't use this device, or what exports isn't there.
    """
    try:
        from mvmr.export.artifacts import ARTIFACTS, EMBEDDING
        from mvmr.export.runtimes import Runner, check_provider, open_artifact

        check_provider(device)
        from mvmr.export.export import export

        export(path, formats=["onnx", "fp16"], data=str(data), images=32, provider=device)
    except ImportError as error:
        raise MvmrError(f"{error.name} is not installed here") from error
    exported = bundles.load(path)

    def engine(runner: Runner) -> Engine:
        return lambda images: runner(images)[EMBEDDING]

    return {
        f"{row.runtime} {row.precision}": engine(open_artifact(row, exported, provider=device))
        for row in (ARTIFACTS["onnx"], ARTIFACTS["fp16"])
    }
