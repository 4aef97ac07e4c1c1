"""Who has a key is answered, probes need none, and pages of other origins may ask only where they are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvmr.errors import MvmrError
from mvmr.serve import Engine
from mvmr.serve.http.settings import read_keys
from tests.serve.inprocess import KEY, serve
from tests.serve.serving import jpeg


@pytest.mark.slow
@pytest.mark.parametrize(
    "headers", [{"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {KEY}"}, {"X-API-Key": KEY}]
)
def test_with_a_valid_key_all_is_as_without(engine: Engine, headers: dict[str, str]) -> None:
    with serve(engine, api_keys=("another-key-of-16", KEY)) as client:
        assert client.post("/v1/embed", content=jpeg(), headers=headers).status_code == 200


PROBES = ["/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready", "/v2/models/student/ready"]


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", PROBES)
def test_probes_need_no_key(engine: Engine, endpoint: str) -> None:
    with serve(engine, api_keys=(KEY,)) as client:
        assert client.get(endpoint).status_code == 200


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (f"{KEY}\n\n# mine\n another-key-of-16 \r\n", None), ("", "holds no API key"), ("# none\n", "holds no API key"),
        ("short\n", "key number 1"), (f"{KEY}\nwith a space inside\n", "key number 2"),
        ("clé-secrète-secrète\n", "number 1"),
    ],
)  # fmt: skip
def test_the_file_of_keys(tmp_path: Path, content: str, fault: str | None) -> None:
    (tmp_path / "keys").write_text(content)
    if fault is None:
        assert read_keys(tmp_path / "keys") == (KEY, "another-key-of-16")
        return
    with pytest.raises(MvmrError, match=fault) as caught:
        read_keys(tmp_path / "keys")
    assert all(key not in str(caught.value) for key in content.split() if key != "#" and len(key) > 6)


def test_only_pages_of_a_named_origin_may_ask(engine: Engine) -> None:
    with serve(engine, cors=("https://mine.example",)) as client:
        for origin, allowed in (("https://mine.example", "https://mine.example"), ("https://other.example", None)):
            answer = client.post("/v1/embed", content=jpeg(), headers={"origin": origin})
            assert answer.headers.get("access-control-allow-origin") == allowed


def test_a_browser_may_ask_beforehand_without_a_key(engine: Engine) -> None:
    beforehand = {
        "origin": "https://mine.example", "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }  # fmt: skip
    with serve(engine, cors=("https://mine.example",), api_keys=(KEY,)) as client:
        answer = client.options("/v1/embed", headers=beforehand)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://mine.example"
        # else the page could not even read that its key is wrong
        refused = client.post("/v1/embed", content=jpeg(), headers={"origin": "https://mine.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://mine.example"
