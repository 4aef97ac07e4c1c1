"""Running the service: its sockets, the signals, and a clean end."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import ssl
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from mvmr.cores import usable_cores
from mvmr.errors import MvmrError
from mvmr.serve.engine import Engine
from mvmr.serve.http import heap
from mvmr.serve.http.app import create_app
from mvmr.serve.http.connections.listener import open_listener, url_of
from mvmr.serve.http.connections.registry import raise_file_limit
from mvmr.serve.http.connections.server import Server
from mvmr.serve.http.probes import serve_probes
from mvmr.serve.http.service import Service
from mvmr.serve.http.settings import Settings

if TYPE_CHECKING:
    from mvmr.serve.index import Index

logger = logging.getLogger(__name__)

# Seconds until a thread that waits for the interpreter claims it. A busy event loop gives it up for a moment at each
# turn, which begins that wait anew: with Python's own 5 ms, the threads of the engine waited for a tenth of a second.
_SWITCH = 1e-4


def serve(
    bundle: str | os.PathLike[str],
    *,
    settings: Settings,
    name: str | None = None,
    precision: str | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    index: str | os.PathLike[str] | None = None,
) -> None:
    """Serve a bundle's exported student until SIGTERM or Ctrl-C; returns when all that was accepted is answered.

    Args:
        name: of the model in answers; None takes that of the bundle's folder.
        precision, provider: as for :meth:`mvmr.serve.Engine.load`.
        threads: of one batch; None shares the cores among the workers, of which there is by default one to a core, and
            one on a GPU.
        index: of `mvmr index`, for /v1/search.

    Raises: MvmrError, before it listens, for a bundle, an index, a certificate or a port that can't be had.
    """
    _check_tls(settings.tls_cert, settings.tls_key)
    heap.have_one()
    with ExitStack() as stack:
        listener = stack.enter_context(open_listener(settings.host, settings.port))
        probe_listener = None
        if settings.probe_port is not None:
            probe_listener = stack.enter_context(open_listener(settings.host, settings.probe_port, flag="--probe-port"))
        # A batch on one thread costs less than on two, which wait for one another (benchmarks/export_speed.py).
        workers = settings.workers or (usable_cores() if provider == "cpu" else 1)
        settings = dataclasses.replace(settings, workers=workers)
        threads = threads or max(1, usable_cores() // workers)
        engine = Engine.load(bundle, precision=precision, provider=provider, threads=threads)
        engine = dataclasses.replace(engine, name=name or engine.name)
        app = create_app(engine, settings, None if index is None else _index(index))
        service: Service = app.state.service
        url = url_of(listener, tls=bool(settings.tls_cert))
        logger.info(
            "%s (%s, %s, %d heads) at %s", engine.name, engine.precision, engine.provider, len(engine.heads), url
        )
        raise_file_limit()
        sys.setswitchinterval(_SWITCH)
        server = Server(app, listener, settings, service.metrics)
        if probe_listener is not None:
            logger.info("probes at %s", url_of(probe_listener))
            stack.enter_context(serve_probes(service, probe_listener))
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(_run(server, service))


async def _run(server: Server, service: Service) -> None:
    loop = asyncio.get_running_loop()
    drains: set[asyncio.Task[None]] = set()

    async def drain() -> None:
        # Probes hear of it, and every answer ends its connection, before the door is closed: a request that comes on a
        # connection that is being closed would be lost.
        service.draining = True
        await asyncio.sleep(service.settings.drain)
        server.should_exit = True

    def stop() -> None:
        if service.draining:
            server.should_exit = server.force_exit = True
            return
        logger.info("stopping: no more is accepted in %g s, what was accepted is finished", service.settings.drain)
        drains.add(loop.create_task(drain()))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, service.reload_heads)
    await server.serve()


def _index(path: str | os.PathLike[str]) -> Index:
    from mvmr.serve.index.index import Index  # here, for faiss and pyarrow take their time to import

    return Index.load(path)


def _check_tls(cert: str | None, key: str | None) -> None:
    if bool(cert) != bool(key):
        raise MvmrError("https takes both --tls-cert and --tls-key")
    if cert and key:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key)
        except OSError as error:  # ssl's own error is one, too
            why = error.strerror or str(error)
            raise MvmrError(
                f"cannot use {cert} with {key}: {why}; give the PEM files of a certificate and its key"
            ) from error
