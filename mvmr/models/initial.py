"""Starting an encoder from weights that are there."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mvmr.bundles import weights
from mvmr.bundles.bundle import encoder_file, load

_CLASSIFIERS = ("fc.", "classifier.", "head.")


def load_init(encoder: nn.Module, source: str | Path) -> None:
    """Start `encoder` from a bundle folder, or from a torchvision or timm state-dict file.

    A classifier's keys, which the encoder lacks, are dropped; of a bundle, the hash of the weights is checked first.
    Nothing is loaded when anything does not fit.

    Raises: MvmrError when the source cannot be read, is of another architecture (naming keys), or holds
        a value that is not finite.
    """
    path = Path(source)
    if path.is_dir():
        origin, path = f"init {path}", encoder_file(load(path, verify=False))
    else:
        origin = f"init {path}"
    state = weights.read(path)
    own = encoder.state_dict().keys()
    kept = {key: value for key, value in state.items() if key in own or not key.startswith(_CLASSIFIERS)}
    weights.fit(encoder, kept, origin=origin)
