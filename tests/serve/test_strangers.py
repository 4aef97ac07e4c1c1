"""Files that a stranger made, or an accident changed: refused in one line or read, and the process lives.

Each file that is read here is changed at random, hundreds of times, in a process of its own: a crash would end it.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from mvmr.bundles import bundle as bundles
from mvmr.errors import MvmrError
from mvmr.serve.engine import read_heads
from mvmr.serve.index.index import Index, build
from mvmr.training.recipe import load_recipe
from tests.serve import serving
from tests.serve.index.indexes import folder, make_clusters, manifest

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "mvmr" / "recipes"
ROUNDS = 30
_STRANGE: list[Any] = [
    *(None, True, False, -1, 0, 1, 2**31, 2**63 - 1, 2**64, 10**400, 0.5, 1e308, "", "x", "x" * 10_000, "a\nb", "\0"),
    *("../../etc/passwd", "/etc/passwd", "\ud800", [], [[]], {}, {"a": 1}, ["x"], [1, 2, 3], "exact", "hnsw"),
]

Read = Callable[[], object]


def change(content: bytes, random: Random) -> bytes:
    """Bytes near to `content`: JSON with another value somewhere, or any bytes with some of them changed."""
    if content[:1] == b"{" and random.random() < 0.7:
        return json.dumps(other_json(json.loads(content), random)).encode()
    new, at = bytearray(content), random.randrange(len(content))
    match random.randrange(6):
        case 0:
            del new[at:]
        case 1:
            del new[at : at + random.randint(1, 64)]
        case 2:
            new[at:at] = random.randbytes(random.randint(1, 64))
        case 3:
            new[at : at + 8] = random.choice([b"\xff" * 8, bytes(8), b"\xff" * 7 + b"\x7f", b"\x00" * 7 + b"\x80"])
        case 4:  # where a format says what follows: at its ends
            at = random.choice([random.randrange(min(200, len(new))), -random.randint(1, min(400, len(new)))])
            new[at] = random.randrange(256)
        case _:
            for _ in range(random.randint(1, 20)):
                new[random.randrange(len(new))] = random.randrange(256)
    return bytes(new)


def other_json(value: Any, random: Random) -> Any:
    """JSON with one value, at any depth, that is another one, or is gone."""
    value = copy.deepcopy(value)
    places = list(places_of(value))
    holder, key = random.choice(places)
    if random.random() < 0.2:
        del holder[key]
    else:
        holder[key] = random.choice(_STRANGE)
    return value


def places_of(value: Any) -> Iterator[tuple[Any, Any]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield value, key
        yield from places_of(inner)


def read_relisted_heads(path: Path, name: str) -> Read:
    """Read the heads of a bundle that vouches for whatever `name` holds."""

    def act() -> object:
        bundles.add_files(bundles.load(path, verify=False), {name: (path / name).read_bytes()})
        return read_heads(bundles.load(path))

    return act


def search_vouched_index(index: Path, name: str) -> Read:
    """Open and search an index that vouches for whatever `name` holds."""

    def act() -> object:
        description = json.loads((index / "index.json").read_text())
        description["files"][name] = (index / name).stat().st_size
        description.pop("sha256", None)
        (index / "index.json").write_text(json.dumps(description))
        return search_index(index)()

    return act


def search_index(index: Path) -> Read:
    def act() -> object:
        opened = Index.load(index)
        queries = make_clusters(3, opened.dim, seed=1)
        return [opened.search(queries, k) for k in (1, 10, 500)]

    return act


def build_index(embeddings: Path) -> Read:
    return lambda: build(embeddings, embeddings.parent / "new-index", overwrite=True)


def whole_bundle(path: Path) -> Read:
    def act() -> object:
        opened = bundles.load(path)
        return opened.space_id, read_heads(opened)

    return act


def targets(root: Path) -> dict[str, tuple[Path, Read]]:
    """What is attacked, by name: a file, and what reads it."""
    vectors = make_clusters(500)
    bundle = serving.bundle(root)
    parts = folder(root / "parts", vectors, parts=1)
    np.save(root / "one.npy", vectors)
    (root / "one.manifest.json").write_text(manifest(500, ["one.npy"]))
    (root / "one.paths.txt").write_text("".join(f"{number}.jpg\n" for number in range(500)))
    recipe = root / "recipe.toml"
    recipe.write_bytes((RECIPES / "default.toml").read_bytes())
    heads = [f"heads/animals/head.{kind}" for kind in ("json", "safetensors")]
    files: dict[str, tuple[Path, Read]] = {
        "bundle.json": (bundle / "bundle.json", whole_bundle(bundle)),
        **{name: (bundle / name, read_relisted_heads(bundle, name)) for name in heads},
        "manifest.json": (parts / "manifest.json", build_index(parts)),
        "part.parquet": (parts / "part-00000.parquet", build_index(parts)),
        "one.npy": (root / "one.npy", build_index(root / "one.npy")),
        "one.paths.txt": (root / "one.paths.txt", build_index(root / "one.npy")),
        "recipe.toml": (recipe, lambda: load_recipe(recipe, "mvmr")),
    }
    for kind, file in (("exact", "vectors.npy"), ("ivf", "ivf.faiss"), ("hnsw", "hnsw.faiss")):
        index = build(parts, root / kind, kind=kind, lists=10).path
        files |= {f"{kind}/index.json": (index / "index.json", search_index(index))}
        files |= {f"{kind}/{name}": (index / name, search_vouched_index(index, name)) for name in (file, "paths.arrow")}
    return files


def end(read: Read) -> str:
    """How reading ended: ``read``, ``refused``, or what should not be."""
    try:
        read()
    except MvmrError as error:
        return (
            "refused" if "\n" not in str(error) and len(str(error)) < 1000 else f"no short line: {str(error)[:300]!r}"
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def attack(root: Path, rounds: int, seed: int = 0) -> None:
    """Change each file `rounds` times; place/report says how each ended, and where the process did, if it did."""
    attacked = targets(root)
    contents = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    times = {path: path.stat().st_mtime_ns for path in contents}
    with (root / "report").open("w") as report:
        for name, (file, read) in attacked.items():
            random = Random(f"{seed} {name}")
            for number in range(rounds):
                file.write_bytes(change(contents[file], random))
                report.write(json.dumps(f"{name} {number}") + "\n")
                report.flush()
                report.write(json.dumps([name, number, end(read)]) + "\n")
                for path, time in times.items():
                    if not path.exists() or path.stat().st_mtime_ns != time:
                        path.write_bytes(contents[path])
                        os.utime(path, ns=(time, time))


@pytest.mark.slow
def test_changed_files_are_refused_or_read_and_the_process_lives(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys, tests.serve.test_strangers as strangers\n"
        "os.fsync = lambda descriptor: None  # no machine loses its power here\n"
        "strangers.attack(pathlib.Path(sys.argv[1]), strangers.ROUNDS)"
    )
    argv = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, cwd=ROOT)
    lines = [json.loads(line) for line in (tmp_path / "report").read_text().splitlines()]
    assert done.returncode == 0, (lines[-1:], done.stderr[-2000:])
    ends = [line for line in lines if isinstance(line, list)]
    assert [ending for ending in ends if ending[2] not in ("read", "refused")] == []
    names = {name for name, _, _ in ends}
    assert len(ends) == 17 * ROUNDS
    assert {name for name, _, how in ends if how == "refused"} == names
    assert {name for name, _, how in ends if how == "read"} == names
