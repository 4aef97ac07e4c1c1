"""Build the ONNX file in 8 bits, for the table of artifacts: quantised until it passes its gate."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from mvmr.data import ImageSet
from mvmr.export.attempt import Attempt
from mvmr.export.attempt import summarise as summarise
from mvmr.export.onnx import builder
from mvmr.export.onnx.builder import check as check
from mvmr.export.onnx.int8 import search
from mvmr.export.onnx.session import Session
from mvmr.export.verification import Report

_AT_ONCE = 32  # images


def build(attempt: Attempt) -> Report:
    """Quantise the fp32 file, calibrated on real images, with as many layers in float as its gate demands.

    It is verified on the processor, which it is made for, whatever the provider.
    """
    images = attempt.calibration
    if images is None:
        raise ValueError("int8 is calibrated on images, and there are none")

    def judge(model: bytes) -> Report:
        return attempt.compare(Session(model))

    float_model = builder.write(attempt, "fp32")
    model, float_layers, trail = search(
        float_model, _prepare_batches(attempt, images), judge, progress=attempt.progress
    )
    calibration = {"data": images.name, "split": images.split, "images": len(images)}
    return builder.verify_file(attempt, model, "cpu", kept_float=float_layers, search=trail, calibration=calibration)


def _prepare_batches(attempt: Attempt, images: ImageSet) -> Iterator[npt.NDArray[np.uint8]]:
    for start in range(0, len(images), _AT_ONCE):
        part = range(start, min(start + _AT_ONCE, len(images)))
        yield attempt.student.preprocess.batch(images.load(index) for index in part)
