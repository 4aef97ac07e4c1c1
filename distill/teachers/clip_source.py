"""Where a teacher's architecture, preprocessing and weights come from: open_clip's names and tags, or files."""

import os
import socket
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import huggingface_hub
import open_clip
from open_clip import pretrained as tags
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.factory import LOCAL_DIR_PREFIX
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from mvmr import strict_json
from mvmr.distillation.teachers.spec import HUB
from mvmr.distillation.teachers.teacher import TeacherGone
from mvmr.errors import MvmrError, nearest, unknown

# What `default_tag` looks for, best first: weights trained on the most openly described data.
DEFAULT_TAGS = ("datacomp_xl", "laion2b", "laion400m_e32", "openai")
WEIGHT_FILES = (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME, "open_clip_model.bin", "open_clip_pytorch_model.safetensors")
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class TeacherSource:
    """All that is needed to build a teacher.

    name, weights: for people; open_clip_name: for open_clip
    model_cfg: open_clip's architecture, with the activation that the weights were trained with
    preprocess: open_clip's preprocessing of these weights
    """

    name: str
    weights: str
    open_clip_name: str
    model_cfg: dict[str, Any]
    preprocess: dict[str, Any]
    file: Path


def default_tag(name: str) -> str:
    """Return the tag used when none is given: of DataComp-XL, LAION-2B, LAION-400M, OpenAI the first there is.

    Of several of a kind the last listed (open_clip lists longer training later); of none of these the first tag.

    Raises: MvmrError for an unknown model, or one without published weights.
    """
    model = _model(name)
    published = open_clip.list_pretrained_tags_by_model(model)
    if not published:
        raise MvmrError(f"open_clip knows no weights for {model}; give a file: --pretrained FILE")
    for prefix in DEFAULT_TAGS:
        if matching := [tag for tag in published if tag.startswith(prefix)]:
            return str(matching[-1])
    return str(published[0])


def default_weights(name: str | Path) -> str:
    """Say which weights `find_source` takes when none are named: a folder's own, or those of `default_tag`.

    Raises: MvmrError for an unknown model, or one without published weights.
    """
    if str(name).startswith(HUB) or Path(name).is_dir():
        return "its own"
    return f"{default_tag(str(name))} (the default; another by --pretrained TAG or FILE)"


def find_source(name: str | Path, pretrained: str | Path | None) -> TeacherSource:
    """Resolve what a user typed; see `Teacher.load` for the forms. Downloads weights not yet in the cache.

    Raises: MvmrError, as `Teacher.load` says.
    """
    text = str(name)
    if text.startswith(HUB):
        folder, label = _hub_folder(text.removeprefix(HUB)), text
    elif Path(name).is_dir():
        folder, label = Path(name), Path(name).resolve().name
    else:
        return _built_in(_model(text), pretrained)
    if pretrained is not None:
        raise MvmrError(f"teacher {name} is a folder with its own weights; leave out --pretrained {pretrained}")
    return _from_folder(folder, label)


def _model(name: str) -> str:
    models = open_clip.list_models()
    model = name.replace("/", "-")  # "ViT-B/16", as OpenAI wrote it
    if model not in models:
        if os.sep in name and nearest(model, models) is None:
            raise TeacherGone(f"teacher {name} is neither a folder here nor a model of open_clip's, such as ViT-B-16")
        raise unknown("teacher", name, models)
    return model


def _built_in(model: str, pretrained: str | Path | None) -> TeacherSource:
    model_cfg: dict[str, Any] = open_clip.get_model_config(model)
    weights = str(pretrained or default_tag(model))
    if tags.is_pretrained_cfg(model, weights):
        tag_cfg = tags.get_pretrained_cfg(model, weights)
        # open_clip only warns where the model's name promises another activation than the weights were trained with.
        model_cfg["quick_gelu"] = model_cfg.get("quick_gelu", False) or tag_cfg.get("quick_gelu", False)
        preprocess, file = _preprocess(tag_cfg), _fetch(model, weights, tag_cfg)
    elif Path(weights).is_file():
        preprocess, file = _shared_preprocess(model), Path(weights)
    elif Path(weights).suffix in WEIGHT_SUFFIXES or os.sep in weights:
        raise TeacherGone(f"weights file {weights} of teacher {model} does not exist")
    else:
        raise unknown(f"weights of {model}:", weights, open_clip.list_pretrained_tags_by_model(model))
    return TeacherSource(
        name=model, weights=weights, open_clip_name=model, model_cfg=model_cfg, preprocess=preprocess, file=file
    )


