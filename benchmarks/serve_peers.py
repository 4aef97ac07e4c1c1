"""Claim: more images/s, and a lower p99 at equal load, than LitServe and BentoML with the same exported file.

All decode and resize by the same code, run the same file by the same onnxruntime with the same options, and answer
with the same embedding (checked). Of each peer the fastest of a grid of settings is compared. Servers have their turns
alone, each round in another order; the clients have a process of their own, on the same cores.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import measure
import numpy as np
from export_speed import export_resnet50
from load import apart
from peers import environments, servers
from peers.servers import Setting
from rich.table import Table
from serve_speed import CLIENTS, photographs

from mvmr.cores import usable_cores
from mvmr.serve import Engine
from mvmr.storage.atomic import cache_dir

OURS = "mvmr"
_WARM_UP = 1.5  # seconds
_SCHEDULED = 64  # connections of the load at a fixed rate
_FINALISTS = 2
_KEYS = ("images_per_s", "p50_ms", "p99_ms", "processor_ms_per_image")
_CLOSE = 0.02  # relative error of an embedding: batches of another size round otherwise


@click.command()
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Exported bundle; left out, a ResNet50 at 224 px, int8."
)
@click.option("--peer", "peers", multiple=True, type=click.Choice(list(environments.PINNED)), help="Both, left out.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=5.0, show_default=True, help="Of each load on each server in each round.")
@click.option("--tune-seconds", default=2.0, show_default=True, help="Of each setting tried; 0 tries none.")
@click.option("--load", "share", default=0.7, show_default=True, help="Equal load, against the slowest's capacity.")
@click.option("--environments", "folder", type=click.Path(path_type=Path), help="Where the peers are installed.")
@click.option("--out", type=click.Path(path_type=Path), default=measure.RESULTS, help="Folder of the JSON.")
def main(
    bundle: Path | None,
    peers: tuple[str, ...],
    rounds: int,
    seconds: float,
    tune_seconds: float,
    share: float,
    folder: Path | None,
    out: Path,
) -> None:
    """Measure throughput and latency beside those of other servers."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers are ended, too
    console, names = measure.output(), list(peers or environments.PINNED)
    pythons = environments.prepare(folder or cache_dir() / "benchmark-peers", names)
    with tempfile.TemporaryDirectory() as scratch:
        path = (bundle or export_resnet50(Path(scratch), 224)).resolve()
        wait = measure.CoreWait()
        bench = Bench(path, pythons, photographs(Path(scratch)))
        best = {OURS: bench.ours} | {name: bench.tune(name, tune_seconds) for name in names}
        rate = share * min(bench.capacity(name, best[name], 2 * tune_seconds or seconds) for name in best)
        measured = bench.rounds(best, rounds, seconds, rate)
        waited = wait.share()
    found = {
        "machine": measure.machine("cpu"),
        "core_wait": waited,
        "clients": CLIENTS,
        "rounds": rounds,
        "seconds": seconds,
        "equal_load_images_per_s": rate,
        "packages": {name: environments.versions(name) for name in names},
        "settings": {name: dataclasses.asdict(setting) for name, setting in best.items()},
        "forms": bench.forms,
        "tried": bench.tried,
        "servers": measured,
        "ours_against": {name: _against(measured[OURS], measured[name]) for name in names},
    }
    _print(console, found, best)
    measure.save("serve_peers", found, out, console)


@dataclass
class Bench:
    """A bundle, the peers' environments and the images; what has been tried so far."""

    bundle: Path
    pythons: dict[str, Path]
    files: list[Path]
    tried: list[dict[str, Any]] = field(default_factory=list)
    forms: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        engine = Engine.load(self.bundle, threads=1)
        self.reference = engine.embed([self.files[0]])[0]
        # what `mvmr serve` takes by itself on a processor
        self.ours = Setting(usable_cores(), 1, engine.at_once)

    def tune(self, name: str, seconds: float) -> Setting:
        """A peer's fastest setting: the best of the grid once more, for longer, LitServe's with its fast queue too."""
        if not seconds:
            return self.ours
        tried = {setting: self.images_per_s(name, setting, seconds) for setting in measure.shown(grid(), name)}
        finalists = sorted(tried, key=tried.__getitem__, reverse=True)[:_FINALISTS]
        if name == "litserve":
            finalists.append(dataclasses.replace(finalists[0], fast_queue=True))
        again = {setting: self.images_per_s(name, setting, 2 * seconds) for setting in finalists}
        return max(again, key=again.__getitem__)

    def capacity(self, name: str, setting: Setting, seconds: float) -> float:
        """Images a second, as found while tuning where that was for so long."""
        wanted = {"server": name, "setting": dataclasses.asdict(setting), "seconds": seconds}
        for each in self.tried:
            if wanted.items() <= each.items():
                return float(each["images_per_s"])
        return self.images_per_s(name, setting, seconds)

    def images_per_s(self, name: str, setting: Setting, seconds: float) -> float:
        """Throughput of a server that is started for it."""
        with self._started(name, setting) as put:
            found = _figures(put(seconds))
        self.tried.append({"server": name, "setting": dataclasses.asdict(setting), "seconds": seconds, **found})
        return float(found["images_per_s"])

    def rounds(self, best: dict[str, Setting], rounds: int, seconds: float, rate: float) -> dict[str, dict[str, Any]]:
        """Each server in each round, with clients that ask again and again, then at the fixed rate."""
        closed: dict[str, list[dict[str, Any]]] = {name: [] for name in best}
        equal: dict[str, list[dict[str, Any]]] = {name: [] for name in best}
        names = list(best)
        for number in measure.shown(range(rounds), "servers"):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                with self._started(name, best[name]) as put:
                    closed[name].append(put(seconds))
                    equal[name].append(put(seconds, clients=_SCHEDULED, rate=rate, seed=number))
        return {name: {"closed": _summary(closed[name]), "equal_load": _summary(equal[name])} for name in names}

    def _started(self, name: str, setting: Setting) -> _Turn:
        python = self.pythons.get(name, Path())
        return _Turn(self, servers.Server(name, python, self.bundle, setting))


