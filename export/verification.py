"""Does an exported artifact do what torch does? Figures on real images, and gates by precision."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mvmr.bundles.head import Head
from mvmr.bundles.tensors import channels_first
from mvmr.errors import MvmrError, unknown
from mvmr.evaluation.neighbours import neighbour_overlap
from mvmr.export.artifacts import DENSE, EMBEDDING, LOGITS, Precision
from mvmr.models.student import Student
from mvmr.progress import track

Floats = npt.NDArray[np.float32]
Run = Callable[[npt.NDArray[np.uint8]], Mapping[str, Floats]]
Report = dict[str, Any]  # JSON values

NEIGHBOURS = 10
LARGEST = 64
_RUNS = 16  # of each batch size but the largest, which sees all images


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What torch makes of real images in float32, by the encoder as it was trained (batch norm not folded).

    Shapes: images uint8 [N, S, S, 3], prepared by the bundle's preprocessing; outputs: ``embedding`` float32 [N, D],
        ``logits_<head>`` [N, C] and, where it is compared, ``dense`` [N, h, w, C]; labels int64 [N], numbers into
        `classes`, None where there are none.
    heads: the classes of each head.
    """

    images: npt.NDArray[np.uint8]
    outputs: Mapping[str, Floats]
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    labels: npt.NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()

    @property
    def dense(self) -> tuple[int, ...]:
        """h, w and width of the map of features, () where there is none to compare."""
        return self.outputs[DENSE].shape[1:] if DENSE in self.outputs else ()

    @classmethod
    def of(
        cls,
        student: Student,
        images: npt.NDArray[np.uint8],
        heads: Sequence[Head] = (),
        *,
        labels: npt.NDArray[np.int64] | None = None,
        classes: Sequence[str] = (),
        dense: bool = False,
        progress: bool = False,
    ) -> Reference:
        """Run `student` over prepared images; dense: its map of features is compared, too.

        Raises: MvmrError when it gives every image the same embedding, or one that is not finite; with `dense`, for
            a network that has no map.
        """
        rows, maps, step = [], [], 32
        with track("torch float32", 0, len(images), shown=progress) as advance:
            for start in range(0, len(images), step):
                part = channels_first(images[start : start + step]).to(student.device)
                rows.append(student(part).cpu().numpy())
                if dense:
                    maps.append(student.dense(part).cpu().numpy())
                advance(min(start + step, len(images)), "")
        embedding = np.concatenate(rows)
        if not np.isfinite(embedding).all() or np.ptp(embedding, axis=0).max() == 0:
            raise MvmrError("the student's embeddings are all the same, or not finite: train it again before exporting")
        logits = {f"{LOGITS}{head.name}": embedding @ head.weight.T + head.bias for head in heads}
        return cls(
            images=images,
            outputs={EMBEDDING: embedding, **logits} | ({DENSE: np.concatenate(maps)} if dense else {}),
            heads={head.name: head.classes for head in heads},
            labels=labels,
            classes=tuple(classes),
        )


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What an artifact must reach before it may be used; None is not judged.

    Where it gives the map of features, too, the first and the last hold for an image's whole map as well.

    cosine_min: the lowest cosine of an image's embedding with torch's must be above it.
    centred_cosine_mean: the same after subtracting torch's mean embedding, on average over the images; plain cosines
        flatter, for embeddings share a large common part.
    overlap: share of each image's 10 nearest images that stay, on average, must be above it.
    accuracy_drop: no head may lose more top-1 accuracy than so many points.
    batch_difference: an embedding may not change by more with the batch it is in, relative to the largest value.
    """

    cosine_min: float | None = None
    centred_cosine_mean: float | None = None
    overlap: float | None = None
    accuracy_drop: float | None = None
    batch_difference: float | None = None

    @classmethod
    def of(cls, precision: Precision, assign: Sequence[str] = ()) -> Gates:
        """The gates of a precision, changed by `assign`: ``("cosine_min=0.999", ...)``.

        Raises: MvmrError for an unknown gate or no number.
        """
        names, changes = [gate.name for gate in fields(cls)], {}
        for text in assign:
            name, _, value = text.partition("=")
            if name not in names:
                raise unknown("gate", name, names)
            try:
                changes[name] = float(value)
            except ValueError as error:
                raise MvmrError(f"gate {text!r} has no number; give it as {name}=0.9") from error
            if not np.isfinite(changes[name]):
                raise MvmrError(f"gate {text!r} must be a finite number")
        return replace(_GATES[precision], **changes)

    def judge(self, figures: Mapping[str, Any]) -> list[str]:
        """What falls short, in words; a figure that was not or could not be measured (None) is not judged."""
        failures = []
        for name, bound in asdict(self).items():
            value = figures.get(name)
            if bound is None or value is None:
                continue
            upper = name in ("accuracy_drop", "batch_difference")
            if value > bound if upper else value <= bound:
                failures.append(f"{name} {value:.8g}, wanted {'at most' if upper else 'above'} {bound:g}")
        return failures


_GATES: dict[Precision, Gates] = {
    "fp32": Gates(cosine_min=0.99999, batch_difference=1e-4),
    "fp16": Gates(cosine_min=0.9995, batch_difference=1e-2),
    "int8": Gates(centred_cosine_mean=0.95, overlap=0.8, accuracy_drop=1.0, batch_difference=1e-2),
}


def verify(
    run: Run,
    reference: Reference,
    *,
    batches: Sequence[int] = (1, 3, LARGEST),
    gates: Gates,
    progress: bool = False,
) -> Report:
    """Run an artifact over the reference's images and compare.

    Args:
        run: uint8 [N, S, S, 3] -> outputs by name, such as a :class:`mvmr.export.onnx.session.Session`.
        batches: sizes, the largest last: it sees all images, each of the others 16 batches of them.

    Returns:
        passed, failures (in words), gates, images, batches, the figures that :class:`Gates` names and more, heads
        (percent and points), latency_ms (median, by batch size) and, where the reference has a map, dense, the
        figures of that. Where an output is missing or not finite the figures are None.
    """
    total = len(reference.images)
    sizes = list(dict.fromkeys(min(size, total) for size in batches))
    outputs, latency = {}, {}
    with track("verifying", 0, total, shown=progress) as advance:
        for size in sizes:
            count = total if size == sizes[-1] else min(total, _RUNS * size)
            outputs[size], latency[str(size)] = _time_batches(run, reference.images[:count], size, advance)
    failures = next(filter(None, (_find_misfits(outputs[size], reference) for size in reversed(sizes))), [])
    figures: Report = dict.fromkeys(_FIGURES) | {"heads": {}}
    if not failures:
        figures = _figures(outputs[sizes[-1]], reference)
        figures["batch_difference"] = _batch_difference(EMBEDDING, outputs.values(), reference)
        failures = gates.judge(figures)
        if reference.dense:
            figures[DENSE] = _dense_figures(outputs[sizes[-1]], reference)
            figures[DENSE]["batch_difference"] = _batch_difference(DENSE, outputs.values(), reference)
            failures += [f"{DENSE} {failure}" for failure in gates.judge(figures[DENSE])]
    return {
        "passed": not failures,
        "failures": failures,
        "gates": asdict(gates),
        "images": total,
        "batches": sizes,
        **figures,
        "latency_ms": latency,
    }


_FIGURES = (
    "cosine_min", "cosine_mean", "centred_cosine_min", "centred_cosine_mean", "max_abs", "max_abs_relative",
    "overlap", "accuracy_drop", "batch_difference",
)  # fmt: skip


def _time_batches(
    run: Run, images: npt.NDArray[np.uint8], size: int, advance: Callable[[int, str], None]
) -> tuple[dict[str, Floats], float]:
    """Outputs of all images in batches of `size`, and the median milliseconds of a full batch, the first left out."""
    run(images[:size])
    rows, seconds = [], []
    for start in range(0, len(images), size):
        began = time.perf_counter()
        rows.append(run(images[start : start + size]))
        if start + size <= len(images):
            seconds.append(time.perf_counter() - began)
        advance(min(start + size, len(images)), f"batch {size}")
    return {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}, 1000 * float(np.median(seconds))


def _find_misfits(outputs: Mapping[str, Floats], reference: Reference) -> list[str]:
    """Outputs that can't be compared: missing, of another width, or not finite."""
    failures = []
    for name, wanted in reference.outputs.items():
        if name not in outputs or outputs[name].shape[1:] != wanted.shape[1:]:
            shape = list(outputs[name].shape) if name in outputs else "missing"
            failures.append(f"output {name} is {shape}, wanted [N, {', '.join(map(str, wanted.shape[1:]))}]")
        elif broken := sum(not np.isfinite(row).all() for row in outputs[name]):
            failures.append(f"{name} of {broken} of {len(outputs[name])} images holds NaN or infinity")
    return failures


