"""Published weights of timm's models as teachers: the classifier goes, whatever it is called."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from mvmr.bundles import weights
from mvmr.distillation.teachers.teacher import canaries
from mvmr.errors import MvmrError
from tests.distill.test_kinds import load_teacher, rows

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


@pytest.mark.parametrize(
    "name",
    [
        "efficientvim_m1",  # heads.0 to heads.3
        "levit_128s",  # head and head_dist, with batch norms
        pytest.param("legacy_seresnet18", marks=pytest.mark.slow),  # last_linear
        pytest.param("swiftformer_xs", marks=pytest.mark.slow),  # head and head_dist
    ],
)
def test_published_weights_lose_their_classifier_whatever_its_name_and_no_other_key(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    whole = timm.create_model(name).state_dict()
    save_file({key: value.contiguous() for key, value in whole.items()}, tmp_path / "whole.safetensors")
    teacher = load_teacher(f"timm:{name}:{tmp_path / 'whole.safetensors'}")
    wanted = timm.create_model(name, num_classes=0).eval()
    wanted.load_state_dict(whole, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(rows(teacher), wanted(torch.stack([teacher.prepare(image) for image in canaries()])))
    for stranger in ("classif.weight", "last_linear.extra"):
        with pytest.raises(MvmrError, match=rf"does not fit: keys 1 unexpected \({stranger}\)"):
            drop_and_fit(wanted, whole | {stranger: torch.zeros(3)})


def drop_and_fit(network: torch.nn.Module, state: dict[str, Tensor]) -> None:
    weights.check_fit(network, weights.drop_classifier(network, state), origin="it")
