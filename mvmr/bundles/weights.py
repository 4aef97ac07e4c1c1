"""Files of weights: read ours and strangers', check that they fit, write ours."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mvmr.errors import MvmrError, one_line
from mvmr.storage.atomic import atomic

_WRAPPERS = ("state_dict", "model")
_KEYS_SHOWN = 3
_CLASSIFIERS = ("fc.", "classifier.", "head.")


def read(path: Path) -> dict[str, Tensor]:
    """Read a state dict from `.safetensors` or from what `torch.save` wrote (with `weights_only=True`), on the CPU.

    One level of wrapping ("state_dict", "model") and a "module." prefix are taken off.

    Raises: MvmrError when the file is missing, broken, or holds anything but a state dict of tensors.
    """
    if not path.is_file():
        raise MvmrError(f"weights file {path} not found; give a .safetensors or a state-dict file")
    try:
        safe = path.suffix == ".safetensors"
        content = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise MvmrError(f"cannot read weights file {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise MvmrError(f"weights file {path} is not a whole safetensors file ({one_line(error)})") from error
    except Exception as error:  # torch.load raises a dozen kinds for strangers' bytes
        raise MvmrError(
            f"weights file {path} is not a plain state dict ({one_line(error)}); save its state_dict() alone"
        ) from error
    if isinstance(content, Mapping):
        content = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise MvmrError(f"weights file {path} holds no tensors but a {type(content).__name__}; give a state dict")
    if strange := [str(key) for key, value in content.items() if not isinstance(value, Tensor)]:
        raise MvmrError(f"weights file {path} is not a state dict of tensors: see {first(strange)}")
    return {str(key).removeprefix("module."): cast(Tensor, value) for key, value in content.items()}


def drop_classifier(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights without their classifier's, which an encoder lacks; keys that `module` has stay."""
    keys = module.state_dict().keys()
    kept = {key: value for key, value in weights.items() if key in keys or not key.startswith(_CLASSIFIERS)}
    if kept.keys() <= keys:
        return kept
    classifier = _timm_keys(module) - keys
    return {key: value for key, value in kept.items() if key not in classifier}


def _timm_keys(module: nn.Module) -> set[str]:
    """The keys that timm's model has as it is published; none where `module` is not one of timm's.

    A dozen of its models have classifiers of other names, or several: last_linear, head_dist, aux_head.
    """
    published = getattr(module, "pretrained_cfg", None)
    architecture = published.get("architecture") if isinstance(published, Mapping) else None
    if architecture is None:
        return set()
    import timm  # which takes its time

    if not timm.is_model(architecture):
        return set()
    with torch.device("meta"):
        whole: nn.Module = timm.create_model(architecture, pretrained=False)
    return set(whole.state_dict())


def check_fit(module: nn.Module, weights: Mapping[str, Tensor], *, origin: str) -> None:
    """Check that `weights` are exactly the keys and shapes of `module` (which may be on the meta device), and finite.

    A missing `num_batches_tracked` is forgiven: old files lack these counters.

    Raises: MvmrError that starts with `origin` and names the keys that don't fit, in one line.
    """
    state = module.state_dict()
    shapes = [
        f"{key} {list(weights[key].shape)} instead of {list(state[key].shape)}"
        for key in state
        if key in weights and weights[key].shape != state[key].shape
    ]
    missing = [key for key in state if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in state]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if parts := [f"{len(keys)} {kind} ({first(keys)})" for kind, keys in kinds.items() if keys]:
        stem_only = not missing and not unexpected and [line.split()[0] for line in shapes] == ["conv1.weight"]
        cure = "the stems differ: switch --small-kernel" if stem_only else "use weights of the same architecture"
        raise MvmrError(f"{origin} does not fit: keys {'; '.join(parts)}; {cure}")
    if broken := [key for key, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise MvmrError(f"{origin} holds values that are not finite in {len(broken)} keys ({first(broken)})")


def fit(module: nn.Module, weights: Mapping[str, Tensor], *, origin: str) -> None:
    """Load `weights` into `module` after `check_fit`; nothing is loaded when anything does not fit."""
    check_fit(module, weights, origin=origin)
    module.load_state_dict({**module.state_dict(), **weights}, strict=True)


def save(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write `state` as safetensors, atomically: on the CPU, contiguous, floating point as float32.

    Raises: MvmrError when the disk is full or the folder can't be written to.
    """
    with atomic(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file({key: _plain(value) for key, value in state.items()}, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)  # safetensors lets nobody but the owner read: a service runs as another user


def _plain(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).contiguous()


def first(keys: Sequence[str]) -> str:
    """The first few keys, for a message."""
    return ", ".join(keys[:_KEYS_SHOWN]) + (", ..." if len(keys) > _KEYS_SHOWN else "")
