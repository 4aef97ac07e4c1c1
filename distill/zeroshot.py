"""Zero-shot classification and text search, for the teacher and, through a linear map to its space, for the student.

The map is fitted on what a distillation has anyway: student features and teacher embeddings of unlabelled images.
With it: columns = teacher.zero_shot_classifier(classes, templates_for(teacher)), then
zero_shot_logits(space_map(features), columns).argmax(1). To search by text, give the query as the only class with
"{}" as the only template; the rows of highest cosine are the images found.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
import torch.nn.functional as F
from safetensors.numpy import save
from torch import Tensor

from mvmr import strict_json
from mvmr.bundles.bundle import Bundle, add_files
from mvmr.bundles.head import Floats, read_arrays
from mvmr.distillation.teachers.teacher import Teacher
from mvmr.distillation.teachers.tiny_clip import TEMPLATES
from mvmr.errors import MvmrError, unknown

IMAGENET_TEMPLATES: tuple[str, ...] = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
"""The 80 captions of OpenAI's prompt ensemble as open_clip ships them, with {} in the place of the class name."""

STRENGTHS = tuple(10.0**power for power in range(3, -7, -1))
"""Ridge strengths tried, strongest first, in units of a standardised feature's variance (scikit-learn's alpha / N)."""

_FEWEST = 10
_HELD_OUT = 5  # one row in so many

Doubles = npt.NDArray[np.float64]
Rows = npt.ArrayLike | Tensor


def templates_for(teacher: Teacher) -> tuple[str, ...]:
    """Captions for `TextTeacher.zero_shot_classifier`: open_clip's 80; for a tiny CLIP those it was trained on."""
    file = Path(teacher.weights)
    tiny = file.is_file() and file.with_name("tiny_clip.json").is_file()
    return TEMPLATES if tiny else IMAGENET_TEMPLATES


@dataclass(frozen=True, kw_only=True, eq=False)
class SpaceMap:
    """A linear map from a student's raw (not normalised) features to its teacher's space, where cosines count.

    Shapes: weight float32 [K, D], bias float32 [K].
    strength: the ridge strength chosen, of `STRENGTHS`
    r2: share of the variance of the teacher's unit embeddings explained on images held out, at most 1; 0 is no better
        than a constant. The strength was chosen by it, so it flatters a little.
    Raises: MvmrError for arrays that don't fit one another, or values that are not finite.
    """

    weight: Floats
    bias: Floats
    strength: float
    r2: float

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or not self.weight.size or self.bias.shape != self.weight.shape[:1]:
            shapes = f"weight {list(self.weight.shape)} and bias {list(self.bias.shape)}"
            raise MvmrError(f"{shapes} make no map; it takes [K, D] and [K]")
        finite = np.isfinite(self.weight).all() and np.isfinite(self.bias).all()
        if not (finite and np.isfinite([self.strength, self.r2]).all()):
            raise MvmrError("the map holds values that are not finite; fit it again")

    def __call__(self, features: Rows) -> Floats:
        """Map raw features [N, D] to [N, K] float32: estimates of unit embeddings, shorter where unsure.

        Raises: MvmrError for features of another width, or rows that are not finite.
        """
        rows = _to_rows(features, "features")
        if rows.shape[1] != self.weight.shape[1]:
            raise MvmrError(f"the map takes features {self.weight.shape[1]} wide, these are {rows.shape[1]} wide")
        return rows.astype(np.float32, copy=False) @ self.weight.T + self.bias


