"""The subcommand that serves a bundle; every flag is also a variable, MVMR_ and its name."""

from __future__ import annotations

from typing import Any

import click

from mvmr.serve.options import CONNECTIONS, ENGINE, LIMITS, bytes_of, connections_of, limits_of

_STDERR = 2
_ENV = {"auto_envvar_prefix": "MVMR"}


@click.command(context_settings=_ENV)
@click.argument("bundle", required=False, envvar="MVMR_BUNDLE")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 for all.")
@click.option("--port", default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="Name of the model in answers; that of BUNDLE's folder when left out.")
@ENGINE
@click.option("--workers", type=click.IntRange(1), help="Batches at a time; left out, one to a core, one on a GPU.")
@click.option("--threads", type=click.IntRange(1), help="Threads to a batch; left out, the cores among the workers.")
@click.option("--decoders", type=click.IntRange(1), help="Processes that decode for a client; left out, one to a core.")
@click.option("--max-batch", type=click.IntRange(1), help="Images to a batch; 4 on a processor, 32 on a GPU.")
@click.option("--queue", default=256, show_default=True, help="Images accepted at a time; more get 429.")
@click.option("--max-items", default=64, show_default=True, help="Images to a request.")
@click.option("--max-body-mb", default=64.0, show_default=True, help="Megabytes of a request.")
@click.option("--max-json-mb", default=16.0, show_default=True, help="Megabytes of a request that is JSON.")
@LIMITS
@CONNECTIONS
@click.option("--probe-port", type=int, help="A port for probes alone, answered whatever the other has to do.")
@click.option("--api-keys", metavar="FILE", help="File with a key to a line; one must come with each request.")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Origin whose pages may ask; none when left out.")
@click.option("--url-host", "url_hosts", multiple=True, metavar="HOST", help="Host that images may be fetched from.")
@click.option("--index", metavar="INDEX", help="Index of `mvmr index`, for /v1/search.")
@click.option("--tls-cert", metavar="FILE", help="Certificate, PEM; with --tls-key the service speaks https.")
@click.option("--tls-key", metavar="FILE", help="Its private key, PEM.")
@click.option("--drain", default=1.0, show_default=True, help="Seconds from SIGTERM to the closing of the door.")
@click.option("--grace", default=30.0, show_default=True, help="Seconds for accepted requests to end after that.")
def serve(
    bundle: str | None,
    api_keys: str | None,
    **options: Any,
) -> None:
    """Serve embeddings of BUNDLE (the newest below runs/ when left out) over HTTP, by its exported file."""
    from mvmr.bundles.bundle import newest
    from mvmr.serve.http.logs import log_to
    from mvmr.serve.http.run import serve as run
    from mvmr.serve.http.settings import Settings, read_keys

    keys = read_keys(api_keys) if api_keys else ()
    for_the_engine = {name: options.pop(name) for name in ("name", "precision", "provider", "threads")}
    index = options.pop("index")
    settings = Settings(
        max_body=bytes_of("--max-body-mb", options.pop("max_body_mb")),
        max_json=bytes_of("--max-json-mb", options.pop("max_json_mb")),
        limits=limits_of(options),
        connections=connections_of(options),
        api_keys=keys,
        **options,
    )
    with log_to(_STDERR):
        run(bundle or newest(), settings=settings, index=index, **for_the_engine)
