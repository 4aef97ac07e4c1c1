"""Claim: whatever bytes are sent as an image, the service answers 200 or 4xx, loses no worker and keeps its memory.

Files of every kind that Pillow writes are cut, their bits flipped, parts of them dropped, doubled or taken from others;
between them come bombs, files of another type, and images of one pixel. Each is a function of its number alone, so
that a file which does harm can be made again: `python benchmarks/serve_fuzz.py --only 4711 --keep FILE`.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import click
import measure
import numpy as np
import psutil  # type: ignore[import-untyped]
import skimage.data
from bombs import PNG, chunk, compressed_text, icns, ico, iptc, png, wide_gif
from export_speed import export_resnet50
from PIL import Image

_MIB = 2**20
_SECONDS = 120.0
_BOMBS = 0.01  # share of the files


@click.command()
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Exported bundle; left out, a ResNet50 at 224 px, int8."
)
@click.option("--count", default=10_000, show_default=True, help="Files to send.")
@click.option("--first", default=0, show_default=True, help="Number of the first of them.")
@click.option("--clients", default=8, show_default=True, help="That send at a time.")
@click.option("--only", type=int, help="Send nothing, make the file of this number.")
@click.option("--keep", type=click.Path(path_type=Path), help="Where to write it.")
@click.option("--out", type=click.Path(path_type=Path), default=measure.RESULTS, help="Folder of the JSON.")
def main(
    bundle: Path | None, count: int, first: int, clients: int, only: int | None, keep: Path | None, out: Path
) -> None:
    """Fire damaged images at a running service, and look at what becomes of it."""
    console = measure.output()
    if only is not None:
        kind, content = mutated(only)
        (keep or Path(f"{only}.bin")).write_bytes(content)
        console.print(f"{kind}, {len(content):,} bytes")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = bundle or export_resnet50(Path(folder), 224)
        wait = measure.CoreWait()
        with Service(path, Path(folder)) as service:
            found = _fire(service, range(first, first + count), clients)
        found |= {"log": service.tracebacks(), "exit_status": service.status}
    found |= {"machine": measure.machine("cpu"), "core_wait": wait.share()}
    for key in (
        "files",
        "seconds",
        "statuses",
        "codes",
        "failures",
        "readiness",
        "threads",
        "rss_mib",
        "rss_peak_mib",
        "same_after",
    ):
        console.print(f"{key:<12} {found[key]}")
    measure.save("serve_fuzz", found, out, console)


# The files


@cache
def originals() -> tuple[tuple[str, bytes], ...]:
    """Name and bytes of whole files, of 64 x 48 pixels or so."""
    photograph = Image.fromarray(skimage.data.astronaut()).resize((64, 48))
    alpha = photograph.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(photograph.size))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    grey = photograph.convert("L")
    sixteen = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    icon = alpha.resize((32, 32))
    wanted: list[tuple[str, Image.Image, str, dict[str, Any]]] = [
        ("jpeg", photograph, "JPEG", {"quality": 90}),
        ("jpeg progressive exif", photograph, "JPEG", {"progressive": True, "exif": exif}),
        ("jpeg cmyk", photograph.convert("CMYK"), "JPEG", {}),
        ("jpeg grey", grey, "JPEG", {"quality": 30}),
        ("png", photograph, "PNG", {}),
        ("png alpha exif", alpha, "PNG", {"exif": exif}),
        ("png palette", photograph.quantize(16), "PNG", {"transparency": 3}),
        ("png 16 bits", sixteen, "PNG", {}),
        ("png 1 bit", photograph.convert("1"), "PNG", {}),
        ("webp", photograph, "WEBP", {"quality": 80}),
        ("webp lossless alpha", alpha, "WEBP", {"lossless": True, "exif": exif}),
        ("webp animation", photograph, "WEBP", {"save_all": True, "append_images": [photograph.rotate(90)]}),
        ("gif animation", photograph, "GIF", {"save_all": True, "append_images": [photograph.rotate(90)]}),
        ("tiff", photograph, "TIFF", {}),
        ("tiff lzw", photograph, "TIFF", {"compression": "tiff_lzw"}),
        ("tiff jpeg", photograph, "TIFF", {"compression": "jpeg"}),
        ("tiff group4", photograph.convert("1"), "TIFF", {"compression": "group4"}),
        ("tiff float", grey.convert("F"), "TIFF", {"compression": "tiff_adobe_deflate"}),
        ("tiff lab", photograph.convert("LAB"), "TIFF", {}),
        ("mpo", photograph, "MPO", {"save_all": True, "append_images": [photograph.rotate(90)]}),
        ("bmp", photograph, "BMP", {}),
        ("ico", icon, "ICO", {}),
        ("icns", icon, "ICNS", {}),
        ("ppm", photograph, "PPM", {}),
        ("tga", alpha, "TGA", {"compression": "tga_rle"}),
        ("sgi", photograph, "SGI", {}),
        ("pcx", photograph, "PCX", {}),
        ("dds", alpha, "DDS", {}),
        ("im", photograph, "IM", {}),
        ("jpeg 2000", photograph, "JPEG2000", {}),
        ("avif", photograph, "AVIF", {}),
        ("msp", photograph.convert("1"), "MSP", {}),
        ("xbm", photograph.convert("1"), "XBM", {}),
        ("spider", grey.convert("F"), "SPIDER", {}),
        ("blp", photograph.quantize(256), "BLP", {}),
        ("qoi", photograph, "QOI", {}),
    ]
    return tuple((name, _saved(image, kind, options)) for name, image, kind, options in wanted)


def _saved(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def mutated(number: int) -> tuple[str, bytes]:
    """What was done, and the bytes; the same for the same number."""
    random = np.random.default_rng(number)
    if random.random() < _BOMBS:
        name, make = list(BOMBS.items())[random.integers(len(BOMBS))]
        return f"bomb: {name}", make()
    name, content = originals()[random.integers(len(originals()))]
    change = CHANGES[random.integers(len(CHANGES))]
    return f"{change.__name__.strip('_')}: {name}", change(content, random)


def _cut(content: bytes, random: np.random.Generator) -> bytes:
    return content[: random.integers(len(content))]


def _cut_in_the_header(content: bytes, random: np.random.Generator) -> bytes:
    return content[: random.integers(min(64, len(content)))]


def _flipped_bits(content: bytes, random: np.random.Generator) -> bytes:
    data = np.frombuffer(content, np.uint8).copy()
    for place in random.integers(len(data), size=random.integers(1, 20)):
        data[place] ^= 1 << random.integers(8)
    return data.tobytes()


def _flipped_in_the_header(content: bytes, random: np.random.Generator) -> bytes:
    data = np.frombuffer(content, np.uint8).copy()
    for place in random.integers(min(200, len(data)), size=random.integers(1, 6)):
        data[place] = random.integers(256)
    return data.tobytes()


def _large_number_in_the_header(content: bytes, random: np.random.Generator) -> bytes:
    data = bytearray(content)
    place, size = int(random.integers(min(200, len(data)))), int(random.choice([2, 4, 8]))
    data[place : place + size] = [b"\xff" * size, b"\x7f" + b"\xff" * (size - 1), bytes(size)][random.integers(3)]
    return bytes(data)


def _dropped_part(content: bytes, random: np.random.Generator) -> bytes:
    start, stop = sorted(random.integers(len(content), size=2))
    return content[:start] + content[stop:]


def _doubled_part(content: bytes, random: np.random.Generator) -> bytes:
    start, stop = sorted(random.integers(len(content), size=2))
    return content[:stop] + content[start:]


def _zeroed_part(content: bytes, random: np.random.Generator) -> bytes:
    start, stop = sorted(random.integers(len(content), size=2))
    return content[:start] + bytes(stop - start) + content[stop:]


def _head_of_another(content: bytes, random: np.random.Generator) -> bytes:
    other = originals()[random.integers(len(originals()))][1]
    size = int(random.integers(4, 64))
    return other[:size] + content[size:]


def _followed_by_another(content: bytes, random: np.random.Generator) -> bytes:
    return content + originals()[random.integers(len(originals()))][1]


def _repaired_png(content: bytes, random: np.random.Generator) -> bytes:
    """A PNG whose fields are wrong and whose checksums are right."""
    head = random.integers(0, 256, 13, np.uint8)
    head[:8] = np.frombuffer(random.integers(0, 200, 2).astype(">u4").tobytes(), np.uint8)
    data = zlib.compress(random.integers(0, 256, random.integers(1, 4000), np.uint8).tobytes())
    kinds = [b"tRNS", b"PLTE", b"gAMA", b"iCCP", b"eXIf", b"zTXt", b"acTL", b"fdAT", b"cHRM", b"pHYs"]
    extra = [chunk(kinds[each], random.bytes(int(random.integers(40)))) for each in random.integers(len(kinds), size=2)]
    return b"".join([PNG, chunk(b"IHDR", head.tobytes()), *extra, chunk(b"IDAT", data), chunk(b"IEND", b"")])


def _another_type(content: bytes, random: np.random.Generator) -> bytes:
    others = [
        b"<html><body>hello</body></html>", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", b"PK\x03\x04" + content, b"BZh9",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        b"\0\0\0\x20ftypmp42" + content, b"RIFF\xff\xff\xff\xffWAVEfmt ", b"GIF89a", base64.b64encode(content), b"{}",
        random.bytes(int(random.integers(1, 5000))), bytes(random.integers(1, 5000)), b"\xff" * 1000, b"\xff\xd8\xff",
    ]  # fmt: skip
    return others[random.integers(len(others))]


def _nothing(content: bytes, random: np.random.Generator) -> bytes:
    return b""


def _whole(content: bytes, random: np.random.Generator) -> bytes:
    return content


def _one_pixel(content: bytes, random: np.random.Generator) -> bytes:
    kind = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"][random.integers(6)]
    size = [(1, 1), (1, 2), (2, 1), (1, 500), (500, 1)][random.integers(5)]
    return _saved(Image.new("RGB", size, (1, 2, 3)), kind, {})


Change = Callable[[bytes, np.random.Generator], bytes]
CHANGES: list[Change] = [
    _cut, _cut_in_the_header, _flipped_bits, _flipped_in_the_header, _large_number_in_the_header, _dropped_part,
    _doubled_part, _zeroed_part, _head_of_another, _followed_by_another, _repaired_png, _another_type, _nothing, _whole,
    _one_pixel,
]  # fmt: skip

# Files that are small and would become large

BOMBS: dict[str, Callable[[], bytes]] = {
    "as many pixels as are allowed": lambda: png(7071, 7071),
    "in 16 bits": lambda: png(5000, 5000, bits=16),
    "in 16 bits of four channels": lambda: png(5000, 5000, colour=6, bits=16),
    "more pixels than are allowed": lambda: png(7072, 7072),
    "more than Pillow allows": lambda: png(14000, 14000, rows=10),
    "the most that a header can say": lambda: png(2**31 - 1, 2**31 - 1, rows=1),
    "thin": lambda: png(1, 300_000),
    "thin, lying": lambda: png(300_000, 1),
    "with text that unpacks to 256 MB": lambda: png(64, 48, extra=compressed_text()),
    "within an IPTC file": lambda: iptc(png(9000, 9000)),
    "within an icon": lambda: ico(png(9000, 9000)),
    "within an Apple icon": lambda: icns(png(9000, 9000)),
    "a GIF of 65535 x 65535": wide_gif,
    "a WebP of 16383 x 16383": lambda: b"RIFF\x1a\0\0\0WEBPVP8L\r\0\0\0\x2f\xff\xff\xff\x0f" + bytes(8),
    "a thousand frames": lambda: originals()[12][1][:-1] * 1000,
}


# The service, and what is sent to it


class Service:
    """`mvmr serve` in a process of its own, which logs into a file."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self._command = [sys.executable, "-m", "mvmr", "serve", str(bundle), "--port", "0", "--drain", "0"]
        self._log = folder / "log"
        self.status: int | None = None

    def __enter__(self) -> Service:
        with self._log.open("wb") as log:
            self._running = subprocess.Popen(self._command, stdout=log, stderr=log)
        self.process, end = psutil.Process(self._running.pid), time.monotonic() + _SECONDS
        while "startup complete" not in (said := self._log.read_text()):
            if self._running.poll() is not None or time.monotonic() > end:
                raise click.ClickException(f"the service does not start:\n{said}")
            time.sleep(0.05)
        self.port = int(next(line for line in said.splitlines() if " at http" in line).rpartition(":")[2])
        return self

    def __exit__(self, *error: object) -> None:
        self._running.terminate()
        self.status = self._running.wait(_SECONDS)

    def tracebacks(self) -> list[str]:
        """The last line of every trace in the log: there should be none."""
        lines = self._log.read_text(errors="replace").splitlines()
        return [line for line in lines if " ERROR " in line or line.startswith(("Traceback", "MemoryError"))][:20]

    @property
    def memory(self) -> float:
        """MiB of its resident set."""
        return round(float(self.process.memory_info().rss) / _MIB, 1)

    @property
    def peak(self) -> float:
        """MiB, the most that its resident set has ever been."""
        line = next(each for each in self._status() if each.startswith("VmHWM"))
        return round(float(line.split()[1]) / 1024, 1)

    def _status(self) -> list[str]:
        return Path(f"/proc/{self._running.pid}/status").read_text().splitlines()


