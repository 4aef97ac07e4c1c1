"""Run one operation on a bundle again and again, killed before its first, second, ... file operation.

Usage: kills.py add_head|replace_head|publish|publish_over FOLDER; prints what was readable after each death as
JSON. A process of its own, without threads, because it forks.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from mvmr.bundles import bundle
from mvmr.bundles.manifest import Manifest
from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.storage import staging

_WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


def write_stub(folder: Path, content: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / "encoder.safetensors").write_bytes(content)
    content_of_manifest = Manifest(
        schema=2,
        mvmr_version="0.1.0",
        created="2026-01-01T00:00:00+00:00",
        backbone="resnet18",
        options={"small_kernel": True},
        embedding_dim=4,
        preprocessing=Preprocess.for_size(32),
        training={},
        metrics=(),
        files={"encoder.safetensors": staging.digest(folder / "encoder.safetensors") or ""},
    )
    (folder / "bundle.json").write_text(json.dumps(content_of_manifest.to_json()))


def add_head(folder: Path, value: float) -> None:
    record = {"command": "c", "data": "d", "protocol": "linear", "values": {"top1": value}}
    bundle.add_head(bundle.load(folder), "x", np.full((2, 4), value), np.zeros(2), ("a", "b"), record)


def prepare(operation: str, work: Path) -> None:
    if operation == "publish_over":
        write_stub(work / "b", b"old")
        add_head(work / "b", 1.0)
    if operation in ("publish", "publish_over"):
        write_stub(work / "b.partial", b"new")
    else:
        write_stub(work / "b", b"weights")
    if operation == "replace_head":
        add_head(work / "b", 1.0)


def operate(operation: str, work: Path) -> None:
    if operation in ("add_head", "replace_head"):
        add_head(work / "b", 2.0)
    else:
        bundle.publish(work / "b.partial", work / "b")


def state(operation: str, work: Path) -> str:
    """What a reader finds: "nothing", "old" or "new"; anything between the two raises."""
    try:
        current = bundle.load(work / "b")
    except MvmrError:
        if operation == "publish":
            return "nothing"
        raise
    if operation in ("publish", "publish_over"):
        return current.file("encoder.safetensors").read_bytes().decode()
    if not current.heads:
        return "nothing"
    values = {current.head("x").weight[0, 0], current.head("x").metrics["values"]["top1"]}
    values |= {entry["values"]["top1"] for entry in current.manifest.metrics}
    return {frozenset({1.0}): "old", frozenset({2.0}): "new"}[frozenset(values)]


def die_before(count: int) -> None:
    seen = 0

    def hook(event: str, _: object) -> None:
        nonlocal seen
        if event in _WATCHED:
            seen += 1
            if seen > count:
                os._exit(9)

    sys.addaudithook(hook)


def main(operation: str, root: Path) -> None:
    os.fsync = lambda descriptor: None  # a death of the process alone loses nothing that was written
    template, warm = root / "template", root / "warm"
    prepare(operation, template)
    shutil.copytree(template, warm)
    operate(operation, warm)  # modules that are imported late must not count as file operations
    state(operation, warm)
    outcomes, alive = [], False
    while not alive:
        work = root / str(len(outcomes))
        shutil.copytree(template, work)
        child = os.fork()
        if child == 0:
            die_before(len(outcomes))
            operate(operation, work)
            os._exit(0)
        alive = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        after_kill = state(operation, work)
        if operation.startswith("publish") and not (work / "b.partial").exists():
            write_stub(work / "b.partial", b"new")  # the user trains again
        operate(operation, work)
        left_over = [name for name in (*os.listdir(work), *os.listdir(work / "b")) if name.startswith(".")]
        outcomes.append({"after_kill": after_kill, "after_retry": state(operation, work), "left_over": left_over})
    print(json.dumps(outcomes))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
