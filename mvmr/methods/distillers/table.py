"""The distillers of one loss, by name."""

from __future__ import annotations

from mvmr.methods.distillers.cka import CkaConfig
from mvmr.methods.distillers.cosine import CosineConfig
from mvmr.methods.distillers.cospress import CospressConfig
from mvmr.methods.distillers.dcor import DcorConfig
from mvmr.methods.distillers.distiller import DistillerConfig
from mvmr.methods.distillers.gram import GramConfig
from mvmr.methods.distillers.procrustes import ProcrustesConfig
from mvmr.methods.distillers.regression import RegressionConfig
from mvmr.methods.distillers.relational import RelationalConfig
from mvmr.methods.distillers.rkd import RkdConfig
from mvmr.methods.distillers.seed import SeedConfig

DISTILLERS: dict[str, type[DistillerConfig]] = {
    "regression": RegressionConfig,
    "cosine": CosineConfig,
    "dcor": DcorConfig,
    "cka": CkaConfig,
    "rkd": RkdConfig,
    "seed": SeedConfig,
    "relational": RelationalConfig,
    "gram": GramConfig,
    "procrustes": ProcrustesConfig,
    "cospress": CospressConfig,
}
