"""The benchmark of a bundle's artifacts: every engine there is, against the float32 ONNX, and why others are not."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mvmr.cli.main import main
from mvmr.errors import MvmrError
from mvmr.export.bench import BASE, bench
from mvmr.export.export import export
from tests.making import write_bundle

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "mine"
    return write_bundle(out).path


def test_a_bundle_without_onnx_is_one_line(path: Path) -> None:
    with pytest.raises(MvmrError, match=r"has no ONNX to compare with: make it with `mvmr export .* --onnx`"):
        bench(path)


@pytest.mark.slow
def test_every_engine_has_its_row_and_every_other_its_reason(path: Path, tmp_path: Path) -> None:
    export(path, formats=["onnx", "fp16"], data="sample:digits", images=20)
    out = tmp_path / "bench.json"
    several = "--batch 1 --batch 3 --threads 1 --threads 2 --rounds 2 --no-compiled"
    argv = ["bench", "export", str(path), *several.split(), "--out", str(out)]
    result = CliRunner().invoke(main, argv)
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    cases = [(row["engine"], row["threads"], row["batch"]) for row in content["rows"]]
    engines = ("torch eager", "onnx fp16", BASE)
    assert sorted(cases) == sorted((name, count, batch) for name in engines for count in (1, 2) for batch in (1, 3))
    assert torch.get_num_threads() == 1  # as it was before
    for row in content["rows"]:
        assert row["wall_ms"] > 0
        assert len(row["wall_ms_rounds"]) == 2
        if row["engine"] == BASE:
            assert (row["times_faster"], row["times_less_processor"]) == (1, 1)
    assert content["not_measured"]["onnx int8"] == "not exported"
    if not torch.cuda.is_available():
        assert "needs an NVIDIA GPU" in content["not_measured"]["tensorrt fp16"]
        assert "needs an NVIDIA GPU" in result.stderr
