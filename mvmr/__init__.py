"""mvmr: distil a large vision teacher into a small student, from unlabelled images.

The public names below are imported when first used, so `import mvmr` is instant and needs no torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvmr.bundles.bundle import load as load
    from mvmr.comparison.ablation import ablate as ablate
    from mvmr.comparison.methods import compare as compare
    from mvmr.data import open_images as open_images
    from mvmr.distillation.distill import distill as distill
    from mvmr.distillation.report.report import report as report
    from mvmr.distillation.teachers.teacher import NetworkTeacher as NetworkTeacher
    from mvmr.errors import MvmrError as MvmrError
    from mvmr.evaluation.evaluate import evaluate as evaluate
    from mvmr.evaluation.evaluate import probe as probe
    from mvmr.methods.parts.dependence import distance_correlation as distance_correlation
    from mvmr.training.finetuning import finetune as finetune
    from mvmr.training.pretraining import pretrain as pretrain

__version__ = "0.1.0"

# onnxruntime reports home from its import on, and leaves an identifier of this machine in the user's cache folder,
# unless the environment says otherwise before that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "MvmrError": "mvmr.errors",
    "NetworkTeacher": "mvmr.distillation.teachers.teacher",
    "ablate": "mvmr.comparison.ablation",
    "compare": "mvmr.comparison.methods",
    "distance_correlation": "mvmr.methods.parts.dependence",
    "distill": "mvmr.distillation.distill",
    "evaluate": "mvmr.evaluation.evaluate",
    "finetune": "mvmr.training.finetuning",
    "load": "mvmr.bundles.bundle",
    "open_images": "mvmr.data",
    "pretrain": "mvmr.training.pretraining",
    "probe": "mvmr.evaluation.evaluate",
    "report": "mvmr.distillation.report.report",
}

__all__ = [
    "MvmrError",
    "NetworkTeacher",
    "__version__",
    "ablate",
    "compare",
    "distance_correlation",
    "distill",
    "evaluate",
    "finetune",
    "load",
    "open_images",
    "pretrain",
    "probe",
    "report",
]


def __getattr__(name: str) -> Any:  # Any: mypy reads the types from the TYPE_CHECKING block
    if name not in _HOMES:
        raise AttributeError(f"module 'mvmr' has no attribute {name!r}")
    try:
        value = getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        from mvmr.errors import missing_extra

        raise missing_extra(error) or error from error.__cause__
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
