"""What is decayed and adapted, and steps by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mvmr.training.optimizers import build_optimizer

LR, DECAY = 0.5, 0.1


def module() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[2].requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def step(name: str, *exempt: str) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Value, gradient, and value after one step, of all parameters."""
    model = module()
    optimizer = build_optimizer(name, model, lr=LR, weight_decay=DECAY, no_weight_decay=exempt, fused=False)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer.step()
    return {key: (before[key], value.grad, value.detach()) for key, value in model.named_parameters()}  # type: ignore[misc]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lars"])
def test_what_needs_no_gradient_is_left_alone(name: str) -> None:
    for key, (before, _, after) in step(name).items():
        assert torch.equal(before, after) == key.startswith("2.")


def test_sgd_decays_all_but_what_is_exempt() -> None:
    for key, (before, gradient, after) in step("sgd", "0.bias").items():
        if not key.startswith("2."):
            decay = 0 if key == "0.bias" else DECAY
            torch.testing.assert_close(after, before - LR * (gradient + decay * before))


def test_lars_adapts_and_decays_matrices_alone() -> None:
    for key, (before, gradient, after) in step("lars").items():
        if key == "0.weight":
            trust = 0.001 * before.norm() / (gradient.norm() + DECAY * before.norm())
            torch.testing.assert_close(after, before - LR * trust * (gradient + DECAY * before))
        elif not key.startswith("2."):
            torch.testing.assert_close(after, before - LR * gradient)


def test_lars_adapts_without_decay_too() -> None:
    model = module()
    before, gradient = model[0].weight.detach().clone(), model[0].weight.grad
    build_optimizer("lars", model, lr=LR, weight_decay=0.0, no_weight_decay=(), fused=False).step()
    assert gradient is not None
    expected = before - LR * 0.001 * before.norm() / gradient.norm() * gradient
    torch.testing.assert_close(model[0].weight.detach(), expected)


def test_momentum_is_nine_tenths() -> None:
    model = module()
    optimizer = build_optimizer("sgd", model, lr=LR, weight_decay=0.0, no_weight_decay=(), fused=False)
    before, gradient = model[0].weight.detach().clone(), model[0].weight.grad
    for _ in range(2):
        optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before - LR * gradient - LR * 1.9 * gradient)
