"""The images of an index that are nearest to one image."""

from __future__ import annotations

import os
from pathlib import Path

from mvmr.bundles import bundle as bundles
from mvmr.errors import MvmrError
from mvmr.export.runtimes import check_provider, run_by
from mvmr.serve.engine import Engine
from mvmr.serve.index.index import Hit, Index
from mvmr.serve.vectors import normalized_space


def search(
    index: str | os.PathLike[str],
    image: str | os.PathLike[str],
    *,
    k: int = 10,
    bundle: str | os.PathLike[str] | None = None,
    precision: str | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    probes: int | None = None,
    ef_search: int | None = None,
) -> list[Hit]:
    """Embed one image and find its nearest neighbours, best first.

    Args:
        bundle: None takes the one that made the index, from where it was then.
        precision: None takes that of the indexed embeddings where the bundle has it.

    Raises: MvmrError for an index, bundle or image that can't be read, or a bundle of another embedding space.
    """
    opened = Index.load(index)
    source = bundle or opened.bundle
    if not source:
        raise MvmrError(f"the index {opened.path} does not know which bundle made it; give it by --bundle")
    if bundle is None and not Path(source).is_dir():
        raise MvmrError(f"{source}, the bundle that made the index {opened.path}, is not there; give it by --bundle")
    space = bundles.load(source, verify=False).space_id
    normalize = opened.space_id == normalized_space(space)  # as the indexed ones were
    if not normalize:
        opened.check_space(space, source)
    engine = Engine.load(
        source, precision=precision or _same_precision(source, opened, provider), provider=provider, threads=threads
    )
    vectors = engine.embed([Path(image)], normalize=normalize)
    return opened.search(vectors, k, probes=probes, ef_search=ef_search)[0]


def _same_precision(bundle: str | os.PathLike[str], index: Index, provider: str) -> str | None:
    check_provider(provider)
    artifact, files = run_by(provider).get(index.precision), bundles.load(bundle, verify=False).manifest.files
    return index.precision if artifact is not None and artifact.files(files) else None