def _figures(outputs: Mapping[str, Floats], reference: Reference) -> Report:
    actual, expected = (side[EMBEDDING].astype(np.float64) for side in (outputs, reference.outputs))
    centre = expected.mean(0)
    plain, centred = _cosines(actual, expected), _cosines(actual - centre, expected - centre)
    largest = float(np.abs(actual - expected).max())
    k = min(NEIGHBOURS, len(expected) - 1)
    overlap = neighbour_overlap(outputs[EMBEDDING], reference.outputs[EMBEDDING], k)
    heads = {name: _head_figures(name, outputs, reference) for name in reference.heads}
    drops = [head["reference_accuracy"] - head["accuracy"] for head in heads.values() if head["accuracy"] is not None]
    values = (plain.min(), plain.mean(), centred.min(), centred.mean(), largest, largest / np.abs(expected).max())
    return {
        **dict(zip(_FIGURES, map(float, values), strict=False)),
        "overlap": float(overlap.mean()),
        "neighbours": k,
        "accuracy_drop": max(drops) if drops else None,
        "heads": heads,
    }


def _dense_figures(outputs: Mapping[str, Floats], reference: Reference) -> Report:
    """Of each image's map as one long vector: of a patch that ReLU leaves next to nothing, a cosine says nothing."""
    cosines, largest = [], 0.0
    for pair in zip(outputs[DENSE], reference.outputs[DENSE], strict=True):  # one by one: all at once may be gigabytes
        actual, expected = (side.astype(np.float64).reshape(1, -1) for side in pair)
        cosines.append(float(_cosines(actual, expected)[0]))
        largest = max(largest, float(np.abs(actual - expected).max()))
    return {
        "cosine_min": min(cosines),
        "cosine_mean": float(np.mean(cosines)),
        "max_abs": largest,
        "max_abs_relative": largest / float(np.abs(reference.outputs[DENSE]).max()),
    }


