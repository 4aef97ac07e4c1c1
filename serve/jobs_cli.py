"""The subcommands over many images: embed, index, search."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from mvmr.bundles.preprocess import Background
from mvmr.progress import say_plan
from mvmr.serve.options import ENGINE, LIMITS, MAX_FILE, limits_of

EXIT_NO_IMAGE = 3  # of `mvmr embed`: it ran to its end, and every image failed
_OF_TEACHERS = ("pretrained", "background", "max_unreadable")
THREADS = click.option("--threads", type=click.IntRange(1), help="Cores that embed; all when left out.")


@click.command()
@click.argument("sources", nargs=-1, metavar="[BUNDLE] IMAGES")
@click.option("--out", required=True, metavar="DIR|FILE", help="Folder of parts, FILE.parquet or FILE.npy.")
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    metavar="SPEC",
    help="In BUNDLE's place, as `mvmr distill` takes it; then FILE is a rows:FILE.",
)
@click.option("--pretrained", metavar="TAG|FILE", help="That teacher's weights.")
@click.option(
    "--background", metavar="R,G,B|none", help="With --teacher: what transparent images are laid on; 255,255,255."
)
@click.option("--max-unreadable", type=float, help="With --teacher: share of unreadable images that stops it; 0.01.")
@ENGINE
@THREADS
@click.option("--head", "heads", multiple=True, metavar="all|NAME", help="Head whose best class becomes a column.")
@click.option("--dtype", default="float32", show_default=True, help="Of the embeddings: float32 or float16.")
@click.option("--normalize", is_flag=True, help="Divide each embedding by its length; their space is another one then.")
@click.option("--shard", metavar="I/N", help="Only piece I of N, from 0, for array jobs.")
@click.option("--resume", is_flag=True, help="Go on with what a stopped run left.")
@click.option("--part-rows", default=4096, show_default=True, type=click.IntRange(1), help="Images to a part.")
@MAX_FILE
@LIMITS
@click.pass_context
def embed(
    context: click.Context, /, sources: tuple[str, ...], out: str, teachers: tuple[str, ...], shard: str | None,
    **options: Any,
) -> None:  # fmt: skip
    """Embed IMAGES by BUNDLE's exported file, or by a teacher.

    IMAGES: a folder, a quoted glob, list:FILE with a path a line (- for standard input), tar files (shards:PATTERN,
    with {000..009}), an address such as s3://bucket/prefix, or a data set such as stl10:ROOT (docs/data.md).
    """
    from mvmr.serve.batch.job import embed as run
    from mvmr.serve.batch.job import read_shard

    of_teacher = {name: value for name in _OF_TEACHERS if (value := options.pop(name)) is not None}
    if teachers:
        _embed_by_teacher(context, teachers, sources, out, of_teacher)
        return
    if of_teacher or len(sources) != 2:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in _OF_TEACHERS)
        raise click.UsageError(f"give BUNDLE and IMAGES, or --teacher SPEC (and its {flags}) and IMAGES")
    bundle, images = sources
    piece = read_shard(shard) if shard else None
    say_plan(bundle=bundle, images=images, out=out)
    summary = run(bundle, images, out=out, shard=piece, limits=limits_of(options), progress=True, **options)
    rate = f", {summary.added / summary.seconds:,.1f} a second" if summary.added else ""
    click.echo(f"{summary.path}: {summary.rows} embeddings of width {summary.dim}, {summary.added} images now{rate}")
    if summary.errors:
        click.echo(f"{summary.errors} images could not be read: {summary.errors_file}", err=True)
    if not summary.rows:
        click.echo("error: not one image was embedded; see there why, mend it, and embed into another --out", err=True)
        context.exit(EXIT_NO_IMAGE)
    click.echo(f"next: mvmr index {out} --out INDEX{' (after the other shards)' if piece else ''}", err=True)


def _embed_by_teacher(
    context: click.Context, teachers: tuple[str, ...], sources: tuple[str, ...], out: str, options: dict[str, Any]
) -> None:
    if len(sources) != 1:
        raise click.UsageError("with --teacher give IMAGES alone: no bundle embeds them")
    if len(teachers) != 1:
        raise click.UsageError(f"give one --teacher, not {len(teachers)}: a file holds the embeddings of one")
    for parameter in context.command.params:
        is_given = context.get_parameter_source(str(parameter.name)) is not ParameterSource.DEFAULT
        if is_given and parameter.name not in ("sources", "out", "teachers", *_OF_TEACHERS):
            raise click.UsageError(f"{parameter.opts[0]} is for bundles: leave it out with --teacher")
    (images,), (teacher,) = sources, teachers
    if "background" in options:
        options["background"] = _read_background(options["background"])
    from mvmr.data import grammar
    from mvmr.distillation.teachers.spec import check_names, parse_specs

    check_names(parse_specs(teacher))
    grammar.parse(images)
    from mvmr.distillation.embedding import embed as run

    say_plan(teacher=teacher, images=images, out=out)
    count, width = run(teacher, images, out, progress=True, **options)
    click.echo(f"{out}: {count} embeddings of width {width}")
    background = options.get("background")
    views = f" --set views.background=[{','.join(map(str, background))}]" if background else ""
    click.echo(f"next: mvmr distill --teacher rows:{out} --data {images}{views}", err=True)


def _read_background(text: str) -> Background:
    if text == "none":
        return None
    try:
        red, green, blue = map(int, text.split(","))
    except ValueError as error:
        raise click.BadParameter(
            f"{text}: give three whole numbers, such as 0,0,0, or none", param_hint="--background"
        ) from error
    return red, green, blue


@click.command()
@click.argument("embeddings")
@click.option("--out", required=True, metavar="INDEX", help="Folder of the index.")
@click.option("--kind", default="exact", show_default=True, help="exact, ivf or hnsw.")
@click.option("--lists", type=click.IntRange(1), help="Of ivf; 4 * sqrt(N) when left out.")
@click.option("--probes", type=click.IntRange(1), help="Lists that ivf looks into; a sixteenth when left out.")
@click.option(
    "--links", default=32, show_default=True, type=click.IntRange(1), help="Neighbours a vector has, of hnsw."
)
@click.option("--ef-search", default=128, show_default=True, type=click.IntRange(1), help="Candidates hnsw keeps.")
@click.option("--overwrite", is_flag=True, help="Replace the index that --out holds.")
def index(embeddings: str, out: str, **options: Any) -> None:
    """Index EMBEDDINGS, as `mvmr embed` wrote them, for `mvmr search` and the service."""
    from mvmr.serve.index.index import build

    built = build(embeddings, out, progress=True, **options)
    recall = "" if built.kind == "exact" else f", recall@10 {built.recall:.3f}"
    click.echo(f"{built.path}: {len(built)} vectors of width {built.dim}, {built.kind}{recall}")
    click.echo(f"next: mvmr search {built.path} IMAGE   mvmr serve --index {built.path}", err=True)


@click.command()
@click.argument("index")
@click.argument("image")
@click.option("-k", default=10, show_default=True, type=click.IntRange(1), help="How many neighbours.")
@click.option("--bundle", metavar="B", help="Bundle that embeds IMAGE; the one that made the index when left out.")
@ENGINE
@THREADS
@click.option("--probes", type=click.IntRange(1), help="Lists that ivf looks into; as built when left out.")
@click.option("--ef-search", type=click.IntRange(1), help="Candidates hnsw keeps; as built when left out.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def search(index: str, image: str, as_json: bool, **options: Any) -> None:
    """Print the images of INDEX that are nearest to IMAGE, by cosine similarity."""
    import json
    from dataclasses import asdict

    from mvmr.serve.index.search import search as run

    hits = run(index, image, **options)
    if as_json:
        click.echo(json.dumps([asdict(hit) for hit in hits], ensure_ascii=False))
        return
    for hit in hits:
        # a path in an index that others made may hold what commands a terminal
        path = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in hit.path)
        click.echo(f"{hit.score:.4f}  {path}")