def _fire(service: Service, numbers: range, clients: int) -> dict[str, Any]:
    statuses: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    readiness: Counter[str] = Counter()
    failures: list[str] = []
    lock, good = threading.Lock(), originals()[0][1]

    def fire(number: int) -> None:
        name, content = mutated(number)
        status: int | str
        try:
            status, answer = _ask(service, "POST", "/v1/embed", *_packed(number, content))
        except (OSError, http.client.HTTPException) as error:
            status, answer = type(error).__name__, b""
        with lock:
            statuses[str(status)] += 1
            codes[_code(status, answer)] += 1
            done = statuses.total()
            if status not in (200, 413, 422):
                failures.append(f"{number} {name}: {status} {answer[:200]!r}")
            if done % max(1, len(numbers) // 100) == 0:
                readiness[str(_ask(service, "GET", "/readyz")[0])] += 1

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda _: _ask(service, "POST", "/v1/embed", good), range(200)))  # all its threads are there
        before, memory = _ask(service, "POST", "/v1/embed", good), [service.memory]
        threads, began = service.process.num_threads(), time.perf_counter()
        for start in range(0, len(numbers), max(1, len(numbers) // 4)):
            list(pool.map(fire, numbers[start : start + max(1, len(numbers) // 4)]))
            memory.append(service.memory)  # while nothing is under way
        seconds = time.perf_counter() - began
    readiness[str(_ask(service, "GET", "/readyz")[0])] += 1
    after = _ask(service, "POST", "/v1/embed", good)
    return {
        "files": len(numbers),
        "first": numbers.start,
        "clients": clients,
        "seconds": round(seconds, 1),
        "statuses": dict(statuses),
        "codes": dict(codes.most_common()),
        "failures": failures[:100],
        "readiness": dict(readiness),
        "threads": [threads, service.process.num_threads()],
        "rss_mib": memory,
        "rss_peak_mib": service.peak,
        "same_after": before == after and before[0] == 200,
    }


def _code(status: int | str, answer: bytes) -> str:
    """Why a file was refused, or that it was not."""
    if status == 200:
        return "embedded"
    if status != 422:
        return str(status)
    problem = json.loads(answer)
    found = problem["errors"][0]
    return str(found["error"]["code"]) if "error" in found else str(problem["type"])


def _packed(number: int, content: bytes) -> tuple[bytes, dict[str, str]]:
    """The file as a raw body, as base64 in JSON, or in a multipart body."""
    if number % 4 == 1:
        return json.dumps({"input": [base64.b64encode(content).decode()]}).encode(), {
            "content-type": "application/json"
        }
    if number % 4 == 2:
        part = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + content + b"\r\n--b--\r\n"
        return part, {"content-type": "multipart/form-data; boundary=b"}
    return content, {"content-type": "application/octet-stream"}


def _ask(
    service: Service, method: str, place: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=_SECONDS)
    try:
        connection.request(method, place, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


if __name__ == "__main__":
    main()
