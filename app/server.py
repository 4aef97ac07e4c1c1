"""The app over HTTP: Gradio's page for each teacher, beside it thumbnails, maps and tables by number, never by path."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated
from urllib.parse import unquote, urlsplit

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
import uvicorn
from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles

from mvmr.app import fragments
from mvmr.app.tabs.maps_service import METHODS, Maps
from mvmr.app.ui import STATIC, build
from mvmr.app.workbench import Workbench
from mvmr.bundles.preprocess import Preprocess
from mvmr.cores import usable_cores
from mvmr.data.image_bytes import LIMITS
from mvmr.errors import MvmrError
from mvmr.progress import say
from mvmr.serve.decoding.pool import DecodePool
from mvmr.serve.http.connections.listener import url_of

MAX_UPLOAD = "64mb"
_LOOKED_AT = 32  # pixels: what comes of decoding an upload beforehand is thrown away
_SYSTEM_FONTS = ("ui-sans-serif", "system-ui", "sans-serif")
_MONO = ("ui-monospace", "Consolas", "monospace")
_FOREVER = {"cache-control": "private, max-age=86400"}  # their addresses name the gallery's fingerprint


def create_app(benches: Sequence[Workbench]) -> FastAPI:
    """The app as an ASGI application, with a page for each workbench; engines and gallery are the same for all."""
    maps = [Maps(bench) for bench in benches]
    decoders = DecodePool(Preprocess.for_size(_LOOKED_AT), LIMITS, processes=usable_cores())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(decoders.start)
        threading.Thread(target=warm, daemon=True).start()
        yield
        await asyncio.to_thread(decoders.close)
        for bench, its_maps in zip(benches, maps, strict=True):
            bench.ending.set()
            its_maps.close()
        benches[0].engines.close()

    def warm() -> None:
        for bench in benches:
            bench.warm()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.exception_handler(MvmrError)
    def refuse(request: Request, error: MvmrError) -> Response:
        return PlainTextResponse(str(error), 404)

    for bench, its_maps in reversed(list(zip(benches, maps, strict=True))):  # the first one's page answers to all else
        path = f"/{unquote(bench.address)}".rstrip("/")
        app.include_router(_gallery_routes(bench, its_maps), prefix=path)
        app.include_router(_tables(bench), prefix=path)
        app.mount(f"{path}/mvmr", StaticFiles(directory=STATIC))
        if path:
            _add_slash(app, path, bench.name)
        _mount_page(app, bench, decoders, path)
    return app


def _gallery_routes(bench: Workbench, maps: Maps) -> APIRouter:
    """What the page shows of the gallery: thumbnails and maps, and the script that draws the maps."""
    router = APIRouter()

    @router.get("/thumb/{version}/{row}")
    def thumb(version: str, row: int) -> Response:
        if version != fragments.version(bench):
            raise MvmrError("the gallery is another one now; load the page again")
        if not 0 <= row < len(bench.gallery):
            raise MvmrError(f"the gallery has no image {row}; it has {len(bench.gallery)}, counted from 0")
        return Response(bench.gallery.thumbnail(row), media_type="image/webp", headers=_FOREVER)

    @router.get("/map.json")
    def map_json(engine: str, method: str = METHODS[0], k: Annotated[int, Query(ge=1)] = bench.k) -> Response:
        content = maps.json(engine, method, k)
        return (
            JSONResponse({"state": "computing"}, 202)
            if content is None
            else Response(content, media_type="application/json")
        )

    @router.get("/mvmr/plotly.min.js")
    def plotly_js() -> Response:
        return FileResponse(str(files("plotly") / "package_data" / "plotly.min.js"), headers=_FOREVER)

    return router


def _tables(bench: Workbench) -> APIRouter:
    """The tables as CSV, for download."""
    router = APIRouter()

    @router.get("/disagreements/{table}.csv")
    def csv(table: str, engine: str, k: Annotated[int, Query(ge=1)] = bench.k) -> Response:
        from mvmr.app.tabs.disagreement_page import tables  # here, for scikit-learn takes seconds

        name = f"{table}-{engine}-k{k}.csv"
        headers = {"content-disposition": f'attachment; filename="{name}"'}
        return Response(tables(bench, table, engine, k), media_type="text/csv; charset=utf-8", headers=headers)

    @router.get("/figures.csv")
    def figures() -> Response:
        from mvmr.app.tabs.figures_page import table_csv

        headers = {"content-disposition": 'attachment; filename="figures.csv"'}
        return Response(table_csv(bench), media_type="text/csv; charset=utf-8", headers=headers)

    return router


def _add_slash(app: FastAPI, path: str, name: str) -> None:
    """To an address of a page without one, relative to which its pieces would not be found."""

    @app.get(path)
    def redirect() -> Response:
        return RedirectResponse(f"{name}/")  # relative: a proxy may put the app below an address of its own


def _mount_page(app: FastAPI, bench: Workbench, decoders: DecodePool, path: str) -> None:
    """Gradio's page: nothing of it loaded from elsewhere, no documentation, no paths of this machine."""
    no_docs = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    theme = gr.themes.Base(
        primary_hue="blue", neutral_hue="slate", font=_SYSTEM_FONTS, font_mono=_MONO, radius_size="sm"
    )  # fmt: skip
    gr.mount_gradio_app(
        app, build(bench, decoders), path=path or "/", theme=theme, css_paths=STATIC / "style.css",
        footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, pwa=False, show_error=False,
        enable_monitoring=False, max_file_size=MAX_UPLOAD, allowed_paths=[], app_kwargs=no_docs,
    )  # fmt: skip


def run(benches: Sequence[Workbench], door: socket.socket) -> None:
    """Serve the app at an open door until Ctrl-C or SIGTERM; what visitors have uploaded is gone then."""
    with tempfile.TemporaryDirectory(prefix="mvmr-app-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        # where a proxy has put the app: Gradio would look for every page there, uvicorn puts it before the page's own
        below = urlsplit(os.environ.pop("GRADIO_ROOT_PATH", "")).path.rstrip("/") if len(benches) > 1 else ""
        config = uvicorn.Config(
            create_app(benches), log_level="warning", timeout_graceful_shutdown=2, server_header=False, root_path=below
        )
        server = uvicorn.Server(config)
        say(f"the app is at {url_of(door)} (Ctrl-C ends it)")
        server.run(sockets=[door])
