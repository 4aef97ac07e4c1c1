"""A teacher of the user's own code, `python:PACKAGE.MODULE:FACTORY`."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mvmr.distillation.teachers.teacher import NetworkTeacher, NoTextTower, TeacherGone
from mvmr.errors import MvmrError, summarise, unknown


def load(what: str, *, device: str | torch.device, text: bool) -> NetworkTeacher:
    """Call FACTORY() of a module that can be imported, from the working folder too.

    It returns a torch module with a method ``prepare``, or the two as a pair: ``prepare`` takes an RGB image of any
    size and gives a tensor [C, H, W], of one shape for all images; the module takes those stacked, [B, C, H, W], and
    gives rows of floats [B, D].

    Raises: MvmrError where there is no such module or factory, it raises, or what it returns is not that.
    """
    package, colon, factory = what.rpartition(":")
    if not colon or not package or not factory:
        raise MvmrError(f"teacher python:{what}: give python:PACKAGE.MODULE:FACTORY")
    if text:
        raise NoTextTower(f"teacher python:{what} has no text tower: zero-shot takes a CLIP, such as ViT-B-16")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the `mvmr` command has its own folder there instead
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise TeacherGone(
            f"teacher python:{what}: there is no module {error.name!r}, looked from {os.getcwd()}"
        ) from error
    except Exception as error:  # a user's own code
        raise MvmrError(f"teacher python:{what}: {package} can't be imported ({summarise(error)})") from error
    if not callable(make := getattr(module, factory, None)):
        raise unknown(
            f"function of {package}", factory, [name for name in vars(module) if callable(vars(module)[name])]
        )
    try:
        product = make()
    except Exception as error:  # as above
        raise MvmrError(f"teacher python:{what}: {factory}() failed ({summarise(error)})") from error
    network, prepare = _parts(product, what)
    return NetworkTeacher(
        network, prepare, kind="python", what=what, name=f"python:{what}", weights="its own",
        description={"python": what, "module": _source(module)}, device=device,
    )  # fmt: skip


def _parts(product: Any, what: str) -> tuple[nn.Module, Callable[[Image.Image], Tensor]]:
    pair = product if isinstance(product, tuple) and len(product) == 2 else (product, getattr(product, "prepare", None))
    network, prepare = pair
    if not isinstance(network, nn.Module) or not callable(prepare):
        kind = f"a {type(product).__name__}" + ("" if callable(prepare) else " without prepare(image)")
        raise MvmrError(
            f"teacher python:{what} returns {kind}; return a torch module that has a method prepare(image), or "
            "(module, prepare)"
        )
    return network, prepare


def _source(module: ModuleType) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):  # compiled
        return ""
