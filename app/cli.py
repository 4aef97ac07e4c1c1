"""The subcommand that opens the app."""

from __future__ import annotations

import click

from mvmr.cli.early import check
from mvmr.cli.threads import THREADS


@click.command()
@click.argument("bundle", required=False)
@click.option("--teacher", metavar="NAME|FOLDER", help="Left out, all that the bundle was distilled from.")
@click.option("--pretrained", metavar="TAG|FILE", help="Its weights; left out, as the bundle records them.")
@click.option(
    "--gallery", metavar="IMAGES|EMBEDDINGS",
    help="Images to search, as --data of other commands takes them, or the output of `mvmr embed`; left out, the data "
    "that the bundle was trained on.",
)  # fmt: skip
@click.option("--service", metavar="URL", help="An embedding service in the place of a bundle on this machine.")
@click.option("--api-key", metavar="KEY", envvar="MVMR_API_KEY", help="Of the service; or the variable MVMR_API_KEY.")
@click.option("--limit", default=20_000, show_default=True, help="Of more images than these, so many are drawn.")
@click.option("--k", default=10, show_default=True, help="Neighbours that are compared at first.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0 takes a free one.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda, of teacher and torch.")
@THREADS
def app(
    bundle: str | None,
    teacher: str | None,
    pretrained: str | None,
    gallery: str | None,
    service: str | None,
    api_key: str | None,
    limit: int,
    k: int,
    host: str,
    port: int,
    device: str,
) -> None:
    """Compare BUNDLE (the newest below runs/ when left out) with its teachers, in the browser."""
    if bundle is not None or service is None:
        check(bundle=bundle)
    from mvmr.app.opening import open_workbenches
    from mvmr.app.server import run
    from mvmr.serve.http.connections.listener import open_listener

    with open_listener(host, port) as door:
        benches = open_workbenches(
            bundle, teacher=teacher, pretrained=pretrained, gallery=gallery, service=service, api_key=api_key,
            limit=limit, k=k, device=device, progress=True,
        )  # fmt: skip
        run(benches, door)
