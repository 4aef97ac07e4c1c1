"""Exported students at work: one engine, behind HTTP or over a folder of images; nothing here needs torch."""

from mvmr.serve.engine import Engine

__all__ = ["Engine"]
