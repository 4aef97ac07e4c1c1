"""What one running app works on: gallery, teacher, engines and their embeddings; shared by all visitors."""

from __future__ import annotations

import logging
import shlex
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from mvmr.app.compare import Comparison, Side, compare
from mvmr.app.embedders.embedder import TEACHER, Encoder
from mvmr.app.embedders.engines import Engines
from mvmr.app.embedders.teacher import TeacherSide
from mvmr.app.gallery import Gallery
from mvmr.bundles.bundle import Bundle
from mvmr.errors import MvmrError
from mvmr.evaluation.neighbours import Bank, neighbour_overlap
from mvmr.serve.engine import Floats

logger = logging.getLogger(__name__)

T = TypeVar("T")
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class TimedComparison:
    """A comparison, and the seconds it took each side to embed the image; none where that was at hand."""

    comparison: Comparison
    seconds: dict[str, float]


class Kept:
    """What is made once for each key, however many ask at a time."""

    def __init__(self) -> None:
        self._products: dict[tuple[object, ...], object] = {}
        self._locks: defaultdict[tuple[object, ...], threading.Lock] = defaultdict(threading.Lock)

    def __contains__(self, key: object) -> bool:
        return key in self._products

    def once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        """What `make` returns, made once for each key."""
        with self._locks[key]:
            if key not in self._products:
                self._products[key] = make()
            return self._products[key]  # type: ignore[return-value]

    def recall(self, key: tuple[object, ...]) -> Any:
        """What `once` has made under a key, None where it has not yet."""
        return self._products.get(key)

    def keep(self, key: tuple[object, ...], value: object) -> None:
        """Keep what `recall` gives from now on under a key, in the place of what was."""
        with self._locks[key]:
            self._products[key] = value


@dataclass(eq=False)
class Workbench:
    """Holds nothing about its visitors; what it computes is kept, and computed once however many ask at a time.

    bundle: None where a service stands in its place
    folder: where embeddings and maps are kept; teacher: None where it can't be had, then `no_teacher` says why
    k: neighbours that are compared unless a visitor asks for another number; ending: set when long work is to stop
    name: of the teacher, where the bundle has several; pages: addresses of the pages of all, by their names
    shared: what is kept that no teacher has a part in, the same for the workbenches of several; own: all else
    """

    bundle: Bundle | None
    engines: Engines
    gallery: Gallery
    folder: Path
    teacher: TeacherSide | None
    no_teacher: str
    k: int
    name: str = ""
    pages: Mapping[str, str] = field(default_factory=dict)
    shared: Kept = field(default_factory=Kept, repr=False)
    own: Kept = field(default_factory=Kept, repr=False)
    ending: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def address(self) -> str:
        """Of the page, below that of the app: "" or "teacher/NAME/"."""
        return self.pages.get(self.name, "")

    def encoder(self, key: str) -> Encoder:
        """The teacher, or the student under an engine; raises MvmrError where it can't be had."""
        if key != TEACHER:
            return self.engines.get(key)
        if self.teacher is None:
            raise MvmrError(self.no_teacher)
        return self.teacher

    def rows(self, key: str, advance: Advance | None = None, *, progress: bool = False) -> Floats:
        """Embeddings of the gallery, float32 [N, D]; computed the first time, which `advance(done, of)` hears of."""

        def hear(done: int, of: int) -> None:
            if self.ending.is_set():
                raise MvmrError("the app is ending")
            if advance is not None:
                advance(done, of)

        return self._side(key).once(
            ("rows", key), lambda: self.gallery.embeddings(self.encoder(key), self.folder, hear, progress=progress)
        )

    def ready(self, key: str) -> bool:
        """Whether the gallery's embeddings under it are at hand."""
        return ("rows", key) in self._side(key)

    def bank(self, key: str) -> Bank:
        """The gallery under it, to be searched."""
        return self._side(key).once(("bank", key), lambda: Bank(self.rows(key)))

    def overlap(self, key: str, k: int) -> npt.NDArray[np.float64]:
        """Neighbour overlap of every image in percent, [N]; raises MvmrError without a teacher or k other images."""
        self.encoder(TEACHER)
        self.engines.get(key)
        if not 1 <= k <= self.most:
            raise MvmrError(f"k = {k}: with this gallery give 1 to {self.most} neighbours")
        return self.own.once(
            ("overlap", key, k),
            lambda: np.asarray(100 * neighbour_overlap(self.rows(TEACHER), self.rows(key), k), np.float64),
        )

    def compare(self, image: Image.Image | int, key: str, k: int, advance: Advance | None = None) -> TimedComparison:
        """The neighbours of an image, or of the gallery's image of that number, under teacher and student."""
        sides: dict[str, Side] = {}
        seconds: dict[str, float] = {}
        for side in (TEACHER, key) if self.teacher is not None else (key,):
            self.rows(side, advance)
            began = time.perf_counter()
            query = self.embed(image, side)
            if not isinstance(image, int):
                seconds[side] = time.perf_counter() - began
            sides[side] = Side(self.bank(side), query)
        without = image if isinstance(image, int) else None
        return TimedComparison(compare(sides.get(TEACHER), sides[key], k, without=without), seconds)

    def embed(self, image: Image.Image | int, key: str) -> Floats:
        """The embedding of an image, or of the gallery's image of that number: float32 [D]."""
        if isinstance(image, int):
            return np.asarray(self.rows(key)[image])
        return self.encoder(key).embed([image])[0]

    @property
    def most(self) -> int:
        """The largest k that may be asked for."""
        return max(1, min(max(50, self.k), len(self.gallery) - 1))

    @property
    def path(self) -> str:
        """Of the bundle, for commands."""
        return "BUNDLE" if self.bundle is None else shlex.quote(str(self.bundle.path))

    def warm(self) -> None:
        """Load the teacher and the engine that is shown first, so that the first visitor does not wait for them."""
        for key in (TEACHER, self.engines.default):
            try:
                self.encoder(key).embed([self.gallery.load(0)])
            except MvmrError as error:  # whoever asks for it will be told, too
                logger.warning("%s", error)

    def _side(self, key: str) -> Kept:
        """Where that is kept which hangs on one side alone."""
        return self.own if key == TEACHER else self.shared