def _from_folder(folder: Path, name: str) -> TeacherSource:
    config = folder / HF_CONFIG_NAME
    try:
        content = strict_json.read(config)
        model_cfg, preprocess = content["model_cfg"], _preprocess(content.get("preprocess_cfg", {}))
    except FileNotFoundError as error:
        raise TeacherGone(
            f"teacher folder {folder} has no {HF_CONFIG_NAME}, which open_clip's hub format needs"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MvmrError(f"{config} is not a configuration of open_clip's hub format: {error!r}") from error
    file = next((folder / candidate for candidate in WEIGHT_FILES if (folder / candidate).is_file()), None)
    if file is None:
        raise TeacherGone(f"teacher folder {folder} has no weights; put {' or '.join(WEIGHT_FILES[:2])} there")
    return TeacherSource(
        name=name,
        weights=str(file),
        open_clip_name=f"{LOCAL_DIR_PREFIX}{folder}",
        model_cfg=model_cfg,
        preprocess=preprocess,
        file=file,
    )


def _preprocess(overlay: dict[str, Any]) -> dict[str, Any]:
    return merge_preprocess_dict(asdict(PreprocessCfg()), overlay)


def _shared_preprocess(model: str) -> dict[str, Any]:
    """The preprocessing of a weights file, which cannot say: that of all the model's tags where they agree.

    Else open_clip's default. (open_clip itself always takes its default, which is wrong for, say, SigLIP.)
    """
    configs = [
        _preprocess(tags.get_pretrained_cfg(model, tag)) for tag in open_clip.list_pretrained_tags_by_model(model)
    ]
    return configs[0] if configs and all(config == configs[0] for config in configs) else _preprocess({})


def _fetch(model: str, tag: str, tag_cfg: dict[str, Any]) -> Path:
    repository, file = os.path.split(tag_cfg.get("hf_hub", ""))
    wanted = [Path(file).with_suffix(".safetensors").name, file] if file else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    if repository and (cached := _find_cached(repository, wanted)):
        return cached
    where = f"{wanted[0]} of {repository} on the Hugging Face Hub" if repository else str(tag_cfg.get("url"))
    advice = f"fetch {where} on a machine with network and give it here: --pretrained FILE"
    if _offline():
        raise TeacherGone(f"weights {tag!r} of {model} are not in the cache and there is no network; {advice}")
    try:
        return Path(tags.download_pretrained(tag_cfg))
    except Exception as error:  # urllib, huggingface_hub and open_clip each raise their own
        raise TeacherGone(
            f"weights {tag!r} of {model} could not be downloaded ({type(error).__name__}); {advice}"
        ) from error


def _hub_folder(repository: str) -> Path:
    """Return the folder of a repository's downloaded configuration and weights."""
    wanted = [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    config, weights = _find_cached(repository, [HF_CONFIG_NAME]), _find_cached(repository, wanted)
    if config and weights:
        return config.parent
    advice = f"fetch {HF_CONFIG_NAME} and {wanted[0]} of it into one folder and give that: --teacher FOLDER"
    if _offline():
        raise TeacherGone(f"teacher {HUB}{repository} is not in the cache and there is no network; {advice}")
    try:
        tags.download_pretrained_from_hf(repository)
        return Path(tags.download_pretrained_from_hf(repository, filename=HF_CONFIG_NAME)).parent
    except Exception as error:
        raise TeacherGone(
            f"teacher {HUB}{repository} could not be downloaded ({type(error).__name__}); {advice}"
        ) from error


def _find_cached(repository: str, files: list[str]) -> Path | None:
    for file in files:
        if isinstance(path := huggingface_hub.try_to_load_from_cache(repository, file), str):
            return Path(path)
    return None


def _offline() -> bool:
    """Say whether the hub's name cannot be resolved; the hub's own client tries for most of a minute to find out."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return True
    if urllib.request.getproxies():
        return False  # names are resolved by the proxy
    try:
        socket.getaddrinfo(urlparse(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False
