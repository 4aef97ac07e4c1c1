"""In which precision a run is trained where none is given, and why small views are an exception on a processor."""

import pytest
import torch

from mvmr.training.precision import native_precision


def test_what_is_given_is_taken() -> None:
    assert native_precision("bf16-mixed", "cpu", 8) == "bf16-mixed"
    assert native_precision("32-true", "cuda") == "32-true"


@pytest.mark.parametrize("bf16", [True, False])
def test_a_processor_computes_in_bfloat16_where_it_can_but_for_small_views(
    bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert native_precision(None, "cpu", 32) == ("bf16-mixed" if bf16 else "32-true")
    assert native_precision(None, "cpu", 16) == native_precision(None, "cpu", 14) == "32-true"


def test_on_a_gpu_size_is_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert native_precision(None, "cuda", 8) == "bf16-mixed"
