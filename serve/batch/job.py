"""The batch job: images in, a table of embeddings out; killed at any moment it loses no row and doubles none."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvmr import __version__
from mvmr.bundles import bundle as bundles
from mvmr.cores import usable_cores
from mvmr.data.image_bytes import LIMITS, Limits
from mvmr.data.listing import open_source
from mvmr.data.readable import Item, Source, note_other_formats
from mvmr.errors import MvmrError
from mvmr.export.artifacts import canary
from mvmr.interrupt import Stop, stop_on_signal
from mvmr.progress import is_wanted, say, track
from mvmr.serve.batch import columns, single_file
from mvmr.serve.batch.parts import Parts, check, claim_folder, open_parts
from mvmr.serve.batch.pipeline import Pipeline
from mvmr.serve.decoding.pool import DecodePool
from mvmr.serve.engine import TOLERANCE, Engine

PART_ROWS = 4096


@dataclass(frozen=True)
class Summary:
    """What a run has made.

    path: the folder or file; rows: embeddings in it; errors: images that could not be read, listed in `errors_file`
    added: images this call went through; seconds: how long that took, without loading the engine
    """

    path: Path
    errors_file: Path
    rows: int
    errors: int
    added: int
    seconds: float
    dim: int
    space_id: str


def embed(
    bundle: str | os.PathLike[str],
    images: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    precision: str | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    heads: Sequence[str] = (),
    dtype: columns.DType = "float32",
    normalize: bool = False,
    shard: tuple[int, int] | None = None,
    resume: bool = False,
    part_rows: int = PART_ROWS,
    limits: Limits = LIMITS,
    progress: bool | None = None,
) -> Summary:
    """Embed many images by an exported student.

    Args:
        bundle: with an exported file (`mvmr export`).
        images: a folder, glob, list, tar shards, address or data set: see `mvmr.data.listing.open_source`.
        out: a folder, for Parquet parts, a manifest and ``errors.parquet``; ``FILE.parquet`` for one file of all rows;
            or ``FILE.npy``, [N, D], with its paths, a line to a row, in ``FILE.paths.txt``. Beside one file stand
            ``FILE.errors.parquet`` and ``FILE.manifest.json``.
        precision, provider: as `Engine.load` takes them.
        threads: cores that embed on a processor; None takes all.
        heads: of the bundle, whose best class and its probability become columns; ``all`` takes every one.
        dtype: of the embeddings in the output, ``float32`` or ``float16``.
        normalize: divides each by its length, which is 1 then, or 0 where all of it is 0. The output is of another
            embedding space than raw ones; classes of heads stay the same.
        shard: (i, n), embeds piece i of n, counted from 0, into the folder ``out/shard-<i>-of-<n>``.
        resume: goes on with what a stopped run left, and begins where there is none.
        part_rows: images to a part, the most that a death costs.
        limits: of an image, to be decoded.

    Raises:
        MvmrError: nothing to embed, a bundle, head, precision or provider that can't be had, an output of another run,
            images or settings that have changed since, a disk that is full; what is written stays good.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM, with a message that says how to go on.
    """
    progress = is_wanted(progress)
    target = Path(out)
    if part_rows < 1 or (threads is not None and threads < 1):
        raise MvmrError(f"part_rows = {part_rows} and threads = {threads} must be 1 or more")
    if shard is not None:
        target = _shard_folder(target, *shard)
    if target.suffix == ".npy" and (heads or dtype != "float32"):
        raise MvmrError(f"{target} holds float32 embeddings alone; for heads or another dtype give FILE.parquet")
    single_file.check_place(target)
    cores = threads or usable_cores()
    engine = Engine.load(bundle, precision=precision, provider=provider, threads=1 if provider == "cpu" else None)
    heads = tuple(engine.heads) if "all" in heads else tuple(heads)
    schema = columns.schema(engine, heads, dtype, normalize=normalize)
    source: Source = open_source(os.fspath(images), limits)
    if shard is not None:
        source = source.share(*shard)
    if note := note_other_formats(source.other_formats):
        say(note, shown=progress)
    settings = _settings(engine, heads, source, dtype, normalize, shard, part_rows, limits)
    folder = single_file.working_folder(target)
    if (manifest := single_file.read_finished(target, settings, resume=resume)) is not None:
        return _summary(target, manifest["rows"], manifest["errors"], engine, normalize)
    check(folder, settings, resume=resume)
    _check_engine(engine)
    facts = {
        "mvmr_version": __version__,
        "bundle": str(engine.path.resolve()),
        "images": source.name,
        "space_id": engine.space_of(normalize=normalize),
        "normalize": normalize,
        "dim": engine.dim,
    }
    decoders = DecodePool(engine.preprocess, limits, processes=max(cores, usable_cores()), hashed=True)
    with claim_folder(folder), decoders:
        parts = open_parts(folder, schema, settings, facts, resume=resume)
        pipeline = Pipeline(
            engine=engine, heads=heads, part_rows=part_rows, decoders=decoders, cores=cores, distant=source.distant,
            normalize=normalize,
        )  # fmt: skip
        job = _Job(parts, pipeline, source, engine, progress)
        began = time.perf_counter()
        if not parts.finished:
            job.run()
            parts.finish()
        parts.tidy()
        single_file.gather(parts, target)
    single_file.clear(target)
    return _summary(target, parts.rows, parts.errors, engine, normalize, job.added, time.perf_counter() - began)


@dataclass
class _Job:
    """One run through a source, from behind the last whole part to the end."""

    parts: Parts
    pipeline: Pipeline
    source: Source
    engine: Engine
    progress: bool
    added: int = 0

    def run(self) -> None:
        start = len(self.parts.done) * self.pipeline.part_rows
        items = iter(self.source.items(start))
        first = next(items, None)
        if first is None:
            if not self.parts.done:
                self.parts.abandon()
                raise MvmrError(f"no images in {self.source.name}: nothing there ends as an image does")
            return
        if start:
            say(f"{start} images are done already", shown=self.progress)
        with stop_on_signal() as stop:
            self._work(itertools.chain([first], items), first.done - (self.source.unit == "img"), stop)
        if stop.requested:
            saved = self.parts.rows + self.parts.errors
            raise KeyboardInterrupt(f"{saved} images are saved in {self.parts.folder}; go on with --resume")

    def _work(self, items: Iterable[Item], start: int, stop: Stop) -> None:
        label, source = "embed", self.source
        rows, began = columns.Rows(), time.perf_counter()
        # a part is written while the next one is embedded; not more than one waits
        with (
            ThreadPoolExecutor(1, "write") as writer,
            track(label, start, source.total, unit=source.unit, shown=self.progress) as advance,
            closing(self.pipeline.run(items)) as batches,
        ):
            written: Future[None] | None = None
            for batch in batches:
                rows.add(batch.rows)
                self.added += batch.images
                if batch.ends_part:
                    if written is not None:
                        written.result()
                    written, rows = writer.submit(self._write, rows), columns.Rows()
                if not batch.images:  # only the end of a part
                    continue
                rate = f"{self.added} images, {self.added / (time.perf_counter() - began):,.0f} img/s"
                advance(batch.done, "" if source.unit == "img" else rate)
                if stop.requested:
                    break
            if written is not None:
                written.result()

    def _write(self, rows: columns.Rows) -> None:
        self.parts.write(columns.to_table(rows, self.parts.schema, self.engine), rows.rejected)


def _settings(
    engine: Engine,
    heads: Sequence[str],
    source: Source,
    dtype: str,
    normalize: bool,
    shard: tuple[int, int] | None,
    part_rows: int,
    limits: Limits,
) -> dict[str, Any]:
    """All that decides what the rows are: a run goes on only while these stay the same."""
    files = bundles.load(engine.path, verify=False).manifest.files
    of_heads = {
        head: [value for name, value in sorted(files.items()) if name.startswith(f"heads/{head}/")] for head in heads
    }
    return {
        "images": source.fingerprint,
        "space_id": engine.space_of(normalize=normalize),
        "exported file": files.get(engine.file, ""),
        "precision": engine.precision,
        "provider": engine.provider,
        "heads": of_heads,
        "dtype": dtype,
        "shard": f"{shard[0]}/{shard[1]}" if shard else None,
        "part_rows": part_rows,
        "limits": json.loads(limits.to_json()),
        # not named where it is off, so that runs that were begun before it existed go on
        **({"normalize": True} if normalize else {}),
    }


def _shard_folder(out: Path, number: int, count: int) -> Path:
    if not 0 <= number < count:
        last = f"{count - 1}/{count}"
        raise MvmrError(f"shard {number}/{count} is not one of 0/{count} to {last}; they are counted from 0")
    if out.suffix in single_file.SUFFIXES:
        raise MvmrError(f"shards don't share the file {out}; give a folder as --out, each shard makes its own inside")
    return out / f"shard-{number:05d}-of-{count:05d}"


def _check_engine(engine: Engine) -> None:
    error = engine.canary_error(engine(canary(engine.size))[0])
    if not error <= TOLERANCE[engine.precision]:
        limit = f"more than {TOLERANCE[engine.precision]:g}"
        raise MvmrError(
            f"{engine.name} on {engine.provider} in {engine.precision} is off by {error:.2g} from what was verified at "
            f"its export, {limit}; export it again on this machine, or take another --precision"
        )


def _summary(
    target: Path, rows: int, errors: int, engine: Engine, normalize: bool, added: int = 0, seconds: float = 0.0
) -> Summary:
    errors_file, space = single_file.errors_file(target), engine.space_of(normalize=normalize)
    return Summary(target, errors_file, rows, errors, added, seconds, engine.dim, space)


def read_shard(text: str) -> tuple[int, int]:
    """Read ``i/n``, counted from 0; raises MvmrError for anything else."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise MvmrError(f"shard {text!r} is not i/n with i from 0 to n - 1; give 0/4, 1/4, 2/4 or 3/4 for four jobs")
    return int(number), int(count)
