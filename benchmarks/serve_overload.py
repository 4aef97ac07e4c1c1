"""Claim: twice the load that the service can bear hurts nobody who is let in, and is over when it is over.

Accepted requests keep a p99 under (queue bound / rate + one batch), the others get 429, memory stays flat, a probe on a
new connection never waits for a second, and full speed is there within a second of the load's end: of clients whose
connections stay, and of clients with a connection to a request. They have a process of their own, on the same cores.
"""

from __future__ import annotations

import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import measure
import numpy as np
import psutil
from export_speed import export_resnet50
from load import apart
from rich.console import Console
from serve_speed import CLIENTS, Service, photographs
from watching import Probe

_WARM_UP, _CAPACITY, _LEAD = 2.0, 6.0, 2.0  # seconds: _LEAD until all clients of a load stand ready
_AFTER = 5  # seconds of clients that ask again and again, beyond those in which the queue empties
_EVERY = 0.5  # seconds between two looks at the memory


@click.command()
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Exported bundle; left out, a ResNet50 at 224 px, int8."
)
@click.option("--queue", default=256, show_default=True, help="Bound of the service's queue.")
@click.option("--clients", default=600, show_default=True, help="Connections at a time.")
@click.option("--seconds", default=60.0, show_default=True, help="Of each overload.")
@click.option("--times", default=2.0, show_default=True, help="The load, against the capacity.")
@click.option("--out", type=click.Path(path_type=Path), default=measure.RESULTS, help="Folder of the JSON.")
def main(bundle: Path | None, queue: int, clients: int, seconds: float, times: float, out: Path) -> None:
    """Put twice its capacity on the service, and look at what becomes of it."""
    kinds = {"connections stay": False, "a connection to a request": True}
    console = measure.output()
    with tempfile.TemporaryDirectory() as folder:
        path = bundle or export_resnet50(Path(folder), 224)
        files = photographs(Path(folder))
        wait = measure.CoreWait()
        found: dict[str, Any] = {}
        for kind, fresh in kinds.items():
            with Service(path, "--queue", str(queue)) as service:
                found[kind] = _overload(service, files, queue, clients, seconds, times, fresh)
            _print(kind, found[kind], console)
        found |= {"machine": measure.machine("cpu"), "core_wait": wait.share()}
    measure.save("serve_overload", found, out, console)


def _print(kind: str, found: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]{kind}[/]")
    for key in (
        "capacity_images_per_s", "offered_per_s", "accepted_per_s", "statuses", "accepted_p50_s", "accepted_p99_s",
        "limit_s", "limit_s_by_capacity", "refused_share", "refused_p99_ms", "probe", "sent_late_s", "resident_mib",
        "recovery",
    ):  # fmt: skip
        console.print(f"{key:<24} {found[key]}")
    if "429" not in found["statuses"]:
        console.print("Nothing was refused: this was no overload. Was the machine busy when the capacity was measured?")


