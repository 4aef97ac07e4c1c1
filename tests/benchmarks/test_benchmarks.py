"""The benchmarks run anywhere, write what they promise, and measure what they say; how fast is not tested."""

import importlib
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mvmr.bundles import bundle as bundles
from mvmr.export.export import export
from tests.export.students import a_bundle

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SPREAD = {"median", "q25", "q75", "rounds"}
MEMORY = {"kind", "base", "peak", "added"}
MACHINE = {"slug", "device", "processor", "cores", "threads", "system", "python", "packages", "date"}
MEMORY_PROBE = """
import measure, torch
from mvmr.comparison.memory import HighWater

def work():
    measure.begin("cpu", 1)
    kept = torch.ones(8 * 2**20 // 4)
    water = HighWater("cpu")
    torch.ones(64 * 2**20 // 4).sum()
    water.forget()
    torch.ones(32 * 2**20 // 4).sum()
    return water.read()

if __name__ == "__main__":
    held = torch.ones(512 * 2**20 // 4)  # of the parent's: must not show in the child
    memory = measure.alone("cpu", ["torch"], work)
    print(memory.base, memory.peak, memory.added)
"""


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("measure")


def run(script: str, out: Path, *options: str) -> dict[str, Any]:
    """Run a benchmark on one thread and return its JSON."""
    command = [sys.executable, str(BENCHMARKS / script), "--device", "cpu", "--threads", "1", "--rounds", "2"]
    done = subprocess.run([*command, "--out", str(out), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = out.iterdir()
    result: dict[str, Any] = json.loads(file.read_text())
    name = script.removesuffix(".py")
    assert result["benchmark"] == name
    assert file.name == f"{result['machine']['slug']}-{name}.json"
    assert file.name.startswith("cpu-")
    assert result["machine"].keys() >= MACHINE
    assert result["settings"]["rounds"] == 2
    assert 0 <= result["core_wait"] < 1
    assert str(file) in done.stdout
    return result


def check_spread(value: dict[str, Any]) -> None:
    assert value.keys() == SPREAD
    assert len(value["rounds"]) == 2
    assert 0 < value["q25"] <= value["median"] <= value["q75"]


@pytest.mark.slow
def test_train_step_writes_every_case_and_every_change(tmp_path: Path) -> None:
    tiny = ("--quick", "--threads", "1", "--size", "32", "--batch", "4", "--set", "train.optimizer=adam")
    result = run("train_step.py", tmp_path, *tiny)
    cases = {case["name"]: case for case in result["cases"]}
    assert len(cases) == 6
    for case in cases.values():
        for name in ("seconds_per_step", "images_per_s", "speed_against_plain"):
            check_spread(case[name])
        assert case["memory_mib"].keys() == MEMORY
        assert case["memory_mib"]["added"] > 0
        assert case["memory_against_plain"] > 0
    assert {case["precision"] for case in cases.values()} == {"32-true", "bf16-mixed"}
    assert {case["teacher"] for case in cases.values()} == {"in the loop", "cached"}
    assert cases[result["plain"]]["speed_against_plain"]["rounds"] == [1, 1]
    for change in result["changes"]:
        check_spread(change["speed"])
        assert {change["with"], change["without"]} <= set(cases)
    whole = result["trainer"]
    assert whole["case"] in cases
    for name in ("tflops", "share_of_matrix_rate", "objective_ms"):
        check_spread(whole[name])
    # a ResNet18 at 32 px: 0.074e9 operations an image forwards, twice that backwards, two views
    assert whole["operations_per_step"] == pytest.approx(4 * 2 * 3 * 0.074e9, rel=0.05)
    assert 0 < whole["objective_share"] < 1
    settings = result["settings"]
    assert (settings["student"], settings["size"], settings["batch"], settings["teacher"]) == (
        "resnet18", 32, 4, "ViT-S-32",
    )  # fmt: skip
    assert settings["recipe"]["train"]["optimizer"] == "adam"


@pytest.mark.slow
def test_methods_are_set_beside_supervised_training(tmp_path: Path) -> None:
    tiny = ["--student", "resnet18_025", "--size", "16", "--batch", "4", "--images", "64", "--method", "selflabel"]
    supervised, other = run("methods.py", tmp_path, *tiny)["rows"]
    assert (supervised["method"], supervised["views"], other["method"], other["views"]) == (
        "supervised", 1, "selflabel", 1,
    )  # fmt: skip
    assert supervised["memory_against_supervised"] == supervised["seconds_against_supervised"]["median"] == 1
    for row in (supervised, other):
        assert row["seconds_per_step"].keys() == SPREAD
        assert row["memory_mib"].keys() == MEMORY
        assert row["images_per_s"]["median"] > 3.9 / row["seconds_per_step"]["median"]  # a mean of two rates is higher
        assert row["memory_mib"]["added"] > 1


@pytest.mark.slow
def test_objective_writes_every_loss_and_ratio(tmp_path: Path) -> None:
    result = run("objective.py", tmp_path, "--batch", "16", "--batch", "32", "--width", "24")
    assert [(cell["batch"], cell["width"]) for cell in result["cells"]] == [(16, 24), (32, 24)]
    for cell in result["cells"]:
        losses = cell["losses"]
        assert losses.keys() == {"mse", "biased", "unbiased", "cdist", "gram"}
        for loss in losses.values():
            check_spread(loss["milliseconds"])
            assert loss["memory_mib"].keys() == MEMORY
        assert losses["cdist"]["value"] == pytest.approx(losses["biased"]["value"], abs=1e-3)
        assert cell["time_ratios"].keys() == cell["memory_ratios"].keys()
        for ratio in cell["time_ratios"].values():
            check_spread(ratio)


@pytest.mark.slow
def test_probes_writes_time_memory_and_accuracy_of_every_case(tmp_path: Path) -> None:
    sizes = {"rows": 600, "queries": 200, "width": 1024, "classes": 4}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, str(BENCHMARKS / "probes.py"), "--threads", "1", "--out", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text())
    assert result["settings"] == sizes | {"k": 20}
    assert list(result["cases"]) == ["linear probe", "kNN", "kNN, scikit-learn"]
    for case in result["cases"].values():
        assert case["seconds"] > 0
        assert case["memory_mib"].keys() == MEMORY
        assert case["top1"] > 32
    ours, plain = (result["cases"][name]["top1"] for name in ("kNN", "kNN, scikit-learn"))
    assert abs(ours - plain) <= 2


@pytest.mark.slow
def test_backbones_writes_every_artifact_of_every_bundle(tmp_path: Path) -> None:
    path = a_bundle(tmp_path / "student", backbone="resnet18_025")
    export(path, formats=["onnx"], images=16)
    bundles.add_metrics(
        bundles.load(path), {"command": "c", "data": "d", "protocol": "linear", "values": {"top1": 61.5}}
    )
    command = [sys.executable, str(BENCHMARKS / "backbones.py"), str(path), "--rounds", "2", "--threads", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").iterdir()
    (row,) = json.loads(file.read_text())["rows"]
    check_spread(row.pop("ms_per_image"))
    size = bundles.load(path).file("onnx/encoder.fp32.onnx").stat().st_size
    assert row == {
        "backbone": "resnet18_025", "image_size": 32, "parameters": 702_096, "accuracy": {"linear": 61.5},
        "artifact": "onnx", "megabytes": size / 1e6,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the mark can be lowered on Linux only")
def test_memory_is_what_the_work_takes_at_its_peak(tmp_path: Path) -> None:
    script = tmp_path / "probe.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n{MEMORY_PROBE}")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    base, peak, added = map(float, done.stdout.split())
    assert added == pytest.approx(32, abs=8)  # the interpreter's own pages come and go meanwhile
    assert base == pytest.approx(peak - added, abs=0.02)
    assert base < 512


def test_ratios_are_taken_round_by_round(measure: ModuleType) -> None:
    fast, slow = measure.Spread.of([1.0, 2.0, 40.0]), measure.Spread.of([2.0, 4.0, 80.0])
    assert measure.ratio(slow, fast) == measure.Spread(2.0, 2.0, 2.0, (2.0, 2.0, 2.0))
    assert (slow.q25, slow.median, slow.q75) == (3.0, 4.0, 42.0)
    assert measure.Spread.of([5.0]) == measure.Spread(5.0, 5.0, 5.0, (5.0,))


def test_rounds_are_interleaved_and_start_with_another_case_each(measure: ModuleType) -> None:
    turns: list[str] = []

    def turn(name: str) -> float:
        turns.append(name)
        return float(len(turns))

    seconds = measure.interleave({name: lambda name=name: turn(name) for name in "abc"}, 3, "")
    assert "".join(turns) == "abcbcacab"
    assert seconds["a"].rounds == (1.0, 6.0, 8.0)


def test_the_machine_is_described_without_naming_it(measure: ModuleType) -> None:
    facts = measure.machine("cpu")
    assert facts["slug"].startswith("cpu-")
    assert facts["slug"].endswith(f"{facts['cores']}cores")
    assert platform.node() not in re.findall(r"[\w.-]+", json.dumps(facts))
    assert str(Path.home()) not in json.dumps(facts)
