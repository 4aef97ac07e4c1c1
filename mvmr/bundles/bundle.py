"""The student bundle, the one artifact of training: a folder that is whole or not there (reading needs no torch).

`write` makes a bundle inside a working folder, `publish` moves that folder into place; `add_files`, `add_head` and
`add_metrics` extend a bundle that stands. Each writes bundle.json last, which lists the hash of every file, so whatever
the moment at which a process is killed, a reader sees the bundle as it was or as it was to be.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvmr import __version__
from mvmr.bundles import manifest
from mvmr.bundles.description import as_html
from mvmr.bundles.manifest import Manifest, plain_json
from mvmr.bundles.model_card import model_card
from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError, missing_extra, unknown
from mvmr.storage import staging
from mvmr.storage.atomic import write_json, write_text
from mvmr.storage.lock import hold

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from mvmr.bundles.head import Head
    from mvmr.models.student import Student

ENCODER, PROJECTOR, CARD = "encoder.safetensors", "projector.safetensors", "README.md"
_RESERVED = (staging.FOLDER, manifest.NAME, CARD, ENCODER)
_NAMES_SHOWN = 3


@dataclass(frozen=True, repr=False)
class Bundle:
    """A bundle on disk and what its bundle.json said when it was loaded; make one with `load`."""

    path: Path
    manifest: Manifest

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}: {self.manifest.backbone}, {self.manifest.embedding_dim} features)"

    def _repr_html_(self) -> str:
        return as_html(self)

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the linear heads, sorted."""
        return self.manifest.heads

    @property
    def space_id(self) -> str:
        """32 hex digits that name the embedding space: vectors are comparable exactly when their ids are equal.

        Depends on the encoder's weights and the preprocessing, not on heads, metrics or the card.
        """
        if ENCODER not in self.manifest.files:
            raise MvmrError(f"bundle {self.path} lists no {ENCODER}; train it again or take a whole copy")
        parts = [self.manifest.files[ENCODER], self.manifest.backbone, self.manifest.preprocessing.to_dict()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def file(self, name: str) -> Path:
        """Return where the listed file `name` ("encoder.safetensors", "heads/x/head.json") is to be read now.

        Raises: MvmrError when the bundle lists no such file.
        """
        return staging.locate(self.path, name, self._hash(name))

    def verify(self, *names: str) -> None:
        """Check the hash of `names`, or of every listed file but the card, which its owner may edit.

        Raises: MvmrError naming the files that are missing or changed.
        """
        faults = []
        for name in names or [name for name in self.manifest.files if name != CARD]:
            digest = staging.located_digest(self.path, name, self._hash(name))
            if digest != self.manifest.files[name]:
                faults.append(f"{name} {'has changed since it was written' if digest else 'is missing'}")
        if faults:
            more = f" and {len(faults) - _NAMES_SHOWN} more" if len(faults) > _NAMES_SHOWN else ""
            listing = ", ".join(faults[:_NAMES_SHOWN])
            raise MvmrError(f"bundle {self.path} is damaged: {listing}{more}; copy it again from a whole bundle")

    def _hash(self, name: str) -> str:
        if name not in self.manifest.files:
            raise MvmrError(f"bundle {self.path}: {unknown('file', name, self.manifest.files)}")
        return self.manifest.files[name]

    def head(self, name: str) -> "Head":
        """Read one linear head.

        Raises: MvmrError for an unknown name (with the nearest), a damaged file, or another width than the features'.
        """
        from mvmr.bundles import head

        if name not in self.heads:
            raise unknown("head", name, self.heads)
        files = [f"heads/{name}/{part}" for part in (head.WEIGHTS, head.DESCRIPTION)]
        self.verify(*files)
        result = head.read(*map(self.file, files))
        if result.name != name:
            raise MvmrError(f"head {name} of bundle {self.path} calls itself {result.name}; take a whole copy of it")
        _check_width(result, self)
        return result

    def student(self, device: str = "cpu") -> "Student":
        """Build the student from the weights, ready to embed images (imports torch).

        Raises: MvmrError when the weights don't fit the architecture, the device is not there, or torch is not.
        """
        try:
            from mvmr.models.student import load_student
        except ModuleNotFoundError as error:
            raise missing_extra(error) or error from error

        return load_student(self, device=device)


def load(path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
    """Open the bundle in folder `path`, checking its schema version and (unless told not to) the hash of every file.

    Raises: MvmrError when there is no bundle, its run has not finished, its schema is newer than this mvmr, bundle.json
        is broken, or a file is missing or changed (naming it).
    """
    previous = None
    while True:
        folder = _locate(Path(path))
        bundle = Bundle(folder, manifest.read(folder / manifest.NAME))
        try:
            if verify:
                bundle.verify()
            return bundle
        except MvmrError:
            # Another process may have changed the bundle since its manifest was read; damage stays the same.
            if bundle == previous:
                raise
            previous = bundle


def newest(root: str | os.PathLike[str] = "runs") -> Path:
    """Return the folder of the bundle below `root` that was made last; unfinished and unreadable ones don't count.

    Raises: MvmrError when there is none.
    """
    candidates = []
    for file in Path(root).glob(f"**/{manifest.NAME}"):
        folder = file.parent
        if any(part.startswith(".") or part.endswith(".partial") for part in folder.relative_to(root).parts):
            continue
        try:
            candidates.append((manifest.read(file).created, str(folder), folder))
        except MvmrError:
            continue
    if not candidates:
        raise MvmrError(f"no bundle below {root}; give one, or make one with `mvmr quickstart` or `mvmr distill`")
    return max(candidates)[2]


def write(
    directory: Path,
    *,
    backbone: str,
    options: Mapping[str, Any],
    embedding_dim: int,
    preprocessing: Preprocess,
    training: Mapping[str, Any],
    encoder_state: Mapping[str, "Tensor"],
    projector_state: Mapping[str, "Tensor"] | None = None,
) -> Bundle:
    """Write a bundle's files into the working folder `directory`, bundle.json last; `publish` makes it visible.

    training: JSON values: method, teachers, data, seed, steps, recipe (see `Manifest`).
    backbone, options: what the encoder is; encoder_state: its weights; stored as float32 on the CPU.

    Whether the weights fit the architecture is for the caller to see to: `mvmr.models.student.save_student` does.

    Raises: MvmrError when the training record is not JSON, or the disk is full.
    """
    from mvmr.bundles import weights

    record = plain_json(training, "training record")
    # An earlier attempt's manifest must not vouch for this one's files.
    (directory / manifest.NAME).unlink(missing_ok=True)
    (directory / PROJECTOR).unlink(missing_ok=True)
    staging.sweep(directory)
    states = {ENCODER: encoder_state} | ({PROJECTOR: projector_state} if projector_state else {})
    for file, state in states.items():
        weights.save(directory / file, state)
    content = Manifest(
        schema=manifest.SCHEMA,
        mvmr_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="microseconds"),
        backbone=backbone,
        options=plain_json(options, "options"),
        embedding_dim=embedding_dim,
        preprocessing=preprocessing,
        training=record,
        metrics=(),
        files={file: staging.digest(directory / file) or "" for file in states},
    )
    card = _card(content, directory.name.removesuffix(".partial"))
    write_text(directory / CARD, card)
    content = replace(content, files={**content.files, CARD: hashlib.sha256(card.encode()).hexdigest()})
    write_json(directory / manifest.NAME, content.to_json())
    return Bundle(directory, content)


def publish(partial: Path, out: Path) -> None:
    """Move the finished working folder `partial` to `out`; a bundle that stands there is replaced.

    Killed between the two renames this takes, `load(out)` reads the old bundle from where it was moved aside.

    Raises: MvmrError when `partial` holds no bundle, or `out` holds something that is not one (left untouched).
    """
    load(partial, verify=False)
    out = out.resolve()
    if out.exists() and not (out / manifest.NAME).exists() and (not out.is_dir() or any(out.iterdir())):
        raise MvmrError(f"{out} exists and is not a bundle; it stays untouched: give another folder")
    try:
        staging.exchange(partial, out, manifest.NAME)
    except OSError as error:
        raise MvmrError(f"cannot move {partial} to {out}: {error.strerror}; the finished bundle stays there") from error


def add_files(bundle: Bundle, contents: Mapping[str, bytes | Path]) -> Bundle:
    """Put files (given as bytes, or as a file to copy) into a bundle that stands, all of them or none.

    Raises: MvmrError for a path outside the bundle, or a disk that is full; the bundle then stays as it was.
    """
    return _extend(bundle, contents, ())


def add_head(
    bundle: Bundle,
    name: str,
    weight: "npt.ArrayLike",
    bias: "npt.ArrayLike",
    classes: Sequence[str],
    metrics: Mapping[str, Any],
) -> Bundle:
    """Store a linear head; one of the same name is replaced. Returns the bundle as it is now.

    Shapes: weight [C, D], bias [C]: arrays, or tensors on the CPU.
    metrics: one record (see `Manifest`), kept in head.json and among the bundle's metrics.

    Raises: MvmrError for a bad name, arrays that don't fit the classes or the features, or a bad record.
    """
    from mvmr.bundles import head

    new = head.make(name, weight, bias, classes, metrics)
    _check_width(new, bundle)
    return _extend(bundle, new.to_files(), (new.metrics,))


def add_metrics(bundle: Bundle, record: Mapping[str, Any]) -> Bundle:
    """Add one metrics record (see `Manifest`), replacing that of the same command, data, protocol and head."""
    return _extend(bundle, {}, (manifest.check_record(record),))


def encoder_file(bundle: Bundle) -> Path:
    """Return where the encoder's weights are, after checking their hash."""
    bundle.verify(ENCODER)
    return bundle.file(ENCODER)


def _extend(bundle: Bundle, contents: Mapping[str, bytes | Path], records: Sequence[Mapping[str, Any]]) -> Bundle:
    for name in contents:
        if not manifest.is_inside(name) or name.split("/")[0] in _RESERVED:
            raise MvmrError(f"{name!r} cannot be put into a bundle; give a plain path such as 'onnx/encoder.onnx'")
    try:
        with hold(bundle.path):
            current = load(bundle.path, verify=False)
            staging.settle(current.path, current.manifest.files)
            try:
                _commit(current, contents, records)
            finally:
                # Read again: on an error nobody but the disk knows which manifest stands.
                current = load(bundle.path, verify=False)
                staging.settle(current.path, current.manifest.files)
            return current
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise MvmrError(f"cannot change bundle {bundle.path}: {error.strerror}{where}; it is still whole") from error


def _commit(current: Bundle, contents: Mapping[str, bytes | Path], records: Sequence[Mapping[str, Any]]) -> None:
    old = current.manifest
    files = {name: staging.stage(current.path, name, content) for name, content in contents.items()}
    # What was measured with a head that is replaced says nothing about the new one.
    heads = {name.split("/")[1] for name in files if name.startswith("heads/")}
    subjects = {_subject(record) for record in records}
    metrics = [record for record in old.metrics if record.get("head") not in heads and _subject(record) not in subjects]
    content = replace(old, metrics=(*metrics, *records), files={**old.files, **files})
    # A card that its owner has edited, or removed, is the owner's.
    if CARD in old.files and staging.digest(current.path / CARD) == old.files[CARD]:
        card = _card(content, current.path.name.removesuffix(".partial")).encode()
        content = replace(content, files={**content.files, CARD: staging.stage(current.path, CARD, card)})
    write_json(current.path / manifest.NAME, content.to_json())


def _subject(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record["command"], record["data"], record["protocol"], record.get("head")


def _card(content: Manifest, name: str) -> str:
    return model_card(content, name=name, space_id=Bundle(Path(name), content).space_id)


def _check_width(head: "Head", bundle: Bundle) -> None:
    width = head.weight.shape[1]
    if width != bundle.manifest.embedding_dim:
        reason = f"the features of {bundle.path} are {bundle.manifest.embedding_dim} wide"
        raise MvmrError(f"head {head.name} takes {width} features but {reason}; fit it on this bundle")


def _locate(path: Path) -> Path:
    try:
        if (path / manifest.NAME).is_file():
            return path
        real = path.resolve()
        if real.is_file():
            raise MvmrError(f"{path} is a file, not a bundle; give the folder that holds {manifest.NAME}")
        if real.is_dir():
            why = "its run has not finished" if real.suffix == ".partial" else f"it holds no {manifest.NAME}"
            raise MvmrError(f"{path} is not a bundle: {why}; give the --out folder of a finished run")
        if (staging.backup_path(real) / manifest.NAME).is_file():
            return staging.backup_path(real)
        if real.with_name(f"{real.name}.partial").is_dir():
            raise MvmrError(f"the run that makes bundle {path} has not finished; go on with it by --resume")
    except OSError as error:
        raise MvmrError(f"cannot read bundle {path}: {error.strerror}; check the path and its permissions") from error
    raise MvmrError(f"no bundle at {path}: there is no such folder")
