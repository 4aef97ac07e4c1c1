"""Hundreds of damaged images, and of requests made of the document, find no fault in a service."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from tests.serve.serving import jpeg, read_metric, running

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.mark.slow
def test_damaged_images_are_answered_and_leave_nothing_behind(path: Path, tmp_path: Path) -> None:
    """A part of benchmarks/serve_fuzz.py; all 10,000 of it take minutes."""
    script, out = str(BENCHMARKS / "serve_fuzz.py"), tmp_path / "out"
    argv = [sys.executable, script, "--bundle", str(path), "--count", "600", "--out", str(out), "--clients", "4"]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (file,) = out.iterdir()
    report = json.loads(file.read_text())
    assert report["failures"] == []
    assert report["log"] == []
    assert report["statuses"].keys() <= {"200", "413", "422"}
    assert sum(report["statuses"].values()) == report["files"] == 600
    assert min(report["statuses"]["200"], report["statuses"]["422"]) > 100  # it is about both
    assert report["codes"].keys() >= {"not-an-image", "undecodable", "empty", "too-many-pixels"}
    assert report["readiness"].keys() == {"200"}
    assert report["threads"][0] == report["threads"][1]
    assert report["rss_mib"][-1] - report["rss_mib"][1] < 100, report["rss_mib"]  # the first quarter warms it up
    assert report["same_after"]
    assert report["exit_status"] == 0


@pytest.mark.slow
def test_schemathesis_finds_nothing(path: Path, tmp_path: Path) -> None:
    """More than 500 requests made of the OpenAPI document, valid and not; all of its checks but one.

    positive_data_acceptance is left out: that a text is the base64 of an image, or that a tensor has as many values as
    its shape says, is beyond JSON schema, so that much of what the document allows is refused with 422.
    """
    (tmp_path / "schemathesis.toml").write_text('[parameters]\n"path.name" = "student"\n"query.head" = "animals"\n')
    (tmp_path / "hooks.py").write_text(
        "import schemathesis\nfrom hypothesis import strategies\n"
        "whole = open('whole.jpg', 'rb').read()\n"
        "images = strategies.sampled_from([whole, whole[:500], b'']) | strategies.binary()\n"
        "for kind in ('image/jpeg', 'image/png', 'application/octet-stream'):\n"
        "    schemathesis.openapi.media_type(kind, images)\n"
    )
    (tmp_path / "whole.jpg").write_bytes(jpeg())
    argv = [
        sys.executable, "-m", "schemathesis.cli", "run", "--max-examples=30", "--seed=1", "--no-shrink", "--no-color",
        "--continue-on-failure", "--exclude-checks=positive_data_acceptance", "--generation-database=none",
        "--warnings=off", "--report=json", "--report-json-path=report.json",
    ]  # fmt: skip
    with running(path, tmp_path) as own:
        env = os.environ | {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [*argv, f"{own.url}/openapi.json"], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        with httpx2.Client(base_url=own.url, verify=False) as client:
            assert client.get("/readyz").status_code == 200
            requests = read_metric(client.get("/metrics").text, "mvmr_http_requests_total")
        assert "Traceback" not in own.log_text
    cases = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert cases
    assert int(cases[1]) == int(cases[2]) > 500
    assert sum(requests.values()) > 500
    assert not [name for name in requests if 'status="5' in name]
    assert requests['endpoint="/v1/embed",status="200"'] > 0  # it is not all about refusals
