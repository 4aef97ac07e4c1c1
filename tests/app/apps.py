"""What tests of the app share: a bundle as the quickstart makes it, the app as a process, and a real browser."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from mvmr.data import open_images
from mvmr.distillation.teachers.clip import ClipTeacher
from mvmr.distillation.teachers.tiny_clip import TinyClip, train_tiny_clip
from mvmr.evaluation import evaluate as evaluation
from mvmr.export.export import export
from mvmr.training.pretraining import fit
from mvmr.training.recipe import load_recipe

CHROMIUM = "/usr/bin/chromium"
DATA = "sample:patches"
_FLAGS = (
    "--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
)  # fmt: skip
_SECONDS = 120
WAIT = 120_000  # milliseconds for what a page shows at once on a quiet machine
_OPEN = ("centred_cosine_mean=-1", "overlap=-1", "accuracy_drop=100")  # a student of one epoch need not export well
# Of Gradio's own frontend, on a page without a frame around it.
_HARMLESS = ("Method not implemented",)


def make_quickstart(out: Path) -> Path:
    """Teacher and student of the quickstart, after an epoch, with a head and exports; the folder of the student."""
    teacher = out / "teacher"
    small = TinyClip(image_size=32, width=8, steps=20, text_width=32)
    train_tiny_clip(open_images(DATA, "train"), teacher, config=small, seed=0)
    recipe = load_recipe("quickstart", "mvmr.distillation", ["train.epochs=1", "views.size=32"])
    teachers = {"teacher": ClipTeacher.load(teacher, text=True)}
    images = open_images(DATA, "unlabelled")
    fit(images.subset(range(0, len(images), 4)), out / "student", recipe, teachers=teachers, device="cpu")
    evaluation.probe(out / "student", DATA, head="textures")
    export(out / "student", formats=["onnx", "int8"], data=DATA, calibration=DATA, images=64, gates=_OPEN)
    return out / "student"


@dataclass
class Running:
    """`mvmr app` in a process of its own; log: what it has said on standard error so far."""

    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.log)


@contextmanager
def running(*arguments: str, cwd: Path | None = None, **environment: str) -> Iterator[Running]:
    """Start the app on a free port, and end it as Ctrl-C does."""
    command = [sys.executable, "-m", "mvmr", "app", *arguments, "--port", "0"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=cwd, env={**os.environ, **environment}, errors="replace"
    )
    app = Running(process)
    started = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            app.log.append(line)
            if match := re.search(r"the app is at (http://\S+)", line):
                app.url = match[1]
                started.set()
        started.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert started.wait(_SECONDS), app.text
        assert app.url, app.text
        yield app
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        finally:
            process.kill()
            reader.join(5)
            if process.stderr is not None:
                process.stderr.close()


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium; the test is skipped where there is none."""
    if shutil.which(CHROMIUM) is None:
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_FLAGS))
        yield browser
        browser.close()


@dataclass
class Visit:
    """One visitor's page, and what went wrong on it: errors of the console, answers that failed, hosts asked."""

    page: Page
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)


@contextmanager
def visit(browser: Browser, url: str, *, width: int = 1366, height: int = 850, dark: bool = False) -> Iterator[Visit]:
    """Open the app as a new visitor; at the end no error may have shown in the console."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", accept_downloads=True
    )
    page = context.new_page()
    page.set_default_timeout(WAIT)
    visitor = Visit(page)

    def heard(message: ConsoleMessage) -> None:
        if message.type == "error" and not any(text in message.text for text in _HARMLESS):
            visitor.errors.append(message.text)

    page.on("console", heard)
    page.on("pageerror", lambda error: visitor.errors.append(str(error)))
    page.on("response", lambda got: visitor.errors.append(f"{got.status} {got.url}") if got.status >= 400 else None)
    page.on("request", lambda request: visitor.hosts.add(re.sub(r"^\w+://([^/:]*).*", r"\1", request.url)))
    page.goto(url)
    page.wait_for_selector(".mvmr-title h1")
    page.wait_for_selector("#strip .pick")
    try:
        yield visitor
        assert not visitor.errors, visitor.errors
    finally:
        context.close()


def wait_until(what: object, seconds: float = 10.0) -> None:
    """Wait for a function to return something true."""
    assert callable(what)
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
