"""A weighted sum of other distillers' losses, each with its own settings as they are by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mvmr.errors import MvmrError, unknown
from mvmr.methods.distillers.distiller import DistillerConfig, check_weights
from mvmr.methods.distillers.table import DISTILLERS


@dataclass(frozen=True, kw_only=True)
class CombinationConfig(DistillerConfig):
    """Each loss has its own settings by default, and its own units unless `standardise` says one for all."""

    name: Literal["combination"] = "combination"
    # weights by name of a distiller [0 or more each]
    losses: dict[str, float] = field(default_factory=lambda: {"regression": 1.0, "relational": 1.0})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights("losses", self.losses)
        for name in self.losses:
            if name not in DISTILLERS:
                raise MvmrError(f"[method] losses: {unknown('distiller', name, DISTILLERS)}")

    @property
    def parts(self) -> Mapping[str, tuple[float, DistillerConfig]]:
        return {
            name: (weight, DISTILLERS[name](name=name, standardise=self.standardise))
            for name, weight in self.losses.items()
            if weight
        }
