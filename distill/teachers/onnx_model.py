"""A model in an ONNX file as teacher, `onnx:FILE[?KEY=VALUE&...]`, run by onnxruntime.

Its input is an image, uint8 or float, [B, 3, S, S] or [B, S, S, 3]. A model of bytes normalises itself. One of floats
says how in its metadata, under ``preprocessing`` as `mvmr export` writes it, or the user says it:

    mean, std      three numbers each, of RGB in [0, 1]
    size           the side of its images, where the file leaves it open
    resize         the short side before the centre crop; `size` when left out
    interpolation  bilinear or bicubic; bicubic when left out
    output         the name of the output that holds the embedding, where there are several
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image
from torch import Tensor

from mvmr.bundles.preprocess import Preprocess
from mvmr.distillation.teachers.onnx_parts import external_tensor
from mvmr.distillation.teachers.teacher import NoTextTower, TeacherGone, measure_width, read_settings
from mvmr.errors import MvmrError, one_line, shorten, unknown

_KEYS = ("mean", "std", "size", "resize", "interpolation", "output")
_KINDS = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}
_Three = tuple[float, float, float]
_ERRORS_ONLY = 4  # of onnxruntime's log: what fails is raised


def load(what: str, *, device: str | torch.device, text: bool) -> OnnxTeacher:
    """Open a file, with what a user says of its input and output.

    Raises: MvmrError for a file that is missing, damaged, in several parts or needs an operator that onnxruntime
        doesn't have; an input that is no image or of an unknown normalisation; several outputs of which none is named.
    """
    file, options = read_settings("onnx", what, _KEYS)
    if text:
        raise NoTextTower(f"teacher onnx:{file} has no text tower: zero-shot takes a CLIP, such as ViT-B-16")
    return OnnxTeacher(Path(file), options, what=what, device=torch.device(device))


class OnnxTeacher:
    """See `mvmr.distillation.teachers.teacher.Teacher`."""

    parameters = None  # a graph doesn't tell weights from other constants

    def __init__(self, file: Path, options: Mapping[str, str], *, what: str, device: torch.device) -> None:
        self.name, self.weights = f"onnx:{file.name}", str(file)
        self.origin = {"kind": "onnx", "what": what}
        content = _read(file)
        _check_whole(content, file)
        self._session = _start(content, file, device)
        (self._input,) = self._inputs(file)
        self._kind = _KINDS[self._input.type]
        self._channels_first, side = _layout(file, self._input.shape)
        self._output = _choose_output(file, self._session.get_outputs(), options.get("output"))
        self.preprocess = self._read_preprocess(file, side, options)
        description = json.dumps([self.preprocess.to_dict(), self._output], sort_keys=True)
        self.identity = hashlib.sha256(hashlib.sha256(content).digest() + description.encode()).hexdigest()
        self.dim = measure_width(self, self.prepare, self.name)

    def prepare(self, image: Image.Image) -> Tensor:
        """Image -> [3, S, S] or [S, S, 3], as its input wants them: uint8, or normalised float32."""
        pixels = self.preprocess.image(image)[None]
        if self._kind is np.uint8:
            pixels = pixels.transpose(0, 3, 1, 2) if self._channels_first else pixels
            return torch.from_numpy(np.ascontiguousarray(pixels[0]))
        normalised = torch.from_numpy(self.preprocess.normalise(pixels)[0])
        return normalised if self._channels_first else normalised.permute(1, 2, 0).contiguous()

    def __call__(self, batch: Tensor) -> Tensor:
        images = batch.cpu().numpy().astype(self._kind, copy=False)
        count = self._input.shape[0]
        parts = np.split(images, len(images) // count) if isinstance(count, int) and count == 1 else [images]
        rows = [self._session.run([self._output], {self._input.name: part})[0] for part in parts]
        return torch.from_numpy(np.concatenate(rows)).float()

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes, which prepare images and run nothing."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_session", "_input")}

    def _inputs(self, file: Path) -> Sequence[Any]:
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type not in _KINDS:
            kinds = ", ".join(f"{node.name} {node.type}" for node in inputs)
            raise MvmrError(f"teacher onnx:{file} takes {kinds or 'nothing'}, not one image of uint8 or floats")
        return inputs

    def _read_preprocess(self, file: Path, side: int | None, options: Mapping[str, str]) -> Preprocess:
        recorded = self._session.get_modelmeta().custom_metadata_map.get("preprocessing")
        base = None if recorded is None else _from_metadata(file, recorded)
        size = _whole(file, "size", options.get("size", side or (base.crop if base else None)))
        if side not in (None, size):
            raise MvmrError(f"teacher onnx:{file} takes images of {side} px; leave out size={size}")
        if base is not None and "size" not in options and base.crop != size:
            raise MvmrError(f"teacher onnx:{file} takes images of {size} px, its metadata say {base.crop} px")
        mean, std = self._scales(file, base, options)
        resize = _whole(file, "resize", options.get("resize", base.resize if base and base.crop == size else size))
        interpolation = options.get("interpolation", base.interpolation if base else "bicubic")
        return Preprocess(resize=resize, crop=size, interpolation=interpolation, mean=mean, std=std)  # type: ignore[arg-type]

    def _scales(self, file: Path, base: Preprocess | None, options: Mapping[str, str]) -> tuple[_Three, _Three]:
        if self._kind is np.uint8:
            if "mean" in options or "std" in options:
                raise MvmrError(f"teacher onnx:{file} takes bytes and normalises them itself; leave out mean and std")
            return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # not used
        if base is None and not {"mean", "std"} <= options.keys():
            raise MvmrError(
                f"teacher onnx:{file} takes floats and doesn't say how they are normalised; give it, of RGB in [0, 1]: "
                f"'onnx:{file}?mean=0.485,0.456,0.406&std=0.229,0.224,0.225'"
            )
        mean = _three(file, "mean", options["mean"]) if "mean" in options or base is None else base.mean
        std = _three(file, "std", options["std"]) if "std" in options or base is None else base.std
        return mean, std


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise TeacherGone(f"teacher onnx:{file}: cannot read it: {error.strerror or error}") from error


def _check_whole(content: bytes, file: Path) -> None:
    try:
        elsewhere = external_tensor(content)
    except ValueError as error:
        raise MvmrError(f"teacher onnx:{file} can't be run (it is no whole ONNX file: {error})") from error
    if elsewhere is not None:
        raise MvmrError(
            f"teacher onnx:{file} has weights in other files ({shorten(elsewhere)!r}), whose change nobody would "
            "notice; save it as one: onnx.save(onnx.load(FILE), NEW)"
        )


def _start(content: bytes, file: Path, device: torch.device) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.load_model_format", "ONNX")  # not its own, which is not looked into
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = torch.get_num_threads()
    available = onnxruntime.get_available_providers()
    providers = [name for name in ("CUDAExecutionProvider",) if device.type == "cuda" and name in available]
    try:
        return onnxruntime.InferenceSession(content, options, providers=[*providers, "CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a dozen kinds
        reason = one_line(error)
        if "is not a registered function" in reason or "custom op" in reason.lower():
            reason = f"it needs an operator that onnxruntime doesn't have, and no foreign code is loaded: {reason}"
        raise MvmrError(f"teacher onnx:{file} can't be run ({reason})") from error


def _layout(file: Path, shape: Sequence[Any]) -> tuple[bool, int | None]:
    """Whether channels come first, and the side in pixels, None where the file leaves it open."""
    if len(shape) == 4 and (shape[0] == 1 or not isinstance(shape[0], int)):
        for channels, sides in ((1, shape[2:4]), (3, shape[1:3])):
            whole = [side for side in sides if isinstance(side, int)]
            if shape[channels] == 3 and len(set(whole)) <= 1:
                return channels == 1, whole[0] if whole else None
    raise MvmrError(f"teacher onnx:{file} takes {list(shape)}, not square images [B, 3, S, S] or [B, S, S, 3]")


def _choose_output(file: Path, outputs: Sequence[Any], wanted: str | None) -> str:
    names = [node.name for node in outputs]
    if wanted is not None and wanted not in names:
        raise unknown(f"output of teacher onnx:{file}", wanted, names)
    if wanted is None and len(names) > 1:
        raise MvmrError(
            f"teacher onnx:{file} has several outputs ({', '.join(names)}); name one: 'onnx:{file}?output={names[0]}'"
        )
    return wanted or names[0]


def _from_metadata(file: Path, text: str) -> Preprocess:
    try:
        return Preprocess.from_dict(json.loads(text))
    except (ValueError, TypeError, AttributeError) as error:
        raise MvmrError(f"teacher onnx:{file}: its metadata's preprocessing is no JSON table ({error})") from error


def _whole(file: Path, key: str, value: str | int | None) -> int:
    if value is None:
        raise MvmrError(f"teacher onnx:{file} leaves the side of its images open; give it: 'onnx:{file}?size=224'")
    try:
        return int(value)
    except ValueError as error:
        raise MvmrError(f"teacher onnx:{file}: {key}={value} should be a whole number of pixels") from error


def _three(file: Path, key: str, text: str) -> _Three:
    try:
        red, green, blue = map(float, text.split(","))
    except ValueError as error:
        raise MvmrError(f"teacher onnx:{file}: {key}={text} should be three numbers, such as 0.5,0.5,0.5") from error
    return red, green, blue
