"""How far a batch is from a standard Gaussian: on random slices, or by distances, without any slice.

Sources: SIGReg of Balestriero and LeCun, "LeJEPA" (2025), section 4, on the test of Epps and Pulley (1983); the energy
test of normality of Székely and Rizzo, "A new test for multivariate normality" (2005).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_REACH, _KNOTS = 5.0, 9  # of the integral over t, from 0 to 5: what is below 0 is the same again, with 8 knots more
_DECADES, _NODES = (-9.0, 6.0), 181  # of the integral over u, on a logarithmic grid


def sigreg(z: Tensor, slices: int, generator: torch.Generator) -> Tensor:
    """Mean over random directions a of B * integral of |mean_b exp(i t a'z_b) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt.

    Shapes: [B, D] float32, rows of all ranks -> scalar. `generator`: on the CPU, the same on all ranks.
    """
    directions = torch.randn(z.shape[1], slices, generator=generator).to(z.device)
    directions = directions / directions.norm(dim=0)
    t = torch.linspace(0, _REACH, _KNOTS, device=z.device)
    angles = (z @ directions)[..., None] * t  # [B, slices, knots]
    cosines, sines = torch.cos(angles).mean(0), torch.sin(angles).mean(0)
    window = torch.exp(-t.square() / 2)  # both the characteristic function of a Gaussian and the weight
    difference = ((cosines - window).square() + sines.square()) * window
    return 2 * len(z) * torch.trapezoid(difference, t, dim=1).mean()


def gaussian_energy(z: Tensor) -> Tensor:
    """The energy distance of rows to a standard Gaussian, 2 E|x - g| - E|x - x'| - E|g - g'|, over sqrt(D).

    The first and the last mean are exact, that over pairs of rows leaves out the pairs of a row with itself, so that of
    Gaussian rows its expectation is 0; it may be negative.

    Shapes: [B, D] float32, rows of all ranks -> scalar.
    """
    width = z.shape[1]
    pairs = torch.pdist(z).mean()  # the gradient of equal rows is 0
    gaussians = 2 * math.exp(math.lgamma((width + 1) / 2) - math.lgamma(width / 2))  # E|g - g'|
    return (2 * distance_to_gaussian(z).mean() - pairs - gaussians) / math.sqrt(width)


def distance_to_gaussian(z: Tensor) -> Tensor:
    """E|z_b - g| of each row, g a standard Gaussian; closed forms by 1F1 have no gradient in torch, so an integral is

        E sqrt(s) = 1 / (2 sqrt(pi)) * integral_0^inf (1 - E exp(-u s)) u^(-3/2) du,
        E exp(-u |x - g|^2) = (1 + 2u)^(-D/2) exp(-u |x|^2 / (1 + 2u)),

    with u on a logarithmic grid.

    Shapes: [B, D] float32 -> [B] float32.
    """
    width = z.shape[1]
    squares = z.double().square().sum(1, keepdim=True)  # [B, 1]
    log_u = torch.linspace(*_DECADES, _NODES, dtype=torch.float64, device=z.device) * math.log(10)
    u = log_u.exp()
    exponent = -width / 2 * torch.log1p(2 * u) - u * squares / (1 + 2 * u)  # [B, nodes]
    integrand = -torch.expm1(exponent) / u.sqrt()  # u^(-3/2) du = u^(-1/2) d log u
    tail = 2 / u[-1].sqrt()  # beyond the last node the exponential is 0
    head = (width + squares[:, 0]) * 2 * u[0].sqrt()  # before the first one, 1 - exp(-u s) is u s
    total = torch.trapezoid(integrand, log_u, dim=1) + head + tail
    return (total / (2 * math.sqrt(math.pi))).to(z.dtype)
