"""Which precision a device computes well in."""

import torch

from mvmr.training.trainer import Precision


def native_precision(precision: Precision | None, device: str) -> Precision:
    """``precision``, or by default bfloat16 autocast where the hardware multiplies it natively, else float32.

    Args:
        device: Lightning Fabric's accelerator name; ``auto`` is CUDA where there is one.
    """
    if precision is not None:
        return precision
    if device in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"