def fit_space_map(features: Rows, embeddings: Rows, *, seed: int = 0) -> SpaceMap:
    """Fit a map to the teacher's space by ridge regression on standardised features; no labels are used.

    A fifth of the rows, drawn by `seed`, is held out to choose the strength by squared error (of equals the strongest);
    then all are fitted. Computed in float64: takes 8 N (D + K) bytes beside the input and some N D min(N, D) steps.

    Shapes: features [N, D], raw; embeddings [N, K], normalised here; row i of both is of the same image.
    Raises: MvmrError for unpaired rows, fewer than 10, values that are not finite, or embeddings that are all the same.
    Source: Hoerl and Kennard, "Ridge regression" (1970).
    """
    x, y = _to_rows(features, "features"), _to_rows(embeddings, "embeddings")
    if len(x) != len(y):
        raise MvmrError(f"{len(x)} rows of features and {len(y)} of embeddings are no pairs; give both of each image")
    if len(x) < _FEWEST:
        raise MvmrError(f"a map to the teacher's space is fitted on {_FEWEST} images or more, here are {len(x)}")
    y = y.astype(np.float64)
    y /= np.linalg.norm(y, axis=1, keepdims=True).clip(min=1e-12)  # as torch's normalize does
    held, fitting = np.split(np.random.default_rng(seed).permutation(len(x)), [len(x) // _HELD_OUT])
    if not np.ptp(y[held], axis=0).any():
        raise MvmrError(f"the embeddings of {len(held)} images are all the same: there is nothing to fit; check them")
    ridge = _Ridge(x[fitting], y[fitting])
    errors = ridge.errors(x[held], y[held])
    strength = min(STRENGTHS, key=errors.__getitem__)
    r2 = 1 - errors[strength] / float(np.square(y[held] - y[held].mean(0)).sum())
    del ridge  # before the next one is built beside it
    weight, bias = _Ridge(x, y).solve(strength)
    return SpaceMap(weight=weight, bias=bias, strength=strength, r2=r2)


def zero_shot_logits(embeddings: Rows, columns: Rows) -> Floats:
    """Return the cosine of each row with each class, in [-1, 1], computed as open_clip does (bit for bit on the CPU).

    embeddings: [N, K], of the teacher or mapped, normalised or not
    columns: [K, C] of unit length, as `TextTeacher.zero_shot_classifier` makes them

    Shapes: float32 [N, C]. open_clip multiplies by 100 before a softmax.
    Raises: MvmrError for widths that don't fit one another, or values that are not finite.
    """
    rows, classes = _to_rows(embeddings, "embeddings"), _to_rows(columns, "class columns")
    if rows.shape[1] != len(classes):
        raise MvmrError(f"embeddings {rows.shape[1]} wide and class columns of length {len(classes)} do not fit")
    unit = F.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)
    return (unit @ torch.tensor(classes, dtype=torch.float32)).numpy()


def store_map(bundle: Bundle, space_map: SpaceMap, teacher: Teacher) -> Bundle:
    """Keep a map in the bundle on whose features it was fitted; one to a teacher of the same name is replaced.

    Writes: maps/<name>/map.safetensors and map.json: teacher, strength, r2, space_id of the bundle.
    Returns: the bundle as it is now.
    Raises: MvmrError when the map is not as wide as the bundle's features and the teacher's embeddings.
    """
    _check_width(space_map, bundle)
    if len(space_map.bias) != teacher.dim:
        wide = f"embeddings of {teacher.name} are {teacher.dim} wide"
        raise MvmrError(f"the map gives {len(space_map.bias)} values but {wide}; give the teacher it was fitted on")
    record = {
        "teacher": {"name": teacher.name, "weights": teacher.weights, "identity": teacher.identity},
        "strength": space_map.strength,
        "r2": space_map.r2,
        "space_id": bundle.space_id,
    }
    arrays = {"weight": np.ascontiguousarray(space_map.weight), "bias": np.ascontiguousarray(space_map.bias)}
    weights, description = _file_names(teacher.name)
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return add_files(bundle, {weights: save(arrays), description: text.encode("utf-8", "replace")})


def read_map(bundle: Bundle, teacher: Teacher | str) -> tuple[SpaceMap, dict[str, Any]]:
    """Read the map to the space of `teacher` and its record (see `store_map`), checking the hashes of both files.

    teacher: the teacher that will encode the text, whose identity must be that of the map's; or a name, unchecked

    Raises: MvmrError for a teacher without a map here (naming those that have one), other weights of that teacher,
        a damaged file, or a map that was fitted on other features than this bundle's.
    """
    name = teacher if isinstance(teacher, str) else teacher.name
    files = _file_names(name)
    if files[1] not in bundle.manifest.files:
        names = [file.split("/")[1] for file in bundle.manifest.files if re.fullmatch(r"maps/[^/]+/map\.json", file)]
        raise MvmrError(f"bundle {bundle.path}: {unknown('map to teacher', name, names)}")
    bundle.verify(*files)
    space_map, record = _read(*map(bundle.file, files))
    _check_width(space_map, bundle)
    if record["space_id"] != bundle.space_id:
        raise MvmrError(f"{bundle.file(files[1])} was fitted on another encoder; fit the map on this bundle")
    if not isinstance(teacher, str) and record["teacher"]["identity"] != teacher.identity:
        origin = f"fitted to {name} ({record['teacher']['weights']})"
        raise MvmrError(f"the map in {bundle.path} was {origin}, not to {teacher.weights}; load that, or fit again")
    return space_map, record


class _Ridge:
    """Ridge regression on standardised rows, for any number of strengths by one eigendecomposition of a Gram matrix.

    For rows Z [N, D] = U S V^T the coefficients are V S (S^2 + N strength)^-1 U^T Y, here kept as basis [D, R] and
    targets [R, K], R = min(N, D). The smaller of Z^T Z and Z Z^T gives S^2 and one of V and U; the other is never made.
    """

    def __init__(self, x: npt.NDArray[Any], y: Doubles) -> None:
        self.mean, self.offset = x.mean(0, dtype=np.float64), y.mean(0)
        z, centred = x - self.mean, y - self.offset
        scale = np.sqrt(np.einsum("nd,nd->d", z, z) / len(z))
        constant = scale <= np.finfo(np.float32).eps * np.abs(self.mean)  # no more than rounding; or a dead unit
        self.scale = np.where(constant, 1.0, scale)
        z /= self.scale
        if z.shape[1] <= len(z):
            values, self.basis = np.linalg.eigh(z.T @ z)
            self.targets = self.basis.T @ (z.T @ centred)
        else:
            values, vectors = np.linalg.eigh(z @ z.T)
            self.basis, self.targets = z.T @ vectors, vectors.T @ centred
        self.squares, self.count = values.clip(min=0), len(z)

    def errors(self, x: npt.NDArray[Any], y: Doubles) -> dict[float, float]:
        """Sum of squared errors on other rows, by strength."""
        scores, targets = ((x - self.mean) / self.scale) @ self.basis, y - self.offset
        return {
            strength: float(np.square(targets - scores @ self._coefficients(strength)).sum()) for strength in STRENGTHS
        }

    def solve(self, strength: float) -> tuple[Floats, Floats]:
        """Return weight [K, D] and bias [K] for rows that are not standardised."""
        weight = (self.basis @ self._coefficients(strength)).T / self.scale
        bias = self.offset - weight @ self.mean
        return np.ascontiguousarray(weight, dtype=np.float32), bias.astype(np.float32)

    def _coefficients(self, strength: float) -> Doubles:
        return self.targets / (self.squares + self.count * strength)[:, None]


def _read(weights: Path, description: Path) -> tuple[SpaceMap, dict[str, Any]]:
    record = strict_json.read_object(description, "the description of a map")
    arrays = read_arrays(weights, ("weight", "bias"))
    try:
        teacher = {key: str(record["teacher"][key]) for key in ("name", "weights", "identity")}
        record = {**record, "teacher": teacher, "space_id": str(record["space_id"])}
        strength, r2 = float(record["strength"]), float(record["r2"])
        return SpaceMap(weight=arrays["weight"], bias=arrays["bias"], strength=strength, r2=r2), record
    except (KeyError, TypeError, ValueError) as error:
        raise MvmrError(f"{description} does not describe a map ({type(error).__name__}: {error})") from error


def _file_names(teacher: str) -> tuple[str, str]:
    folder = re.sub(r"[^A-Za-z0-9]+", "-", teacher)[-64:].strip("-") or "teacher"
    return f"maps/{folder}/map.safetensors", f"maps/{folder}/map.json"


def _check_width(space_map: SpaceMap, bundle: Bundle) -> None:
    width = space_map.weight.shape[1]
    if width != bundle.manifest.embedding_dim:
        wide = f"the features of {bundle.path} are {bundle.manifest.embedding_dim} wide"
        raise MvmrError(f"the map takes {width} features but {wide}; fit it on this bundle")


def _to_rows(values: Rows, what: str) -> npt.NDArray[Any]:
    """`values`, of any device, as an array of numbers [N, width], all finite."""
    array = values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 2:
        raise MvmrError(f"{what} must be rows of numbers, [N, width]; these are of shape {list(array.shape)}")
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise MvmrError(f"{what}: row {int(np.argmin(finite))} holds NaN or infinity; compute them again in float32")
    return array
