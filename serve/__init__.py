"""Exported students at work: one engine, behind HTTP or over many images; nothing here needs torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvmr.serve.engine import Engine as Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:  # Any: mypy reads the type from the TYPE_CHECKING block
    if name != "Engine":
        raise AttributeError(f"module 'mvmr.serve' has no attribute {name!r}")
    from mvmr.serve.engine import Engine  # here: a client needs no onnxruntime

    return Engine