def _overload(
    service: Service, files: list[Path], queue: int, clients: int, seconds: float, times: float, fresh: bool
) -> dict[str, Any]:
    load = {
        "host": "127.0.0.1", "port": service.port, "path": "/v1/embed", "files": [str(file) for file in files],
        "headers": {"content-type": "image/jpeg", "accept": "application/x-mvmr-float32"}, "clients": CLIENTS,
    }  # fmt: skip
    apart({**load, "seconds": _WARM_UP})
    alone = apart({**load, "seconds": _CAPACITY})
    capacity = alone["statuses"]["200"] / alone["seconds"]
    start = time.time() + _LEAD
    end, after = start + seconds, queue / capacity + _AFTER
    above = {"clients": clients, "seconds": seconds, "rate": times * capacity, "start_at": start, "fresh": fresh}
    batches, probe = _batches(service), Probe(service.port)
    with ThreadPoolExecutor(2) as pool, Resident(service.process) as resident, probe:
        over = pool.submit(apart, {**load, **above, "timeline": True})
        # its clients connect when the load is nearly over: before that, they would only take its connections' place
        then = pool.submit(_later, end - _LEAD, {**load, "seconds": after, "start_at": end, "timeline": True})
        overload, recovery = over.result(), then.result()
    batch = (_batches(service)[0] - batches[0]) / max(1, _batches(service)[1] - batches[1])
    accepted = [answered - due for due, answered, status in overload["rows"] if status == "200"]
    refused = [answered - due for due, answered, status in overload["rows"] if status == "429"]
    served = sum(start <= answered < end for _, answered, status in overload["rows"] if status == "200") / seconds
    return {
        "queue": queue,
        "seconds": seconds,
        "capacity_images_per_s": round(capacity, 2),
        "offered_per_s": round(len(overload["rows"]) / seconds, 2),
        "accepted_per_s": round(served, 2),
        "statuses": overload["statuses"],
        "accepted_p50_s": _percentile(accepted, 50),
        "accepted_p99_s": _percentile(accepted, 99),
        "accepted_max_s": _percentile(accepted, 100),
        "batch_s": round(batch, 4),
        # at the rate at which images are embedded while the load is on, and at the rate without it
        "limit_s": round(queue / served + batch, 3),
        "limit_s_by_capacity": round(queue / capacity + batch, 3),
        "refused_share": round(len(refused) / len(overload["rows"]), 3),
        "refused_p99_ms": _percentile([1000 * each for each in refused], 99),
        "sent_late_s": round(overload["late"], 3),
        "probe": probe.reset(),
        "resident_mib": resident.summary(start, end),
        "recovery": _recovery(overload["rows"] + recovery["rows"], recovery, end, after, capacity),
    }


def _later(when: float, load: dict[str, Any]) -> dict[str, Any]:
    time.sleep(max(0.0, when - time.time()))
    return apart(load)


def _recovery(rows: list[Any], own: dict[str, Any], end: float, after: float, capacity: float) -> dict[str, Any]:
    """Images a second after the load's end against the capacity, in all and of the clients that came then.

    In all: the first seconds are those of the images that still wait; the clients that came then stand behind them.
    """

    def each_second(of: list[Any]) -> list[float]:
        times = np.array([answered - end for _, answered, status in of if status == "200"])
        return [round(float(((times >= k) & (times < k + 1)).sum()) / capacity, 2) for k in range(int(after))]

    everyone = each_second(rows)
    return {
        "first_second": everyone[0],
        "following": round(float(np.mean(everyone[1:])), 2),
        "each_second": everyone,
        "each_second_of_new_clients": each_second(own["rows"]),
        "statuses_of_new_clients": own["statuses"],
    }


def _percentile(values: list[float], percent: float) -> float | None:
    return round(float(np.percentile(values, percent)), 3) if values else None


def _batches(service: Service) -> tuple[float, int]:
    """Seconds and number of the engine's batches so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{service.port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    told = dict(line.rsplit(" ", 1) for line in lines if line.startswith("mvmr_stage_seconds"))
    return float(told['mvmr_stage_seconds_sum{stage="infer"}']), int(
        float(told['mvmr_stage_seconds_count{stage="infer"}'])
    )


class Resident:
    """The resident set of a process, looked at in a thread while the context is entered."""

    def __init__(self, process: psutil.Process) -> None:
        self._process, self._stop = process, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._seen: list[tuple[float, float]] = []

    def __enter__(self) -> Resident:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def summary(self, start: float, end: float) -> dict[str, float]:
        """MiB before the load, after ten seconds of it (or its half, where it is shorter), at its end, and the most."""
        early = start + min(10.0, (end - start) / 2)
        found = {"start": self._at(start), "after_10_s": self._at(early), "end": self._at(end)}
        return found | {"most": max(size for _, size in self._seen), "last": self._seen[-1][1]}

    def _at(self, when: float) -> float:
        return min(self._seen, key=lambda seen: abs(seen[0] - when))[1]

    def _look(self) -> None:
        while True:
            self._seen.append((time.time(), round(self._process.memory_info().rss / 2**20, 1)))
            if self._stop.wait(_EVERY):
                return


if __name__ == "__main__":
    main()