class _Turn:
    """A server that runs, is warm and embeds as it should; gives the function that puts a load on it."""

    def __init__(self, bench: Bench, server: servers.Server) -> None:
        self._bench, self._server = bench, server

    def __enter__(self) -> Callable[..., dict[str, Any]]:
        server, bench = self._server, self._bench
        files = servers.bodies(server.name, server.request, bench.files)
        load = {
            "host": "127.0.0.1", "port": server.port, "path": server.path, "headers": server.headers,
            "files": [str(file) for file in files],
        }  # fmt: skip

        def put(seconds: float, clients: int = CLIENTS, **more: Any) -> dict[str, Any]:
            before = server.processor_seconds()
            answers = apart({**load, "clients": clients, "seconds": seconds, **more})
            return answers | {"processor_seconds": server.processor_seconds() - before}

        server.__enter__()
        try:
            found, wanted = server.ask(files[0].read_bytes()), bench.reference
            error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
            if not error <= _CLOSE:
                raise RuntimeError(f"{server.name} embeds something else: off by {error:.2g}")
            bench.forms[server.name] = {"request": server.request, "answer": server.answer}
            put(_WARM_UP)
        except BaseException:
            print(server.log())
            server.__exit__()
            raise
        return put

    def __exit__(self, *error: object) -> None:
        self._server.__exit__()


def grid() -> Iterator[Setting]:
    """Settings to try: one worker or one to a core, with one thread or one to a core, and batches of three sizes.

    One worker with one thread would leave cores idle, and is left out.
    """
    counts = sorted({1, usable_cores()})
    for workers in counts:
        for threads in counts:
            if workers * threads >= usable_cores():
                yield from (Setting(workers, threads, batch) for batch in (1, 4, 8))


def _figures(answers: dict[str, Any]) -> dict[str, Any]:
    times = np.array(answers["latencies"] or [np.nan]) * 1000
    done = answers["statuses"].get("200", 0)
    return {
        "images_per_s": done / answers["seconds"],
        "processor_ms_per_image": 1000 * answers["processor_seconds"] / max(1, done),
        "p50_ms": float(np.percentile(times, 50)),
        "p99_ms": float(np.percentile(times, 99)),
        "others": {status: count for status, count in answers["statuses"].items() if status != "200"},
    }


def _summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    figures = [_figures(turn) for turn in turns]
    found: dict[str, Any] = {key: measure.Spread.of([each[key] for each in figures]) for key in _KEYS}
    together = [latency for turn in turns for latency in turn["latencies"]]
    found["p99_ms_of_all_rounds"] = float(np.percentile(together, 99) * 1000)
    found["images"] = len(together)
    found["others"] = [each["others"] for each in figures]
    return found


def _against(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    return {
        "images_per_s": measure.ratio(ours["closed"]["images_per_s"], peer["closed"]["images_per_s"]),
        "processor_ms_per_image": measure.ratio(
            ours["closed"]["processor_ms_per_image"], peer["closed"]["processor_ms_per_image"]
        ),
        "p99_closed": measure.ratio(ours["closed"]["p99_ms"], peer["closed"]["p99_ms"]),
        "p99_equal_load": measure.ratio(ours["equal_load"]["p99_ms"], peer["equal_load"]["p99_ms"]),
    }


def _print(console: Any, found: dict[str, Any], best: dict[str, Setting]) -> None:
    rate = found["equal_load_images_per_s"]
    table = Table(
        "server",
        "setting",
        "images/s",
        "core ms/image",
        "p50 ms",
        "p99 ms",
        f"p50 ms at {rate:.3g}/s",
        "p99 ms",
        "not 200",
    )
    for name, of in found["servers"].items():
        closed, equal = of["closed"], of["equal_load"]
        lost = sum(count for each in closed["others"] + equal["others"] for count in each.values())
        cells = [closed[key] for key in ("images_per_s", "processor_ms_per_image", "p50_ms", "p99_ms")]
        table.add_row(name, str(best[name]), *map(str, [*cells, equal["p50_ms"], equal["p99_ms"], lost]))
    console.print(table)
    for name, of in found["ours_against"].items():
        console.print(
            f"ours / {name}: images/s {of['images_per_s']}, processor time {of['processor_ms_per_image']}, "
            f"p99 with {CLIENTS} clients {of['p99_closed']}, p99 at equal load {of['p99_equal_load']}"
        )


if __name__ == "__main__":
    main()
