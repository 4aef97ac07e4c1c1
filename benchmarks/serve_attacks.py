"""Claim: a stranger can't stop the service: probes are answered, others are served, memory comes back.

Each attack of benchmarks/attacks.py alone, then all of them together, by one stranger and by as many as there are
attacks, at the lowest priority (an attacker's processors are not the service's). Meanwhile a normal client asks ten
times a second, at a connection that stays, and a probe on new ones. At the end SIGTERM comes while it is made again.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import attacks
import click
import measure
import numpy as np
import psutil
from export_speed import export_resnet50
from rich.table import Table
from serve_speed import photographs
from watching import Client, Memory, Probe

_WARM_UP, _QUIET = 2.0, 8.0  # seconds
_LONG_QUIET = 40.0  # before all together: the slowest of a hundred requests is not found among eighty
_AGAIN = 4.0  # seconds of another attack, at the height of which the service is told to stop
_FORMATS = ("PPM", "JPEG2000", "FITS")  # not read by default, and the worst
_MIB = 2**20


@click.command()
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Exported bundle; left out, a ResNet50 at 224 px, int8."
)
@click.option("--attack", "names", multiple=True, help="One of them; all, one by one and together, when left out.")
@click.option("--seconds", default=10.0, show_default=True, help="Of an attack.")
@click.option("--alone/--no-alone", default=True, show_default=True, help="Each alone, too.")
@click.option("--together", default=60.0, show_default=True, help="Seconds of all of them together; 0: not at all.")
@click.option("--rest", default=30.0, show_default=True, help="Seconds after which memory must be back.")
@click.option("--grace", default=10.0, show_default=True, help="Of the service.")
@click.option("--python", default=sys.executable, help="Interpreter of the service: another version's, to compare.")
@click.option("--flag", "flags", multiple=True, help="Of `mvmr serve`.")
@click.option("--out", type=click.Path(path_type=Path), default=measure.RESULTS, help="Folder of the JSON.")
def main(
    bundle: Path | None,
    names: tuple[str, ...],
    seconds: float,
    alone: bool,
    together: float,
    rest: float,
    grace: float,
    python: str,
    flags: tuple[str, ...],
    out: Path,
) -> None:
    """Attack a service, and look at what becomes of it."""
    console = measure.output()
    with tempfile.TemporaryDirectory() as folder:
        path = bundle or export_resnet50(Path(folder), 224)
        picture = photographs(Path(folder), 1)[0].read_bytes()
        wait = measure.CoreWait()
        rows = []
        for name in names or attacks.ATTACKS if alone else ():
            rows.append(_watch([name], path, picture, seconds, min(rest, 5.0), grace, python, flags))
            console.print(_line(rows[-1]))
        for spread in (False, True) if together and not names else ():
            every = list(attacks.ATTACKS)
            rows.append(
                _watch(every, path, picture, together, rest, grace, python, flags, spread=spread, quietly=_LONG_QUIET)
            )
            console.print(_line(rows[-1]))
    console.print(_table(rows))
    found = {"machine": measure.machine("cpu"), "core_wait": wait.share(), "attacks": rows}
    measure.save("serve_attacks" if alone else "serve_attacks_together", found, out, console)


def _watch(
    names: list[str], path: Path, picture: bytes, seconds: float, rest: float, grace: float, python: str,
    flags: tuple[str, ...], *, spread: bool = False, quietly: float = _QUIET,
) -> dict[str, Any]:  # fmt: skip
    """One service, attacked for so long, after so many seconds of quiet.

    spread: from an address each, as by as many strangers.
    """
    with Service(path, python, grace, flags) as service:
        client, probe, memory = Client(service.port, picture), Probe(service.port), Memory(service.process)
        with client, probe, memory:
            attackers = _prepare(names, service.port, spread)
            time.sleep(_WARM_UP)
            client.reset()
            memory.reset()
            time.sleep(quietly)
            probe.reset()
            quiet, start = client.reset(), memory.reset()
            until = time.time() + seconds
            for each in attackers:
                _begin(each, until)
            time.sleep(max(0.0, until - time.time()))
            busy, peak, longest = client.reset(), memory.reset(), probe.reset()
            told = [json.loads(each.communicate()[0] or '{"sent": 0}') for each in attackers]
            time.sleep(rest)
            after = memory.reset()
            attackers = _prepare(names, service.port, spread)
            for each in attackers:
                _begin(each, time.time() + _AGAIN + 2 * grace)
            time.sleep(_AGAIN)
        ended, alive = service.stop(), service.alive
        for each in attackers:
            each.kill()
            each.communicate()
    return {
        "attack": names[0] if len(names) == 1 else f"all, from {'an address each' if spread else 'one address'}",
        "mib_sent": round(sum(each["sent"] for each in told) / _MIB, 1),
        "alive": alive,
        "longest_probe_s": longest["longest_s"],
        "failed_probes": longest["failed"],
        "quiet_p99_ms": _percentile(quiet["seconds"]),
        "p99_ms": _percentile(busy["seconds"]),
        "p99_to_quiet": _rounded(np.percentile(busy["seconds"], 99) / np.percentile(quiet["seconds"], 99))
        if busy["seconds"]
        else None,
        "statuses": busy["statuses"],
        "mib_start": start["last"],
        "mib_most": peak["most"],
        "mib_after": after["last"],
        "after_to_start": _rounded(after["last"] / start["last"]) if start["last"] else None,
        "stop_s": _rounded(ended),
    }


def _prepare(names: list[str], port: int, spread: bool) -> list[subprocess.Popen[str]]:
    """Attackers, ready to begin."""
    command = [sys.executable, attacks.__file__]
    places = [
        [name, "127.0.0.1", str(port), f"127.0.1.{number if spread else 1}"] for number, name in enumerate(names, 1)
    ]
    started = [
        subprocess.Popen([*command, *place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for place in places
    ]
    for each in started:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    return started


def _begin(attacker: subprocess.Popen[str], until: float) -> None:
    assert attacker.stdin is not None
    attacker.stdin.write(f"{until}\n")
    attacker.stdin.flush()


class Service:
    """`mvmr serve` in a process of its own, by any version of mvmr; its log goes to a file."""

    def __init__(self, bundle: Path, python: str, grace: float, flags: tuple[str, ...]) -> None:
        self._command = [python, "-m", "mvmr", "serve", str(bundle), "--port", "0", "--grace", str(grace), *flags]
        if python == sys.executable:
            self._command += [each for name in _FORMATS for each in ("--format", name)]

    def __enter__(self) -> Service:
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(self._command, stderr=self._log, stdout=self._log, cwd=tempfile.gettempdir())
        while "startup complete" not in (said := self.said):
            assert self._process.poll() is None, said
            time.sleep(0.1)
        self.port = int(next(line for line in said.splitlines() if " at http" in line).rpartition(":")[2])
        self.process = psutil.Process(self._process.pid)
        return self

    @property
    def said(self) -> str:
        """Its log so far."""
        return os.pread(self._log.fileno(), 10 * _MIB, 0).decode()

    @property
    def alive(self) -> bool:
        """Whether it ended by itself, with exit status 0."""
        return self._process.returncode == 0

    def stop(self) -> float:
        """Seconds from SIGTERM to its end; killed after two minutes."""
        began = time.perf_counter()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(120)
        return time.perf_counter() - began

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


def _percentile(seconds: list[float]) -> float | None:
    return round(1000 * float(np.percentile(seconds, 99)), 1) if seconds else None


def _rounded(value: Any) -> float | None:
    return None if value is None else round(float(value), 2)


def _line(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items())


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table()
    columns = {
        "attack": "attack", "mib_sent": "MiB sent", "longest_probe_s": "longest /healthz, s", "p99_ms": "p99, ms",
        "p99_to_quiet": "to quiet", "statuses": "a normal client", "mib_most": "MiB, most", "after_to_start": "after",
        "stop_s": "SIGTERM, s",
    }  # fmt: skip
    for title in columns.values():
        table.add_column(title)
    for row in rows:
        table.add_row(*(str(row[name]) for name in columns))
    return table


if __name__ == "__main__":
    main()
