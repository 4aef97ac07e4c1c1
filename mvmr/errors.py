"""The exception for what a user can mend, and its most frequent text."""

import difflib
from collections.abc import Iterable

_NAMES_SHOWN = 12
_LONGEST = 80
_LONGEST_LINE = 200


class MvmrError(Exception):
    """Something the user can mend: a wrong name, file, value or machine.

    The message stands on one line and says what is wrong, the value seen, where, and what to do.
    The command line prints it after `error: ` and exits 1; programming errors keep their traceback.
    """


class NotHere(MvmrError):
    """A package or device that this machine does not have, where another may do instead; what is broken is no such."""


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that `name` was most likely meant to be, or None if none is close."""
    by_folded = {candidate.casefold(): candidate for candidate in names}
    if len(name) > _LONGEST:  # no typing error, and slow to compare
        return None
    close = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[close[0]] if close else None


def shorten(text: object) -> str:
    """The beginning of a stranger's text, for a message that stays one that can be read."""
    words = str(text)
    return words if len(words) <= _LONGEST else f"{words[: _LONGEST - 3]}..."


def one_line(text: object) -> str:
    """The words of a stranger's error or text on one line, cut where they are many; its type where it has none."""
    words = " ".join(str(text).split()) or type(text).__name__
    return words if len(words) <= _LONGEST_LINE else f"{words[: _LONGEST_LINE - 3]}..."


def summarise(error: BaseException) -> str:
    """An error of somebody else's code on one line, its type first."""
    return one_line(f"{type(error).__name__}: {error}")


def unknown(kind: str, name: str, choices: Iterable[str]) -> MvmrError:
    """Return (not raise) the error for a name that is not in `choices`, with the nearest valid name.

    `unknown("recipe", "papr", RECIPES)` reads: unknown recipe 'papr'; did you mean 'paper'? Known: default, paper
    """
    names = list(choices)
    suggestion = nearest(name, names)
    listing = ", ".join(words if words.isprintable() else repr(words) for words in map(shorten, names[:_NAMES_SHOWN]))
    if len(names) > _NAMES_SHOWN:
        listing += f" and {len(names) - _NAMES_SHOWN} more"
    hint = f"did you mean {suggestion!r}? " if suggestion else ""
    return MvmrError(f"unknown {kind} {shorten(name)!r}; {hint}Known: {listing or 'none'}")


# Import names of the optional packages, by the extra that installs them. A test holds it to pyproject.toml.
EXTRAS: dict[str, tuple[str, ...]] = {
    "train": (
        "torch",
        "torchvision",
        "lightning_fabric",
        "open_clip",
        "kymatio",
        "scipy",
        "sklearn",
        "skimage",
        "huggingface_hub",
        "jinja2",
        "markupsafe",
        "matplotlib",
        "threadpoolctl",
        "timm",
    ),
    "export": ("onnx", "onnxscript", "tritonclient"),
    "app": ("gradio", "plotly", "umap"),
    "s3": ("s3fs",),
    "rtx": ("onnxruntime_ep_nv_tensorrt_rtx", "tensorrt_rtx_bindings"),
}


ON_TRAIN = ("export", "app")  # extras that bring all of train


def missing_extra(error: ModuleNotFoundError, wanted: str | None = None) -> MvmrError | None:
    """Return the one-line error when `error` is about a package of an extra, else None (a real fault).

    wanted: the extra that what was asked for needs; it is named where that brings the package, too.
    """
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            name = wanted if wanted in ON_TRAIN and extra == "train" else extra
            return MvmrError(f"this needs the package {package!r}, not installed here: pip install 'mvmr[{name}]'")
    return None
