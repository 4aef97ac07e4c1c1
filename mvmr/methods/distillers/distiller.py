"""What all distillers share: teachers with weights, their units, a loss for each, over the batch of all devices.

A distiller is one file: its settings, and the loss that they make for one teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from mvmr.errors import MvmrError
from mvmr.methods.method import Method, MethodConfig, Setting, Step
from mvmr.methods.parts.dependence import centred_distances, correlate, effective_rank, permutation_null
from mvmr.methods.parts.gathering import gather
from mvmr.methods.parts.standardising import Bank, How, Standard


@dataclass(frozen=True, kw_only=True)
class DistillerConfig(MethodConfig):
    """Settings of every distiller.

    standardise: see `mvmr.methods.parts.standardising.Standard`; None: `units`
    drop: after Sariyildiz et al., "UNIC: universal classification models via multi-teacher distillation" (2024),
        section 3.3, where for every image each teacher but the one of the largest loss is left out with this
        probability, and the weights are scaled up again
    """

    smallest_batch: ClassVar[int] = 4  # the unbiased estimator, in diagnoses too, is not defined below
    weighted: ClassVar[tuple[str, ...]] = ("teachers",)
    units: ClassVar[How] = "scale"

    # weights by name; a hand-crafted representation that is computed once may stand among them [0 or more each]
    teachers: dict[str, float] = field(default_factory=lambda: {"teacher": 1.0})
    standardise: How | None = None  # units of a teacher's embeddings; none: `dimension` of regression, else `scale`
    drop: float = 0.0  # probability with which a step leaves out the teacher whose loss is smallest [0 to below 1]

    def __post_init__(self) -> None:
        check_weights("teachers", self.teachers)
        if not 0 <= self.drop < 1:
            raise MvmrError(f"[method] drop = {self.drop}: a probability below 1")

    @property
    def how(self) -> How:
        """The units of a teacher's embeddings."""
        return self.standardise or self.units

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(name for name, weight in self.teachers.items() if weight)

    @property
    def stored_targets(self) -> tuple[str, ...]:
        return self.targets

    @property
    def parts(self) -> Mapping[str, tuple[float, DistillerConfig]]:
        """Weights and settings of the losses that it is made of, by name."""
        return {self.name: (1.0, self)}

    def loss(self, width: int, bank: Bank) -> nn.Module:
        """The loss for one teacher.

        width: of the features; bank: what the teacher makes of all images
        returns: features [B, width] and standardised embeddings [B, K] of all devices, float32 -> scalar
        """
        raise NotImplementedError


class Distiller(Method):
    """Encoder, and for each teacher the losses with whatever of them is trained along.

    Those of all teachers start alike, so that two names for one teacher are that teacher with both weights, as far as
    an optimiser moves a head by its gradient's direction alone.
    """

    steps: Tensor
    salt: Tensor

    def __init__(self, config: DistillerConfig, encoder: nn.Module, setting: Setting) -> None:
        super().__init__(encoder, setting.preprocess)
        self.config = config
        self.names = sorted(config.targets)
        self.weights = {part: weight for part, (weight, _) in config.parts.items()}
        self.losses = nn.ModuleDict()
        state = torch.get_rng_state()
        for name in self.names:
            torch.set_rng_state(state)
            rows, units = setting.rows[name], {settings.how for _, settings in config.parts.values()}
            standards = {how: Standard(rows, how) for how in sorted(units)}
            for part, (_, settings) in config.parts.items():
                loss = settings.loss(setting.width, Bank(rows, standards[settings.how]))
                self.losses[f"{part}-{name}"] = TeacherLoss(standards[settings.how], loss)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("salt", torch.tensor(torch.initial_seed() % 2**31))  # other seeds leave out other teachers

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        h, ha = self.features(views["original"]), self.features(views["augmented"])
        with torch.autocast(h.device.type, enabled=False):
            everyone = {name: gather(targets[name].float()) for name in self.names}
            both = [gather(features.float()) for features in (h, ha)]
            learnt = {name: self._losses(name, both, everyone[name]) for name in self.names}
            kept = self._kept(learnt)
            terms = {f"{part}.{name}": kept[name] * term for name in self.names for part, term in learnt[name].items()}
        return Step(terms, ha, (both[1].detach(), everyone))

    def _losses(self, name: str, both: Sequence[Tensor], target: Tensor) -> dict[str, Tensor]:
        """The losses of one teacher by name, each the mean over both views, weighted against each other."""
        terms = {}
        for part, weight in self.weights.items():
            loss = self.losses[f"{part}-{name}"]
            terms[part] = weight * torch.stack([loss(features, target) for features in both]).mean()
        return terms

    def _kept(self, learnt: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """The weights of the teachers in this step; 0, not nothing, for one left out: every head gets a gradient."""
        weights = {name: self.config.teachers[name] for name in self.names}
        if self.training and self.config.drop and len(weights) > 1:
            generator = torch.Generator().manual_seed(
                2**31 * int(self.salt) + int(self.steps)
            )  # the same on all devices
            chance = torch.rand((), generator=generator)
            if float(chance) < self.config.drop:
                sums = {name: float(sum(term.detach() for term in learnt[name].values())) for name in self.names}
                weights[min(sums, key=lambda name: sums[name])] = 0.0
        return weights

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        self.steps.fill_(step)

    @torch.no_grad()
    def diagnose(self, outputs: tuple[Tensor, Mapping[str, Tensor]], generator: torch.Generator) -> dict[str, float]:
        """Effective rank and spread of the features, their dCor with every teacher, and what comes by chance."""
        h, targets = outputs
        report = {"rank_h": effective_rank(h), "std_h": float(h.std(0).mean())}
        a = centred_distances(h, "unbiased")
        for name, target in targets.items():
            b = centred_distances(target, "unbiased")
            report[f"unbiased.{name}"] = float(correlate(a, b, "unbiased"))
            report[f"unbiased.{name}.null"] = float(permutation_null(a, b, "unbiased", generator))
        return report


class TeacherLoss(nn.Module):
    """A loss for one teacher, which takes its embeddings as they are: [B, D] and [B, K] -> scalar."""

    def __init__(self, standard: Standard, loss: nn.Module) -> None:
        super().__init__()
        self.standard, self.loss = standard, loss

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.loss(h, self.standard(target))
        return loss


def check_weights(key: str, weights: Mapping[str, float]) -> None:
    """Refuse weights of which nothing could be learnt.

    Raises: MvmrError: one is below 0, or none is above.
    """
    for name, weight in weights.items():
        if not weight >= 0:
            raise MvmrError(f"[method] {key}.{name} = {weight}: a weight must be 0 or more")
    if not any(weights.values()):
        raise MvmrError(f"[method] {key}: every weight is 0, so there is nothing to learn; give at least one")
