"""Multi-crop: beside views of most of an image, cheap ones of small parts of it.

Source: Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments" (2020), section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

from mvmr.errors import MvmrError
from mvmr.methods.method import MethodConfig, ViewSpec


@dataclass(frozen=True, kw_only=True)
class CropsConfig(MethodConfig):
    """Settings of a method that learns from several crops: global0, global1, ..., then local0, local1, ..."""

    crops: int = 2  # views of the usual size [2 or more]
    local: int = 6  # views that are smaller [0 or more]
    local_scale: float = 0.43  # side of the smaller ones, as a share of the usual one [above 0, up to 1]
    # of a random crop of the usual size, from and to; none: the policy's [share of the image, above 0, up to 1]
    global_area: tuple[float, float] | None = (0.14, 1.0)
    # of a smaller one, from and to [share of the image, above 0, up to 1]
    local_area: tuple[float, float] = (0.05, 0.14)

    def __post_init__(self) -> None:
        if self.crops < 2:
            raise MvmrError(f"[method] crops = {self.crops}: a view is told from others of its image; give 2 or more")
        if self.local < 0:
            raise MvmrError(f"[method] local = {self.local}: give a number of smaller crops, or 0 for none")
        if not 0 < self.local_scale <= 1:
            raise MvmrError(
                f"[method] local_scale = {self.local_scale}: local views are smaller than global ones; at most 1"
            )
        for name in ("global_area", "local_area"):
            area = getattr(self, name)
            if area is not None and not (len(area) == 2 and 0 < area[0] <= area[1] <= 1):
                raise MvmrError(f"[method] {name} = {list(area)}: give two shares of the image, the smaller one first")

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        return (
            *(ViewSpec(f"global{number}", area=self.global_area) for number in range(self.crops)),
            *(ViewSpec(f"local{k}", scale=self.local_scale, area=self.local_area) for k in range(self.local)),
        )
