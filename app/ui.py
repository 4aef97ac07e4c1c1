"""The page: its controls, and what happens when they are used. What a visitor brings stays with that visitor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from mvmr.app import fragments
from mvmr.app.classify import Guess, best, names_of, suggest_names, zero_shot
from mvmr.app.embedders.embedder import TEACHER
from mvmr.app.uploads import check, open_image, take_upload
from mvmr.app.workbench import Workbench
from mvmr.bundles.preprocess import Background
from mvmr.errors import MvmrError
from mvmr.serve.decoding.pool import DecodePool

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
_PICKS = 24
_AT_ONCE = 8  # events of a kind
_PROGRESS = gr.Progress()  # a default by which Gradio knows where the bar goes
_FIRST_NAMES = "cat, dog, car, house, tree, person"
_ASK = "Upload, paste or photograph an image, or click one of the gallery: its nearest neighbours appear here."
_CHOOSE = "Choose an image on the page Neighbours, then classify it here."
_ROW_CLICKED = """
element.addEventListener('click', event => {
  const image = event.target.closest('[data-row]');
  if (image) trigger('select', {row: Number(image.dataset.row)});
});
for (const kind of ['mouseover', 'mouseout']) element.addEventListener(kind, event => {
  const card = event.target.closest('.card');
  if (card) for (const twin of element.querySelectorAll(`.card[data-row="${card.dataset.row}"]`))
    twin.classList.toggle('hovered', kind === 'mouseover');
});
"""
_MAP = """
let maps = null, turns = Promise.resolve();
const show = () => { turns = turns.then(async () => {
  const {mount} = await import(new URL('mvmr/map.js', document.baseURI));
  const start = maps?.state();
  maps?.destroy();
  const box = element.querySelector('.map'), source = element.querySelector('[data-source]');
  box.replaceChildren();
  maps = mount(box, {data: source.dataset.source, thumbs: source.dataset.thumbs, start});
}); };
show();
watch('value', show);
"""


@dataclass(frozen=True)
class Query:
    """The image a visitor asks about: the bytes of a file, decoded when they are needed, or a row of the gallery."""

    content: bytes | int
    name: str
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, upload: bytes | MvmrError, decoders: DecodePool, background: Background) -> Query:
        """Look at what a visitor has brought; raises MvmrError, a sentence for the page, where it is no image."""
        if isinstance(upload, MvmrError):
            raise upload
        check(upload, decoders)
        image = open_image(upload, background=background)
        return cls(upload, "Your image", (f"{image.width} x {image.height} pixels", *image.notes))

    def image(self, background: Background) -> Image.Image | int:
        """The image in RGB, its transparent parts on the background, or its row."""
        return self.content if isinstance(self.content, int) else open_image(self.content, background=background).image


def build(bench: Workbench, decoders: DecodePool) -> gr.Blocks:
    """Put the page together for a workbench; what visitors bring is decoded by `decoders` first."""
    usable = [(choice.label, choice.key) for choice in bench.engines.choices if choice.why is None]
    beside = f" beside {bench.name}" if bench.name else ""
    with gr.Blocks(
        title=f"mvmr: {bench.engines.name}{beside}", fill_width=True, analytics_enabled=False, delete_cache=(60, 60)
    ) as page:
        _html(fragments.header(bench))
        query = gr.State(None, time_to_live=3600)
        with gr.Row(elem_classes="controls"):
            engine = gr.Dropdown(usable, value=bench.engines.default, label="Student runs as", elem_id="engine")
            k = gr.Slider(
                1, max(2, bench.most), bench.k, step=1, label="Neighbours (k)", elem_id="k", visible=bench.most > 1
            )
        with gr.Tab("Neighbours", id="neighbours"):
            _neighbours_tab(bench, decoders, query, engine, k)
        with gr.Tab("Map", id="map"):
            maps = _map_tab(bench, engine, k)
        with gr.Tab("Disagreements", id="disagreements") as tab:
            _disagreements_tab(bench, tab, engine, k, maps)
        with gr.Tab("Classify", id="classify"):
            _classify_tab(bench, query, engine)
        with gr.Tab("Figures", id="figures") as tab:
            _figures_tab(bench, tab)
    page.queue(default_concurrency_limit=_AT_ONCE)  # else one visitor's long wait is everybody's
    page.has_launched = True  # Gradio refuses paths outside its own folders only then, and mounting does not say so
    return page


def _neighbours_tab(bench: Workbench, decoders: DecodePool, query: gr.State, engine: gr.Dropdown, k: gr.Slider) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            picture = gr.Image(
                label="Your image", sources=["upload", "clipboard", "webcam"], type="filepath", height=240,
                buttons=[], elem_id="picture", placeholder="Drop an image here\nor click to upload",
            )  # fmt: skip
            # Gradio's own way decodes the file before anybody knows how many pixels it has
            picture.preprocess = take_upload  # type: ignore[method-assign, assignment]
            strip = _html(fragments.strip(bench, _pick_rows(bench)), js_on_load=_ROW_CLICKED, elem_id="strip")
            shuffle = gr.Button("Other images of the gallery", size="sm", variant="secondary")
        with gr.Column(scale=4, min_width=320):
            result = _html(fragments.message(_ASK), js_on_load=_ROW_CLICKED, elem_id="result")

    def show(what: Query | None, key: str, count: int, progress: gr.Progress) -> str:
        if what is None:
            return fragments.message(_ASK)
        image = what.image(bench.gallery.images.background)
        timed = bench.compare(image, key, int(count), _progress_bar(progress))
        return fragments.neighbours(bench, key, image, what.name, what.notes, timed)

    def upload(
        content: bytes | MvmrError | None, current: Query | None, key: str, count: int, progress: Any = _PROGRESS
    ) -> tuple[Query | None, str, None]:
        if content is None:  # the visitor took the image away
            return current, _render(lambda: show(current, key, count, progress)), None
        try:
            what = Query.read(content, decoders, bench.gallery.images.background)
        except MvmrError as error:
            return current, fragments.message(str(error), fragments.PROBLEM), None
        return what, _render(lambda: show(what, key, count, progress)), None

    def pick(event: gr.EventData, key: str, count: int, progress: Any = _PROGRESS) -> tuple[Any, str]:
        row = int(event.row)
        if not 0 <= row < len(bench.gallery):
            return gr.skip(), fragments.message(f"the gallery has no image {row}", fragments.PROBLEM)
        what = Query(row, bench.gallery.keys[row])
        return what, _render(lambda: show(what, key, count, progress))

    def refresh(what: Query | None, key: str, count: int, progress: Any = _PROGRESS) -> str:
        return _render(lambda: show(what, key, count, progress))

    private: dict[str, Any] = {"api_visibility": "private"}
    picture.input(upload, [picture, query, engine, k], [query, result, picture], **private)
    for grid in (strip, result):
        grid.select(pick, [engine, k], [query, result], **private)
    shuffle.click(lambda: fragments.strip(bench, _pick_rows(bench)), None, strip, **private)
    engine.change(refresh, [query, engine, k], result, **private)
    k.change(refresh, [query, engine, k], result, trigger_mode="always_last", **private)


def _map_tab(bench: Workbench, engine: gr.Dropdown, k: gr.Slider) -> gr.HTML | None:
    if bench.teacher is None:
        _html(fragments.message(f"A map lays two sides over one another. {bench.no_teacher}", fragments.PROBLEM))
        return None

    def source(key: str, count: int) -> str:
        return fragments.map_source(bench, key, int(count))

    panel = _html(source(bench.engines.default, bench.k), js_on_load=_MAP, elem_id="map")
    for event in (engine.change, k.change):
        event(source, [engine, k], panel, trigger_mode="always_last", api_visibility="private")
    return panel


def _classify_tab(bench: Workbench, query: gr.State, engine: gr.Dropdown) -> None:
    suggestion = suggest_names(bench.gallery.classes or ()) or _FIRST_NAMES
    names = gr.Textbox(
        suggestion, label="Class names for the teacher, separated by commas or a line to each", lines=2, max_lines=6,
        visible=bench.teacher is not None, elem_id="names",
    )  # fmt: skip
    with gr.Row():
        ask = gr.Button("Classify the image", variant="primary", elem_id="classify", scale=0, min_width=220)
    result = _html(fragments.message(_CHOOSE), elem_id="classes")

    def guess_by_names(image: Image.Image | int, typed: str) -> tuple[list[Guess] | None, str]:
        if bench.teacher is None:
            return None, ""
        try:
            if not bench.teacher.has_text:
                return None, "The teacher has no text tower, so there is no zero-shot classification."
            return zero_shot(bench.teacher.teacher, bench.embed(image, TEACHER), names_of(typed)), ""
        except MvmrError as error:
            return None, str(error)

    def classify(what: Query | None, key: str, typed: str) -> str:
        if what is None:
            return fragments.message(_CHOOSE)
        image = what.image(bench.gallery.images.background)
        guesses, why = guess_by_names(image, typed)
        heads = []
        if bench.engines.heads:
            embedding = np.asarray(bench.embed(image, key), np.float32)
            picture = bench.gallery.load(image) if isinstance(image, int) else image
            for name, classes in bench.engines.heads.items():
                chances = bench.engines.classify(embedding[None], name, [picture])[0]
                heads.append((name, best(chances, tuple(classes)), f"on features of {bench.engines.get(key).label}"))
        none = f"No linear head in the bundle: fit one with `mvmr probe {bench.path} --data DATA --head NAME`."
        return fragments.classification(bench, image, what.name, heads, none, guesses, why)

    ask.click(
        lambda *inputs: _render(lambda: classify(*inputs)), [query, engine, names], result, api_visibility="private"
    )


def _figures_tab(bench: Workbench, tab: gr.Tab) -> None:
    with gr.Row():
        measure = gr.Button(
            "Measure speed, dCor and CKA here", variant="primary", elem_id="measure", scale=0, min_width=380
        )

    panel = _html(fragments.message("Reading the bundle's reports."), elem_id="figures")

    def run(measured: bool, progress: Any = _PROGRESS) -> str:
        from mvmr.app.tabs.figures_page import figures_table  # here, for scikit-learn takes seconds

        return _render(lambda: figures_table(bench, _progress_bar(progress), measure=measured))

    private: dict[str, Any] = {"api_visibility": "private"}
    tab.select(lambda: run(False), None, panel, **private)
    measure.click(lambda progress=_PROGRESS: run(True, progress), None, panel, **private)


def _disagreements_tab(bench: Workbench, tab: gr.Tab, engine: gr.Dropdown, k: gr.Slider, maps: gr.HTML | None) -> None:
    """Made when somebody looks at it, and again when engine or k change."""
    visited = gr.State(False)
    with gr.Row():
        fit = gr.Button(
            "Fit linear probes of both sides", elem_id="fit", scale=0, min_width=380,
            visible=bench.gallery.labels is not None,
        )  # fmt: skip

    panel = _html(fragments.message("Comparing all images of the gallery."), elem_id="disagreements")

    def make(key: str, count: int, progress: Any) -> str:
        from mvmr.app.tabs.disagreement_page import disagreement  # here, for scikit-learn takes seconds

        bench.rows(key, _progress_bar(progress))
        return disagreement(bench, key, int(count))

    def show(key: str, count: int, progress: Any = _PROGRESS) -> tuple[bool, str]:
        return True, _render(lambda: make(key, count, progress))

    def refresh(was: bool, key: str, count: int, progress: Any = _PROGRESS) -> Any:
        return _render(lambda: make(key, count, progress)) if was else gr.skip()

    def probe(key: str, count: int, progress: Any = _PROGRESS) -> str:
        from mvmr.app.tabs.fidelity_service import fit_probes

        def fit_and_show() -> str:
            fit_probes(bench, key, _progress_bar(progress, "embedding the training images"))
            return make(key, count, progress)

        return _render(fit_and_show)

    private: dict[str, Any] = {"api_visibility": "private"}
    tab.select(show, [engine, k], [visited, panel], **private)
    engine.change(refresh, [visited, engine, k], panel, **private)
    k.change(refresh, [visited, engine, k], panel, trigger_mode="always_last", **private)
    fitting = fit.click(probe, [engine, k], panel, **private)
    if maps is not None:  # which gain a colour: the side whose probe is right
        fitting.then(lambda key, count: fragments.map_source(bench, key, int(count)), [engine, k], maps, **private)


def _html(value: str, **options: Any) -> gr.HTML:
    return gr.HTML(value, apply_default_css=False, **options)


def _render(make: Callable[[], str]) -> str:
    """What is made, or why it can't be."""
    try:
        return make()
    except MvmrError as error:
        return fragments.message(str(error), fragments.PROBLEM)
    except Exception:
        logger.exception("a page could not be made")
        return fragments.message("this is a fault of the app; its log has the trace", fragments.PROBLEM)


def _progress_bar(progress: Any, what: str = "embedding the gallery") -> Callable[[int, int], None]:
    def advance(done: int, of: int) -> None:
        progress((done, of), desc=what, unit="images")

    return advance


def _pick_rows(bench: Workbench) -> Iterator[int]:
    count = len(bench.gallery)
    return map(int, np.random.default_rng().choice(count, min(_PICKS, count), replace=False))
