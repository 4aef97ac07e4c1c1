"""What a caller of the client gets wrong is one line, before anything is sent."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from mvmr.serve.client import Client
from tests.serve.client.clients import both, refusal


@both
@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("a.jpg", "the client takes several images; put the one into a list"),
        (b"bytes", "the client takes several images; put the one into a list"),
        (np.zeros((4, 4, 3), np.uint8), "the client takes arrays of uint8 [N, H, W, 3], this one is uint8 [4, 4, 3]"),
        (np.zeros((1, 4, 4, 3), np.float32), "an array must be uint8 [H, W, 3], image number 0 is float32 [4, 4, 3]"),
        ([b"", np.zeros((4, 4), np.uint8)], "an array must be uint8 [H, W, 3], image number 1 is uint8 [4, 4]"),
        ([7], "the client takes paths, bytes, PIL images and uint8 arrays, image number 0 is a int"),
    ],
)
def test_what_is_no_image_is_refused_before_anything_is_sent(kind: Any, images: Any, message: str) -> None:
    with kind("http://127.0.0.1:9") as client:
        assert refusal(client.embed, images, errors="return") == message


@both
def test_wrong_arguments_are_one_line(kind: Any) -> None:
    for url in ("localhost:8000", "ftp://x", "http://", "http://x:port", ""):
        assert "is no URL" in refusal(Client, url)
    for option in ({"retries": -1}, {"max_items": 0}, {"max_bytes": 0}):
        assert "of a client must be at least" in refusal(Client, "http://x", **option)
    for key in ("", "sch\u00f6n", "a\nb"):
        message = refusal(Client, "http://x", api_key=key)
        assert "the API key is not printable ASCII" in message
        assert not key or key not in message
    with kind("http://user:secret@127.0.0.1:9", retries=0) as client:
        assert "unknown value of errors 'retrun'; did you mean 'return'?" in refusal(client.embed, [], errors="retrun")
        assert "secret" not in refusal(client.models)


def test_the_client_needs_no_torch() -> None:
    program = "import sys, mvmr.serve.client\nassert not {'torch', 'fastapi', 'faiss', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
