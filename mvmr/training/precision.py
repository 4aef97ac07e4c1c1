"""Which precision a device computes well in."""

import torch

from mvmr.training.trainer import Precision

_SMALL = 16  # pixels of a view of which a network that halves it five times has one left


def native_precision(precision: Precision | None, device: str, side: int | None = None) -> Precision:
    """``precision``, or by default bfloat16 autocast where the hardware multiplies it natively, else float32.

    Args:
        device: Lightning Fabric's accelerator name; ``auto`` is CUDA where there is one.
        side: pixels of the smallest views. In bfloat16, oneDNN's gradient of a strided convolution of maps of 1 x 1
            reads memory that nobody wrote, and may be NaN: of small views a processor computes in float32.
    """
    if precision is not None:
        return precision
    if device in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    if side is not None and side <= _SMALL:
        return "32-true"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"
