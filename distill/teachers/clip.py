"""A frozen CLIP image tower from open_clip, with its own preprocessing: one more fixed representation."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.factory import LOCAL_DIR_PREFIX
from open_clip.model import _build_vision_tower, resize_pos_embed
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from torch import Tensor, nn

from mvmr.bundles import weights
from mvmr.distillation.teachers.clip_source import TeacherSource, find_source
from mvmr.distillation.teachers.spec import split_weights
from mvmr.distillation.teachers.teacher import NoTextTower


class Prepare(Protocol):
    """An image of any mode -> the tensor a teacher takes. Carries no weights, so workers are sent little."""

    def __call__(self, image: Image.Image) -> Tensor: ...


class ClipTeacher:
    """A CLIP image tower that is never trained.

    Not an `nn.Module`, on purpose: kept as an attribute of one, it stays out of that module's parameters,
    checkpoints and `train()`. It satisfies the interface of a representation (`mvmr.representations.cache.represent`).

    name: as open_clip calls the model, or the name of the folder it came from
    weights: the tag or file they came from, for people
    identity: hex sha256 of weights, architecture, precision and preprocessing
    dim: length of an embedding
    prepare: open_clip's own evaluation transform: PIL image of any mode -> float32 [3, S, S], normalised by the
        teacher's own mean and standard deviation
    """

    name: str
    weights: str
    identity: str
    dim: int
    preprocess_cfg: PreprocessCfg
    prepare: Prepare

    def __init__(self, source: TeacherSource, visual: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Take a tower whose weights are loaded; `ClipTeacher.load` is the way to get one."""
        self.name, self.weights = source.name, source.weights
        self.dim = int(source.model_cfg["embed_dim"])
        size = getattr(visual, "image_size", None)
        self.preprocess_cfg = PreprocessCfg(**merge_preprocess_dict(source.preprocess, {"size": size}))
        self.prepare = image_transform_v2(self.preprocess_cfg, is_train=False)
        self.identity = _identity(visual, source, self.preprocess_cfg, dtype)
        self._device, self._dtype = device, dtype
        self._visual = visual.to(device, dtype).eval().requires_grad_(False)
        self._full: nn.Module | None = None
        self._tokenizer: Callable[[list[str]], Tensor] | None = None

    @property
    def parameters(self) -> int:
        """How many parameters the image tower has."""
        return sum(parameter.numel() for parameter in self._visual.parameters())

    @classmethod
    def load(
        cls,
        name: str | Path,
        pretrained: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        weights_dtype: torch.dtype = torch.float32,
        text: bool = False,
    ) -> "ClipTeacher":
        """Load a teacher; only its image tower is built, unless `text` asks for the other one (zero-shot).

        name: an open_clip model name ("ViT-B-16"), a folder in open_clip's hub format, or "hf-hub:ORG/REPO"
        pretrained: one of the model's tags, or a file (.safetensors, or a state dict, whole or image tower
            only); None takes `default_tag(name)`
        weights_dtype: float32, or bfloat16/float16 to go faster where the device has them

        Raises: MvmrError for an unknown name or tag (the nearest is named), weights that cannot be downloaded
            (which file to get is said), and weights of another architecture (which keys do not fit is said).
        """
        source = find_source(name, pretrained)
        if not text:
            return cls(source, _image_tower(source), torch.device(device), weights_dtype)
        full = _both_towers(source)
        teacher = cls(source, full.get_submodule("visual"), torch.device(device), weights_dtype)
        teacher._full = full.to(device, weights_dtype).eval().requires_grad_(False)
        teacher._tokenizer = open_clip.get_tokenizer(source.open_clip_name)
        return teacher

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> Tensor:
        """Return the raw image embeddings, not normalised.

        Shapes: batch [B, 3, S, S] as `prepare` makes them, on any device -> [B, dim] float32 on the teacher's.
        """
        out = self._visual(batch.to(self._device, self._dtype))
        pooled: Tensor = out[0] if isinstance(out, tuple) else out  # CoCa's tower hands out its tokens, too
        return pooled.float()

    @torch.no_grad()
    def zero_shot_classifier(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Return a unit column per class: the mean embedding of its captions, by open_clip's own code.

        templates: captions with {} in the place of the class name

        Shapes: float32 [dim, C]; (normalised embeddings) @ it are the cosines.
        Raises: MvmrError when the teacher was loaded without `text=True`.
        """
        if self._full is None:
            raise NoTextTower(f"teacher {self.name} was loaded without its text tower; load it with text=True")
        return open_clip.build_zero_shot_classifier(
            self._full, self._tokenizer, classes, templates, device=self._device
        ).float()


def load(what: str, pretrained: str | Path | None = None, *, device: str | torch.device, text: bool) -> ClipTeacher:
    """Load a model of open_clip's, `NAME[:TAG|FILE]` or a folder; see `ClipTeacher.load`."""
    name, weights = split_weights(what)
    return ClipTeacher.load(name, weights or pretrained, device=device, text=text)


def _identity(visual: nn.Module, source: TeacherSource, preprocess: PreprocessCfg, dtype: torch.dtype) -> str:
    text = json.dumps([source.model_cfg, asdict(preprocess), str(dtype)], sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for key, tensor in sorted(visual.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class _Tower(nn.Module):
    """A CLIP without its text tower: what open_clip's weight conversions need to see."""

    def __init__(self, model_cfg: dict[str, Any]) -> None:
        super().__init__()
        vision = dict(model_cfg["vision_cfg"])
        if "timm_model_name" in vision:
            vision["timm_model_pretrained"] = False
        # open_clip's own constructor of image towers, though a private name: its public ones build the text tower
        # as well, which costs memory and, for some models, a download.
        self.visual = _build_vision_tower(model_cfg["embed_dim"], vision, model_cfg.get("quick_gelu", False))


def _image_tower(source: TeacherSource) -> nn.Module:
    model = _Tower(source.model_cfg)
    state = convert_state_dict(model, weights.read(source.file))
    if not any(key.startswith("visual.") for key in state):
        state = {f"visual.{key}": value for key, value in state.items()}  # the tower's own state dict
    with contextlib.suppress(RuntimeError):  # of another architecture: `fit` says so
        resize_pos_embed(state, model)
    tower = {key: value for key, value in state.items() if key.startswith("visual.")}
    weights.fit(model, tower, origin=f"{source.file}, as the image tower of {source.name},")
    return model.visual


def _both_towers(source: TeacherSource) -> nn.Module:
    _image_tower(source)  # says more exactly what does not fit than loading the whole model would
    folder = source.open_clip_name.startswith(LOCAL_DIR_PREFIX)
    try:
        return open_clip.create_model(
            source.open_clip_name,
            pretrained=None if folder else str(source.file),
            force_quick_gelu=source.model_cfg.get("quick_gelu", False),
        )
    except RuntimeError as error:
        raise NoTextTower(
            f"{source.file} holds no text tower that fits {source.name}; give the whole CLIP's weights"
        ) from error
