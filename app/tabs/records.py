"""What a bundle's own reports say of its accuracy on the gallery's data, and the commands that measured it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mvmr import strict_json
from mvmr.app.embedders.embedder import TEACHER, key_of
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.manifest import Manifest
from mvmr.distillation.teachers.clip_source import default_tag
from mvmr.errors import MvmrError
from mvmr.export.artifacts import ARTIFACTS, report_of


@dataclass(frozen=True, kw_only=True)
class Records:
    """What a bundle's own reports say of the gallery's data.

    data: as the user named it; labelled: whether it has one label to an image
    teacher, weights, identity: of the teacher that is loaded, as `Teacher` names them
    """

    bundle: Bundle | None
    data: str
    labelled: bool
    teacher: str = ""
    weights: str = ""
    identity: str = ""

    def command(self, protocol: str, *, table: bool) -> str:
        """What measures a protocol with `mvmr evaluate`; table: for the teacher, too."""
        path = "BUNDLE" if self.bundle is None else self.bundle.path
        return f"mvmr evaluate {path} --data {self.data} --protocol {protocol}{' --table' if table else ''}"

    def find(self, protocol: str, *, teacher: bool) -> tuple[float, str] | None:
        """Top-1 in percent from the newest record of it, and the command that made the record."""
        own_names = {self.teacher, *(name for name, record in self._teachers().items() if self._is_this(record))}
        labels = {f"{protocol}, teacher {own}" for own in own_names} if teacher else {protocol}
        name = "top1_weighted_k5" if protocol == "knn" else "top1"
        for record in reversed(self._now().metrics if self.bundle else ()):
            if record["protocol"] not in labels or name not in record["values"] or not _same(record["data"], self.data):
                continue
            if not teacher or self._is_ours(record["command"]):
                return float(record["values"][name]), str(record["command"])
        return None

    def find_exported(self, key: str) -> tuple[float, str] | None:
        """Top-1 in percent of a head on the images that an export was verified with, from the report beside it."""
        artifact = next((row for row in ARTIFACTS.values() if key_of(row) == key), None)
        file = None if artifact is None else report_of(artifact.file)
        if self.bundle is None or file is None or file not in self.bundle.manifest.files:
            return None
        try:
            report = strict_json.read(self.bundle.file(file))
            accuracies = {
                name: entry["accuracy"] for name, entry in report["heads"].items() if entry["accuracy"] is not None
            }
            if not accuracies or not _same(report["data"], self.data):
                return None
            head = min(accuracies)
            sample = f"{report['images']} images of {report['data']} ({report['split']})"
            return float(accuracies[head]), f"mvmr export, {file}: head {head} on {sample}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a bundle may come from a stranger
            return None

    def _now(self) -> Manifest:
        """The bundle's manifest as it stands: what was measured since the app was started is in it."""
        assert self.bundle is not None
        try:
            current = bundles.load(self.bundle.path, verify=False)
        except MvmrError:
            return self.bundle.manifest
        return current.manifest if current.space_id == self.bundle.space_id else self.bundle.manifest

    def _is_ours(self, command: str) -> bool:
        """Whether a record of a teacher of this name is of these weights, and not of others."""
        options = dict(re.findall(r"--(teacher|pretrained) (\S+)", command))
        record = self._teachers().get(options.get("teacher", TEACHER))
        if "teacher" in options and record is None:
            try:
                weights = options.get("pretrained") or default_tag(self.teacher)
            except MvmrError:  # a folder with its own weights
                return _same(options["teacher"], os.path.dirname(self.weights))
            return _same(weights, self.weights)
        return self._is_this(record)

    def _teachers(self) -> Mapping[str, object]:
        """What the bundle says of its teachers, by their names."""
        teachers = None if self.bundle is None else self.bundle.manifest.training.get("teachers")
        return teachers if isinstance(teachers, Mapping) else {}

    def _is_this(self, record: object) -> bool:
        return isinstance(record, Mapping) and record.get("identity") == self.identity


def _same(first: str, second: str) -> bool:
    """Whether two names are of the same data or file; paths may be written in several ways."""
    return os.path.abspath(first) == os.path.abspath(second)
