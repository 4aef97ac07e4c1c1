"""How faithful each engine is on the gallery, computed when somebody asks and kept for all."""

from __future__ import annotations

from mvmr.app.embedders.embedder import TEACHER
from mvmr.app.tabs.disagreement import Fidelity
from mvmr.app.tabs.probes import ProbeResult, Probes, Training
from mvmr.app.workbench import Advance, Workbench
from mvmr.errors import MvmrError


def fidelity(bench: Workbench, engine: str, k: int) -> Fidelity:
    """Neighbour overlap on the gallery; with the accuracy of linear probes once `fit_probes` has been called.

    Raises: MvmrError where there is no teacher, or not k other images.
    """
    overlap = bench.overlap(engine, k)  # refuses what can't be had, so that nothing is kept for it
    probes: Probes | None = bench.own.recall(("probes", engine))

    def make() -> Fidelity:
        gallery = bench.gallery
        return Fidelity.of(overlap, k, gallery.labels, gallery.classes, probes=probes)

    return bench.own.once(("fidelity", engine, k, probes is not None), make)


def fit_probes(bench: Workbench, engine: str, advance: Advance | None = None) -> Probes:
    """Fit linear probes of both sides on the training split of the gallery's data, and ask them about the gallery.

    Raises: MvmrError where the data have no labels, or no training split.
    """
    gallery = bench.gallery

    def make() -> Probes:
        if gallery.labels is None:
            raise MvmrError(f"{gallery.name} has no labels (one to an image), and a probe is fitted on labels")
        training = bench.shared.once(
            ("training",),
            lambda: Training.open(gallery.name, gallery.classes, background=gallery.images.background),
        )
        labels = gallery.labels

        def ask(key: str) -> ProbeResult:
            head = training.probe(bench.encoder(key), bench.folder, advance)
            return ProbeResult.of(head, bench.rows(key), labels)

        return Probes(teacher=bench.own.once(("probe", TEACHER), lambda: ask(TEACHER)), student=ask(engine))

    return bench.own.once(("probes", engine), make)
