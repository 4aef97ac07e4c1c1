"""What an export leaves in a bundle, or says."""

import json
from pathlib import Path
from typing import Any

import pytest

from mvmr.errors import MvmrError
from mvmr.export.export import export

FP32, FP16 = "onnx/encoder.fp32", "onnx/encoder.fp16"


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(MvmrError) as excinfo:
        export(path, **({"images": 16} | options))
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


def report(path: Path, name: str) -> dict[str, Any]:
    return json.loads((path / f"{name}.json").read_text())


def state(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
