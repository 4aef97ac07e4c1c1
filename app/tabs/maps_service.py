"""The maps that the page asks for: PCA at once, UMAP in a process of its own and when it is ready."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import orjson

from mvmr.app.embedders.embedder import TEACHER
from mvmr.app.tabs.maps import Map, Method, cached_map, map_json, stored_map
from mvmr.app.workbench import Workbench
from mvmr.errors import MvmrError, unknown
from mvmr.serve.engine import Floats

METHODS: tuple[Method, ...] = get_args(Method)
_SLOW: Literal["umap"] = "umap"


class Maps:
    """Maps of a workbench, kept on disk beside the embeddings they are made from."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._futures: dict[str, Future[Map]] = {}
        self._lock = threading.Lock()
        self._process: ProcessPoolExecutor | None = None
        self._embedding: dict[str, Future[Floats]] = {}
        self._background = ThreadPoolExecutor(1, "mvmr-map")

    def json(self, engine: str, method: str, k: int) -> bytes | None:
        """The map as the page takes it; None while it is being made.

        Raises: MvmrError for an unknown method or engine, or where there is no teacher to compare with.
        """
        if method not in METHODS:
            raise unknown("map", method, METHODS)
        bench = self._bench
        if bench.teacher is None:
            raise MvmrError(f"a map lays two sides over one another, and there is no teacher: {bench.no_teacher}")
        bench.engines.get(engine)
        if not (bench.ready(TEACHER) and bench.ready(engine)):
            self._begin(engine)
            return None
        layout = self._slow(engine) if method == _SLOW else self._at_once(engine)
        if layout is None:
            return None
        from mvmr.app.tabs.fidelity_service import fidelity  # here, for scikit-learn takes seconds

        result = fidelity(bench, engine, min(k, len(bench.gallery) - 1))
        return orjson.dumps(map_json(layout, bench.gallery, result.overlap, result.right, k=result.k))

    def _begin(self, engine: str) -> None:
        """Embed the gallery behind the page, which asks again; raises MvmrError when that has failed."""
        with self._lock:
            if engine not in self._embedding:
                self._embedding[engine] = self._background.submit(self._bench.rows, engine)
            future = self._embedding[engine]
            if future.done() and future.exception() is not None:
                del self._embedding[engine]
        if future.done():
            future.result()

    def close(self) -> None:
        """End what is made behind the page, at whatever it is."""
        self._background.shutdown(wait=False, cancel_futures=True)
        if self._process is not None:
            for process in list(self._process._processes.values()):  # there is no public way before Python 3.14
                process.terminate()
            self._process.shutdown(cancel_futures=True)

    def _at_once(self, engine: str) -> Map:
        bench = self._bench
        return bench.own.once(
            ("map", engine),
            lambda: cached_map("pca", bench.rows(TEACHER), bench.rows(engine), self._file("pca", engine)),
        )

    def _slow(self, engine: str) -> Map | None:
        rows = self._bench.rows(TEACHER), self._bench.rows(engine)
        with self._lock:
            if engine not in self._futures:
                file, ready = self._file(_SLOW, engine), Future[Map]()
                if (stored := stored_map(_SLOW, *rows, file)) is not None:
                    ready.set_result(stored)
                    self._futures[engine] = ready
                else:
                    if self._process is None:
                        self._process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
                    self._futures[engine] = self._process.submit(cached_map, _SLOW, *rows, file)
            future = self._futures[engine]
            if not future.done():
                return None
            if future.exception() is not None:
                del self._futures[engine]  # what went wrong may be mended: the next to ask tries again
        return future.result()

    def _file(self, method: Method, engine: str) -> Path:
        sides = f"{engine}-{self._bench.encoder(TEACHER).identity[:16]}"
        return self._bench.folder / f"{method}-{sides}-{self._bench.gallery.fingerprint[:16]}.npz"