def _cosines(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: npt.NDArray[np.float64] = (a * b).sum(1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return cosines


def _head_figures(name: str, outputs: Mapping[str, Floats], reference: Reference) -> Report:
    """Top-1 agreement in percent; where the images' classes are the head's, accuracies in percent, change in points."""
    predicted, expected = (side[f"{LOGITS}{name}"].argmax(1) for side in (outputs, reference.outputs))
    figures: Report = {"agreement": 100 * float((predicted == expected).mean())}
    figures |= dict.fromkeys(("accuracy", "reference_accuracy", "change"))
    numbers = {label: number for number, label in enumerate(reference.heads[name])}
    if reference.labels is not None and reference.labels.ndim == 1 and set(reference.classes) <= numbers.keys():
        answers = np.array([numbers[label] for label in reference.classes])[reference.labels]
        accuracy, original = (100 * float((classes == answers).mean()) for classes in (predicted, expected))
        figures |= {"accuracy": accuracy, "reference_accuracy": original, "change": accuracy - original}
    return figures


def _batch_difference(name: str, outputs: Iterable[Mapping[str, Floats]], reference: Reference) -> float:
    """The largest change of a value with the batch its image is in, relative to torch's largest value.

    outputs: of each batch size, the largest last
    """
    *others, last = (part[name] for part in outputs)
    changes = (float(np.abs(rows - last[: len(rows)]).max()) for rows in others)
    return max(changes, default=0.0) / float(np.abs(reference.outputs[name]).max())
