"""How images are named, by whoever trains, measures or embeds: the kinds of description there are, and which this is.

Every command reads the one table of kinds. `mvmr.data.opening` opens a description as an `ImageSet`, whose images are
known by number; `mvmr.data.listing` as a `Source`, which is read from front to back. What the first can't take yet has
a refusal in the table.
"""

import glob
import os
from dataclasses import dataclass

from mvmr.data import remote, tar
from mvmr.data.scan import printable
from mvmr.errors import MvmrError, nearest, unknown

DEFAULT_ROOT = "data"
_LISTS = (".txt", ".lst", ".list")
_TABLES = (".csv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A way to name images.

    example: to be typed; meaning: in a few words, as docs/data.md has them
    refusal: why only `mvmr embed` takes it, and what to give instead; "" where every command does
    """

    name: str
    example: str
    meaning: str
    refusal: str = ""


_ALL = (
    Kind(name="folder", example="photos/", meaning="every image below it, at any depth"),
    Kind(name="glob", example="'photos/**/*.jpg'", meaning="the images that match, quoted; `**` stands for any depth"),
    Kind(
        name="list",
        example="list:FILE",
        meaning="a path a line, relative to the list; the name of a `.txt`, `.lst` or `.list` file alone will do",
    ),
    Kind(
        name="table",
        example="table:FILE",
        meaning="a CSV or Parquet table with the columns `file` (relative to it), `label` and perhaps `split` (train, "
        "test, val); called otherwise: `'table:FILE?file=COLUMN&label=COLUMN'`; the name of a `.csv` or `.parquet` "
        "file alone will do",
    ),
    Kind(name="stl10", example="stl10:ROOT", meaning="`ROOT/stl10_binary/*.bin`"),
    Kind(name="cifar10", example="cifar10:ROOT", meaning="torchvision's folder of CIFAR-10"),
    Kind(name="cifar20", example="cifar20:ROOT", meaning="that of CIFAR-100, with its 20 coarse labels"),
    Kind(name="cifar100", example="cifar100:ROOT", meaning="that of CIFAR-100"),
    Kind(name="imagenet", example="imagenet:ROOT", meaning="class folders in `ROOT/train` and `ROOT/val`"),
    Kind(name="voc07", example="voc07:ROOT", meaning="`ROOT/VOCdevkit/VOC2007`"),
    Kind(
        name="sample:patches",
        example="sample:patches",
        meaning="64 px patches of 17 photographs that scikit-image ships; the class is the photograph",
    ),
    Kind(name="sample:digits", example="sample:digits", meaning="scikit-learn's digits, enlarged to 32 px"),
    Kind(
        name="file",
        example="cat.jpg",
        meaning="one image",
        refusal="is a file, not a folder, and only `mvmr embed` takes a single image: give its folder, a quoted glob "
        "or list:FILE",
    ),
    Kind(
        name="stdin",
        example="-",
        meaning="such a list, on standard input",
        refusal="is a list on standard input, which only `mvmr embed` reads: write it to a file, and give list:FILE",
    ),
    Kind(
        name="shards",
        example="shards:PATTERN",
        meaning="tar files, by a glob that may hold `{000..009}` or `{a,b}`; the name of a `.tar`, `.tar.gz`, ... "
        "alone will do",
        refusal="names tar files, which only `mvmr embed` reads as yet: unpack them, or give a folder",
    ),
    Kind(
        name="address",
        example="s3://bucket/photos",
        meaning="any address of fsspec's, of a folder, a glob or tar files; S3 needs `pip install 'mvmr[s3]'`",
        refusal="is an address, which only `mvmr embed` reads as yet: copy the images here, and give their folder",
    ),
)
KINDS = {kind.name: kind for kind in _ALL}
STANDARD = ("stl10", "cifar10", "cifar20", "cifar100", "imagenet", "voc07")
SAMPLES = ("sample:patches", "sample:digits")
_NAMES = (*STANDARD, *SAMPLES, "list:", "table:", "shards:", "an address, a folder or glob")


@dataclass(frozen=True)
class Described:
    """What was typed, of which kind it is, and what follows the kind's name: a folder, a file or a pattern."""

    text: str
    kind: Kind
    location: str


def parse(text: str) -> Described:
    """Say of which kind a description of images is; looks at the file system, and opens nothing.

    A name of the table comes before a folder of that name, which is "./stl10"; what is there comes before a pattern.

    Raises: MvmrError for a name that is unknown, and for what is not there.
    """
    prefix, colon, tail = text.partition(":")
    if prefix in STANDARD:
        return Described(text, KINDS[prefix], os.path.expanduser(tail or DEFAULT_ROOT))
    if prefix == "sample" and colon:
        if text not in SAMPLES:
            raise unknown("sample", text, SAMPLES)
        return Described(text, KINDS[text], "")
    if prefix in ("list", "shards", "table") and colon:
        return Described(text, KINDS[prefix], os.path.expanduser(tail))
    return Described(text, KINDS[_kind_of_path(text)], os.path.expanduser(text))


def _kind_of_path(text: str) -> str:
    path = os.path.expanduser(text)
    if text == "-":
        return "stdin"
    if not os.path.isdir(path) and tar.is_tar(text):
        return "shards"
    if remote.is_address(text):
        return "address"
    if os.path.isdir(path) or not path:
        return "folder"
    if os.path.exists(path):
        if path.lower().endswith(_TABLES):
            return "table"
        return "list" if path.lower().endswith(_LISTS) else "file"
    if glob.has_magic(path):
        return "glob"
    raise _missing(text)


def _missing(text: str) -> MvmrError:
    prefix, colon, _ = text.partition(":")
    if os.sep not in prefix:
        if nearest(text, _NAMES):
            return unknown("data", text, _NAMES)
        if colon or nearest(prefix, _NAMES):
            return unknown("data", prefix, _NAMES)
    path = printable(os.fsencode(os.path.abspath(os.path.expanduser(text))))
    return MvmrError(
        f"no images at {text}: {path} does not exist; give a folder of images or a quoted glob, list:FILE, table:FILE, "
        f"shards:PATTERN, an address such as s3://bucket/photos, or one of {', '.join((*STANDARD, *SAMPLES))}"
    )
