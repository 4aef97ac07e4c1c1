"""The servers that are compared, each started alone on 127.0.0.1 and ended with all its processes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
from peers import environments

HERE = Path(__file__).parent
BINARY = "application/x-mvmr-float32"
_START_SECONDS = 120.0


@dataclass(frozen=True)
class Setting:
    """workers: processes (of ours: threads) that run batches; threads: of onnxruntime, to a batch; batch: at most."""

    workers: int
    threads: int
    batch: int
    fast_queue: bool = False

    def __str__(self) -> str:
        queue = ", fast queue" if self.fast_queue else ""
        return f"{self.workers} x {self.threads} threads, batches of {self.batch}{queue}"


class Server:
    """One server for a bundle, in processes of its own; to be entered as a context.

    name: mvmr, litserve or bentoml; python: of its environment; port: that it listens at
    path, headers, answer: of a request, and in which form the embedding comes back
    """

    def __init__(self, name: str, python: Path, bundle: Path, setting: Setting) -> None:
        self.name, self.port, self._bundle, self._setting = name, _free_port(), bundle, setting
        self.headers = {"content-type": "application/json"}
        if name == "mvmr":
            self.path, self._ready, self.answer = "/v1/embed", "/readyz", "float32"
            self.headers = {"content-type": "image/jpeg", "accept": BINARY}
            self._command = [
                sys.executable, "-m", "mvmr", "serve", str(bundle), "--port", str(self.port),
                "--workers", str(setting.workers), "--threads", str(setting.threads), "--max-batch", str(setting.batch),
            ]  # fmt: skip
        elif name == "litserve":
            self.path, self._ready, self.answer = "/embed", "/health", "float32"
            self._command = [
                str(python), str(HERE / "litserve_server.py"), "--bundle", str(bundle), "--port", str(self.port),
                "--workers", str(setting.workers), "--threads", str(setting.threads), "--batch", str(setting.batch),
                *(["--fast-queue"] if setting.fast_queue else []),
            ]  # fmt: skip
        else:
            batched = setting.batch > 1
            self.path, self._ready, self.answer = "/embed", "/readyz", "base64 in JSON" if batched else "float32"
            if not batched:
                self.headers = {"content-type": "image/jpeg"}
            service = f"bentoml_service:{'Batched' if batched else 'Single'}"
            self._command = [
                str(python), "-m", "bentoml", "serve", service, "--working-dir", str(HERE),
                "--host", "127.0.0.1", "--port", str(self.port),
            ]  # fmt: skip

    @property
    def request(self) -> str:
        """In which form an image is sent."""
        return "raw" if self.headers["content-type"] == "image/jpeg" else "base64 in JSON"

    def __enter__(self) -> Server:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        variables = environments.quiet(folder)
        for name in ("workers", "threads", "batch"):
            variables[f"PEER_{name.upper()}"] = str(getattr(self._setting, name))
        variables["PEER_BUNDLE"] = str(self._bundle)
        self._log = folder / "log.txt"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=variables, cwd=folder, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = psutil.Process(self._process.pid).children(recursive=True)
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            for left in psutil.wait_procs(tree, timeout=1)[1]:  # some have a process group of their own
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()

    def ask(self, body: bytes) -> npt.NDArray[np.float32]:
        """The embedding of one body: float32 [D]."""
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}{self.path}", body, self.headers)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            content = answer.read()
        if self.answer != "float32":
            content = base64.b64decode(json.loads(content)[0])
        return np.frombuffer(content, np.float32)

    def processor_seconds(self) -> float:
        """Of all threads of all its processes, so far."""
        main = psutil.Process(self._process.pid)
        return float(sum(sum(each.cpu_times()[:2]) for each in (main, *main.children(recursive=True))))

    def log(self) -> str:
        """The end of what it wrote."""
        return self._log.read_text(errors="replace")[-3000:]

    def _wait(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self._ready}"):
                return
            time.sleep(0.1)
        raise RuntimeError(f"{self.name} did not start: {self.log()}")


def bodies(name: str, request: str, files: list[Path]) -> list[Path]:
    """Files with the bodies of a server's requests, made from images."""
    if request == "raw":
        return files
    made = []
    for file in files:
        image = base64.b64encode(file.read_bytes()).decode()
        content = {"image": image} if name == "litserve" else {"images": [image]}
        made.append(file.with_suffix(f".{name}.json"))
        made[-1].write_text(json.dumps(content))
    return made


def _free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])
